"""Estimate what running a recipe would take, before anything runs: tokens, steps, FLOPs, disk, memory, hours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations
from os.path import isdir
from pathlib import Path
from typing import Any

import torch

from fire_llm.architectures.matrices import hidden_matrices, logical_matrices
from fire_llm.core import hardware
from fire_llm.core.atomic import AVERAGED_BYTES, BYTES_A_PARAMETER, checkpoints
from fire_llm.core.console import show_table
from fire_llm.core.errors import UserError, check_all
from fire_llm.core.flops import PEAK_FLOPS, flops_per_token
from fire_llm.core.hardware import resolve_precision
from fire_llm.core.terminal import open_console
from fire_llm.data.corpora import SPLITS
from fire_llm.experiment.batch import phase_steps, split_batch
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.generation import check_prompts
from fire_llm.experiment.memory import Training, peak_bytes
from fire_llm.experiment.norms import norm_warnings
from fire_llm.experiment.recipe import OptimizerSection, PhaseSection, Recipe, doubts, optimizer_of
from fire_llm.experiment.stages import Stage, changes_without_text, check_resets, expand, final_checkpoint, select
from fire_llm.models import check_fits, describe, load_tokenizer, model_on_meta

TRAINING_BYTES = BYTES_A_PARAMETER + 4
"""Bytes of a parameter while training: what a checkpoint holds, and the gradient in fp32."""

BYTES_A_TOKEN = 4.2
"""About how many UTF-8 bytes of English text a byte-level BPE puts into a token; for phases counted in epochs."""

MACHINES = (("H100", 1), ("A100", 8), ("H100", 8))
"""Hours and memory are estimated for these devices of 80 GB, and this many of them."""

MACHINE_BYTES = 80 * 10**9

ROOM = int(0.9 * MACHINE_BYTES)
"""Bytes that a step may hold: the allocator's slack, CUDA's context and NCCL's buffers take the rest."""

SHARDS, CHECKPOINTED, SYNC, ONE_SEQUENCE, OFFLOAD = CHANGES = (
    "--accelerate-config fsdp2",
    "gradient_checkpointing: true",
    "sync_each_batch: true",
    "batch.sequences_per_device: 1",
    "fsdp_offload_params: true",
)
"""Changes that reduce the memory of a step, the cheapest first; the last is a key of accelerate's configuration."""

MFU = 0.3
"""The share of a device's peak that training is assumed to reach.

Source: nanoGPT trains GPT-2 124M for 600,000 steps of 491,520 tokens in about 4 days on eight A100s, which is 0.29.
"""

LOGITS_HELD = 2**29
"""The most logits in memory at once on 80 GB: the loss takes slices of this size (`training.loss`), except in fp16."""


def plan(recipe: Recipe, output: str | Path | None = None, arms: Iterable[str] = ()) -> dict[str, Any]:
    """Return the plan as data: the stages with steps, tokens and FLOPs, and the totals.

    Steps counted in epochs are estimated from the bytes of the corpora; they are None if those are not known. No text
    is read. A stage's `key` is the same in the plans of trials that share it.

    Raises:
        UserError: An arm cannot reset or train the model, as far as its config shows; or the tokens of a step do not
            divide into sequences.
    """
    run = RunContext(recipe, output)
    model = model_on_meta(run.planned_config)
    stages = select(expand(run), arms)
    check_all(
        lambda: split_batch(run, 1, memory=0),  # a batch that one process cannot divide, several cannot
        lambda: _check_tokenizer(run),
        lambda: _check_tokens(run),
        lambda: _check_trackers(recipe),
        lambda: check_resets(stages),
        lambda: _check_recycling(stages, model),
    )
    parameters = sum(p.numel() for p in model.parameters())
    # If a token's operations cannot be counted exactly (experts, state spaces), 6 a parameter are not too few.
    flops_a_token = flops_per_token(model, run.sequence_length) or 6 * parameters
    rows: list[dict[str, Any]] = []
    begun_otherwise: list[str] = []
    for stage in stages:
        steps = _steps(stage)
        folder = run.folder / stage.folder
        if changed := changes_without_text(folder, stage):
            begun_otherwise.append(f"'{folder}' was begun with another recipe ({'; '.join(changed)})")
        tokens = steps * recipe.batch.tokens_per_step if steps is not None else None
        rows.append(
            {
                "stage": stage.folder,
                "reset": "; ".join(r.label() for r in stage.resets) or "-",
                "steps": steps,
                "estimated": stage.phase.epochs is not None,
                "tokens": tokens,
                "flops": tokens * flops_a_token if tokens is not None else None,
                "state": "begun with another recipe" if changed else state_of(folder),
                "key": stage.key(stage.outline),
            }
        )
    averaged = AVERAGED_BYTES if any(phase.ema for phase in recipe.phases) else 0
    disk = sum(
        (1 + len(stage.phase.keep)) * (BYTES_A_PARAMETER + (AVERAGED_BYTES if stage.phase.ema else 0))
        for stage in stages
    )
    return {
        "model": describe(model),
        "precision": resolve_precision(recipe.precision),
        "optimizer": _optimizer(recipe.optimizer, model),
        "schedule": _schedule(recipe.optimizer),
        "own": [*(own for phase in recipe.phases if (own := _own_settings(recipe, phase, model))), *_pushed(recipe)],
        "stages": rows,
        "warnings": [*norm_warnings(stages), *(f"{one}: run refuses it in that folder" for one in begun_otherwise)],
        "machines": _machines(run, BYTES_A_PARAMETER + averaged, sum(row["flops"] or 0 for row in rows)),
        "disk_bytes": disk * parameters,
        "memory_bytes": parameters * (TRAINING_BYTES + averaged),
    }


def _check_tokenizer(run: RunContext) -> None:
    """Compare a tokenizer in a folder, and the prompts, with the model; one on the Hub is compared at loading."""
    recipe = run.recipe
    place = (recipe.tokenizer and recipe.tokenizer.path) or (None if run.tokenizer_corpora else recipe.model.checkpoint)
    if place and isdir(place):
        check_fits(run.planned_config, load_tokenizer(place), recipe.model.context)
        check_prompts(run)


def _check_tokens(run: RunContext) -> None:
    """Check the headers of files that are tokenised already; their tokens are checked later, with the tokenizer."""
    vocabulary = run.planned_config.get_text_config().vocab_size
    files = [files for name in run.recipe.corpus_names() if (files := run.corpus(name).pretokenized)]
    splits = ((given, split) for given in files for split in (SPLITS if given.validation else ("train",)))
    check_all(*(partial(given.sources, split, vocabulary) for given, split in splits))


def _check_trackers(recipe: Recipe) -> None:
    if recipe.report_to:
        from fire_llm.training.trackers import check_trackers  # the trainer takes seconds to import

        check_trackers(recipe.report_to, recipe.name)


def _check_recycling(stages: Iterable[Stage], model: Any) -> None:
    if recycling := [r for stage in stages for r in stage.resets if r.kind == "recycling"]:
        from fire_llm.training.recycling import recycled_layers  # the trainer takes seconds to import

        for spec in recycling:
            recycled_layers(model, spec)


def _machines(run: RunContext, at_rest: int, flops: float) -> list[dict[str, Any]]:
    """Return hours and memory on each of `MACHINES` whose number of devices divides the batch; in 16 bits only.

    Args:
        run: The run.
        at_rest: Bytes of a parameter between steps, in fp32.
        flops: The operations of all stages.
    """
    if run.recipe.precision == "fp32" or run.sizes is None:
        return []
    work = flops * (4 / 3 if run.recipe.gradient_checkpointing else 1)  # the forward pass, a third, is repeated
    machines = []
    for device, count in MACHINES:
        try:
            held = memory_bytes(run, count, at_rest)
        except UserError:
            continue
        machines.append(
            {
                "name": f"{count}×{device}",
                "hours": work / (count * PEAK_FLOPS[device] * MFU) / 3600,
                "memory_bytes": held,
                "shards_bytes": memory_bytes(run, count, at_rest, [SHARDS]) if count > 1 else None,
                "fits": held <= ROOM,
                "would_fit": None if held <= ROOM else would_fit(run, count, at_rest),
            }
        )
    return machines


def memory_bytes(run: RunContext, count: int, at_rest: int, changes: Iterable[str] = ()) -> int:
    """Return the bytes that each of some GPUs of 80 GB holds at the peak of a step.

    Args:
        run: The run.
        count: How many GPUs: replicas, or shards of FSDP2.
        at_rest: Bytes of a parameter between steps, in fp32.
        changes: Those of `CHANGES` that are made to the recipe or to the command.

    Raises:
        UserError: The batch does not divide.
    """
    recipe, changes = run.recipe, set(changes)
    checkpointed = recipe.gradient_checkpointing or CHECKPOINTED in changes
    sequences, passes = split_batch(run, count, memory=MACHINE_BYTES, checkpointed=checkpointed)
    if ONE_SEQUENCE in changes:
        sequences, passes = 1, sequences * passes
    assert run.sizes is not None
    tokens = sequences * run.sequence_length
    logits = tokens * run.sizes.vocabulary
    shards = count if changes & {SHARDS, OFFLOAD} else 0
    compiled = recipe.compile is not False and not shards
    return peak_bytes(
        run.sizes,
        Training(
            tokens,
            logits if recipe.precision == "fp16" else min(logits, LOGITS_HELD),
            accumulated=passes > 1,
            narrow=recipe.precision == "bf16-params",
            checkpointed=checkpointed,
            compiled=compiled,
            at_rest=at_rest,
            a_logit=4 if compiled and recipe.precision != "fp16" else 8,
            replicas=count > 1,
            shards=shards,
            offload=OFFLOAD in changes,
            reduce_bytes=2 if recipe.reduce_precision == "bf16" else 4,
            sync_each_batch=recipe.sync_each_batch or SYNC in changes,
        ),
    )


def would_fit(run: RunContext, count: int, at_rest: int) -> str:
    """Return in words the fewest changes with which a step fits GPUs of 80 GB, and how much memory it then takes."""
    recipe = run.recipe
    useless = {
        CHECKPOINTED: recipe.gradient_checkpointing or recipe.precision == "bf16-params",
        SYNC: recipe.sync_each_batch,
        ONE_SEQUENCE: recipe.batch.sequences_per_device == 1,
    }
    possible = [change for change in CHANGES if not useless.get(change)]
    for number in range(1, len(possible) + 1):
        for some in combinations(possible, number):
            # Without shards each rank holds whole gradients, whenever they are added up.
            if (SYNC in some or OFFLOAD in some) and SHARDS not in some:
                continue
            if (held := memory_bytes(run, count, at_rest, some)) <= ROOM:
                return f"fits with {' and '.join(some)}: {held / 1e9:.2g} GB"
    return "does not fit, whatever is set: take more GPUs, or a smaller model"


def _own_settings(recipe: Recipe, phase: PhaseSection, model: Any) -> str:
    """Return in words how a phase differs from the recipe: optimizer, average, early end; empty if it does not."""
    section = optimizer_of(recipe, phase)
    parts = []
    if section != recipe.optimizer:
        parts += [_optimizer(section, model), _schedule(section)]
    if phase.optimizer_state == "kept":
        parts.append("begins with the optimizer's state of what it starts from")
    if phase.ema is not None:
        parts.append(f"weights averaged (decay {phase.ema.decay:g}), {AVERAGED_BYTES} more bytes a parameter")
    if (stop := phase.stop) is not None:
        by = f"by more than {stop.min_delta:g} " if stop.min_delta else ""
        parts.append(f"ends early where the NLL of {stop.corpus} has not fallen {by}for {stop.patience} evaluation(s)")
    return f"phase {phase.name}: {'; '.join(parts)}" if parts else ""


def _pushed(recipe: Recipe) -> list[str]:
    """Return in words what is pushed where; empty if nothing is."""
    if (hub := recipe.hub) is None:
        return []
    what = {"end": "the final checkpoint", "best": "the best checkpoint", "every save": "every checkpoint"}[hub.push]
    seen = "private" if hub.private else "public where it is made"
    return [f"pushed to {hub.repo} ({seen}): {what} of each stage, to a branch {recipe.name}/STAGE"]


def _optimizer(section: OptimizerSection, model: Any) -> str:
    """Return in words which optimizer trains what.

    Raises:
        UserError: It is Muon, and the layout of the model is unknown.
    """
    if section.name != "muon":
        return section.name
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    hidden = hidden_matrices(model)
    by_muon = sum(sizes[name] for name in hidden)
    stacks = {p.parameter for p in logical_matrices(model) if p.spec is not None and p.spec.index is not None}
    among = f", {len(stacks)} stacks of experts among them" if stacks else ""
    rest = sum(sizes.values()) - by_muon
    emulated = not torch.accelerator.is_available() and not hardware.cpu_has_bf16()
    slow = "; Muon multiplies in bf16, which this CPU emulates: its steps will be slow" if emulated else ""
    return f"muon for {len(hidden)} matrices ({by_muon:,} parameters), adamw for the rest ({rest:,}{among}){slow}"


def _schedule(section: OptimizerSection) -> str:
    """Return in words how the learning rate changes in a phase."""
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


def _steps(stage: Stage) -> int | None:
    tokens_per_step = stage.run.recipe.batch.tokens_per_step
    if stage.phase.epochs is None:
        return phase_steps(stage.phase, tokens_per_step, 0)
    sizes = [_approximate_tokens(stage.run, name) for name in stage.phase.data]
    if any(size is None for size in sizes):
        return None
    limit = stage.phase.max_corpus_tokens or math.inf
    return phase_steps(stage.phase, tokens_per_step, int(sum(min(size or 0, limit) for size in sizes)))


def _approximate_tokens(run: RunContext, name: str) -> float | None:
    """Return about how many tokens a corpus trains on, without reading it; None if that is unknown."""
    corpus = run.corpus(name)
    if corpus.pretokenized is None:
        return None if corpus.approximate_bytes is None else corpus.approximate_bytes / BYTES_A_TOKEN
    sources = corpus.pretokenized.sources("train", run.planned_config.get_text_config().vocab_size)
    return sum(source.tokens() for source in sources) * (1 - corpus.pretokenized.holdout)


def state_of(folder: Path) -> str:
    """Return in words how far a stage is."""
    if final_checkpoint(folder) is not None:
        return "finished"
    complete = checkpoints(folder)
    return f"resumes at step {complete[-1][1]}" if complete else "to do"


def print_plan(recipe: Recipe, output: str | Path | None = None, arms: Iterable[str] = ()) -> None:
    """Print the plan as a table with totals."""
    from rich.markup import escape
    from rich.table import Table

    planned = plan(recipe, output, arms)
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "reset"):
        table.add_column(column, overflow="fold")
    for column in ("steps", "tokens", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state")
    for row in planned["stages"]:
        steps = "by corpus size" if row["steps"] is None else f"{'≈ ' if row['estimated'] else ''}{row['steps']:,}"
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
        flops = f"{row['flops']:.2g}" if row["flops"] else ""
        table.add_row(escape(row["stage"]), escape(row["reset"]), steps, tokens, flops, escape(row["state"]))
    print(f"recipe {recipe.name}: no fault found")
    for doubt in doubts(recipe):
        print(doubt)
    print(f"model: {planned['model']}; precision {planned['precision']}; seeds {recipe.seed}")
    print(f"optimizer: {planned['optimizer']}")
    print("\n".join([f"schedule {planned['schedule']}", *planned["own"]]))
    for warning in planned["warnings"]:
        print(f"warning: {warning}")
    show_table(open_console(), table)
    print(
        f"{totals(planned['stages'])}; "
        f"disk ≈ {planned['disk_bytes'] / 1e9:.2g} GB of checkpoints; "
        f"memory ≈ {planned['memory_bytes'] / 1e9:.2g} GB a process, without activations"
    )
    machines = [machine for machine in planned["machines"] if machine["hours"] * 60 >= 1]
    hours = [f"{machine['name']} ≈ {_duration(machine['hours'])}, {_gigabytes(machine)}" for machine in machines]
    if hours:
        print(f"at {MFU:.0%} of the 16-bit peak, evaluation left out: {'; '.join(hours)}")
    for machine in machines:
        if not machine["fits"]:
            print(f"{machine['name']} of {MACHINE_BYTES / 1e9:.0f} GB: {machine['would_fit']}")


def _gigabytes(machine: dict[str, Any]) -> str:
    """Return in words how much a GPU holds at the peak of a step."""
    in_shards = machine["shards_bytes"]
    suffix = "" if in_shards is None else f" ({in_shards / 1e9:.3g} in shards)"
    return f"{machine['memory_bytes'] / 1e9:.3g} GB a GPU{suffix}"


def totals(rows: Sequence[dict[str, Any]]) -> str:
    """Return in words how many tokens and FLOPs the rows of a plan take together."""
    tokens, flops = (sum(row[what] or 0 for row in rows) for what in ("tokens", "flops"))
    unknown = "" if all(row["steps"] is not None for row in rows) else " and the phases counted in epochs"
    return f"in all: {tokens:,} tokens, {flops:.2g} FLOPs{unknown}"


def _duration(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 2 else f"{hours * 60:.0f} min"
