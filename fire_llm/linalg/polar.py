"""The true polar factor.

Shapes: (..., out, in) at the surface; inside, a chunk is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.linalg.accelerated import SHORT, Quintic, more_steps, positions, project
from fire_llm.linalg.matmul import (
    CPU_BATCH_SIDE,
    accumulates,
    check_dtype,
    check_matrix,
    chunks,
    exact_products,
    inverse,
    multiply,
    oriented,
    spans,
    step,
    store,
    symmetric_product,
)
from fire_llm.linalg.newton_schulz import CUBIC
from fire_llm.linalg.rectangles import WIDE, project_rectangles

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

FAST_TOLERANCE = 1e-3  # from here on fp32 iterates are precise enough for `polar`
# (M, ((a_j, c_j), ...)) of x M (1 + sum_j a_j / (x^2 + c_j)), the best odd rational functions of their type: the first
# takes [1e-4, 1] to [0.117, 1], the second [0.1, 1] to 1 within 5e-3. Source: Zolotarev's, used as by Nakatsukasa and
# Freund, Computing fundamental matrix decompositions accurately via the matrix sign function, SIAM Review 58, 2016.
FIRST = (0.9965888026975834, ((0.0034228833903714737, 2.919024140850194e-06),))
SECOND = (0.47054027319176, ((0.25812633041531335, 0.006548922991163), (1.0790925249018042, 0.22721251650373747)))
POWER_STEPS = 8
TOP_MARGIN = 1.2  # eight power steps find a Gaussian's largest eigenvalue up to a tenth too small
NEWTON_STEPS = 8  # a condition of 1e7 takes seven
RECTANGLE = 1.5  # m / n from which a matrix is likely well-conditioned, and fp32 tried first

POLAR_FLOATS = (torch.float32, torch.float64)  # rounding W itself to bf16 moves its polar factor by up to 0.3


@torch.no_grad()
def polar(
    w: Tensor, tolerance: float = 1e-3, *, compute_dtype: torch.dtype | None = None, name: str = "matrix"
) -> Tensor:
    """Project onto the nearest matrix with orthonormal rows (or columns): the polar factor U V^T of w = U S V^T.

    On CPU, Newton's iteration or rational functions to 1e-3, else (w w^T)^(-1/2) w from the eigenvalues of the fp64
    Gram matrix; elsewhere, or where `compute_dtype` is given, `COMPOSITION`, on accelerators to 1e-3 in products of
    fp16 parts that hold 22 bits. In each case ||I - X X^T||_F is measured
    or bounded, and a matrix where it exceeds `tolerance` is done again: float64, more steps, at last an SVD. Singular
    values under max(out, in) * 2.2e-16 of the largest count as zero, and their directions stay zero: a rank-deficient
    matrix gives the partial isometry, zeros give zeros.

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
    if compute_dtype is None and w.device.type != "cpu":
        if tolerance >= FAST_TOLERANCE and accumulates(w.device.type, torch.float16):
            with exact_products(w.device):
                _by_stacks(w, out, tolerance, name)
            return out
        compute_dtype = torch.float32 if tolerance >= FAST_TOLERANCE else torch.float64
    fast = compute_dtype is None and tolerance >= FAST_TOLERANCE
    quick = fast and w.dtype != torch.float64 and min(w.shape[-2:]) > CPU_BATCH_SIDE
    with exact_products(w.device):
        for chunk, x, _ in chunks(w, torch.float32 if quick else torch.float64, name):
            if quick:
                found = _quick(x, tolerance)
                if found is not None:
                    store(out, chunk, found)
                    continue
                x = x.double()
            store(out, chunk, _project(x, tolerance, compute_dtype))
    return out


def _by_stacks(w: Tensor, out: Tensor, tolerance: float, name: str) -> None:
    """Write the polar factors of a batch on an accelerator, stack by stack; what is not certain is done in float64."""
    if max(w.shape[-2:]) < RECTANGLE * min(w.shape[-2:]):
        steps = (
            COMPOSITION[0],
            *(COMPOSITION[1:2] * more_steps(min(w.shape[-2:]), COMPOSITION[1][0])),
            *COMPOSITION[1:-1],
        )
        attempts: tuple[tuple[tuple[Quintic, ...], ...], ...] = tuple(
            tuple((one,) for one in all_of) for all_of in (steps, AGAIN)
        )
    else:
        again = (AGAIN[:2], AGAIN[2:4], AGAIN[4:])  # all five on one Gram matrix would lose digits
        attempts = ((SHORT,), again, again)
    solve = project_rectangles if max(w.shape[-2:]) >= WIDE * min(w.shape[-2:]) else project
    batch = w.reshape(-1, *w.shape[-2:]) if w.numel() else w
    for chunk in spans(w):
        found = solve(oriented(batch, chunk).float(), attempts, tolerance, False)
        if found is None:
            _, x, _ = next(chunks(w, torch.float32, name, only=chunk))
            found = solve(x, attempts, tolerance, True)
        assert found is not None
        y, uncertain = found
        if uncertain:
            at = positions(uncertain, y)
            hard = batch[chunk].index_select(0, at)
            for part, x, _ in chunks(hard, torch.float64, name):
                y.index_copy_(0, at[part], _project(x, tolerance, torch.float64).to(y.dtype))
        store(out, chunk, y)


def _quick(x: Tensor, tolerance: float) -> Tensor | None:
    """Return the polar factor of one matrix (1, n, m), float32, or None where it is not certain.

    A square is tried by Newton's iteration, a rectangle at once in the interval that the second rational function
    needs. Where that fails, the first is taken in fp64: in an fp32 Gram matrix singular values below 3e-4 of the
    largest drown.
    """
    if x.shape[-1] == x.shape[-2]:
        found = _newton(x, tolerance)
        if found is not None:
            return found
    elif x.shape[-1] >= RECTANGLE * x.shape[-2]:
        z, residual = _finish(x)
        if residual <= tolerance:
            return z
    double = x.double()
    gram = symmetric_product(double, double.mT)
    top = _top(gram)
    first = _rational(gram / top, FIRST)[0] / top.sqrt()
    z, residual = _finish(multiply(first.float(), x))
    return z if residual <= tolerance else None


def _newton(x: Tensor, tolerance: float) -> Tensor | None:
    """Return the polar factor of one square matrix (1, n, n), float32, by X <- (z X + X^-T / z) / 2, or None.

    With D = (z X - X^-T / z) / 2 the next X has X X^T = I + D D^T, hence ||I - X X^T||_F <= ||D||_F^2. The scale z
    centres the interval of the singular values: estimated once, then known. Rounding moves the polar factor Q by about
    eps ||X||_F / n times the sum of 1 / (s_i + s_j), for which sum 1 / s_i = <Q, X^-T> stands: at least twice as much
    as was found on any spectrum, from gradual to half of the singular values at one floor.

    Source: Higham, Functions of Matrices (2008), section 8.6 on scaled Newton iterations.
    """
    z = x
    for number in range(NEWTON_STEPS):
        inverted, failed = torch.linalg.inv_ex(z)
        if failed.any():
            return None
        if number == 0:
            first = inverted.mT
            low, high = 1 / _norm(inverted), _norm(x)
            if not torch.finfo(x.dtype).eps * high < low:  # or NaN
                return None
        scale = (low * high) ** -0.5
        low, high = 1.0, (scale * high + 1 / (scale * high)) / 2
        half = inverted.mT * (0.5 / scale)
        error = torch.linalg.vector_norm(torch.sub(half, z, alpha=scale / 2)).item() ** 2
        z = half.add_(z, alpha=scale / 2)
        if error <= tolerance:
            rounding = torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x) / len(x[0]) * (z * first).sum()
            return z if rounding <= tolerance else None
    return None


def _norm(x: Tensor) -> float:
    """Estimate the largest singular value of one matrix (1, n, n); NaN or infinity where it is out of range."""
    v = _probe(x)
    for _ in range(POWER_STEPS):
        v = x @ (x.mT @ v)
        square = torch.linalg.vector_norm(v)
        v /= square
    return square.sqrt().item()


def _finish(x: Tensor) -> tuple[Tensor, float]:
    """Take singular values of [0.1, 1] of the largest to 1: by the second function, then by a Taylor step.

    Returns:
        The result, and a bound on its ||I - X X^T||_F: (I + E)^(-1/2) to second order leaves 5/8 E^3 and less of E.
    """
    gram = symmetric_product(x, x.mT)
    top = _top(gram)
    factor, product = _rational(gram / top, SECOND)
    error = symmetric_product(factor, product)
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    square = symmetric_product(error, error)
    norms = torch.linalg.vector_norm(error), torch.linalg.vector_norm(square)
    correction = square.mul_(0.375).sub_(error, alpha=0.5)
    factor += symmetric_product(correction, factor)
    return multiply(factor / top.sqrt(), x), (norms[0] * norms[1]).item()


def _rational(gram: Tensor, function: tuple[float, tuple[tuple[float, float], ...]]) -> tuple[Tensor, Tensor]:
    """Return P = M (I + sum_j a_j (gram + c_j I)^(-1)), the symmetric factor that multiplies x, and P gram.

    Args:
        gram: (1, n, n), of spectrum within [0, 1].
        function: M and the pairs (a_j, c_j).

    Returns:
        Both (1, n, n); NaN where an inverse does not exist.
    """
    scale, terms = function
    factor, product = torch.zeros_like(gram), gram * scale
    for weight, shift in terms:
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        inverted = inverse(shifted)
        factor.add_(inverted, alpha=scale * weight)
        # (gram + c I)^(-1) gram = I - c (gram + c I)^(-1)
        product.sub_(inverted, alpha=scale * weight * shift).diagonal(dim1=-2, dim2=-1).add_(scale * weight)
    factor.diagonal(dim1=-2, dim2=-1).add_(scale)
    return factor, product


def _top(gram: Tensor) -> Tensor:
    """Return the largest eigenvalue, about: a tenth and more above what power iterations find, at most the trace.

    A value too low does no harm: the functions stay near 1 above 1, and the residual tells.
    """
    v = _probe(gram)
    for _ in range(POWER_STEPS):
        v = gram @ v
        v /= torch.linalg.vector_norm(v).clamp_min(torch.finfo(gram.dtype).tiny)
    found = torch.linalg.vector_norm(gram @ v) * TOP_MARGIN
    return torch.minimum(found, gram.diagonal(dim1=-2, dim2=-1).sum()).clamp_min(torch.finfo(gram.dtype).tiny)


def _probe(x: Tensor) -> Tensor:
    """Return a vector that power iterations on x (1, n, n) may start from, the same each time."""
    return torch.arange(x.shape[-1], dtype=x.dtype, device=x.device).mul_(2.4).cos_()[None, :, None]


def _project(x: Tensor, tolerance: float, dtype: torch.dtype | None) -> Tensor:
    """Return the polar factors of a batch, each to `tolerance`; zeros stay zeros.

    Args:
        x: (B, n, m), float64.
        tolerance: bound on ||I - X X^T||_F, hence on max |s - 1|.
        dtype: of the composition's first attempt (later ones use float64), or None for eigendecompositions.
    """
    y, todo = torch.zeros_like(x), x.flatten(1).any(1)
    attempts: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [(x, _inverse_root)]
    if dtype is not None:
        precise = partial(_compose, steps=(*COMPOSITION, *POLISH), dtype=torch.float64, normalise=True)
        lift = partial(_compose, steps=LIFT, dtype=torch.float64)
        attempts = [(x, precise), (y, lift), (y, lift)]
        if dtype == torch.float32:
            attempts.insert(0, (x, partial(_compose, steps=COMPOSITION, dtype=dtype, normalise=True)))
    if x.device.type != "cpu":  # all at once, zeros too: which they are is fetched with the rest
        z = attempts.pop(0)[1](x)
        y.copy_(z)
        hard, zero = torch.stack([todo & ~_held(z, tolerance), ~todo]).tolist()
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
        todo = todo.masked_scatter(todo, ~_held(z, tolerance))
    for i in todo.nonzero().flatten():
        u, sigma, vh = torch.linalg.svd(x[i], full_matrices=False)
        rank_floor = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * sigma[0]
        y[i] = (u * (sigma > rank_floor)) @ vh
    return y


def _held(z: Tensor, tolerance: float) -> Tensor:
    """Tell of which matrices ||I - Z Z^T||_F is within the tolerance; of NaN it is not."""
    gram = z @ z.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.vector_norm(gram, dim=(-2, -1)) <= tolerance


def _inverse_root(x: Tensor) -> Tensor:
    """Return (x x^T)^(-1/2) x from the eigenvalues of x x^T.

    Its residual E = X X^T - I bounds the error, however ill-conditioned x is: X = P x with P symmetric, and in the
    eigenbasis of x x^T the error in P is E_ij / (s_i + s_j), so that ||X - Q||_F <= ||E||_F to first order.
    """
    squares, vectors = torch.linalg.eigh(x @ x.mT)
    return (vectors * squares.clamp_min(torch.finfo(x.dtype).tiny).rsqrt()[..., None, :]) @ vectors.mT @ x


def _compose(
    x: Tensor, steps: tuple[tuple[float, float, float], ...], dtype: torch.dtype, normalise: bool = False
) -> Tensor:
    """Apply odd quintics one after another, the first `DOUBLE_STEPS` to float64, the others to `dtype`."""
    for done, coefficients in enumerate(steps):
        x = step(x if done < DOUBLE_STEPS else x.to(dtype), *coefficients, normalise=normalise and done == 0)
    return x
