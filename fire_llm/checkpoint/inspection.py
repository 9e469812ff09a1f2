"""Measure the logical matrices of a checkpoint, alone or against another; both stay on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fire_llm.architectures.matrices import ParameterSlice, logical_matrices
from fire_llm.checkpoint import Stored
from fire_llm.checkpoint.source import Source
from fire_llm.core.errors import UserError
from fire_llm.core.progress import progress_bar
from fire_llm.linalg.measures import dfi, effective_rank, sfe
from fire_llm.linalg.singular_values import singular_values
from fire_llm.models import find_device
from fire_llm.resets import sigma_quantiles

SCHEMA_VERSION = 1
ROLES = ("attention", "mlp", "conv", "lm_head")
"""What is measured unless others are named."""


@dataclass(frozen=True)
class Inspected:
    """A checkpoint that was read."""

    name: str
    """As it was given: a folder or a Hub id."""
    revision: str | None
    """The Hub's commit; None for a folder."""
    sha256: str
    """Of the bytes of its weights' files, one after another in the order of their names."""

    @classmethod
    def of(cls, source: Source, progress: bool = False) -> Inspected:
        """Read the weights' files once more for their hash; they are still what was measured, or it is refused."""
        digest, bar = hashlib.sha256(), progress_bar("hashing", source.shard_bytes, "B", shown=progress)
        with bar:
            for name in source.shards:
                with source.copied[name].opened() as file:
                    while chunk := file.read(1 << 24):
                        digest.update(chunk)
                        bar.update(len(chunk))
        return cls(source.name, source.revision, digest.hexdigest())


@dataclass(frozen=True)
class Inspection:
    """What was measured of a checkpoint, alone or against another."""

    checkpoint: Inspected
    against: Inspected | None
    """What `sfe` and `cosine` compare it with."""
    device: str
    rows: list[dict[str, Any]]
    """One a logical matrix, or a convolution's kernel: shape, singular values, DfI, effective rank and norm."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `fire-llm inspect --json` writes."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


@torch.no_grad()
def inspect_checkpoint(
    checkpoint: str | Path,
    against: str | Path | None = None,
    roles: Iterable[str] = ROLES,
    progress: bool = True,
    device: str = "cpu",
    native: bool = False,
) -> Inspection:
    """Measure each logical matrix: shape, singular values, DfI, effective rank and norm.

    Memory holds one matrix (and what is fused with it) of either checkpoint at a time.

    Args:
        checkpoint: A folder or a Hub id.
        against: A second checkpoint of the same architecture; adds `sfe` and `cosine`.
        roles: Which matrices.
        progress: Show a progress bar.
        device: Where to compute: `cpu`, `cuda`, `cuda:1`, or `auto`, as in `find_device`.
        native: See `reset_checkpoint`.

    Raises:
        UserError: For an unreadable or unknown checkpoint, one of another architecture, or a matrix that is not finite.
    """
    wanted = (roles,) if isinstance(roles, str) else tuple(roles)
    stored, where = Stored.open(checkpoint, native=native), find_device(device)
    matrices = list(logical_matrices(stored.model, wanted))
    if not matrices:
        raise UserError(f"'{checkpoint}' holds no matrix of the roles {', '.join(wanted)}: choose others with --role")
    other = Stored.open(against, native=native) if against is not None else None
    pairs = {m.name: m for m in logical_matrices(other.model, wanted)} if other else {}
    for matrix in matrices:
        stored.check_readable(matrix)
        if other is not None:
            pair = pairs.get(matrix.name)
            if pair is None or pair.shape != matrix.shape:
                raise UserError(
                    f"'{against}' holds no '{matrix.name}' of shape {tuple(matrix.shape)}: another architecture"
                )
            other.check_readable(pair)
    rows, bar = [], progress_bar("inspecting", len(matrices), "matrix", shown=progress)
    for matrix in matrices:
        w = _weights(stored, matrix, where)
        shape = [*matrix.shape[-2:], *matrix.kernel]
        row = {"name": matrix.name, "role": matrix.role, "shape": shape, **_measures(w)}
        if other is not None:
            v = _weights(other, pairs[matrix.name], where)
            norms = torch.linalg.vector_norm(w, dtype=torch.float64) * torch.linalg.vector_norm(v, dtype=torch.float64)
            row |= {"sfe": sfe(v, w), "cosine": float((w.double() * v.double()).sum() / norms)}
        rows.append(row)
        bar.update()
    bar.close()
    reference = Inspected.of(other.source, progress) if other is not None else None
    return Inspection(Inspected.of(stored.source, progress), reference, str(where), rows)


def _weights(stored: Stored, matrix: ParameterSlice, device: torch.device) -> torch.Tensor:
    """Read a matrix, and refuse it where it has no singular values."""
    w = stored.loaded(matrix).read().to(device)
    if not torch.isfinite(w).all():
        raise UserError(f"'{matrix.name}' of '{stored.source.name}' holds NaN or infinity: it has no singular values")
    return w


def _measures(w: torch.Tensor) -> dict[str, Any]:
    """Measure a matrix, or all at the positions of a kernel: DfI is their sum, the effective rank their mean."""
    matrices = w[None] if w.ndim == 2 else w
    spectra = [singular_values(matrix) for matrix in matrices]
    sigma = spectra[0] if len(spectra) == 1 else torch.cat(spectra).sort(descending=True).values
    return {
        "sigma_min": float(sigma[-1]),
        "sigma_median": float(sigma.median()),
        "sigma_max": float(sigma[0]),
        "dfi": sum(dfi(matrix) for matrix in matrices),
        "effective_rank": sum(map(effective_rank, spectra)) / len(spectra),
        "norm": float(torch.linalg.vector_norm(sigma)),
        "sigma": sigma_quantiles(sigma),
    }
