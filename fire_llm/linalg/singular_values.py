"""Singular values: all of them, or the largest and the smallest alone.

Shapes: (..., out, in) at the surface; inside, a chunk is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fire_llm.linalg.matmul import check_matrix, chunks, exact_products
from fire_llm.linalg.measures import dfi_of_gram

EXACT_SIDE = 256  # up to this n all eigenvalues cost little
LANCZOS_STEPS = 96
LANCZOS_ERROR = 1e-3  # of the eigenvalue
GRAM_LEAST_RATIO = {torch.float32: 1e-4, torch.float64: 1e-12}
"""By the dtype of its products: the least (smallest / largest)^2 that a Gram matrix keeps to a relative 1e-3."""
LU_LEAST_RATIO = {False: 1e-4, True: 3e-6}
"""Without and with a refinement: the least smallest / largest that LU factors in float32 keep to a relative 1e-3."""
AGREEMENT = 1e-2  # relative
TILE = 256  # side of the blocks of a Gram matrix, of which those above the diagonal are not computed
ROWS_ELEMENTS = 1 << 22  # entries whose products are summed in one go, 32 MB in float64


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
    check_matrix(w, "matrix")
    out = w.new_empty((*w.shape[:-2], min(w.shape[-2:])), dtype=torch.float64)
    for chunk, batch, largest in chunks(w, torch.float64, "matrix"):
        rows = out.view(-1, out.shape[-1])[chunk]
        for x, scale, row in zip(batch, largest, rows, strict=True):
            squares = torch.linalg.eigvalsh(x @ x.mT).flip(-1)
            exact = squares[-1] > 1e-10 * squares[0]
            sigma = squares.sqrt() if exact else torch.linalg.svdvals(torch.linalg.qr(x.mT, mode="r").R)
            torch.mul(sigma, scale.squeeze(), out=row)
    return out


class Extent(NamedTuple):
    """Measures of a matrix that need no whole spectrum."""

    norm: float
    """Frobenius norm."""
    dfi: float
    largest: float
    """Largest singular value."""
    smallest: float


@torch.no_grad()
def extent(w: Tensor, known: Tensor | None = None) -> Extent:
    """Return the norm, DfI, and the largest and the smallest singular value of a finite matrix.

    Up to a side of `EXACT_SIDE` all singular values are taken. Beyond, the smaller Gram matrix gives everything, of
    float32 products where they lose nothing. Lanczos on it gives the largest singular value. Lanczos on its inverse
    gives the smallest: by the Cholesky factor of the Gram matrix, or for a square matrix by its own LU factors in
    float32. A smallest value that is lost there comes from a Gram matrix of float64 products. If that loses it too
    (below 1e-6 of the largest), it comes from a QR factorisation of the matrix. The range is right to 1 %, as a rule to
    1e-4; what is below 1e-13 of the largest is rounding.

    Args:
        w: (out, in), any floating dtype.
        known: (n, n), its smaller Gram matrix of float32 products, where something else has computed that.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., 10.1.
    """
    x = w if w.shape[0] >= w.shape[1] else w.mT
    m, n = x.shape
    if n <= EXACT_SIDE:
        squares = singular_values(w).square()
        ends = (float(squares[0]), float(squares[-1])) if n else (0.0, 0.0)
        return Extent(float(squares.sum().sqrt()), float((squares - 1).square().sum()), *map(math.sqrt, ends))
    g, norm, dfi, products = _isometry(x, known)
    if products == torch.float32:
        largest, smallest = _square_range(x, g) if m == n else singular_range(g, products)
        if smallest is not None:
            return Extent(norm, dfi, largest, smallest)
        g = _gram_by_tiles(x, torch.float64)
    largest, smallest = singular_range(g)
    if smallest is None:
        r = torch.linalg.qr(x.double(), mode="r").R
        smallest = 1 / _largest_inverse(r) if r.diagonal().all() else 0.0
    return Extent(norm, dfi, largest, smallest)


@torch.no_grad()
def norm_and_dfi(w: Tensor, known: Tensor | None = None) -> tuple[float, float]:
    """Return the norm and DfI of a finite matrix; arguments as in `extent`."""
    _, norm, dfi, _ = _isometry(w if w.shape[0] >= w.shape[1] else w.mT, known)
    return norm, dfi


def _isometry(x: Tensor, known: Tensor | None) -> tuple[Tensor, float, float, torch.dtype]:
    """Return the Gram matrix (n, n) of a tall x in float64, the norm, DfI, and the dtype of the products."""
    if x.dtype != torch.float64:
        g = _gram_by_tiles(x, torch.float32) if known is None else known.double()
        squared, dfi = float(g.trace()), float(dfi_of_gram(g))
        # Near an isometry the rounding of float32 products would count.
        if 0 < squared < math.inf and dfi > 1e-4 * squared**2 / len(g):
            return g, math.sqrt(squared), dfi, torch.float32
    g = _gram_by_tiles(x, torch.float64)
    return g, math.sqrt(float(g.trace())), float(dfi_of_gram(g)), torch.float64


def _gram_by_tiles(x: Tensor, products: torch.dtype) -> Tensor:
    """Return x^T x (n, n) of a tall x in float64, of which the blocks above the diagonal are copies of those below."""
    n = x.shape[1]
    total = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    starts = range(0, n, TILE)
    with exact_products(x.device):
        for rows in torch.split(x, max(TILE, ROWS_ELEMENTS // n)):
            rows = rows.to(products)
            for start in starts:
                total[start : start + TILE, : start + TILE] += (
                    rows[:, start : start + TILE].mT @ rows[:, : start + TILE]
                )
    for start in starts:
        total[:start, start : start + TILE] = total[start : start + TILE, :start].mT
    return total


def _square_range(x: Tensor, gram: Tensor) -> tuple[float, float | None]:
    """Return the largest and the smallest singular value of a square matrix; None for one that float32 does not hold.

    Lanczos on the inverse, by LU factors, gives the smallest one and its vector. The length of x times that vector is
    off by the square of the vector's error alone. Where it is too small for that, or the two do not agree to
    `AGREEMENT`, each solution is refined by a step.

    Args:
        x: (n, n).
        gram: (n, n), x^T x in float64, of float32 products.
    """
    squared = float(gram.trace())
    top = _largest(gram, squared)
    a = x.float() / math.sqrt(squared)
    rows = torch.split(x, max(1, ROWS_ELEMENTS // len(x)))
    with exact_products(x.device):
        factors, pivots, failed = torch.linalg.lu_factor_ex(a)

        def solve(v: Tensor, refined: bool, adjoint: bool) -> Tensor:
            solution: Tensor = torch.linalg.lu_solve(factors, pivots, v, adjoint=adjoint)
            if refined:
                residual = v - (a.mT if adjoint else a) @ solution
                solution += torch.linalg.lu_solve(factors, pivots, residual, adjoint=adjoint)
            return solution

        def inverse(v: Tensor, refined: bool) -> Tensor:
            return solve(solve(v[:, None], refined, True), refined, False)[:, 0]

        for refined, least in LU_LEAST_RATIO.items() if not int(failed) else ():
            largest_inverse, vector = _lanczos(partial(inverse, refined=refined), len(a), a)
            by_lanczos = math.sqrt(squared / largest_inverse) if largest_inverse > 0 else math.inf
            vector = inverse(vector, refined).double()  # which leaves nothing of large singular values
            vector /= vector.norm()
            smallest = math.sqrt(sum(float((part.double() @ vector).square().sum()) for part in rows))
            if smallest > least * top and abs(by_lanczos - smallest) < AGREEMENT * smallest:
                return top, smallest
    return top, None


@torch.no_grad()
def singular_range(gram: Tensor, products: torch.dtype = torch.float64) -> tuple[float, float | None]:
    """Return the largest and the smallest singular value of a matrix, given its smaller Gram matrix.

    Args:
        gram: (n, n), symmetric, float64.
        products: The dtype of the products that it was formed by, which says how precise it is.

    Returns:
        Both, as right as in `extent`; None for a smallest value that is lost in the rounding of the Gram matrix.
    """
    squared = float(gram.trace())
    if squared <= 0:
        return 0.0, 0.0
    top = _largest(gram, squared)
    factor, failed = torch.linalg.cholesky_ex(gram)
    bottom = 0.0 if int(failed) else 1 / _largest_inverse(factor.mT)
    return top, bottom if bottom**2 > GRAM_LEAST_RATIO[products] * top**2 else None


def _largest(gram: Tensor, squared: float) -> float:
    """Return the largest singular value of a matrix, given its Gram matrix and the trace of that."""
    low = (gram / squared).float()
    return math.sqrt(_lanczos(lambda v: low @ v, len(low), low)[0] * squared)


def _largest_inverse(r: Tensor) -> float:
    """Return the largest singular value of the inverse of an upper triangular matrix (n, n)."""

    def solve(v: Tensor) -> Tensor:  # ten times as fast as cholesky_solve, for one column
        half = torch.linalg.solve_triangular(r.mT, v[:, None], upper=False)
        solution: Tensor = torch.linalg.solve_triangular(r, half, upper=True)
        return solution[:, 0]

    return math.sqrt(_lanczos(solve, len(r), r)[0])


def _lanczos(multiply: Callable[[Tensor], Tensor], n: int, like: Tensor) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of a positive map.

    Args:
        multiply: The map, of a vector (n,).
        n: Its size.
        like: A tensor of the dtype and on the device of the vectors.

    Returns:
        The eigenvalue, to a relative `LANCZOS_ERROR` by its residual or as near as `LANCZOS_STEPS` come, infinity
        where the map gave no finite number; its vector (n,).
    """
    v = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(like)
    steps = min(n, LANCZOS_STEPS)
    basis = v.new_empty(steps + 1, n)
    basis[0] = v / v.norm()
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for step in range(steps):
        known = basis[: step + 1]
        w = multiply(known[-1])
        diagonal.append(float(w @ known[-1]))
        if not math.isfinite(diagonal[-1]):
            return math.inf, known[-1]
        for _ in range(2):  # once is not enough in floating point
            w = w - known.mT @ (known @ w)
        off_diagonal.append(float(w.norm()))
        ended = step + 1 == n or off_diagonal[-1] <= 4 * torch.finfo(v.dtype).eps * max(diagonal)
        if ended or step % 3 == 2 or step + 1 == steps:
            values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off_diagonal[:-1]))
            top = max(0.0, float(values[-1]))
            # An eigenvalue is as near as the residual, and as its square over the gap to the others.
            residual = off_diagonal[-1] * float(vectors[-1, -1].abs())
            gap = float(values[-1] - values[-2]) if step else 0.0
            error = min(residual, residual * residual / gap if gap else math.inf)
            if ended or step + 1 == steps or error <= LANCZOS_ERROR * top:
                break
        basis[step + 1] = w / off_diagonal[-1]
    return top, known.mT @ vectors[:, -1].to(known)


def _tridiagonal(diagonal: list[float], off_diagonal: list[float]) -> Tensor:
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (diagonal, off_diagonal))
    return torch.diag(a) + torch.diag(b, 1) + torch.diag(b, -1)
