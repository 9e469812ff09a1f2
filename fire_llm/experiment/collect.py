"""Read the results of a run off its checkpoints, so that a process that was killed takes no results with it."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fire_llm
from fire_llm.core.atomic import AVERAGED
from fire_llm.core.compat import installed
from fire_llm.core.errors import UserError
from fire_llm.core.hardware import resolve_precision
from fire_llm.core.hashing import hash_file
from fire_llm.core.manifest import STATES, read_state, trainer_state, weights_hash
from fire_llm.evaluation.diagnose import LOG_PREFIX
from fire_llm.evaluation.measurement import first_token, token_text
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.estimate import state_of
from fire_llm.experiment.stages import (
    REPORT,
    Stage,
    final_checkpoint,
    kept_checkpoints,
    labelled_checkpoint,
    read_unit,
    step_behind,
)
from fire_llm.models import describe, model_on_meta, pretrained_config
from fire_llm.reporting.schema import (
    SCHEMA_VERSION,
    Arm,
    CorpusSize,
    CurveEntry,
    Diagnostics,
    Hardware,
    LossJump,
    Measurement,
    ModelSummary,
    ResetEntry,
    Results,
    Run,
    Sample,
    Scores,
    Start,
    Throughput,
    Versions,
)
from fire_llm.training.contract import MEASURED
from fire_llm.training.generating import BEFORE, PROMPTS, SAMPLES
from fire_llm.training.loss_jump import loss_jump
from fire_llm.training.nonfinite import SKIPPED
from fire_llm.training.recycling import RECYCLED
from fire_llm.training.throughput import MEASURES


def collect(stages: list[Stage], run: RunContext, *, texts: bool = True) -> Results:
    """Read the results of every finished stage of a run off its checkpoints (schema: docs/results-schema.md).

    Args:
        stages: All stages of the run.
        run: The run that they belong to.
        texts: Read the tokenizer and the texts too; they are made if they do not exist yet.
    """
    recipe = run.recipe
    finished: list[Stage] = []
    for stage in stages:  # parents before children
        if final_checkpoint(run.folder / stage.folder) and (stage.parent is None or stage.parent in finished):
            finished.append(stage)
    last = next((phase for phase in reversed(recipe.phases) if phase.arms), None)
    compared = [stage for stage in finished if last is not None and stage.phase.name == last.name]
    arms: dict[str, list[Stage]] = {}
    for stage in compared:
        arms.setdefault(stage.arm or "", []).append(stage)
    model = model_on_meta(run.config if texts else run.planned_config)
    heaviest = {p.name: max(p.data, key=p.data.__getitem__) for p in recipe.phases}
    return Results(
        schema_version=SCHEMA_VERSION,
        name=recipe.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        hardware=hardware(),
        model=ModelSummary(parameters=sum(p.numel() for p in model.parameters()), description=describe(model)),
        corpora={name: _corpus_size(name, run) for name in recipe.corpus_names()} if texts else {},
        measurement=_measurement(run) if texts else None,
        phase_corpus=heaviest,
        phases=[_run(stage) for stage in finished if stage not in compared],
        arms_phase=last.name if last else None,
        first_corpus=heaviest[recipe.phases[0].name],
        new_corpus=heaviest[(last or recipe.phases[-1]).name],
        arms={name: _arm(stages) for name, stages in arms.items()},
        unfinished={s.folder: state_of(run.folder / s.folder) for s in stages if s not in finished},
    )


def _corpus_size(name: str, run: RunContext) -> CorpusSize:
    train = run.tokens(name, "train") if any(name in phase.data for phase in run.recipe.phases) else None
    held_out = run.tokens(name, "validation") if name in run.recipe.evaluated() else None
    return CorpusSize(
        train_tokens=train.n_tokens if train else None,
        validation_tokens=held_out.n_tokens if held_out else None,
        validation_bytes=held_out.n_bytes if held_out else None,
    )


def _measurement(run: RunContext) -> Measurement:
    """Return how every perplexity of the run was measured."""
    prefix = first_token(run.tokenizer)
    return Measurement(
        precision="fp32" if run.recipe.evaluate.precision == "fp32" else resolve_precision(run.recipe.precision),
        context=run.sequence_length,
        stride=run.sequence_length,
        per_document=False,
        prefix=prefix,
        prefix_text=token_text(run.tokenizer, prefix),
    )


def _run(stage: Stage) -> Run:
    """Return the results of one finished stage."""
    run = stage.run
    path = run.folder / stage.folder
    final = final_checkpoint(path)
    assert final is not None
    state, continual = (read_state(final, name) for name in STATES)
    history, per_step = state["log_history"], run.recipe.batch.tokens_per_step
    curve = _curve(history, per_step)
    start, jump = None, {}
    if stage.parent is not None:
        origin = labelled_checkpoint(run.folder / stage.parent.folder, stage.start)
        parent = stage.parent
        start = Start(phase=parent.phase.name, arm=parent.arm, checkpoint=stage.start, step=step_behind(origin))
        if stage.arm:
            jump = _loss_jump(measured_nll(origin), curve, pretrained_config(final).get_text_config().vocab_size)
    report = path / REPORT
    if report.exists() and (read_unit(path) or {}).get("reset", hash_file(report)) != hash_file(report):
        raise UserError(f"'{report}' is not what was written: put back a copy, or delete '{path}' to train it again")
    return Run(
        phase=stage.phase.name,
        arm=stage.arm,
        seed=stage.seed,
        start=start,
        steps=state["global_step"],
        planned_steps=state["max_steps"] if continual.get("stopped") else None,
        tokens_per_step=per_step,
        seconds=round(continual["seconds"], 2),
        batches_hash=f"{continual['batches_hash'] & (2**64 - 1):016x}",
        checkpoint=str(final.relative_to(run.folder)),
        weights=_weights(stage),
        curve=curve,
        diagnosed_on=run.recipe.diagnosed(stage.phase) if run.recipe.evaluate.diagnostics_every_steps else None,
        final=next(entry.eval for entry in reversed(curve) if entry.eval),
        final_ema=next((entry.ema for entry in reversed(curve) if entry.ema), {}),
        throughput=[
            Throughput.model_validate({"step": log["step"], **{measure: log.get(measure) for measure in MEASURES}})
            for log in history
            if "loss" in log
        ],
        skipped_steps=max((log.get(SKIPPED, 0) for log in history), default=0),
        recycled_units=max((log.get(RECYCLED, 0) for log in history), default=0),
        loss_jump=jump,
        reset=_reset_entry(report) if report.exists() else None,
        samples=_samples(history),
    )


def _samples(history: list[dict[str, Any]]) -> list[Sample]:
    """Return the texts that a stage's model wrote."""
    return [
        Sample(step=log["step"], before_reset=log[BEFORE], prompt=prompt, text=text)
        for log in history
        if SAMPLES in log
        for prompt, text in zip(log[PROMPTS], log[SAMPLES], strict=True)
    ]


def _weights(stage: Stage) -> dict[str, str]:
    """Return the hashes of the weights that a finished stage kept, by checkpoint."""
    hashes = {str(path.relative_to(stage.run.folder)): weights_hash(path) for path in kept_checkpoints(stage)}
    return {path: weights for path, weights in hashes.items() if weights is not None}


def _reset_entry(report: Path) -> ResetEntry:
    try:
        return ResetEntry.model_validate_json(report.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{report}' is damaged: put back a copy of it, or delete '{report.parent}' to train that stage again"
        ) from error


def measured_nll(checkpoint: Path) -> dict[str, float]:
    """Return the held-out NLL of a checkpoint from its log, by corpus; empty if it was not evaluated at its step."""
    averaged, state = checkpoint.name == AVERAGED, trainer_state(checkpoint)
    entry = next((e for e in _curve(state["log_history"], 0) if e.step == state["global_step"]), None)
    scores = {} if entry is None else entry.ema if averaged else entry.eval
    return {corpus: score.nll for corpus, score in scores.items() if score.nll is not None}


def _loss_jump(before: dict[str, float], curve: list[CurveEntry], vocabulary: int) -> dict[str, LossJump]:
    """Return, by corpus, by how much the reset raised the loss, and at which evaluated step it was as low again."""
    jumps = {}
    for corpus, nll in before.items():
        measured = [(e.step, e.eval[corpus].nll) for e in curve if corpus in e.eval]
        after = next((value for step, value in measured if step == 0), None)
        if after is not None:
            regained = next((step for step, value in measured if value is not None and value <= nll), None)
            jumps[corpus] = LossJump.model_validate({**loss_jump(nll, after, vocabulary), "regained_at_step": regained})
    return jumps


def _curve(history: list[dict[str, Any]], tokens_per_step: int) -> list[CurveEntry]:
    """Turn the trainer's log into one entry a step."""
    entries: dict[int, dict[str, Any]] = {}
    for log in history:
        if SAMPLES in log:
            continue
        step = log["step"]
        entry = entries.setdefault(step, {"step": step, "tokens": step * tokens_per_step, "eval": {}, "ema": {}})
        if "loss" in log:
            entry |= {"train_loss": log["loss"], "learning_rate": log.get("learning_rate")}
        for key, value in log.items():
            weights, _, rest = key.partition("_")
            measure = next((name for name in MEASURED if rest.endswith(f"_{name}")), None)
            if weights in ("eval", "ema") and rest != "nll" and measure:
                entry[weights].setdefault(rest.removesuffix(f"_{measure}"), {})[measure] = value
        if diagnostics := {key[len(LOG_PREFIX) :]: value for key, value in log.items() if key.startswith(LOG_PREFIX)}:
            entry["diagnostics"] = diagnostics
    return [CurveEntry.model_validate(entries[step]) for step in sorted(entries)]


def _arm(stages: list[Stage]) -> Arm:
    """Return the results of one arm: those of each seed, and their means."""
    runs = [_run(stage) for stage in stages]
    return Arm(
        label="; ".join(r.label() for r in stages[0].resets),
        methods=[r.method for r in stages[0].resets],
        final=mean_finals(runs),
        curve=runs[0].curve
        if len(runs) == 1
        else [_mean_entry(entries) for entries in zip(*(run.curve for run in runs), strict=False)],
        runs=runs,
    )


def mean_finals(runs: Sequence[Run]) -> dict[str, Scores]:
    """Return, by corpus, the final scores of several seeds as their mean."""
    return {corpus: _mean_scores([run.final[corpus] for run in runs]) for corpus in runs[0].final}


def _mean_scores(values: Sequence[Scores]) -> Scores:
    """Return one corpus's scores of several seeds as their mean, with the standard deviation of their NLL."""
    nll = [v.nll for v in values if v.nll is not None]
    mean = _mean([v.nll for v in values])
    return Scores(
        nll=mean,
        perplexity=None if mean is None else math.exp(min(mean, 700.0)),
        bits_per_byte=_mean([v.bits_per_byte for v in values if v.bits_per_byte is not None]),
        tokens=values[0].tokens,
        nll_std=float(np.std(nll, ddof=1)) if mean is not None and len(nll) > 1 else None,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean over all seeds; None if one lacks the number."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _mean_entry(entries: Sequence[CurveEntry]) -> CurveEntry:
    diagnostics = [e.diagnostics for e in entries if e.diagnostics is not None]
    measures = {key: _mean([getattr(d, key) for d in diagnostics]) for key in Diagnostics.model_fields}
    return CurveEntry(
        step=entries[0].step,
        tokens=entries[0].tokens,
        learning_rate=entries[0].learning_rate,
        train_loss=_mean([e.train_loss for e in entries]),
        eval={c: _mean_scores([e.eval[c] for e in entries]) for c in entries[0].eval},
        ema={c: _mean_scores([e.ema[c] for e in entries]) for c in entries[0].ema if all(c in e.ema for e in entries)},
        diagnostics=Diagnostics(**measures) if len(diagnostics) == len(entries) else None,
    )


def versions() -> Versions:
    """Return the versions that results depend on; None for a library without metadata."""
    libraries = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    named = {name: installed(name) for name in libraries}
    return Versions(fire_llm=fire_llm.__version__, **named, python=platform.python_version(), git=_git_hash())


def _git_hash() -> str | None:
    """Return the commit of the checkout that this code runs from, None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def hardware() -> Hardware:
    """Return the machine that this process runs on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if sys.platform != "win32" else 0.0
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Hardware(cpu=cpu, cores=os.cpu_count(), memory_gib=round(memory, 1), accelerator=accelerator)
