"""The paper's Newton-Schulz map.

Shapes: (..., out, in) at the surface; inside, a chunk is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import math
from functools import cache, partial

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.linalg.accelerated import positions
from fire_llm.linalg.matmul import (
    CPU_BATCH_SIDE,
    FLOATS,
    accumulates,
    add_product,
    check_dtype,
    check_matrix,
    chunks,
    exact_products,
    matmul,
    oriented,
    positive,
    spans,
    step,
    store,
    symmetric_product,
)
from fire_llm.linalg.stack_maps import (
    LOW_PRECISION_SHARE,
    SPREAD,
    Coefficients,
    fixed_map,
    gaussian_root,
    polynomial_map,
    share,
)

CUBIC = (1.5, -0.5)  # x -> 1.5 x - 0.5 x^3

GRAM_RATIO = 1.5  # m / n from which iterating on the n x n Gram matrix costs less
GRAM_STEPS = 5  # steps before the Gram matrix is formed anew: its rounding grows by 2.25 a step
AT_ONCE = 5  # steps taken as one polynomial; more of them need too high a degree
HIGHEST_DEGREE = 12  # beyond it, monomials lose digits and steps one by one cost little more
INTERPOLATION_ERROR = 2e-7  # relative, on the whole interval
BOUND_MARGIN = 1.01  # on the largest eigenvalue, for the rounding of the Gram matrix that bounds it


@torch.no_grad()
def newton_schulz(
    w: Tensor, iterations: int = 5, *, compute_dtype: torch.dtype | None = None, name: str = "matrix"
) -> Tensor:
    """Map each singular value by p(s) = 1.5 s - 0.5 s^3, `iterations` times, from w / ||w||_F.

    This is FIRE's approximation, not its solution: five steps leave a Gaussian's singular values near 0.25 (`polar` is
    the solution). The paper's factor sqrt(out / in) is left to the caller. A matrix of zeros comes back as zeros.

    Args:
        w: (..., out, in), any floating dtype; not modified.
        iterations: number of cubic steps, >= 0.
        compute_dtype: dtype of the matrix products. float32 and float64 are also the iterate's dtype; bfloat16 and
            float16 round the operands of each product while the iterate stays in float32. Default: float64 for
            float64 input, else bfloat16 on CUDA and float32 elsewhere.
        name: what error messages call `w`.

    Returns:
        A new contiguous tensor with the shape, dtype and device of `w`.

    Raises:
        UserError: `w` is not a floating-point matrix (or batch) or holds NaN or infinity; `iterations` is negative.

    Source: FIRE, arXiv 2602.08040, the Newton-Schulz approximation of W (W^T W)^(-1/2).
    """
    check_matrix(w, name)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise UserError(f"iterations: {iterations!r} is not a number of steps; give an integer >= 0 (the paper uses 5)")
    check_dtype(compute_dtype, FLOATS)
    fast = torch.bfloat16 if w.is_cuda else torch.float32
    products = compute_dtype or (torch.float64 if w.dtype == torch.float64 else fast)
    iterate = torch.float64 if products == torch.float64 else torch.float32
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    with exact_products(w.device):
        if w.device.type == "cpu" or iterate == torch.float64:
            for chunk, x, _ in chunks(w, iterate, name, own=False):
                store(out, chunk, _map(x, iterations, products))
        else:
            _by_stacks(w, out, iterations, products, name)
    return out


@torch.no_grad()
def newton_schulz_factor(gram: Tensor, iterations: int = 5) -> Tensor:
    """Return P such that `newton_schulz(w, iterations)` = w P, from w^T w alone: for a w that no device holds whole.

    Args:
        gram: (n, n) = w^T w of a w with at least n rows; its dtype is that of every product, so float64 is advised.
        iterations: as in `newton_schulz`.
    """
    trace = positive(gram.trace())
    gram = gram / trace
    factor = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / trace.sqrt()
    with exact_products(gram.device):
        for _ in range(iterations):
            one = gram * CUBIC[1]  # all of these commute
            one.diagonal().add_(CUBIC[0])
            gram, factor = one @ gram @ one, factor @ one
    return factor


def _map(x: Tensor, iterations: int, products: torch.dtype) -> Tensor:
    """Return the map of a batch (B, n, m) of any scale; B = 1 where n is above `CPU_BATCH_SIDE`."""
    first = min(iterations, AT_ONCE)
    if first < 2 or x.shape[-2] <= CPU_BATCH_SIDE or x.dtype == torch.float64:
        return _one_by_one(_normalised(x), iterations, products)
    y = _at_once(x, first, products)
    if y is None:
        y = _one_by_one(_normalised(x), first, products)
    return _one_by_one(y, iterations - first, products)


def _by_stacks(w: Tensor, out: Tensor, iterations: int, products: torch.dtype, name: str) -> None:
    """Write the map of a batch on an accelerator, stack by stack; what 16 bits do not carry is done in float32."""
    wide_enough = min(w.shape[-2:]) > CPU_BATCH_SIDE
    first = min(iterations, AT_ONCE) if wide_enough and iterations > 1 else 0
    batch = w.reshape(-1, *w.shape[-2:]) if w.numel() else w
    for chunk in spans(w):
        x = oriented(batch, chunk).float()
        y = oriented(out, chunk) if out.dtype == torch.float32 else torch.empty_like(x)
        left = _as_polynomials(x, y, first, products, False) if first else None
        if left is None:
            _, x, _ = next(chunks(w, torch.float32, name, own=False, only=chunk))
            left = _as_polynomials(x, y, first, products, True) if first else None
        if left is None:
            y.copy_(_one_by_one(_normalised(x), iterations, torch.float32))
        else:
            wide, heavy = left
            if heavy:
                at = positions(heavy, x)
                of, z = x.index_select(0, at), torch.empty_like(x[: len(heavy)])
                precise = None if accumulates(w.device.type, torch.float16) else torch.float32
                lost, _ = polynomial_map(of, z, precise, partial(_coefficients, first), True) or ([], [])
                wide += [heavy[i] for i in lost]
                y.index_copy_(0, at, z)
            if wide:
                at = positions(wide, x)
                y.index_copy_(0, at, _one_by_one(_normalised(x.index_select(0, at)), first, torch.float32))
            if iterations > first:
                y.copy_(_one_by_one(y, iterations - first, torch.float32))
        if y.dtype != out.dtype:
            store(out, chunk, y)


def _as_polynomials(
    x: Tensor, y: Tensor, steps: int, products: torch.dtype, sound: bool
) -> tuple[list[int], list[int]] | None:
    """Do as `polynomial_map`, which is left what the polynomial for Gaussians of that shape does not serve."""
    own, fixed = partial(_coefficients, steps), _fixed(steps, *x.shape[-2:], products != x.dtype)
    if fixed is None:
        return polynomial_map(x, y, products, own, sound)
    left = fixed_map(x, y, products, *fixed, own, sound)
    if left is None:
        return None
    again, wide, heavy = left
    if again:
        every = len(again) == len(x)
        at = positions(again, x)
        of, z = (x, y) if every else (x.index_select(0, at), torch.empty_like(x[: len(again)]))
        found = polynomial_map(of, z, products, own, True)
        assert found is not None
        if not every:
            y.index_copy_(0, at, z)
        wide, heavy = (
            sorted([*had, *(again[i] for i in more)]) for had, more in zip((wide, heavy), found, strict=True)
        )
    return wide, heavy


def _normalised(x: Tensor) -> Tensor:
    return x / positive(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)).to(x.dtype)


def _one_by_one(x: Tensor, iterations: int, products: torch.dtype) -> Tensor:
    if products != x.dtype:
        for _ in range(iterations):
            x = _low_precision_cubic(x, products)
    elif x.shape[-1] < GRAM_RATIO * x.shape[-2]:
        for _ in range(iterations):
            x = step(x, *CUBIC)
    else:
        for done in range(0, iterations, GRAM_STEPS):
            x = _gram_cubics(x, min(GRAM_STEPS, iterations - done))
    return x


def _at_once(x: Tensor, steps: int, products: torch.dtype) -> Tensor | None:
    """Take several steps as one polynomial of the Gram matrix, where its spectrum lies in a short enough interval.

    k steps multiply a singular value s by q(s^2). Of the Frobenius-normalised Gram matrix G, (tr G^4)^(1/4) bounds the
    spectrum, and on [0, bound] a polynomial of low degree stands for q: 4 where the singular values are a Gaussian's.
    It takes half its degree in products of n x n matrices, and m/n to multiply x by it.

    Args:
        x: (1, n, m), float32, of any scale.
        steps: to take.
        products: dtype of the products' operands.

    Returns:
        The result, or None where the spectrum or the correction is too large.
    """
    low = x.to(products)
    gram = _product(low, low.mT)
    trace = positive(gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)[:, None, None])
    gram /= trace.to(x.dtype)
    square = _product(gram.to(products), gram.to(products))
    end = _rounded_up(torch.linalg.vector_norm(square).sqrt().mul(BOUND_MARGIN).item())
    coefficients = _interpolant(steps, end)
    if coefficients is None:
        return None
    first, *others = coefficients
    gram /= end
    square /= end**2
    pairs = [others[i : i + 2] for i in range(0, len(others), 2)]
    rest = torch.zeros_like(gram)
    for number, (odd, even) in enumerate(reversed(pairs)):  # Horner's scheme in the square
        if number:
            rest = _product(square.to(products), rest.to(products))
        rest.add_(gram, alpha=odd / first).add_(square, alpha=even / first)
    if products == x.dtype:
        y = add_product(x, 1.0, rest)
    else:
        correction = _product(rest.to(products), low)
        if torch.linalg.vector_norm(correction) > LOW_PRECISION_SHARE * torch.linalg.vector_norm(x):
            return None
        y = x + correction
    return y.mul_((first / trace.sqrt()).to(x.dtype))


def _coefficients(steps: int, bound: float) -> tuple[float, ...] | None:
    """Return the polynomial that replaces steps on a spectrum within the bound, in powers of t; None for none."""
    end = _rounded_up(bound * BOUND_MARGIN)
    found = _interpolant(steps, end)
    return found and tuple(c / end**power for power, c in enumerate(found))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return symmetric_product(a, b) if a.dtype == torch.float32 else matmul(a, b)


def _rounded_up(bound: float) -> float:
    """Return the next power of 2^(1/16), so that few polynomials are ever made."""
    return min(1.0, 2 ** (np.ceil(16 * np.log2(max(bound, 1e-12))) / 16))


@cache
def _interpolant(steps: int, end: float) -> tuple[float, ...] | None:
    """Return a polynomial for q on [0, end], in powers of t / end; None where its degree would be too high.

    An even number of coefficients follows the constant one. The error is measured on a grid, relative to q.
    """
    attempts = (_interpolated(steps, end, degree) for degree in range(2, HIGHEST_DEGREE + 1, 2))
    return next((found for found in attempts if found is not None), None)


def _interpolated(steps: int, end: float, degree: int) -> tuple[float, ...] | None:
    grid = np.linspace(0, end, 2001)
    found = Chebyshev.interpolate(lambda t: _growth(t, steps), degree, domain=[0, end])
    if not np.max(np.abs(found(grid) / _growth(grid, steps) - 1)) < INTERPOLATION_ERROR:
        return None
    powers = found.convert(kind=Polynomial, domain=[0, end], window=[0, 1]).coef
    return tuple(float(c) for c in np.pad(powers, (0, degree + 1 - len(powers))))


@cache
def _fixed(steps: int, n: int, m: int, low: bool) -> tuple[Coefficients, float] | None:
    """Return the polynomial of least degree that Gaussians of a shape need, in powers of t, and up to which bound.

    None where the degree would be too high, or low precision not do.
    """
    root = math.sqrt(gaussian_root(n, m))
    for degree in range(4, HIGHEST_DEGREE + 1, 2):
        found, end = _widest(steps, degree)
        if math.sqrt(root) * BOUND_MARGIN * SPREAD <= end:
            coefficients = tuple(c / end**power for power, c in enumerate(found))
            return (
                None
                if low and share(coefficients, root * SPREAD) > LOW_PRECISION_SHARE
                else (coefficients, end / BOUND_MARGIN)
            )
    return None


@cache
def _widest(steps: int, degree: int) -> tuple[Coefficients, float]:
    """Return the interpolant of a degree on the widest interval [0, end] that it serves, in powers of t / end."""
    end = 1.0
    while (found := _interpolated(steps, end, degree)) is None:
        end *= 2 ** (-1 / 16)
    return found, end


def _growth(t: np.ndarray, steps: int) -> np.ndarray:
    """Return q(t): what `steps` cubic steps multiply a singular value by whose square is t."""
    s, q = np.sqrt(t), np.ones_like(t)
    for _ in range(steps):
        by = CUBIC[0] + CUBIC[1] * s**2
        s, q = s * by, q * by
    return q


def _gram_cubics(x: Tensor, steps: int) -> Tensor:
    """Return `steps` cubic steps of x, iterating on its n x n Gram matrix and multiplying x once, at the end.

    Costs 2 m/n + 3 steps - 3 products of n x n matrices; `step` costs 2 m/n a step. The product of the factors is
    kept as a I + rest: added into a product, the large diagonal would cost the rest a digit.
    """
    a, b = CUBIC
    gram = x @ x.mT
    diagonal, rest = a, gram * b
    for _ in range(steps - 1):
        square = gram @ gram  # gram <- (a I + b gram)^2 gram
        gram = torch.baddbmm(gram, gram, square, beta=a * a, alpha=b * b).add_(square, alpha=2 * a * b)
        # diagonal I + rest <- (a I + b gram) (diagonal I + rest)
        rest = torch.baddbmm(rest, gram, rest, beta=a, alpha=b).add_(gram, alpha=b * diagonal)
        diagonal *= a
    return add_product(x, diagonal, rest)


def _low_precision_cubic(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one cubic step of x, its two products on operands rounded to `dtype` where that costs under 5e-4.

    The rounding is relative to the correction (x x^T) x. Where few singular values dominate and the correction is no
    longer small beside x, the step is taken in the dtype of x.
    """
    low = x.to(dtype)
    correction = matmul(matmul(low, low.mT).to(dtype), low)
    size = torch.linalg.vector_norm(correction, dim=(-2, -1)) / torch.linalg.vector_norm(x, dim=(-2, -1))
    out = torch.add(x * CUBIC[0], correction, alpha=CUBIC[1])
    heavy = size * -CUBIC[1] / CUBIC[0] > LOW_PRECISION_SHARE
    if heavy.any():
        out[heavy] = step(x[heavy], *CUBIC)
    return out
