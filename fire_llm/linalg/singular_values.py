"""Singular values: all of them, or the largest and the smallest alone.

Shapes: (..., out, in) at the surface; inside, a chunk is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fire_llm.linalg.matmul import check_matrix, chunks, exact_products
from fire_llm.linalg.measures import dfi_of_gram

EXACT_SIDE = 256  # up to this n all eigenvalues cost little
LANCZOS_STEPS = 96
LANCZOS_ERROR = 1e-3  # of the eigenvalue
HELD = {torch.float32: 1e-4, torch.float64: 1e-12}
"""Least square of smallest over largest that a Gram matrix keeps to a relative 1e-3, by the dtype of its products."""
RECTANGLE = 1.5  # m / n from which float32 products likely do
TILE = 384  # side of the blocks of a Gram matrix, of which those above the diagonal are not computed
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
def extent(w: Tensor) -> Extent:
    """Return the norm, DfI, and the largest and the smallest singular value of a finite matrix.

    Up to `EXACT_SIDE` all singular values are taken. Beyond, everything comes from half of the smaller Gram matrix: the
    range by Lanczos on it and, through its Cholesky factor, on its inverse. Of a rectangle its products are float32
    where that loses nothing, else float64; a smallest value that is lost in these too (below 1e-6 of the largest) comes
    from a QR factorisation of the matrix itself. The range is right to 1 %, as a rule to 1e-4; what is below 1e-13 of
    the largest is rounding.

    Args:
        w: (out, in), any floating dtype.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., 10.1.
    """
    x = w if w.shape[0] >= w.shape[1] else w.mT
    m, n = x.shape
    if n <= EXACT_SIDE:
        squares = singular_values(w).square()
        ends = (float(squares[0]), float(squares[-1])) if n else (0.0, 0.0)
        return Extent(float(squares.sum().sqrt()), float((squares - 1).square().sum()), *map(math.sqrt, ends))
    if w.dtype != torch.float64 and m >= RECTANGLE * n:
        g = _half_gram(x, torch.float32)
        squared, dfi = float(g.trace()), float(dfi_of_gram(g))
        # Near an isometry the rounding of float32 products would count.
        if 0 < squared < math.inf and dfi > 1e-4 * squared**2 / n:
            low = (g / squared).float()
            top, bottom = _lanczos(lambda v: low @ v, n, low, both=True)
            if bottom is not None and bottom > HELD[torch.float32] * top:
                return Extent(math.sqrt(squared), dfi, math.sqrt(top * squared), math.sqrt(bottom * squared))
    g = _half_gram(x, torch.float64)
    norm, dfi = math.sqrt(float(g.trace())), float(dfi_of_gram(g))
    largest, smallest = singular_range(g)
    if smallest is None:
        r = torch.linalg.qr(x.double(), mode="r").R
        smallest = 1 / _largest_inverse(r) if r.diagonal().all() else 0.0
    return Extent(norm, dfi, largest, smallest)


def _half_gram(x: Tensor, products: torch.dtype) -> Tensor:
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


@torch.no_grad()
def singular_range(gram: Tensor) -> tuple[float, float | None]:
    """Return the largest and the smallest singular value of a matrix, given its smaller Gram matrix.

    Args:
        gram: (n, n), symmetric, float64.

    Returns:
        Both, as right as in `extent`; None for a smallest value that is lost in the rounding of the Gram matrix.
    """
    squared = float(gram.trace())
    if squared <= 0:
        return 0.0, 0.0
    low = (gram / squared).float()
    top, _ = _lanczos(lambda v: low @ v, len(low), low)
    factor, failed = torch.linalg.cholesky_ex(gram)
    bottom = 0.0 if int(failed) else _largest_inverse(factor.mT) ** -2 / squared
    known = bottom > HELD[torch.float64] * top
    return math.sqrt(top * squared), math.sqrt(bottom * squared) if known else None


def _largest_inverse(r: Tensor) -> float:
    """Return the largest singular value of the inverse of an upper triangular matrix (n, n)."""

    def solve(v: Tensor) -> Tensor:  # ten times as fast as cholesky_solve, for one column
        half = torch.linalg.solve_triangular(r.mT, v[:, None], upper=False)
        found: Tensor = torch.linalg.solve_triangular(r, half, upper=True)
        return found[:, 0]

    return math.sqrt(_lanczos(solve, len(r), r)[0])


def _lanczos(
    multiply: Callable[[Tensor], Tensor], n: int, like: Tensor, *, both: bool = False
) -> tuple[float, float | None]:
    """Return the ends of the spectrum of a positive map.

    Args:
        multiply: The map, of a vector (n,).
        n: Its size.
        like: A tensor of the dtype and on the device of the vectors.
        both: Whether the smallest eigenvalue is wanted too.

    Returns:
        The largest, and the smallest eigenvalue where it is wanted, to a relative `LANCZOS_ERROR` by their residuals.
        After `LANCZOS_STEPS`, the largest as near as it came, and None.
    """
    v = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(like)
    steps = min(n, LANCZOS_STEPS)
    basis = v.new_empty(steps + 1, n)
    basis[0] = v / v.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        known = basis[: step + 1]
        w = multiply(known[-1])
        diagonal.append(float(w @ known[-1]))
        for _ in range(2):  # once is not enough in floating point
            w = w - known.mT @ (known @ w)
        beside.append(float(w.norm()))
        ended = step + 1 == n or beside[-1] <= 4 * torch.finfo(v.dtype).eps * max(diagonal)
        if ended or step % 6 == 5 or step + 1 == steps:
            values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside[:-1]))
            found = values.tolist()
            # An eigenvalue is as near as the residual, and as its square over the gap to the others.
            left = (beside[-1] * vectors[-1].abs()).tolist()
            gaps = (found[1] - found[0], found[-1] - found[-2]) if step else (0.0, 0.0)
            off = [min(left[i], left[i] ** 2 / gap if gap else math.inf) for i, gap in zip((0, -1), gaps, strict=True)]
            low, top = max(0.0, found[0]), max(0.0, found[-1])
            if ended or (off[1] <= LANCZOS_ERROR * top and not (both and off[0] > LANCZOS_ERROR * low)):
                return top, low if both else None
        basis[step + 1] = w / beside[-1]
    return top, None


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (diagonal, beside))
    return torch.diag(a) + torch.diag(b, 1) + torch.diag(b, -1)
