"""Orthogonalise matrices: the paper's Newton-Schulz map, the true polar factor, and singular values.

Shapes: (..., out, in) at the surface; inside, a chunk is (B = batch, n = short side, m = long side), n <= m.
`docs/newton-schulz.md` says what each function really computes and how precisely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from fire_llm.errors import UserError

CUBIC = (1.5, -0.5)  # x -> 1.5 x - 0.5 x^3

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
CHUNK_ELEMENTS = 1 << 26  # upper bound on a batch worked on at once, 256 MB in fp32
CPU_BATCH_SIDE = 128  # batched products beat a loop on CPU only up to this n
GRAM_RATIO = 1.5  # m / n from which iterating on the n x n Gram matrix costs less
LOW_PRECISION_SHARE = 0.2  # largest correction, relative to the iterate, that is computed in low precision
GRAM_STEPS = 5  # steps before the Gram matrix is formed anew: its rounding grows by 2.25 a step
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POLAR_FLOATS = (torch.float32, torch.float64)  # rounding W itself to bf16 moves its polar factor by up to 0.3


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
            float64 input, else float32.
        name: what error messages call `w`.

    Returns:
        A new contiguous tensor with the shape, dtype and device of `w`.

    Raises:
        UserError: `w` is not a floating-point matrix (or batch) or holds NaN or infinity; `iterations` is negative.

    Source: FIRE, arXiv 2602.08040, the Newton-Schulz approximation of W (W^T W)^(-1/2).
    """
    _check_matrix(w, name)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise UserError(f"iterations: {iterations!r} is not a number of steps; give an integer >= 0 (the paper uses 5)")
    _check_dtype(compute_dtype, FLOATS)
    products = compute_dtype or (torch.float64 if w.dtype == torch.float64 else torch.float32)
    iterate = torch.float64 if products == torch.float64 else torch.float32
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    with _exact_products(w.device):
        for chunk, x, _ in _chunks(w, iterate, name):
            x /= _positive(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)).to(iterate)
            if products != iterate:
                for _ in range(iterations):
                    x = _low_precision_cubic(x, products)
            elif x.shape[-1] < GRAM_RATIO * x.shape[-2]:
                for _ in range(iterations):
                    x = _step(x, *CUBIC)
            else:
                for done in range(0, iterations, GRAM_STEPS):
                    x = _gram_cubics(x, min(GRAM_STEPS, iterations - done))
            _store(out, chunk, x)
    return out


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
    _check_matrix(w, name)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance <= 0.1:
        raise UserError(f"tolerance: {tolerance!r} is outside (0, 0.1]; 1e-3 is the default, 1e-5 is tight")
    _check_dtype(compute_dtype, POLAR_FLOATS)
    if compute_dtype == torch.float32 and tolerance < FAST_TOLERANCE:
        raise UserError(
            f"compute_dtype: torch.float32 holds a tolerance of {FAST_TOLERANCE:g}, not {tolerance:g}; "
            "leave compute_dtype out, or give torch.float64"
        )
    if compute_dtype is None and w.device.type != "cpu":
        compute_dtype = torch.float32 if tolerance >= FAST_TOLERANCE else torch.float64
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    with _exact_products(w.device):
        for chunk, x, _ in _chunks(w, torch.float64, name):
            _store(out, chunk, _project(x, tolerance, compute_dtype))
    return out


@torch.no_grad()
def singular_values(w: Tensor) -> Tensor:
    """Return every singular value in float64, descending.

    Takes the eigenvalues of the fp64 Gram matrix (2 to 10 times faster than an SVD) where they lose nothing, that is
    where the smallest singular value exceeds 1e-5 of the largest (relative error then < 1e-7), else an SVD.

    Args:
        w: (..., out, in), any floating dtype; not modified.

    Returns:
        (..., min(out, in)), float64, on the device of `w`.

    Raises:
        UserError: `w` is not a floating-point matrix (or batch) or holds NaN or infinity.
    """
    _check_matrix(w, "matrix")
    out = w.new_empty((*w.shape[:-2], min(w.shape[-2:])), dtype=torch.float64)
    for chunk, batch, largest in _chunks(w, torch.float64, "matrix"):
        rows = out.view(-1, out.shape[-1])[chunk]
        for x, scale, row in zip(batch, largest, rows, strict=True):
            squares = torch.linalg.eigvalsh(x @ x.mT).flip(-1)
            exact = squares[-1] > 1e-10 * squares[0]
            sigma = squares.sqrt() if exact else torch.linalg.svdvals(torch.linalg.qr(x.mT, mode="r").R)
            torch.mul(sigma, scale.squeeze(), out=row)
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
    for done, step in enumerate(steps):
        x = _step(x if done < DOUBLE_STEPS else x.to(dtype), *step, normalise=normalise and done == 0)
    return x


def _step(x: Tensor, a: float, b: float, c: float = 0.0, *, normalise: bool = False) -> Tensor:
    """Return a x + b (x x^T) x + c (x x^T)^2 x, of x or of x over its Schatten-8 norm.

    The Schatten-8 norm (tr (x x^T)^4)^(1/8) bounds the largest singular value from above as the Frobenius norm does,
    exceeds it 1.0 to 2 times instead of up to sqrt(n) times, and is free where (x x^T)^2 is formed anyway.
    """
    gram = x @ x.mT
    squared = gram @ gram if c else None
    if normalise and squared is not None:
        norm = torch.linalg.vector_norm(squared, dim=(-2, -1), keepdim=True) ** 0.25
        x, gram, squared = x / norm, gram / norm**2, squared / norm**4
    polynomial = gram.mul_(b) if squared is None else gram.mul_(b).add_(squared, alpha=c)
    return _add_product(x, a, polynomial)


def _add_product(x: Tensor, a: float, symmetric: Tensor) -> Tensor:
    """Return a x + symmetric @ x in the memory layout of x: a tall matrix is never transposed in memory."""
    if x.mT.is_contiguous():
        return torch.baddbmm(x.mT, x.mT, symmetric, beta=a).mT
    return torch.baddbmm(x, symmetric, x, beta=a)


def _gram_cubics(x: Tensor, steps: int) -> Tensor:
    """Return `steps` cubic steps of x, iterating on its n x n Gram matrix and multiplying x once, at the end.

    Costs 2 m/n + 3 steps - 3 products of n x n matrices; `_step` costs 2 m/n a step. The product of the factors is
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
    return _add_product(x, diagonal, rest)


def _low_precision_cubic(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one cubic step of x, its two products on operands rounded to `dtype` where that costs under 5e-4.

    The rounding is relative to the correction (x x^T) x. Where few singular values dominate and the correction is no
    longer small beside x, the step is taken in the dtype of x.
    """
    low = x.to(dtype)
    correction = ((low @ low.mT) @ low).to(x.dtype)
    size = torch.linalg.vector_norm(correction, dim=(-2, -1)) / torch.linalg.vector_norm(x, dim=(-2, -1))
    out = torch.add(x * CUBIC[0], correction, alpha=CUBIC[1])
    heavy = size > LOW_PRECISION_SHARE
    if heavy.any():
        out[heavy] = _step(x[heavy], *CUBIC)
    return out


def _chunks(w: Tensor, dtype: torch.dtype, name: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (slice of the flattened batch, x, largest): x = w / largest as a new (B, n, m) tensor, n <= m.

    `largest` (B, 1, 1) is the largest absolute entry of each matrix (1 for zeros), so that no later square or sum
    overflows or underflows, whatever the scale of `w`.
    """
    if not w.numel():
        return
    batch = w.reshape(-1, *w.shape[-2:])
    n, m = sorted(w.shape[-2:])
    count = 1 if w.device.type == "cpu" and n > CPU_BATCH_SIDE else max(1, CHUNK_ELEMENTS // (n * m))
    for start in range(0, len(batch), count):
        chunk = slice(start, start + count)
        x = batch[chunk].to(torch.promote_types(w.dtype, dtype))
        largest = torch.linalg.vector_norm(x, torch.inf, dim=(-2, -1), keepdim=True)
        bad = (~largest.isfinite()).flatten().nonzero()
        if len(bad):
            index = torch.unravel_index(bad[0] + start, w.shape[:-2]) if w.ndim > 2 else ()
            which = name + (f"[{', '.join(str(i.item()) for i in index)}]" if index else "")
            raise UserError(
                f"{which}: holds NaN or infinity, which would spread to the whole matrix; "
                "reset from an earlier checkpoint, or leave this matrix out"
            )
        largest = _positive(largest)
        x = (x / largest).to(dtype)
        yield chunk, x if w.shape[-2] == n else x.mT, largest


def _store(out: Tensor, chunk: slice, x: Tensor) -> None:
    """Write a chunk of results (B, n, m) into the contiguous batch it belongs to, in its dtype and orientation."""
    batch = out.view(-1, *out.shape[-2:])
    batch[chunk] = (x if batch.shape[-2:] == x.shape[-2:] else x.mT).to(out.dtype)


def _positive(x: Tensor) -> Tensor:
    """Return x with 1 in place of 0, so that a division by it keeps zeros zero."""
    return torch.where(x == 0, 1, x)


def _check_matrix(w: Tensor, name: str) -> None:
    """Refuse what is not a floating-point matrix or a batch of them."""
    if w.dtype not in FLOATS:
        raise UserError(f"{name}: dtype {w.dtype} cannot be orthogonalised; convert it to torch.float32 first")
    if w.ndim < 2:
        raise UserError(f"{name}: shape {tuple(w.shape)} is not a matrix; give (out, in) or a batch (..., out, in)")


def _check_dtype(dtype: torch.dtype | None, allowed: tuple[torch.dtype, ...]) -> None:
    """Refuse a compute dtype that the function cannot work in."""
    if dtype is not None and dtype not in allowed:
        raise UserError(f"compute_dtype: {dtype} is not one of {', '.join(map(str, allowed))}")


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and bf16 shortcuts out of the products inside; afterwards every setting is as it was."""
    # torch's annotations leave mkldnn.matmul out.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
