"""FIRE's Newton-Schulz map: `reference_newton_schulz` says what it is, `newton_schulz` computes it fast.

Shapes: (..., out, in) at the surface; inside, a stack is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import math
from functools import cache, partial

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.linalg.matmul import (
    CPU_BATCH_SIDE,
    FLOATS,
    accumulates,
    add_product,
    check_dtype,
    check_matrix,
    chunks,
    exact_products,
    indices,
    oriented,
    positive,
    spans,
    step,
    store,
)
from fire_llm.linalg.stack_maps import (
    LOW_PRECISION_SHARE,
    Growth,
    correction_share,
    gaussian_fourth_moment,
    polynomial_map,
)

CUBIC = (1.5, -0.5)  # x -> 1.5 x - 0.5 x^3


@torch.no_grad()
def reference_newton_schulz(w: Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the map as the paper writes it: X <- 1.5 X - 0.5 X X^T X, from w / ||w||_F.

    Nothing here is fast or careful. It is what `newton_schulz` is tested against.

    Args:
        w: (..., out, in), any floating dtype.
        iterations: Number of cubic steps.
        dtype: Of the iterate and of every product. The authors' code takes float32.

    Returns:
        (..., out, in), in the dtype of `w`.

    Source: FIRE, arXiv 2602.08040, the Newton-Schulz approximation of W (W^T W)^(-1/2).
    """
    tall = w.shape[-2] > w.shape[-1]
    x = (w.mT if tall else w).to(dtype)  # (..., n, m): the Gram matrix of the short side is the smaller one
    x = x / torch.linalg.matrix_norm(x, keepdim=True)  # no singular value exceeds the Frobenius norm
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x  # each singular value s becomes 1.5 s - 0.5 s^3
    mapped: Tensor = x.mT if tall else x
    return mapped.to(w.dtype)


# The fast path. k cubic steps multiply a singular value s by q(s^2), a polynomial of degree (3^k - 1) / 2. In a
# normalised matrix s^2 lies in a short interval. There a polynomial of low degree equals q within 2e-7: degree 4 for
# five steps on a Gaussian 768 x 768. That takes 4 products of n x n instead of 10, and of a 3072 x 768 matrix 10
# instead of 40. Measured against the reference in fp32: 2.8 and 4.1 times as fast on one CPU thread. On an H200 all
# matrices of GPT-2's blocks take 3.4 ms in bf16 and 12 ms in fp32, the authors' loop 55 ms (docs/newton-schulz.md).
# Steps are taken one by one where the interval is too long, where the sides are small, and in fp64.
STEPS_AT_ONCE = 5  # a polynomial for more steps needs too high a degree
DEGREES = range(2, 13, 2)  # beyond, steps one by one cost little more
# From this degree on, powers are of t less the middle of the interval. Their terms are then at most 4 times q. Terms in
# powers of t are 200 times q at degree 10 and 4000 times at 12, and so is what their rounding costs.
CENTRED_DEGREE = 10
INTERPOLATION_ERROR = 2e-7  # relative, on the whole interval
BOUND_MARGIN = 1.01  # on the bound of the eigenvalues: the Gram matrix that it is taken from is rounded
GAUSSIAN_MARGIN = 1.05  # what a Gaussian's bound may exceed the expected one by
# In fp32, rounding adds 1e-8 where a singular value is 0, and a step multiplies that by 1.5. So only the last steps, of
# this number, are in fp32, and those before in fp64. Singular values begin near 1 / sqrt(n): larger sides bear more.
SINGLE_STEPS_SMALL, SINGLE_STEPS = 10, 12
GRAM_RATIO = 1.5  # m / n from which iterating on the n x n Gram matrix costs less
GRAM_STEPS = 5  # steps before the Gram matrix is formed again: its rounding grows by 2.25 a step


@torch.no_grad()
def newton_schulz(
    w: Tensor,
    iterations: int = 5,
    *,
    compute_dtype: torch.dtype | None = None,
    name: str = "matrix",
    grams: list[Tensor] | None = None,
) -> Tensor:
    """Map each singular value by p(s) = 1.5 s - 0.5 s^3, `iterations` times, from w / ||w||_F.

    This is FIRE's approximation, not its solution: five steps leave a Gaussian's singular values near 0.25 (`polar` is
    the solution). The paper's factor sqrt(out / in) is left to the caller. A matrix of zeros comes back as zeros.

    Args:
        w: (..., out, in), any floating dtype; not modified.
        iterations: number of cubic steps, >= 0.
        compute_dtype: dtype of the matrix products. float32 and float64 are also the iterate's dtype; bfloat16 and
            float16 round the products' operands where the result stays within 5e-4; the iterate is float32.
            Default: float64 for float64 input, else bfloat16 on CUDA and float32 elsewhere.
        name: what error messages call `w`.
        grams: takes the smaller Gram matrices of what is worked on at once, (B, n, n), where float32 products of `w`
            as it is are formed on the way.

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
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    with exact_products(w.device):
        _write_maps(w, out, iterations, products, name, guess_first=w.device.type != "cpu", grams=grams)
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
            step_factor = gram * CUBIC[1]  # 1.5 I - 0.5 G, a polynomial of G like all others here: they commute
            step_factor.diagonal().add_(CUBIC[0])
            gram, factor = step_factor @ gram @ step_factor, factor @ step_factor
    return factor


def _write_maps(
    w: Tensor,
    out: Tensor,
    iterations: int,
    products: torch.dtype,
    name: str,
    *,
    guess_first: bool = True,
    grams: list[Tensor] | None = None,
) -> None:
    """Write the map of a batch, stack by stack: on a CPU a stack is one matrix where n is above `CPU_BATCH_SIDE`.

    Args:
        w: (..., out, in).
        out: (..., out, in), contiguous, where the result goes.
        iterations: As in `newton_schulz`.
        products: Dtype of the products' operands.
        name: What error messages call `w`.
        guess_first: Whether all matrices take the polynomial for Gaussians of their shape before any spectrum is known.
            On an accelerator the host then waits after the last product; on a CPU a wrong guess costs half the time.
        grams: As in `newton_schulz`.
    """
    at_once = min(iterations, STEPS_AT_ONCE)
    small = min(w.shape[-2:]) <= CPU_BATCH_SIDE
    single_steps = SINGLE_STEPS_SMALL if small else SINGLE_STEPS
    double_steps = max(0, iterations - single_steps) if products == torch.float32 else 0
    if at_once < 2 or products == torch.float64 or small:
        for chunk, x, _ in chunks(w, torch.promote_types(products, torch.float32), name, copy=False):
            store(out, chunk, _one_by_one(x, iterations, double_steps))
        return
    choose = partial(_polynomial_for, at_once)
    n, m = sorted(w.shape[-2:])
    guess = _gaussian_polynomial(at_once, n, m, products != torch.float32) if guess_first else None
    batch = w.reshape(-1, *w.shape[-2:])
    for chunk in spans(w):
        x = oriented(batch, chunk).float()
        y = oriented(out, chunk) if out.dtype == torch.float32 else torch.empty_like(x)
        unmapped = polynomial_map(x, y, products, choose, guess, grams=grams)
        if unmapped is None:  # name what is not finite, scale what is out of range
            _, x, _ = next(chunks(w, torch.float32, name, copy=False, only=chunk))
            unmapped = polynomial_map(x, y, products, choose, guess, checked=True)
            assert unmapped is not None
        too_wide = unmapped.too_wide
        if imprecise := unmapped.too_imprecise:  # 16 bits are too few: 22, or where these cannot be had 24
            precise_dtype = None if accumulates(w.device.type, torch.float16) else torch.float32
            members, z = indices(imprecise, x), torch.empty_like(x[: len(imprecise)])
            again = polynomial_map(x.index_select(0, members), z, precise_dtype, choose, checked=True)
            assert again is not None
            y.index_copy_(0, members, z)
            too_wide += [imprecise[i] for i in again.too_wide]
        if too_wide:
            members = indices(too_wide, x)
            y.index_copy_(0, members, _one_by_one(x.index_select(0, members), at_once, min(at_once, double_steps)))
        if iterations > at_once:
            y.copy_(_cubic_steps(y, iterations - at_once))
        if y.dtype != out.dtype:
            store(out, chunk, y)


def _polynomial_for(steps: int, bound: float) -> Growth | None:
    """Return the polynomial of least degree that replaces steps on a spectrum within the bound; None for none."""
    return next((growth for growth, largest in _polynomials(steps) if bound <= largest), None)


@cache
def _gaussian_polynomial(steps: int, n: int, m: int, low_precision: bool) -> tuple[Growth, float] | None:
    """Return the polynomial that Gaussians (n, m) need, and the largest bound that it serves.

    None where there is none, or where products are of low precision and a Gaussian's correction is too large for them.
    """
    squared_norm = math.sqrt(gaussian_fourth_moment(n, m))
    bound = math.sqrt(squared_norm) * GAUSSIAN_MARGIN
    for growth, largest in _polynomials(steps):
        if bound <= largest:
            share = correction_share(growth, squared_norm * GAUSSIAN_MARGIN)
            return None if low_precision and share > LOW_PRECISION_SHARE else (growth, largest)
    return None


@cache
def _polynomials(steps: int) -> tuple[tuple[Growth, float], ...]:
    """Return a polynomial of each degree in `DEGREES`, and the largest bound (sum t^4)^(1/4) that it serves."""
    served, end = [], 1.0
    for degree in reversed(DEGREES):
        while (growth := _interpolated(steps, end, degree)) is None:
            end *= 2 ** (-1 / 16)
        served.append((growth, end / BOUND_MARGIN))
    return tuple(reversed(served))


def _interpolated(steps: int, end: float, degree: int) -> Growth | None:
    """Return a polynomial for q on [0, end]; None where it is off by too much on a grid."""
    grid = np.linspace(0, end, 2001)
    q = Chebyshev.interpolate(lambda t: _exact_growth(t, steps), degree, domain=[0, end])
    if not np.max(np.abs(q(grid) / _exact_growth(grid, steps) - 1)) < INTERPOLATION_ERROR:
        return None
    middle = 0.5 if degree >= CENTRED_DEGREE else 0.0
    powers = q.convert(kind=Polynomial, domain=[0, end], window=[-middle, 1 - middle]).coef  # of t / end - middle
    powers = np.pad(powers, (0, degree + 1 - len(powers)))
    coefficients = tuple(float(c) / end**power for power, c in enumerate(powers))
    return Growth(coefficients, middle * end, float(abs(q.deriv()(0) / q(0))))


def _exact_growth(t: np.ndarray, steps: int) -> np.ndarray:
    """Return q(t): what `steps` cubic steps multiply a singular value by whose square is t."""
    s, q = np.sqrt(t), np.ones_like(t)
    for _ in range(steps):
        factor = CUBIC[0] + CUBIC[1] * s**2
        s, q = s * factor, q * factor
    return q


def _normalised(x: Tensor) -> Tensor:
    """Return x / ||x||_F, the norm accumulated in fp64: an fp32 sum of squares is off by 2e-3 on 50304 x 768."""
    return x / positive(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)).to(x.dtype)


def _one_by_one(x: Tensor, iterations: int, double_steps: int) -> Tensor:
    """Return cubic steps of x / ||x||_F (B, n, m): the first `double_steps` in fp64, the others in the dtype of x."""
    if not double_steps:
        return _cubic_steps(_normalised(x), iterations)
    return _cubic_steps(_cubic_steps(_normalised(x.double()), double_steps).to(x.dtype), iterations - double_steps)


def _cubic_steps(x: Tensor, iterations: int) -> Tensor:
    """Return cubic steps of a stack (B, n, m), one by one."""
    if x.shape[-1] < GRAM_RATIO * x.shape[-2]:
        for _ in range(iterations):
            x = step(x, *CUBIC)
    else:
        for done in range(0, iterations, GRAM_STEPS):
            x = _steps_on_gram(x, min(GRAM_STEPS, iterations - done))
    return x


def _steps_on_gram(x: Tensor, steps: int) -> Tensor:
    """Return `steps` cubic steps of x, iterating on its n x n Gram matrix and multiplying x once, at the end.

    Each step multiplies x by the factor a I + b G, and hence G by the square of that factor. The product of the factors
    so far is kept as diagonal I + rest: added into a product, the large diagonal would cost the rest a digit. Costs
    2 m/n + 3 steps - 3 products of n x n matrices; `step` costs 2 m/n a step.
    """
    a, b = CUBIC
    gram = x @ x.mT
    diagonal, rest = a, gram * b
    for _ in range(steps - 1):
        # G <- (a I + b G)^2 G = a^2 G + 2 a b G^2 + b^2 G^3
        square = gram @ gram
        gram = torch.baddbmm(gram, gram, square, beta=a * a, alpha=b * b).add_(square, alpha=2 * a * b)
        # diagonal I + rest <- (a I + b G) (diagonal I + rest)
        rest = torch.baddbmm(rest, gram, rest, beta=a, alpha=b).add_(gram, alpha=b * diagonal)
        diagonal *= a
    return add_product(x, diagonal, rest)
