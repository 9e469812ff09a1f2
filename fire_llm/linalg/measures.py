"""Measure what a reset did to a matrix: distance moved (SFE), distance from orthogonality (DfI), effective ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.linalg.matmul import exact_products

CHUNK_ELEMENTS = 1 << 20  # entries converted to float64 at once, 8 MB
CACHED_ELEMENTS = 1 << 16  # the same, where they are to stay in a core's cache


@torch.no_grad()
def sfe(before: Tensor, after: Tensor) -> float:
    """Return the squared Frobenius error ||before - after||_F^2, accumulated in float64.

    Args:
        before: Tensor of any shape and floating dtype.
        after: Tensor of the same shape, any floating dtype.

    Raises:
        UserError: The shapes differ.

    Source: FIRE, arXiv 2602.08040, SFE, the measure of stability.
    """
    if before.shape != after.shape:
        raise UserError(f"sfe: shapes {tuple(before.shape)} and {tuple(after.shape)} differ; give one parameter, twice")
    return float(squared_error(before, after))


def squared_error(before: Tensor, after: Tensor) -> Tensor:
    """Return `sfe` of tensors of one shape as a float64 scalar on the device of `before`, which is not waited for."""
    total = torch.zeros((), dtype=torch.float64, device=before.device)
    if before.is_complex():
        before, after = torch.view_as_real(before), torch.view_as_real(after)
    size = CACHED_ELEMENTS if before.device.type == "cpu" else CHUNK_ELEMENTS
    for a, b in zip(*(torch.split(tensor.reshape(-1), size) for tensor in (before, after)), strict=True):
        total += (a.double() - b.to(a.device).double()).square_().sum()
    return total


@torch.no_grad()
def dfi(w: Tensor) -> float:
    """Return the deviation from isometry ||G - I||_F^2, accumulated in float64.

    G is the smaller Gram matrix: w^T w for a tall w, w w^T for a wide one.

    Args:
        w: (out, in), any floating dtype.

    Raises:
        UserError: `w` is not a matrix.

    Source: FIRE, arXiv 2602.08040, DfI, the measure of plasticity.
    """
    if w.ndim != 2:
        raise UserError(f"dfi: shape {tuple(w.shape)} is not a matrix; give (out, in), one matrix at a time")
    return float(dfi_of_gram(gram(w if w.shape[0] >= w.shape[1] else w.mT)))


def dfi_of_gram(g: Tensor) -> Tensor:
    """Return ||g - I||_F^2 of a Gram matrix (n, n), which is as it was afterwards; its device is not waited for."""
    diagonal = g.diagonal().clone()  # 1 taken away and added again would leave little of a small one
    g.diagonal().sub_(1)
    deviation = torch.dot(g.reshape(-1), g.reshape(-1))
    g.diagonal().copy_(diagonal)
    return deviation


@torch.no_grad()
def gram(w: Tensor) -> Tensor:
    """Return w^T w in float64, of a (rows, n) tensor of any floating dtype, a chunk of rows at a time.

    A chunk's product is float64 on a CPU. Most accelerators are slow at that: there it is float32 (relative error 1e-7)
    unless `w` is float64, and the chunks are summed in float64.
    """
    n = w.shape[1]
    products = torch.float64 if w.dtype == torch.float64 or w.device.type == "cpu" else torch.float32
    total = torch.zeros(n, n, dtype=torch.float64, device=w.device)
    with exact_products(w.device):
        for rows in torch.split(w, max(1, CHUNK_ELEMENTS // max(1, n), n if products == torch.float32 else 1)):
            rows = rows.to(products)
            total += rows.mT @ rows
    return total


def effective_rank(sigma: Tensor) -> float:
    """Return exp of the entropy of the singular values' shares, between 1 and their number; 0 where all are zero.

    Args:
        sigma: (n,) singular values, in any order.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.
    """
    sigma = sigma.double()
    total = sigma.sum()
    return float(torch.special.entr(sigma / total).sum().exp().item()) if total > 0 else 0.0


def srank(sigma: Tensor, delta: float = 0.01) -> int:
    """Return the least k whose k largest singular values sum to (1 - delta) of all; 0 where all are zero.

    Args:
        sigma: (n,) singular values, in any order.
        delta: Share that may be left out, 0 <= delta < 1.

    Source: Kumar et al., arXiv 2010.14498, srank_delta of a feature matrix.
    """
    sums = sigma.double().sort(descending=True).values.cumsum(0)
    if not sums.numel() or sums[-1] <= 0:
        return 0
    return int((sums < (1 - delta) * sums[-1]).sum().item()) + 1
