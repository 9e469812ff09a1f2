"""Say what running a recipe would take, before anything runs: tokens, steps, FLOPs, disk, memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fire_llm.layout import hidden_matrices, logical_matrices
from fire_llm.models import describe, model_on_meta
from fire_llm.recipe import Recipe
from fire_llm.staging import checkpoints
from fire_llm.units import (
    Unit,
    config_of,
    context_of,
    corpus_of,
    cpu_has_bf16,
    expand,
    final_checkpoint,
    phase_steps,
    resolve_precision,
    select,
)

BYTES_A_PARAMETER = {"checkpoint": 12, "training": 16}
"""Weights and AdamW's two moments, all in fp32; with gradients while training."""

BYTES_A_TOKEN = 4.2
"""UTF-8 bytes of English text that a byte-level BPE puts into a token, about; for phases counted in epochs."""


def plan(recipe: Recipe, output: str | Path | None = None, arms: Iterable[str] = ()) -> dict[str, Any]:
    """Return the plan as data: the units with steps, tokens and FLOPs, and the totals.

    Steps counted in epochs are estimated from the bytes of the corpora; None where those are not known.
    """
    folder = Path(output or Path("runs") / recipe.name)
    config = config_of(recipe)
    model = model_on_meta(config)
    parameters = sum(p.numel() for p in model.parameters())
    text = config.get_text_config()
    # 6 N for the matrices, 12·L·d·T for attention's scores, a token. Source: PaLM, arXiv 2204.02311, appendix B.
    flops_a_token = 6 * parameters + 12 * text.num_hidden_layers * text.hidden_size * context_of(recipe, config)
    units = select(expand(recipe), arms)
    rows = []
    for unit in units:
        steps = _steps(recipe, unit)
        tokens = steps * recipe.batch.tokens_per_step if steps is not None else None
        rows.append(
            {
                "unit": unit.folder,
                "reset": "; ".join(r.label() for r in unit.resets) or "-",
                "steps": steps,
                "estimated": unit.phase.epochs is not None,
                "tokens": tokens,
                "flops": tokens * flops_a_token if tokens is not None else None,
                "state": _state(folder, unit),
            }
        )
    kept = sum(1 + len(u.phase.keep) for u in units)
    return {
        "model": describe(model),
        "precision": resolve_precision(recipe.precision),
        "optimizer": _optimizer(recipe, model),
        "schedule": _schedule(recipe),
        "units": rows,
        "disk_bytes": kept * parameters * BYTES_A_PARAMETER["checkpoint"],
        "memory_bytes": parameters * BYTES_A_PARAMETER["training"],
    }


def _optimizer(recipe: Recipe, model: Any) -> str:
    """Say which optimizer trains what.

    Raises:
        UserError: Muon is asked for, and the layout of the model is unknown.
    """
    if recipe.optimizer.name != "muon":
        return recipe.optimizer.name
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    hidden = hidden_matrices(model)
    own = sum(sizes[name] for name in hidden)
    stacks = {p.parameter for p in logical_matrices(model) if p.cut is not None and p.cut.index is not None}
    among = f", {len(stacks)} stacks of experts among them" if stacks else ""
    rest = sum(sizes.values()) - own
    emulated = not torch.accelerator.is_available() and not cpu_has_bf16()
    slow = "; Muon multiplies in bf16, which this CPU emulates: its steps will be slow" if emulated else ""
    return f"muon for {len(hidden)} matrices ({own:,} parameters), adamw for the rest ({rest:,}{among}){slow}"


def _schedule(recipe: Recipe) -> str:
    """Say how the learning rate goes in every phase."""
    section = recipe.optimizer
    parts = [f"up to {section.lr:g} in {section.warmup:.0%} of the steps (at most {section.max_warmup_steps})"]
    if section.schedule == "cosine":
        parts.append(f"a cosine down to {section.min_lr:g}")
    elif section.schedule == "infinite":
        parts.append(f"{section.cooldown:.0%} a cosine down to {section.constant_lr:g}")
    if section.schedule != "cosine":
        parts.append("constant")
    if section.schedule in ("wsd", "infinite"):
        parts.append(f"the last {section.decay:.0%} {section.shape} to {section.min_lr:g}")
    return f"{section.schedule}: {', '.join(parts)}"


def _steps(recipe: Recipe, unit: Unit) -> int | None:
    if unit.phase.epochs is None:
        return phase_steps(unit.phase, recipe.batch.tokens_per_step, 0)
    sizes = [corpus_of(recipe, name).approximate_bytes for name in unit.phase.data]
    if any(size is None for size in sizes):
        return None
    limit = unit.phase.max_corpus_tokens or math.inf
    total = int(sum(min((size or 0) / BYTES_A_TOKEN, limit) for size in sizes))
    return phase_steps(unit.phase, recipe.batch.tokens_per_step, total)


def _state(folder: Path, unit: Unit) -> str:
    path = folder / unit.folder
    if final_checkpoint(path) is not None:
        return "finished"
    whole = checkpoints(path)
    return f"resumes at step {whole[-1][1]}" if whole else "to do"


def print_plan(recipe: Recipe, output: str | Path | None = None, arms: Iterable[str] = ()) -> None:
    """Print the plan as a table with totals."""
    from rich.console import Console
    from rich.table import Table

    planned = plan(recipe, output, arms)
    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("unit", "reset"):
        table.add_column(column, overflow="fold")
    for column in ("steps", "tokens", "FLOPs"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for row in planned["units"]:
        steps = "by corpus size" if row["steps"] is None else f"{'≈ ' if row['estimated'] else ''}{row['steps']:,}"
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
        table.add_row(
            row["unit"], row["reset"], steps, tokens, f"{row['flops']:.2g}" if row["flops"] else "", row["state"]
        )
    console.print(f"recipe {recipe.name}: no fault found")
    console.print(f"model: {planned['model']}; precision {planned['precision']}; seeds {recipe.seed}")
    console.print(f"optimizer: {planned['optimizer']}")
    console.print(f"schedule {planned['schedule']}")
    console.print(table)
    total = sum(row["tokens"] or 0 for row in planned["units"])
    flops = sum(row["flops"] or 0 for row in planned["units"])
    unknown = "" if all(row["steps"] is not None for row in planned["units"]) else " and the phases counted in epochs"
    console.print(
        f"in all: {total:,} tokens, {flops:.2g} FLOPs{unknown}; "
        f"disk ≈ {planned['disk_bytes'] / 1e9:.2g} GB of checkpoints; "
        f"memory ≈ {planned['memory_bytes'] / 1e9:.2g} GB a process, without activations"
    )
