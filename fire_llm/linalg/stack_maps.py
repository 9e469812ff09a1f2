"""The paper's map of a stack on an accelerator: by one polynomial that its shape chooses, or by one for each matrix.

The first has nothing to wait for before its end, and serves spectra no wider than a Gaussian's of that shape.

Shapes: (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fire_llm.linalg.accelerated import LEAST_NORM, accumulate, norms, operand, split, square_of, transposed, within
from fire_llm.linalg.matmul import positive

Coefficients = tuple[float, ...]
LOW_PRECISION_SHARE = 0.07  # largest correction, relative to what it corrects, that is computed in low precision
REST_SCALE = 16.0  # keeps the last operand of `polynomial_map` within fp16
SPREAD = 1.05  # what a Gaussian's bound may exceed the expected one by


def gaussian_root(n: int, m: int) -> float:
    """Return sum t^4 of a Gaussian's squared singular values t, sum t = 1: the fourth Marchenko-Pastur moment."""
    ratio = n / m
    return (1 + 6 * ratio + 6 * ratio**2 + ratio**3) / n**3


def per_matrix(values: list[float], like: Tensor) -> Tensor:
    """Return one number a matrix as (B, 1, 1), without waiting for the device."""
    return torch.tensor(values, dtype=like.dtype)[:, None, None].to(like.device, non_blocking=True)


def share(coefficients: tuple[float, ...], root: float) -> float:
    """Return the most that the correction can be of what it corrects, with root = (sum t^4)^(1/2)."""
    return abs(coefficients[1] / coefficients[0]) * root ** (2 / 3)


Polynomial = Callable[[float], "tuple[float, ...] | None"]
"""Gives, for (sum t^4)^(1/4), the coefficients of what a singular value of square t is multiplied by, in powers of t
and an odd number of them; None where there is none."""


def polynomial_map(
    x: Tensor, y: Tensor, dtype: torch.dtype | None, polynomial: Polynomial, sound: bool
) -> tuple[list[int], list[int]] | None:
    """Write the map of x / ||x||_F, as one polynomial of its Gram matrix, to y; each matrix has its own polynomial.

    With the Gram matrix scaled to a trace of u, G = u t, and S = G^2 / u, Horner's scheme in t^2 takes one product for
    two degrees. The share of the correction is at most kappa (sum t^3)^(1/2), kappa its slope at 0, and sum t^3 at most
    (sum t^4)^(2/3), as sum t = 1.

    Args:
        x: (B, n, m), float32, of norms within `within`, or zeros.
        y: (B, n, m), float32, where the result goes.
        dtype: Of the products' operands: float32, bfloat16 or float16; None for split ones.
        polynomial: See `Polynomial`.
        sound: Whether x is known to be finite and within range.

    Returns:
        The matrices that have no polynomial, and those whose correction is too large for the dtype: of both nothing
        useful was written. None, and nothing written, where x may not be finite or is out of range.
    """
    n, m = x.shape[-2:]
    norm = norms(x)
    size, u, rest_scale = math.sqrt(n * m), float(n), REST_SCALE  # entries of order 1
    if dtype is None:  # smaller ones, as `split` takes none above 255
        size, u, rest_scale = size / 16, u / 16, 8 * REST_SCALE
    parts = split if dtype is None else partial(operand, dtype=dtype)
    kept_as = dtype or x.dtype
    factor = (size / positive(norm)).to(x.dtype)[:, None, None]
    low = split(x * factor) if dtype is None else (torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype)),)
    gram = square_of(low, transposed(low), alpha=u / size**2)
    g = parts(gram)
    square = square_of(g, g, kept_as, alpha=1 / u)
    lengths = torch.linalg.vector_norm(square, dim=(-2, -1), dtype=torch.float32).double() / u
    found, roots = torch.stack([norm, lengths]).tolist()  # roots of sum t^4
    if not sound and not within(found):
        return None
    own = [polynomial(math.sqrt(root)) if math.isfinite(root) else None for root in roots]
    wide = [i for i, coefficients in enumerate(own) if coefficients is None]
    heavy = [
        i
        for i, (c, root) in enumerate(zip(own, roots, strict=True))
        if c is not None and kept_as != x.dtype and share(c, root) > LOW_PRECISION_SHARE
    ]
    left = {*wide, *heavy}
    if len(left) == len(x):
        return wide, heavy
    kept = [(1.0, 0.0, 0.0) if c is None else c for c in own]
    levels = max(len(c) for i, c in enumerate(kept) if i not in left) // 2
    # Horner's scheme on M_k = G + (even / odd) S + (odd of k + 1 / odd of k) S M_(k+1) / u; where a matrix's polynomial
    # has ended, the ratios are 0.
    odds = [[c[2 * k + 1] if len(c) > 2 * k + 1 else 0.0 for c in kept] for k in range(levels + 1)]
    evens = [[c[2 * k + 2] if len(c) > 2 * k + 2 else 0.0 for c in kept] for k in range(levels)]
    s, rest = (square,) if kept_as == dtype else parts(square), gram
    for k in reversed(range(levels)):
        ratio = per_matrix([e / o if o else 0.0 for e, o in zip(evens[k], odds[k], strict=True)], x)
        higher, rest = rest, torch.addcmul(gram, square, ratio)
        if k < levels - 1:
            ratio = per_matrix([h / o if o else 0.0 for h, o in zip(odds[k + 1], odds[k], strict=True)], x)
            rest.addcmul_(square_of(s, parts(higher), kept_as, alpha=1 / u), ratio)
    rest *= per_matrix([o / rest_scale for o in odds[0]], x)
    first = per_matrix([c[0] for c in kept], norm)[:, 0, 0] / positive(norm)
    torch.mul(x, first.to(x.dtype)[:, None, None], out=y)
    accumulate(y, parts(rest), low, alpha=rest_scale / (u * size))
    return wide, heavy


def fixed_map(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    fixed: Coefficients,
    end: float,
    polynomial: Polynomial,
    sound: bool,
) -> tuple[list[int], list[int], list[int]] | None:
    """Write the map of x / ||x||_F to y, as `polynomial_map` does, by the same polynomial for all.

    Args:
        x: (B, n, m), float32.
        y: (B, n, m), float32, where the result goes.
        dtype: Of the products' operands, and of what is n x n.
        fixed: Coefficients in powers of t, an odd number, of what a singular value of square t is multiplied by.
        end: Largest (sum t^4)^(1/4) that they serve.
        polynomial: Gives coefficients for any matrix.
        sound: Whether x is known to be finite and within range.

    Returns:
        The matrices beyond `end` that have a polynomial of their own, those that have none, and those whose correction
        is too large for the dtype; of all nothing useful was written. None, and the same, where x may not be finite or
        is out of range.
    """
    n, m = x.shape[-2:]
    size, u = math.sqrt(n * m), float(n)  # entries of order 1
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1), dim=-1)
    inverse = norm.clamp_min(LEAST_NORM).reciprocal()[:, None, None]  # zeros stay zero
    low = (torch.mul(x, inverse * size, out=torch.empty_like(x, dtype=dtype)),)
    gram = square_of(low, transposed(low), dtype, alpha=u / size**2)
    square = square_of((gram,), (gram,), dtype, alpha=1 / u)
    lengths = torch.linalg.vector_norm(square, dim=(-2, -1), dtype=torch.float32)
    odds, evens = fixed[1::2], fixed[2::2]
    rest = torch.add(gram, square, alpha=evens[-1] / odds[-1])
    for (odd, higher), even in reversed([*zip(pairwise(odds), evens, strict=False)]):  # Horner's scheme in t^2
        this = torch.add(gram, square, alpha=even / odd)
        rest = accumulate(this, (square,), (rest,), alpha=higher / odd / u)
    torch.mul(x, inverse * fixed[0], out=y)
    accumulate(y, (rest,), low, alpha=odds[0] / (u * size))
    found, lengths_found = torch.stack([norm, lengths]).tolist()
    if not sound and not within(found):
        return None
    again, wide, heavy = [], [], []
    for i, root in enumerate(length / u for length in lengths_found):
        beyond = not math.sqrt(root) <= end if math.isfinite(root) else True
        own = fixed if not beyond else polynomial(math.sqrt(root)) if math.isfinite(root) else None
        if own is None:
            wide.append(i)
        elif dtype != x.dtype and share(own, root) > LOW_PRECISION_SHARE:
            heavy.append(i)
        elif beyond:
            again.append(i)
    return again, wide, heavy
