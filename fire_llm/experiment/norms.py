"""Compute before training how the arms of a recipe change the norms of the checkpoint that it starts from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fire_llm.checkpoint import Stored
from fire_llm.core.errors import UserError
from fire_llm.distributed.balance import FLOPS_PER_COST, cost
from fire_llm.experiment.stages import Stage
from fire_llm.resets import RESETS, ResetSpec
from fire_llm.resets.norms import norm_warning, sets_norms
from fire_llm.resets.plan import Plan
from fire_llm.resets.report import TensorReport

MOST_MATRICES = 16
"""So many of the matrices that an arm resets are sampled, evenly spread."""

MOST_FLOPS = 1e12
"""The most operations for all samples, a few seconds on a CPU: larger matrices are left out."""


def norm_warnings(stages: Iterable[Stage]) -> list[str]:
    """Return a warning for each arm that changes the norms of a checkpoint in a folder by more than half.

    Args:
        stages: The stages of one run or several.
    """
    stored: dict[str, Stored] = {}
    warnings: dict[str, None] = {}
    for stage in {(stage.run, stage.phase.name, stage.arm): stage for stage in stages if stage.arm}.values():
        folder = str(stage.run.recipe.model.checkpoint)
        specs = [spec for spec in stage.resets if spec.kind == "transition"]
        if not sets_norms(specs) or not Path(folder).is_dir():
            continue
        try:
            if folder not in stored:
                stored[folder] = Stored.open(folder)
            warning = norm_warning(specs, _sample(stored[folder], specs))
        except UserError:  # a checkpoint that cannot be read is refused where it is loaded
            continue
        if warning is not None:
            warnings[f"phase '{stage.phase.name}', arm '{stage.arm}', by the weights of '{folder}': {warning}"] = None
    return list(warnings)


@torch.no_grad()
def _sample(stored: Stored, specs: list[ResetSpec]) -> list[TensorReport]:
    """Reset some of the matrices in memory, and report their norms before and after."""
    plan = Plan.of(stored.model, specs, None)
    touched = [(weight, actions) for weight, actions in zip(plan.slices, plan.actions, strict=True) if actions]
    rows = []
    most_flops = MOST_FLOPS / MOST_MATRICES
    for weight, actions in touched[:: max(1, -(-len(touched) // MOST_MATRICES))]:
        if FLOPS_PER_COST * cost(weight.shape) > most_flops or weight.parameter not in stored.places.of:
            continue
        x = stored.loaded(weight).read().float()
        if not torch.isfinite(x).all():  # the reset itself refuses it
            continue
        row = TensorReport.of(weight)
        row.norm_before = float(torch.linalg.vector_norm(x))
        for spec in actions:
            x = RESETS[spec.method].act(x, options=spec.options, kernel=weight.kernel)
        row.norm_after = float(torch.linalg.vector_norm(x))
        rows.append(row)
    return rows
