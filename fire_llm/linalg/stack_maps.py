"""The fast path of Newton-Schulz: several cubic steps as one polynomial of the Gram matrix, a stack at a time.

Shapes: (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fire_llm.linalg.accelerated import (
    LEAST_NORM,
    Operand,
    accumulate,
    norms,
    positions,
    split,
    square_of,
    transposed,
    within,
)


@dataclass(frozen=True)
class Growth:
    """A polynomial q: a singular value of square t is multiplied by q(t) = sum_k c_k (t - centre)^k."""

    coefficients: tuple[float, ...]
    """c_0, c_1, …, an odd number of them."""
    centre: float
    slope: float
    """|q'(0) / q(0)|."""


LOW_PRECISION_SHARE = 0.07  # largest correction, relative to what it corrects, that is computed in 16 bits


def gaussian_root(n: int, m: int) -> float:
    """Return sum t^4 of a Gaussian's squared singular values t, sum t = 1: the fourth Marchenko-Pastur moment."""
    ratio = n / m
    return (1 + 6 * ratio + 6 * ratio**2 + ratio**3) / n**3


def share(growth: Growth, root: float) -> float:
    """Return the most that the correction can be of what it corrects, with root = (sum t^4)^(1/2).

    The correction is all of q but q(0). Its share is at most kappa (sum t^3)^(1/2), kappa the slope at 0 over q(0), and
    sum t^3 at most (sum t^4)^(2/3), as sum t = 1.
    """
    return growth.slope * float(root ** (2 / 3))


def polynomial_map(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype | None,
    choose: Callable[[float], Growth | None],
    guess: tuple[Growth, float] | None = None,
    *,
    sound: bool = False,
    grams: list[Tensor] | None = None,
) -> tuple[list[int], list[int]] | None:
    """Write q(G) x / ||x||_F to y, G the Gram matrix x x^T / ||x||_F^2; each matrix by the q that its spectrum needs.

    Args:
        x: (B, n, m), float32.
        y: (B, n, m), float32, where the result goes.
        dtype: Of the products' operands, and of what is n x n: float32, bfloat16 or float16; None for split operands.
        choose: Returns the polynomial for a bound (sum t^4)^(1/4) on the spectrum of G, None where there is none.
        guess: A polynomial and the largest bound that it serves. All matrices take it before any bound is known, so
            that the host waits after the last product, not before it; those beyond the bound are then done again.
        sound: Whether x is known to be finite and within range.
        grams: Takes x x^T (B, n, n), where its products are those of x in float32.

    Returns:
        The matrices that have no polynomial, and those whose correction is too large for 16 bits: of both nothing
        useful was written. None, and the same for all, where x may not be finite or is out of range.
    """
    n, m = x.shape[-2:]
    size, u = math.sqrt(n * m), float(n)  # Frobenius norm of the operands, trace of the Gram matrix: entries of order 1
    if dtype is None:
        size, u = size / 16, u / 16  # `split` takes no entry above 255
    kept = dtype or x.dtype
    norm = norms(x)
    inverse = norm.clamp_min(LEAST_NORM).reciprocal().to(x.dtype)[:, None, None]  # zeros stay zero
    if dtype == x.dtype:  # x is its own operand
        low: Operand = (x,)
        gram = square_of(low, transposed(low)).mul_(inverse.square() * u)  # u G
    else:
        low = _operand(torch.mul(x, inverse * size, out=torch.empty_like(x, dtype=kept)), dtype)
        gram = square_of(low, transposed(low), kept, alpha=u / size**2)
    g = _operand(gram, dtype)
    square = square_of(g, g, kept, alpha=1 / u)  # u G^2

    def write(growth: Growth, at: Tensor | None = None) -> None:
        """Write q(G) x, of all matrices or of some, by Horner's scheme in H^2, H = G - centre: a product a two degrees.

        M = (q(G) - c_0) / c_1 comes first. The large c_0 is kept apart: in a product it would cost M a digit.
        """
        coefficients, centre = growth.coefficients, growth.centre

        def part(one: Tensor) -> Tensor:
            return one if at is None else one.index_select(0, at)

        g1, g2, start, by = part(gram), part(square), part(x), part(inverse)
        if centre:
            g2 = torch.add(g2, g1, alpha=-2 * centre)
            g1 = g1.clone()
            for h, constant in ((g1, -centre), (g2, centre**2)):  # u H, u H^2
                h.diagonal(dim1=-2, dim2=-1).add_(u * constant)
        factor = _operand(g2, dtype)
        odds, evens = coefficients[1::2], coefficients[2::2]
        rest = torch.add(g1, g2, alpha=evens[-1] / odds[-1])
        for (odd, higher), even in reversed([*zip(pairwise(odds), evens, strict=False)]):
            this = torch.add(g1, g2, alpha=even / odd)
            rest = accumulate(this, factor, _operand(rest, dtype), alpha=higher / odd / u)
        z = torch.mul(start, by, out=y if at is None else torch.empty_like(start))
        if dtype == x.dtype:
            accumulate(z, (rest.mul_(by),), (start,), alpha=odds[0] / u, beta=coefficients[0])
        else:
            lows = tuple(map(part, low))
            accumulate(z, _operand(rest, dtype), lows, alpha=odds[0] / (u * size), beta=coefficients[0])
        if at is not None:
            y.index_copy_(0, at, z)

    if guess is not None:
        write(guess[0])
    lengths = torch.linalg.vector_norm(square, dim=(-2, -1), dtype=torch.float32).double()
    found, lengths_found = torch.stack([norm, lengths]).tolist()  # the one wait
    if not sound and not within(found):
        return None
    if grams is not None and dtype == x.dtype:
        grams.append(gram * (norm.square() / u)[:, None, None].to(gram))
    wide: list[int] = []
    heavy: list[int] = []
    others: dict[Growth, list[int]] = {}
    for i, root in enumerate(length / u for length in lengths_found):  # (sum t^4)^(1/2)
        own = choose(math.sqrt(root)) if math.isfinite(root) else None
        if own is None:
            wide.append(i)
        elif kept != x.dtype and share(own, root) > LOW_PRECISION_SHARE:
            heavy.append(i)
        elif guess is None or math.sqrt(root) > guess[1]:
            others.setdefault(own, []).append(i)
    for growth, members in others.items():
        write(growth, None if len(members) == len(x) else positions(members, x))
    return wide, heavy


def _operand(x: Tensor, dtype: torch.dtype | None) -> Operand:
    """Return what a product reads of x (B, n, m), which is in the dtype already, or is split for None."""
    return split(x) if dtype is None else (x,)
