"""Read the results of a run off its checkpoints, so that nothing a killed process held in memory is missed."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fire_llm
from fire_llm.core.atomic import CONTINUAL_STATE, step_of
from fire_llm.core.compat import installed
from fire_llm.core.hardware import resolve_precision
from fire_llm.evaluation.diagnose import LOG_PREFIX
from fire_llm.evaluation.measurement import first_token, token_text
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.recipe import Recipe
from fire_llm.experiment.stages import Stage, final_checkpoint, labelled_checkpoint
from fire_llm.models import describe, model_on_meta
from fire_llm.training.loss_jump import loss_jump
from fire_llm.training.nonfinite import SKIPPED
from fire_llm.training.recycling import RECYCLED
from fire_llm.training.throughput import MEASURES

SCHEMA_VERSION = 1


def collect(recipe: Recipe, stages: list[Stage], folder: Path, run: RunContext) -> dict[str, Any]:
    """Read the results of every finished stage off its checkpoints (schema: docs/results-schema.md)."""
    finished = [u for u in stages if final_checkpoint(folder / u.folder)]
    armed = [phase for phase in recipe.phases if phase.arms]
    last = armed[-1] if armed else None
    compared = [u for u in finished if last is not None and u.phase.name == last.name]
    arms: dict[str, list[Stage]] = {}
    for stage in compared:
        arms.setdefault(stage.arm or "", []).append(stage)
    model = model_on_meta(run.config)
    heaviest = {p.name: max(p.data, key=p.data.__getitem__) for p in recipe.phases}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": recipe.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "versions": versions(),
        "hardware": hardware(),
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "description": describe(model),
        },
        "corpora": {
            name: {
                "train_tokens": run.tokens(name, "train").n_tokens if name in _trained(recipe) else None,
                "validation_tokens": run.tokens(name, "validation").n_tokens if name in recipe.evaluated() else None,
                "validation_bytes": run.tokens(name, "validation").n_bytes if name in recipe.evaluated() else None,
            }
            for name in recipe.corpus_names()
        },
        "measured": _measured(recipe, run),
        "phases": [_stage_results(recipe, u, folder, run) for u in finished if u not in compared],
        "arms_phase": last.name if last else None,
        "first_corpus": heaviest[recipe.phases[0].name],
        "new_corpus": heaviest[(last or recipe.phases[-1]).name],
        "arms": {name: _arm_results(recipe, stages, folder, run) for name, stages in arms.items()},
    }


def _measured(recipe: Recipe, run: RunContext) -> dict[str, Any]:
    """Return how every perplexity of the run was measured."""
    prefix = first_token(run.tokenizer)
    return {
        "precision": "fp32" if recipe.evaluate.precision == "fp32" else resolve_precision(recipe.precision),
        "context": run.sequence_length,
        "stride": run.sequence_length,
        "per_document": False,
        "prefix": prefix,
        "prefix_text": token_text(run.tokenizer, prefix),
    }


def _trained(recipe: Recipe) -> set[str]:
    return {name for phase in recipe.phases for name in phase.data}


def _stage_results(recipe: Recipe, stage: Stage, folder: Path, run: RunContext) -> dict[str, Any]:
    path = folder / stage.folder
    final = final_checkpoint(path)
    assert final is not None
    state = json.loads((final / "trainer_state.json").read_text(encoding="utf-8"))
    own = json.loads((final / CONTINUAL_STATE).read_text(encoding="utf-8"))
    per_step = stage.spec["batch"]["tokens_per_step"]
    curve = _curve(state["log_history"], per_step)
    result = {
        "phase": stage.phase.name,
        "arm": stage.arm,
        "seed": stage.seed,
        "start": None,
        "steps": state["global_step"],
        "tokens_per_step": per_step,
        "seconds": round(own["seconds"], 2),
        "batches_hash": f"{own['batches_hash'] & (2**64 - 1):016x}",
        "checkpoint": str(final.relative_to(folder)),
        "curve": curve,
        "diagnosed_on": recipe.diagnosed(stage.phase) if recipe.evaluate.diagnostics_every_steps else None,
        "final": next(entry["eval"] for entry in reversed(curve) if entry["eval"]),
        "speed": [
            {"step": log["step"], **{measure: log.get(measure) for measure in MEASURES}}
            for log in state["log_history"]
            if "loss" in log
        ],
        "skipped_steps": max((log.get(SKIPPED, 0) for log in state["log_history"]), default=0),
        "recycled": max((log.get(RECYCLED, 0) for log in state["log_history"]), default=0),
    }
    if stage.parent is not None:
        origin = labelled_checkpoint(folder / stage.parent.folder, stage.start)
        step = step_of(origin)
        parent = {"phase": stage.parent.phase.name, "arm": stage.parent.arm}
        result["start"] = {**parent, "checkpoint": stage.start, "step": step}
        if stage.arm:
            result["spike"] = _loss_jump(measured_nll(origin), curve, run.config.get_text_config().vocab_size)
    if (path / "reset.json").exists():
        result["reset"] = json.loads((path / "reset.json").read_text(encoding="utf-8"))
    return result


def measured_nll(checkpoint: Path) -> dict[str, float]:
    """Return the NLL that a checkpoint was measured at when it was written, by corpus; empty where it was not."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    entries = [entry for entry in _curve(state["log_history"], 0) if entry["step"] == state["global_step"]]
    return {corpus: measures["nll"] for entry in entries for corpus, measures in entry["eval"].items()}


def _loss_jump(before: dict[str, float], curve: list[dict[str, Any]], vocabulary: int) -> dict[str, Any]:
    """Return, by corpus, what the reset did to the loss, and the first evaluated step at which that was made good."""
    evaluated = [entry for entry in curve if entry["eval"]]
    found = {}
    for corpus, nll in before.items():
        after = next((e["eval"][corpus]["nll"] for e in evaluated if e["step"] == 0 and corpus in e["eval"]), None)
        if after is not None:
            regained = (e["step"] for e in evaluated if corpus in e["eval"] and e["eval"][corpus]["nll"] <= nll)
            found[corpus] = {**loss_jump(nll, after, vocabulary), "regained_at_step": next(regained, None)}
    return found


def _curve(history: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, Any]]:
    """Turn the trainer's log into one entry a step."""
    entries: dict[int, dict[str, Any]] = {}
    for log in history:
        step = log["step"]
        entry = entries.setdefault(
            step,
            {"step": step, "tokens": step * tokens_per_step, "learning_rate": None, "train_loss": None, "eval": {}},
        )
        if "loss" in log:
            entry["train_loss"], entry["learning_rate"] = log["loss"], log.get("learning_rate")
        for key, value in log.items():
            if key.startswith("eval_") and key != "eval_nll":
                corpus, measure = _split_key(key)
                if measure:
                    entry["eval"].setdefault(corpus, {})[measure] = value
        if diagnostics := {key[len(LOG_PREFIX) :]: value for key, value in log.items() if key.startswith(LOG_PREFIX)}:
            entry["diagnostics"] = diagnostics
    return [entries[step] for step in sorted(entries)]


def _split_key(key: str) -> tuple[str, str]:
    for measure in ("nll", "perplexity", "bits_per_byte", "tokens", "bytes"):
        if key.endswith(f"_{measure}"):
            return key[len("eval_") : -len(measure) - 1], measure
    return key, ""


def _arm_results(recipe: Recipe, stages: list[Stage], folder: Path, run: RunContext) -> dict[str, Any]:
    runs = [_stage_results(recipe, stage, folder, run) for stage in stages]
    finals = {c: [one["final"][c] for one in runs] for c in runs[0]["final"]}
    return {
        "label": "; ".join(r.label() for r in stages[0].resets),
        "final": {c: mean_scores(values) for c, values in finals.items()},
        "curve": _mean_curve([one["curve"] for one in runs]),
        "runs": runs,
    }


def mean_scores(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one corpus's scores of several seeds as their mean, with the standard deviation of their NLL."""
    nll = [v["nll"] for v in values]
    mean = sum(nll) / len(nll)
    spread = float(np.std(nll, ddof=1)) if len(nll) > 1 else None
    bits = [v["bits_per_byte"] for v in values if v.get("bits_per_byte") is not None]
    return {
        "nll": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": sum(bits) / len(bits) if bits else None,
        "tokens": values[0]["tokens"],
        "nll_std": spread,
    }


def _mean_curve(curves: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if len(curves) == 1:
        return curves[0]
    mean = []
    for entries in zip(*curves, strict=False):
        entry = dict(entries[0])
        losses = [e["train_loss"] for e in entries if e["train_loss"] is not None]
        entry["train_loss"] = sum(losses) / len(losses) if losses else None
        entry["eval"] = {c: mean_scores([e["eval"][c] for e in entries]) for c in entries[0]["eval"]}
        if "diagnostics" in entry:
            seeds = [e["diagnostics"] for e in entries]
            entry["diagnostics"] = {key: sum(seed[key] for seed in seeds) / len(seeds) for key in seeds[0]}
        mean.append(entry)
    return mean


def versions() -> dict[str, Any]:
    """Return the versions that results depend on; None for a library without metadata."""
    libraries = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    named = {name: installed(name) for name in libraries}
    return {"fire_llm": fire_llm.__version__, **named, "python": platform.python_version(), "git": _git_hash()}


def _git_hash() -> str | None:
    """Return the commit of the checkout that this code runs from, None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """Return what the run ran on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if sys.platform != "win32" else 0.0
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "accelerator": accelerator}
