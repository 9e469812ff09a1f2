"""Matrices of known singular values, their decomposition in fp64, and the settings of products."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(rows: int, columns: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """Build a float64 matrix with the given singular values and random singular vectors."""
    u = torch.linalg.qr(gaussian(rows, len(sigma), seed=seed)).Q
    v = torch.linalg.qr(gaussian(columns, len(sigma), seed=seed + 1)).Q
    return (u * sigma.double()) @ v.mT


def decaying(rows: int, columns: int, condition: float = 1e4) -> Tensor:
    return with_spectrum(rows, columns, torch.logspace(0, -np.log10(condition), min(rows, columns)))


def svd(w: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return scipy.linalg.svd(w.double().numpy(), full_matrices=False, lapack_driver="gesdd")


def scalar_map(
    w: Tensor, iterations: int, decomposition: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the singular values (unsorted) and the matrix that the scalar map gives on an fp64 SVD."""
    u, sigma, vh = decomposition or svd(w)
    sigma = sigma / np.linalg.norm(sigma)
    for _ in range(iterations):
        sigma = 1.5 * sigma - 0.5 * sigma**3
    return torch.from_numpy(sigma), torch.from_numpy((u * sigma) @ vh)


def distance(x: Tensor, target: Tensor) -> float:
    return ((x.double() - target).norm() / target.norm()).item()


def product_settings() -> dict[str, object]:
    """Read every setting of torch's for products in fp32, by the older way and by the newer."""
    newer = {name: getattr(torch.backends, name).matmul.fp32_precision for name in ("cuda", "mkldnn")}
    convolutions = {name: getattr(torch.backends, name).conv.fp32_precision for name in ("cudnn", "mkldnn")}
    try:
        older = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # they contradict the newer ones
        older = None
    return {"matmul": newer, "conv": convolutions, "older": older}
