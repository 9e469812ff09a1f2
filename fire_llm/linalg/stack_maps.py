"""The fast path of Newton-Schulz: several cubic steps as one polynomial of the Gram matrix, a stack at a time.

k cubic steps turn X, of Frobenius norm 1, into q(G) X: G = X X^T, q a polynomial. `newton_schulz` replaces q by a
polynomial of low degree, which equals it to rounding where the eigenvalues of G lie. This file bounds the eigenvalues
and evaluates the polynomial, in three steps:

1. It forms G and G^2. All that follows needs these two alone.
2. (tr G^4)^(1/4), the square root of ||G^2||_F, bounds the largest eigenvalue. Each matrix gets the polynomial of the
   least degree that serves its own bound.
3. Horner's scheme in G^2 takes one n x n product for every two degrees. X is multiplied once, at the end.

Shapes: (B = batch, n = short side, m = long side), n <= m. t is an eigenvalue of G, the square of a singular value of
X; all t of a matrix sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fire_llm.linalg.matmul import LEAST_NORM, in_range, indices, norms
from fire_llm.linalg.split_products import Operand, accumulate, product, split, transposed


@dataclass(frozen=True)
class Growth:
    """A polynomial q: a singular value of square t is multiplied by q(t) = sum_k c_k (t - centre)^k."""

    coefficients: tuple[float, ...]
    """c_0, c_1, …, an odd number of them."""
    centre: float
    slope: float
    """|q'(0) / q(0)|."""


LOW_PRECISION_SHARE = 0.07  # largest correction, relative to what it corrects, that is computed in 16 bits


def gaussian_fourth_moment(n: int, m: int) -> float:
    """Return the expected sum t^4 of a Gaussian matrix (n, m): the fourth Marchenko-Pastur moment."""
    ratio = n / m
    return (1 + 6 * ratio + 6 * ratio**2 + ratio**3) / n**3


def correction_share(growth: Growth, norm: float) -> float:
    """Return a bound on ||(q(G) - q(0)) X|| / ||q(0) X||: how large the correction is that a product computes.

    The share is at most slope (sum t^3)^(1/2). Since sum t = 1, sum t^3 is at most (sum t^4)^(2/3).

    Args:
        growth: The polynomial.
        norm: ||G^2||_F = (sum t^4)^(1/2).
    """
    return growth.slope * float(norm ** (2 / 3))


class Unmapped(NamedTuple):
    """Numbers of the matrices for which `polynomial_map` wrote nothing useful."""

    too_wide: list[int]
    """No polynomial serves their spectrum."""
    too_imprecise: list[int]
    """Their correction is too large for products of 16 bits."""


@dataclass(frozen=True)
class _Powers:
    """A stack X, and the powers of its Gram matrices that polynomials are evaluated from.

    Powers are stored times `trace`, which gives them entries of order 1: fp16 has few digits for small numbers.
    """

    x: Tensor
    """(B, n, m), float32, as it was given."""
    dtype: torch.dtype | None
    """Of the operands of products; None for split operands."""
    norm: Tensor
    """(B,), float64, ||x||_F."""
    inverse_norm: Tensor
    """(B, 1, 1), float32, 1 / ||x||_F; of zeros a finite number, so that they stay zero."""
    trace: float
    """What G, of trace 1, is multiplied by in `gram`."""
    operand_norm: float
    """Frobenius norm of the matrices in `operand`."""
    operand: Operand
    """The normalised x as products read it; in float32 x itself, which saves a copy."""
    gram: Tensor
    """(B, n, n), `trace` G."""
    squared: Tensor
    """(B, n, n), `trace` G^2."""

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype | None) -> _Powers:
        """Form the powers; arguments as in `polynomial_map`."""
        n, m = x.shape[-2:]
        operand_norm, trace = math.sqrt(n * m), float(n)
        if dtype is None:
            operand_norm, trace = operand_norm / 16, trace / 16  # `split` takes no entry above 255
        stored = dtype or x.dtype
        norm = norms(x)
        inverse_norm = norm.clamp_min(LEAST_NORM).reciprocal().to(x.dtype)[:, None, None]
        if dtype == x.dtype:
            operand: Operand = (x,)
            gram = product(operand, transposed(operand)).mul_(inverse_norm.square() * trace)
        else:
            scaled = torch.mul(x, inverse_norm * operand_norm, out=torch.empty_like(x, dtype=stored))
            operand = _operand(scaled, dtype)
            gram = product(operand, transposed(operand), stored, alpha=trace / operand_norm**2)
        factor = _operand(gram, dtype)
        squared = product(factor, factor, stored, alpha=1 / trace)
        return cls(x, dtype, norm, inverse_norm, trace, operand_norm, operand, gram, squared)

    def write(self, growth: Growth, y: Tensor, members: Tensor | None = None) -> None:
        """Write q(G) x / ||x||_F to y.

        With H = G - centre, q = c_0 + c_1 M and M = H + (c_2 / c_1) H^2 + …. M is computed first. The large c_0 is kept
        apart, because added into a product it would cost M a digit.

        Args:
            growth: The polynomial q.
            y: (B, n, m), float32.
            members: (k,), numbers of the matrices to write; default: all.
        """

        def chosen(tensor: Tensor) -> Tensor:
            return tensor if members is None else tensor.index_select(0, members)

        h, h_squared, x, inverse_norm = map(chosen, (self.gram, self.squared, self.x, self.inverse_norm))
        if growth.centre:
            h_squared = torch.add(h_squared, h, alpha=-2 * growth.centre)
            h = h.clone()
            for power, shift in ((h, -growth.centre), (h_squared, growth.centre**2)):
                power.diagonal(dim1=-2, dim2=-1).add_(self.trace * shift)
        constant = growth.coefficients[0]
        odd, even = growth.coefficients[1::2], growth.coefficients[2::2]
        # Horner's scheme, from the highest pair of powers down: M <- H + (c_even / c_odd) H^2 + (c_next / c_odd) H^2 M
        factor = _operand(h_squared, self.dtype)
        polynomial = torch.add(h, h_squared, alpha=even[-1] / odd[-1])
        for (c_odd, c_next), c_even in reversed([*zip(pairwise(odd), even, strict=False)]):
            pair = torch.add(h, h_squared, alpha=c_even / c_odd)
            higher = _operand(polynomial, self.dtype)
            polynomial = accumulate(pair, factor, higher, alpha=c_next / c_odd / self.trace)
        z = torch.mul(x, inverse_norm, out=y if members is None else torch.empty_like(x))
        if self.dtype == x.dtype:
            accumulate(z, (polynomial.mul_(inverse_norm),), (x,), alpha=odd[0] / self.trace, beta=constant)
        else:
            operand, alpha = tuple(map(chosen, self.operand)), odd[0] / (self.trace * self.operand_norm)
            accumulate(z, _operand(polynomial, self.dtype), operand, alpha=alpha, beta=constant)
        if members is not None:
            y.index_copy_(0, members, z)


def polynomial_map(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype | None,
    choose: Callable[[float], Growth | None],
    guess: tuple[Growth, float] | None = None,
    *,
    checked: bool = False,
    grams: list[Tensor] | None = None,
) -> Unmapped | None:
    """Write q(G) x / ||x||_F to y, each matrix with the q that its own spectrum needs.

    Args:
        x: (B, n, m), float32.
        y: (B, n, m), float32, where the result goes.
        dtype: Of the products' operands, and of what is n x n: float32, bfloat16 or float16; None for split operands.
        choose: Returns the polynomial for a bound (sum t^4)^(1/4) on the eigenvalues of G, None where there is none.
        guess: A polynomial and the largest bound that it serves. All matrices take it before any bound is known, so
            that the host waits after the last product, not before it. Those beyond the bound are then done again.
        checked: Whether x is known to be finite and in range.
        grams: Takes x x^T (B, n, n), where its products are those of x in float32.

    Returns:
        The matrices that are left to be done in another way. None, and the same for all, where x may not be finite or
        is out of range.
    """
    powers = _Powers.of(x, dtype)
    if guess is not None:
        powers.write(guess[0], y)
    lengths = torch.linalg.vector_norm(powers.squared, dim=(-2, -1), dtype=torch.float32).double()
    norm_values, squared_norms = torch.stack([powers.norm, lengths]).tolist()  # the one wait
    if not checked and not in_range(norm_values):
        return None
    if grams is not None and dtype == x.dtype:
        grams.append(powers.gram * (powers.norm.square() / powers.trace)[:, None, None].to(powers.gram))
    unmapped = Unmapped([], [])
    others: dict[Growth, list[int]] = {}
    for i, squared_norm in enumerate(value / powers.trace for value in squared_norms):  # ||G^2||_F
        growth = choose(math.sqrt(squared_norm)) if math.isfinite(squared_norm) else None
        if growth is None:
            unmapped.too_wide.append(i)
        elif dtype not in (None, x.dtype) and correction_share(growth, squared_norm) > LOW_PRECISION_SHARE:
            unmapped.too_imprecise.append(i)
        elif guess is None or math.sqrt(squared_norm) > guess[1]:
            others.setdefault(growth, []).append(i)
    for growth, members in others.items():
        powers.write(growth, y, None if len(members) == len(x) else indices(members, x))
    return unmapped


def _operand(x: Tensor, dtype: torch.dtype | None) -> Operand:
    """Return what a product reads of x (B, n, m), which is in the dtype already, or is split for None."""
    return split(x) if dtype is None else (x,)
