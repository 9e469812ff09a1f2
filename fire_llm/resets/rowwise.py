"""FIRE on a matrix too large for one owner: every rank keeps its rows, and only n × n Gram matrices travel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.distributed import Block, Placement, splits
from fire_llm.distributed.agree import wire_device
from fire_llm.linalg.matmul import exact_products
from fire_llm.linalg.measures import CHUNK_ELEMENTS, gram
from fire_llm.linalg.singular_values import singular_range
from fire_llm.resets.methods import fire_by_gram
from fire_llm.resets.report import Spectra, TensorReport, sigma_quantiles
from fire_llm.resets.spec import ResetSpec


def by_rows(
    block: Block, weight: ParameterSlice, actions: list[ResetSpec], placement: Placement, total_cost: int
) -> bool:
    """Return whether a block is reset where its rows are: one tall matrix, in shards, for FIRE's own map alone."""
    if placement.shards is None or placement.axis or len(block.members) != 1 or len(actions) != 1:
        return False
    if weight.spec is None or weight.spec.in_first or weight.kernel or weight.shape != weight.tensor.shape:
        return False
    if actions[0].method != "fire" or actions[0].options["solver"] != "newton-schulz":
        return False
    ranks = placement.n_shards * placement.n_replicas
    return splits(weight.shape, weight.tensor.element_size(), total_cost, ranks)


def reset_by_rows(
    weight: ParameterSlice, spec: ResetSpec, placement: Placement, spectra: Spectra
) -> TensorReport | None:
    """Reset one matrix: sum the ranks' Gram matrices, map the sum, multiply this rank's rows by the result.

    Every measure of the report follows from the Gram matrix and the map, so that no row is looked at again.

    Returns:
        The report; None where the result is not finite, and nothing was written.
    """
    tensor: Any = weight.tensor.detach()
    rows: Tensor = tensor.to_local()
    g = gram(rows).to(wire_device(placement.shards, rows.device))
    dist.all_reduce(g, group=placement.shards)
    g = g.to(rows.device)
    p = fire_by_gram(g, weight.shape[0], **spec.options)
    if not torch.isfinite(p).all():
        return None
    wide = torch.promote_types(rows.dtype, torch.float32)
    with exact_products(rows.device):
        for chunk in rows.split(max(1, 16 * CHUNK_ELEMENTS // max(1, rows.shape[1]))):
            chunk.copy_(chunk.to(wide) @ p.to(wide))
    identity = torch.eye(len(p), dtype=p.dtype, device=p.device)
    change = p - identity
    report = TensorReport.of(weight)
    report.sfe = float((change.mT @ g @ change).trace())
    for when, gram_then in (("before", g), ("after", p.mT @ g @ p)):
        setattr(report, f"norm_{when}", float(gram_then.trace().clamp_min(0).sqrt()))
        setattr(report, f"dfi_{when}", float((gram_then - identity).square().sum()))
        if spectra == "range":
            setattr(report, f"sigma_{when}", list(singular_range(gram_then.double())))
        elif spectra:
            sigma = torch.linalg.eigvalsh(gram_then).clamp_min(0).sqrt().flip(-1)
            setattr(report, f"sigma_{when}", sigma_quantiles(sigma))
    return report
