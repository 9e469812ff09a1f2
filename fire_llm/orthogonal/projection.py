"""The true polar factor.

Shapes: (..., out, in) at the surface; inside, a chunk is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fire_llm.errors import UserError
from fire_llm.orthogonal.paper_map import CUBIC
from fire_llm.orthogonal.products import check_dtype, check_matrix, chunks, exact_products, step, store

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
DOUBLE_STEPS = 2  # leading steps taken in fp64, while singular values of 1e-4 would drown in fp32's rounding

FAST_TOLERANCE = 1e-3  # from here on fp32 iterates are precise enough for `polar`
POLAR_FLOATS = (torch.float32, torch.float64)  # rounding W itself to bf16 moves its polar factor by up to 0.3


@torch.no_grad()
def polar(
    w: Tensor, tolerance: float = 1e-3, *, compute_dtype: torch.dtype | None = None, name: str = "matrix"
) -> Tensor:
    """Project onto the nearest matrix with orthonormal rows (or columns): the polar factor U V^T of w = U S V^T.

    On CPU, (w w^T)^(-1/2) w from the eigenvalues of the fp64 Gram matrix; elsewhere, or where `compute_dtype` is given,
    `COMPOSITION`. Either way ||I - X X^T||_F is measured, and a matrix where it exceeds `tolerance` is done again:
    float64, more steps, at last an SVD. Singular values under max(out, in) * 2.2e-16 of the largest count as zero, and
    their directions stay zero: a rank-deficient matrix gives the partial isometry, zeros give zeros.

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
    if compute_dtype is None and w.device.type != "cpu":
        compute_dtype = torch.float32 if tolerance >= FAST_TOLERANCE else torch.float64
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    with exact_products(w.device):
        for chunk, x, _ in chunks(w, torch.float64, name):
            store(out, chunk, _project(x, tolerance, compute_dtype))
    return out


def _project(x: Tensor, tolerance: float, dtype: torch.dtype | None) -> Tensor:
    """Return the polar factors of a batch, each to `tolerance`; zeros stay zeros.

    Args:
        x: (B, n, m), float64.
        tolerance: bound on ||I - X X^T||_F, hence on max |s - 1|.
        dtype: of the composition's first attempt (later ones use float64), or None for eigendecompositions.
    """
    y = torch.zeros_like(x)
    todo = x.flatten(1).any(1)
    attempts: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [(x, _inverse_root)]
    if dtype is not None:
        precise = partial(_compose, steps=(*COMPOSITION, *POLISH), dtype=torch.float64, normalise=True)
        lift = partial(_compose, steps=LIFT, dtype=torch.float64)
        attempts = [(x, precise), (y, lift), (y, lift)]
        if dtype == torch.float32:
            attempts.insert(0, (x, partial(_compose, steps=COMPOSITION, dtype=dtype, normalise=True)))
    for source, solve in attempts:
        if not todo.any():
            return y
        z = solve(source[todo])
        y[todo] = z.double()
        gram = z @ z.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        held = torch.linalg.vector_norm(gram, dim=(-2, -1)) <= tolerance  # NaN does not hold
        todo = todo.masked_scatter(todo, ~held)
    for i in todo.nonzero().flatten():
        u, sigma, vh = torch.linalg.svd(x[i], full_matrices=False)
        rank_floor = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * sigma[0]
        y[i] = (u * (sigma > rank_floor)) @ vh
    return y


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
