"""Measure the logical matrices of a checkpoint, alone or against another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fire_llm.errors import UserError
from fire_llm.layout import logical_matrices
from fire_llm.metrics import dfi, effective_rank, sfe
from fire_llm.models import load_model
from fire_llm.orthogonal import singular_values
from fire_llm.resets import sigma_quantiles

COLUMNS = ("sigma_min", "sigma_median", "sigma_max", "dfi", "effective_rank", "norm")


def inspect_checkpoint(
    checkpoint: str | Path,
    against: str | Path | None = None,
    roles: Iterable[str] = ("attention", "mlp", "lm_head"),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Return one row a logical matrix: shape, singular values, DfI, effective rank and norm.

    Args:
        checkpoint: A folder or a Hub id.
        against: A second checkpoint of the same architecture; adds `sfe` and `cosine`.
        roles: Which matrices.
        progress: Show a progress bar.

    Raises:
        UserError: For an unreadable or unknown checkpoint, or one of another architecture.
    """
    from tqdm.auto import tqdm

    matrices = list(logical_matrices(load_model(checkpoint), tuple(roles)))
    others = {m.name: m for m in logical_matrices(load_model(against), tuple(roles))} if against else {}
    rows = []
    for matrix in tqdm(matrices, desc="inspecting", unit="matrix", disable=not progress, leave=False, delay=1):
        w = matrix.read()
        if not torch.isfinite(w).all():
            raise UserError(f"'{matrix.name}' of '{checkpoint}' holds NaN or infinity: it has no singular values")
        sigma = singular_values(w)
        row: dict[str, Any] = {
            "name": matrix.name,
            "role": matrix.role,
            "shape": list(matrix.shape),
            "sigma_min": float(sigma[-1]),
            "sigma_median": float(sigma.median()),
            "sigma_max": float(sigma[0]),
            "dfi": dfi(w),
            "effective_rank": effective_rank(sigma),
            "norm": float(torch.linalg.vector_norm(sigma)),
            "sigma": sigma_quantiles(sigma),
        }
        if against is not None:
            other = others.get(matrix.name)
            if other is None or other.shape != matrix.shape:
                raise UserError(
                    f"'{against}' holds no '{matrix.name}' of shape {tuple(matrix.shape)}: another architecture"
                )
            v = other.read()
            row["sfe"] = sfe(v, w)
            row["cosine"] = float((w.double() * v.double()).sum() / (w.double().norm() * v.double().norm()))
        rows.append(row)
    return rows


def print_inspection(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    columns = [*COLUMNS, *(c for c in ("sfe", "cosine") if c in rows[0])]
    table = Table(box=None, pad_edge=False)
    table.add_column("matrix", overflow="fold")
    for column in ("shape", *columns):
        table.add_column(column.replace("_", " ").replace("sigma", "σ"), justify="right")
    for row in rows:
        shape = "×".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, *(f"{row[c]:.4g}" for c in columns))
    Console().print(table)
