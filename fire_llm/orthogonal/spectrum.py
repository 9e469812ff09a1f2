"""Singular values.

Shapes: (..., out, in) at the surface; inside, a chunk is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fire_llm.orthogonal.products import check_matrix, chunks


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
