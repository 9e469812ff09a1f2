"""A recipe of seconds with three arms, and the two corpora that it reads."""

from __future__ import annotations

import json
import os
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import load_file

from fire_llm import load_recipe, run_recipe

WORDS = [
    "fire",
    "resets",
    "the",
    "weights",
    "of",
    "a",
    "model",
    "so",
    "that",
    "it",
    "may",
    "learn",
    "again",
    "from",
    "text",
    "it",
    "never",
    "saw",
    "before",
]


def write_texts(folder: Path) -> Path:
    """Write two corpora of random words, the second with a vocabulary order of its own."""
    for name, seed in (("a", 1), ("b", 2)):
        generator = torch.Generator().manual_seed(seed)
        picks = torch.multinomial(torch.linspace(1, 5, len(WORDS)) ** seed, 12000, True, generator=generator)
        lines = [" ".join(WORDS[i] for i in chunk) for chunk in picks.split(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def recipe_data(texts: Path) -> dict:
    return {
        "name": "tiny",
        "data_root": str(texts),
        "model": {"preset": "gpt-tiny", "context": 32, "config": {"n_embd": 32, "n_layer": 2, "n_head": 2}},
        "tokenizer": {"train": 300},
        "corpora": {"a": {"files": "a.jsonl", "holdout": 0.1}, "b": {"files": "b.jsonl", "holdout": 0.1}},
        "optimizer": {"lr": 3.0e-3, "min_lr": 3.0e-4},
        "batch": {"tokens_per_step": 384, "sequences_per_device": 2},  # 12 sequences: for 1, 2 and 3 processes
        "precision": "fp32",  # other orders of summation give the same losses to 1e-5
        "phases": [
            {"name": "first", "data": {"a": 1.0}, "steps": 12, "keep": ["best", 6]},
            {
                "name": "second",
                "data": {"b": 0.75, "a": 0.25},
                "steps": 8,
                "arms": {
                    "base": {"method": "keep"},
                    "full-reset": {"method": "full_reset"},
                    "fire": {"method": "fire", "iterations": 5},
                },
            },
        ],
        "evaluate": {"data": ["b", "a"], "every_steps": 4},
        "log_every_steps": 2,
        "save_every_steps": 4,
    }


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def run_rank(rank, world, data, folder, environment, arms):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    with redirect_stderr(StringIO()) as said:
        results = run_recipe(load_recipe(data), folder, arms=arms)
    return {k: v for k, v in results.items() if k != "created"}, said.getvalue()
