"""A recipe of a second, for tests of whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

WORDS = ["fire", "resets", "the", "weights", "of", "a", "model", "so", "that", "it", "may", "learn", "again"]


def recipe(folder: Path, **changes: Any) -> Path:
    """Write a recipe of a second: two phases of two corpora, an arm with a reset, saves in the middle of intervals.

    Args:
        folder: For the recipe and the corpora.
        changes: Keys of the recipe to put in the place of these.
    """
    for name, seed in (("a", 1), ("b", 2)):
        generator = torch.Generator().manual_seed(seed)
        picks = torch.multinomial(torch.linspace(1, 5, len(WORDS)) ** seed, 4000, True, generator=generator)
        lines = [json.dumps({"text": " ".join(WORDS[i] for i in chunk)}) + "\n" for chunk in picks.split(60)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    data = {
        "name": "tiny",
        "data_root": str(folder),
        "model": {"preset": "gpt-tiny", "context": 16, "config": {"n_embd": 16, "n_layer": 1, "n_head": 1}},
        "tokenizer": {"train": 280},
        "corpora": {name: {"files": f"{name}.jsonl", "holdout": 0.1} for name in "ab"},
        "optimizer": {"lr": 3.0e-3, "min_lr": 3.0e-4},
        "batch": {"tokens_per_step": 128, "sequences_per_device": 2},
        "precision": "fp32",
        "phases": [
            {"name": "first", "data": {"a": 1.0}, "steps": 10, "keep": ["best"]},
            {"name": "second", "data": {"b": 0.75, "a": 0.25}, "steps": 8, "arms": {"fire": {"method": "fire"}}},
        ],
        "evaluate": {"every_steps": 5, "max_tokens": 600},
        "log_every_steps": 3,
        "save_every_steps": 4,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}))
    return path


def quick_recipe(folder: Path, ranks: int = 1) -> Path:
    """Write a recipe of the same stages that takes half a second: 4 and 3 steps of one micro-batch on so many ranks."""
    arms = {"fire": {"method": "fire"}}
    return recipe(
        folder,
        batch={"tokens_per_step": 32 * ranks, "sequences_per_device": 2},
        phases=[
            {"name": "first", "data": {"a": 1.0}, "steps": 4, "keep": ["best"]},
            {"name": "second", "data": {"b": 0.75, "a": 0.25}, "steps": 3, "arms": arms},
        ],
        evaluate={"every_steps": 2, "max_tokens": 200},
        log_every_steps=2,
        save_every_steps=2,
    )
