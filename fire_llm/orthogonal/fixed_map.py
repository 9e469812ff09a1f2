"""The paper's map of a stack on an accelerator by one polynomial that its shape chooses: nothing to wait for.

Shapes: (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fire_llm.orthogonal.accelerated import (
    LEAST_NORM,
    LOW_PRECISION_SHARE,
    Polynomial,
    accumulate,
    square_of,
    transposed,
    within,
)

Coefficients = tuple[float, ...]
SPREAD = 1.05  # what a Gaussian's bound may exceed the expected one by


def gaussian_root(n: int, m: int) -> float:
    """Return sum t^4 of a Gaussian's squared singular values t, sum t = 1: the fourth Marchenko-Pastur moment."""
    ratio = n / m
    return (1 + 6 * ratio + 6 * ratio**2 + ratio**3) / n**3


def share(coefficients: Coefficients, root: float) -> float:
    """Return the most that the correction can be of what it corrects, with root = (sum t^4)^(1/2)."""
    return abs(coefficients[1] / coefficients[0]) * root ** (2 / 3)


def fixed_map(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    fixed: Coefficients,
    end: float,
    polynomial: Polynomial,
    sound: bool,
) -> tuple[list[int], list[int], list[int]] | None:
    """Write the map of x / ||x||_F to y, as `accelerated.polynomial_map` does, by the same polynomial for all.

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
