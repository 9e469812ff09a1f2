"""The polar factor: the matrix nearest to W whose rows (or columns) are orthonormal, with proof that it is.

`polar` chooses between three ways to compute it. Each ends with a measure of ||I - X X^T||_F, or a bound on it, and a
matrix that fails goes on to a more exact way; an SVD in float64 is the last.

- `_by_rational_function`: rectangles on a CPU to 1e-3, in float32. X is multiplied once.
- `_write_polar_factors`: stacks on an accelerator to 1e-3, in 16-bit products (`accelerated`).
- `_project`: all else. Eigenvalues of the Gram matrix on a CPU, a composition of polynomials elsewhere.

Shapes: (..., out, in) at the surface; inside, a stack is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.linalg.accelerated import SHORT, Attempt, Composition, more_steps, project, project_rectangles
from fire_llm.linalg.matmul import (
    CPU_BATCH_SIDE,
    accumulates,
    check_dtype,
    check_matrix,
    chunks,
    exact_products,
    indices,
    multiply,
    oriented,
    spans,
    step,
    store,
)
from fire_llm.linalg.newton_schulz import CUBIC

# Odd quintics a x + b x^3 + c x^5 whose composition takes every singular value of [1e-4, 1] to 1 within 6e-6: seven
# minimax quintics and two cubics, found as in Polar Express (arXiv 2505.16932) but with a floor of 1e-4, a cushion of
# 0.05 (no singular value of order 1 is thrown below 0.36 on the way, which costs digits) and a safety factor of 1.003.
# From the second on they also take all of (0, 1.99] towards 1, and serve again for what lay below the floor.
COMPOSITION = (
    (8.08502, -21.84146, 15.691745),
    (4.039159, -2.730126, 0.490754),
    (4.024068, -2.726625, 0.491331),
    (3.964548, -2.713065, 0.49376),
    (3.746666, -2.667528, 0.505082),
    (3.015049, -2.245058, 0.477639),
    (2.093819, -1.469021, 0.392955),
    (1.498076, -0.495891, 0.0),
    (1.500006, -0.500001, 0.0),
)
POLISH = ((*CUBIC, 0.0), (*CUBIC, 0.0))  # squares the error twice: 6e-6 -> 1e-10 -> rounding
LIFT = (*COMPOSITION[3:], *POLISH)  # multiplies what is still small by 210
AGAIN = COMPOSITION[3:8]  # multiplies what is still small by 142
DOUBLE_STEPS = 2  # leading steps taken in fp64, while singular values of 1e-4 would drown in fp32's rounding

FAST_TOLERANCE = 1e-3  # from here on fp32 is precise enough for `polar`
# (M, ((a_j, c_j), ...)) of x M (1 + sum_j a_j / (x^2 + c_j)), the best odd rational function of its type: it takes
# [0.1, 1] to 1 within 5e-3. Source: Zolotarev's, used as by Nakatsukasa and Freund, Computing fundamental matrix
# decompositions accurately via the matrix sign function, SIAM Review 58, 2016.
ZOLOTAREV = (0.47054027319176, ((0.25812633041531335, 0.006548922991163), (1.0790925249018042, 0.22721251650373747)))
POWER_STEPS = 8
TOP_MARGIN = 1.2  # eight power steps find a Gaussian's largest eigenvalue up to a tenth too small
RECTANGLE = 1.5  # m / n from which singular values likely lie within [0.1, 1] of the largest
WIDE = 2.0  # m / n from which a Gaussian's singular values are far enough from 0 for single fp16 operands

POLAR_FLOATS = (torch.float32, torch.float64)  # rounding W itself to bf16 moves its polar factor by up to 0.3


@torch.no_grad()
def polar(
    w: Tensor, tolerance: float = 1e-3, *, compute_dtype: torch.dtype | None = None, name: str = "matrix"
) -> Tensor:
    """Project onto the nearest matrix with orthonormal rows (or columns): the polar factor U V^T of w = U S V^T.

    On a CPU, (w w^T)^(-1/2) w from the eigenvalues of the fp64 Gram matrix, to 1e-3 a rational function of rectangles
    in fp32. Elsewhere, or where `compute_dtype` is given, `COMPOSITION`, on accelerators to 1e-3 in products of fp16
    parts that hold 22 bits. In each case ||I - X X^T||_F is measured or bounded, and a matrix where it exceeds
    `tolerance` is done again: float64, more steps, at last an SVD. Singular values under max(out, in) * 2.2e-16 of the
    largest count as zero, and their directions stay zero: a rank-deficient matrix gives the partial isometry, zeros
    give zeros.

    Args:
        w: (..., out, in), any floating dtype; not modified. Its values count as exact.
        tolerance: bound on max |s - 1| over the result's singular values, and on ||X - Q||_F / ||Q||_F against the
            polar factor Q of an fp64 SVD; 0 < tolerance <= 0.1. Rounding the result to the dtype of `w` comes on top:
            2e-3 for bfloat16, 2e-4 for float16, 3e-8 for float32.
        compute_dtype: iterate the composition in float32 or float64, on any device. Default: see above; where no
            eigenvalues are taken, float32 for tolerance >= 1e-3 and float64 below.
        name: what error messages call `w`.

    Returns:
        A new contiguous tensor with the shape, dtype and device of `w`.

    Raises:
        UserError: `w` is not a floating-point matrix (or batch) or holds NaN or infinity; `tolerance` is out of range
            or out of reach of `compute_dtype`.

    Source: FIRE, arXiv 2602.08040, the orthogonal Procrustes problem: min SFE subject to DfI = 0.
    """
    check_matrix(w, name)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance <= 0.1:
        raise UserError(f"tolerance: {tolerance!r} is outside (0, 0.1]; 1e-3 is the default, 1e-5 is tight")
    check_dtype(compute_dtype, POLAR_FLOATS)
    if compute_dtype == torch.float32 and tolerance < FAST_TOLERANCE:
        raise UserError(
            f"compute_dtype: torch.float32 holds a tolerance of {FAST_TOLERANCE:g}, not {tolerance:g}; "
            "leave compute_dtype out, or give torch.float64"
        )
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    fast = tolerance >= FAST_TOLERANCE and compute_dtype is None
    if w.device.type != "cpu" and fast and accumulates(w.device.type, torch.float16):
        with exact_products(w.device):
            _write_polar_factors(w, out, tolerance, name)
        return out
    if w.device.type != "cpu" and compute_dtype is None:
        compute_dtype = torch.float32 if fast else torch.float64
    n, m = sorted(w.shape[-2:])
    large_rectangle = n > CPU_BATCH_SIDE and m >= RECTANGLE * n
    rational = fast and large_rectangle and w.device.type == "cpu" and w.dtype != torch.float64
    with exact_products(w.device):
        for chunk, x, _ in chunks(w, torch.float32 if rational else torch.float64, name):
            factor = _by_rational_function(x, tolerance) if rational else None
            store(out, chunk, _project(x.double(), tolerance, compute_dtype) if factor is None else factor)
    return out


def _write_polar_factors(w: Tensor, out: Tensor, tolerance: float, name: str) -> None:
    """Write the polar factors of a batch on an accelerator, stack by stack; what is not certain is done in float64."""
    n, m = sorted(w.shape[-2:])
    solve = project_rectangles if m >= WIDE * n else project
    attempts = _attempts(n, m)
    batch = w.reshape(-1, *w.shape[-2:]) if w.numel() else w
    for chunk in spans(w):
        solved = solve(oriented(batch, chunk).float(), attempts, tolerance, checked=False)
        if solved is None:  # name what is not finite, scale what is out of range
            _, x, _ = next(chunks(w, torch.float32, name, only=chunk))
            solved = solve(x, attempts, tolerance, checked=True)
        assert solved is not None
        y, uncertain = solved
        if uncertain:
            members = indices(uncertain, y)
            hard = batch[chunk].index_select(0, members)
            for part, x, _ in chunks(hard, torch.float64, name):
                y.index_copy_(0, members[part], _project(x, tolerance, torch.float64).to(y.dtype))
        store(out, chunk, y)


def _attempts(n: int, m: int) -> tuple[Attempt, ...]:
    """Return what `project` tries in turn for matrices (n, m)."""
    if m < RECTANGLE * n:
        first, second, *others, _ = COMPOSITION  # a Taylor step takes the place of the last cubic
        repeated = (second,) * more_steps(n, second[0])
        return tuple((step,) for step in (first, *repeated, second, *others)), tuple((step,) for step in AGAIN)
    again = (AGAIN[:2], AGAIN[2:4], AGAIN[4:])  # all five on one Gram matrix would lose digits
    return (SHORT,), again, again


def _by_rational_function(x: Tensor, tolerance: float) -> Tensor | None:
    """Take singular values of [0.1, 1] of the largest to 1, on a CPU: by a rational function, then by a Taylor step.

    A Gaussian rectangle's are in that interval, and this is 3 times as fast as `_project` (768 x 3072). With E the
    residual before it, the Taylor step multiplies by (I + E)^(-1/2) to second order and leaves 5/8 E^3 and less of E.

    Args:
        x: (1, n, m), float32.
        tolerance: Bound on ||I - X X^T||_F.

    Returns:
        The polar factor (1, n, m); None where the bound is not certain.
    """
    gram = x @ x.mT
    largest = _largest_eigenvalue(gram)
    gram /= largest
    scale, terms = ZOLOTAREV
    factor = torch.zeros_like(gram)  # M (I + sum_j a_j (gram + c_j I)^(-1)), symmetric
    factor.diagonal(dim1=-2, dim2=-1).add_(scale)
    for weight, shift in terms:
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        inverse = torch.cholesky_inverse(lower).masked_fill_(failed[:, None, None] > 0, torch.nan)
        factor.add_(inverse, alpha=scale * weight)
    error = factor @ gram @ factor
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    square = error @ error
    bound = torch.linalg.vector_norm(error) * torch.linalg.vector_norm(square)
    if not bound <= tolerance:  # too far from 1, or NaN for want of an inverse
        return None
    factor += square.mul_(0.375).sub_(error, alpha=0.5) @ factor
    return multiply(factor / largest.sqrt(), x)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Return the largest eigenvalue (1,) of a Gram matrix (1, n, n), about: at most a fifth too large.

    A value too low does no harm: the function stays near 1 above 1, and the residual is measured.
    """
    v = torch.arange(gram.shape[-1], dtype=gram.dtype).mul_(2.4).cos_()[None, :, None]  # the same each time
    tiny = torch.finfo(gram.dtype).tiny
    for _ in range(POWER_STEPS):
        v = gram @ v
        v /= torch.linalg.vector_norm(v).clamp_min(tiny)
    estimate = torch.linalg.vector_norm(gram @ v) * TOP_MARGIN
    return torch.minimum(estimate, gram.diagonal(dim1=-2, dim2=-1).sum()).clamp_min(tiny)


def _project(x: Tensor, tolerance: float, dtype: torch.dtype | None) -> Tensor:
    """Return the polar factors of a batch, each to `tolerance`; zeros stay zeros.

    Args:
        x: (B, n, m), float64.
        tolerance: bound on ||I - X X^T||_F, hence on max |s - 1|.
        dtype: of the composition's first attempt (later ones use float64), or None for eigendecompositions.
    """
    y, todo = torch.zeros_like(x), x.flatten(1).any(1)
    attempts: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [(x, _by_eigenvalues)]  # what each starts from, and how
    if dtype is not None:
        precise = partial(_compose, steps=(*COMPOSITION, *POLISH), dtype=torch.float64, normalise=True)
        lift = partial(_compose, steps=LIFT, dtype=torch.float64)
        attempts = [(x, precise), (y, lift), (y, lift)]
        if dtype == torch.float32:
            attempts.insert(0, (x, partial(_compose, steps=COMPOSITION, dtype=dtype, normalise=True)))
    if x.device.type != "cpu":  # all at once, zeros too: which they are is fetched with the rest
        z = attempts.pop(0)[1](x)
        y.copy_(z)
        hard, zero = torch.stack([todo & ~_orthonormal(z, tolerance), ~todo]).tolist()
        if any(zero):
            y.masked_fill_(~todo[:, None, None], 0)
        if not any(hard):
            return y
        todo = torch.tensor(hard, device=x.device)
    for source, solve in attempts:
        if not todo.any():
            return y
        z = solve(source[todo])
        y[todo] = z.double()
        todo = todo.masked_scatter(todo, ~_orthonormal(z, tolerance))
    for i in todo.nonzero().flatten():
        u, sigma, vh = torch.linalg.svd(x[i], full_matrices=False)
        rank_floor = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * sigma[0]
        y[i] = (u * (sigma > rank_floor)) @ vh
    return y


def _orthonormal(z: Tensor, tolerance: float) -> Tensor:
    """Return for each matrix (B,) whether ||I - Z Z^T||_F is within the tolerance; of NaN it is not."""
    gram = z @ z.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    within: Tensor = torch.linalg.vector_norm(gram, dim=(-2, -1)) <= tolerance
    return within


def _by_eigenvalues(x: Tensor) -> Tensor:
    """Return (x x^T)^(-1/2) x from the eigenvalues of x x^T.

    Its residual E = X X^T - I bounds the error, however ill-conditioned x is: X = P x with P symmetric, and in the
    eigenbasis of x x^T the error in P is E_ij / (s_i + s_j), so that ||X - Q||_F <= ||E||_F to first order.
    """
    squares, vectors = torch.linalg.eigh(x @ x.mT)
    roots = squares.clamp_min(torch.finfo(x.dtype).tiny).rsqrt()[..., None, :]
    factor: Tensor = (vectors * roots) @ vectors.mT
    return factor @ x


def _compose(x: Tensor, steps: Composition, dtype: torch.dtype, normalise: bool = False) -> Tensor:
    """Apply odd quintics one after another, the first `DOUBLE_STEPS` to float64, the others to `dtype`."""
    for done, coefficients in enumerate(steps):
        x = step(x if done < DOUBLE_STEPS else x.to(dtype), *coefficients, normalise=normalise and done == 0)
    return x
