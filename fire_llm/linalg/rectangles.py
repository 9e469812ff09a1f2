"""Polar factors of stacks of well-conditioned rectangles on accelerators, the longest products in single fp16 operands.

Shapes: (B = batch, n = short side, m = long side), n <= m. What is applied to x is one symmetric matrix P, made of
rounded operands, to all 22 bits of x. In the eigenbasis of x x^T with singular values h the polar factor of P x is that
of x turned by K_ij = E_ij (h_j - h_i) / (2 (h_i + h_j)) to first order, E = P x (P x)^T - I: less than half of a
residual that is measured, however P came about.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fire_llm.linalg.accelerated import (
    SHORT,
    SPLIT_ROUNDING,
    SPLIT_SCALE,
    WELL_CONDITIONED,
    Quintic,
    accumulate,
    finish,
    normalised,
    positions,
    project,
    single,
    single_square,
    split,
    square_of,
    within,
)
from fire_llm.linalg.matmul import positive

WIDE = 2.0  # m / n from which a Gaussian's singular values are far enough from 0 for fp16


def project_rectangles(
    x: Tensor, attempts: tuple[tuple[tuple[Quintic, ...], ...], ...], tolerance: float, sound: bool
) -> tuple[Tensor, list[int]] | None:
    """Do as `accelerated.project`, which is given what is not certain after one pass of `one_factor`.

    The host waits once, and then as often as `project` does where that is needed.
    """
    z, norm = normalised(x)
    y, traces = one_factor(z)
    y, residual, first = finish(y)
    roundings = (traces + WELL_CONDITIONED) * SPLIT_ROUNDING
    turned = first * (0.5 / math.sqrt(x.shape[-2])) + roundings
    found, *bounds = torch.stack([norm, residual.double(), turned.double()]).tolist()
    if not sound and not within(found):
        return None
    left = [i for i, pair in enumerate(zip(*bounds, strict=True)) if not all(one <= tolerance for one in pair)]  # NaN
    if not left:
        return y, []
    at = positions(left, x)
    again = project(x.index_select(0, at), attempts, tolerance, True)
    assert again is not None
    return y.index_copy_(0, at, again[0]), [left[i] for i in again[1]]


def one_factor(z: Tensor) -> tuple[Tensor, Tensor]:
    """Take singular values of [0.1, 1] of the Schatten-8 norm to 1, about, by one symmetric matrix.

    The first Gram matrix, squares and the final factor are rounded to fp16, which leaves E at 5e-4 sqrt(n); the updates
    between them are split, or it were ten times that.

    Args:
        z: (B, n, m), float32, of Frobenius norm sqrt(n).

    Returns:
        The product (B, n, m), and the traces (B,) of that matrix over n.
    """
    high, low = split(z)
    gram = square_of((high,), (high.mT,), alpha=SPLIT_SCALE**-2)
    fourth = positive(torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True))
    gram /= fourth
    square = single_square(gram)
    top = positive(torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).sqrt())
    gram /= top
    factor = (fourth * top).rsqrt()
    d, p = 1.0, torch.zeros(())
    for number, (a, b, c) in enumerate(SHORT):  # as in `compose`: by d I + p, the next by a I + b h
        square = square.div_(top**2) if number == 0 else single_square(gram)
        h = square.mul_(c / b).add_(gram)
        hs = split(h)
        p = h * b if number == 0 else accumulate(p * a, hs, split(p), alpha=b).add_(h, alpha=d * b)
        d *= a
        if number < len(SHORT) - 1:
            half = accumulate(gram * a, hs, split(gram), alpha=b)
            gram = accumulate(half * a, hs, split(half), alpha=b)
    p = p.add(p.mT).mul_(factor * 0.5)  # symmetric to the last bit
    means = p.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    p.diagonal(dim1=-2, dim2=-1).sub_(means[:, 0])  # the largest of it, which would be rounded most
    means = means + factor * d
    rounded = single(p)
    y = accumulate(z * means, rounded, (high,), alpha=SPLIT_SCALE**-2)
    return accumulate(y, rounded, (low,), alpha=-(SPLIT_SCALE**-2)), means[:, 0, 0]
