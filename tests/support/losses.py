"""Losses that training must go on giving, step by step: `support.runs` with more resets and optimizers.

The tolerance is relative, 1e-5. Other orders of summation (kernels without AVX2, with it, with AVX512; bf16 products
emulated; passes of 1, 2 and 4 sequences) move no loss by more than 2.2e-7, and Muon's, whose products are in bf16, by
8.5e-7. torch 2.13 and 2.15, transformers 5.15 and 5.24 give the same to the bit. A hundredth more of AdamW's ε, of the
norm that gradients are clipped to, or of a weight decay moves some loss by 1e-4 or more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.runs import recipe_data

FILE = Path(__file__).parents[1] / "references" / "losses.json"
"""Written by `python scripts/write_losses.py --write`."""


def wider_recipe(texts: Path) -> dict[str, Any]:
    """Return the shared recipe with a phase more for each optimizer, four steps long and with resets of its own.

    With a large ε and no clipping, AdamW's steps depend on the size of its gradients, as SGD's do.
    """
    data = recipe_data(texts)
    common = {"data": {"b": 1.0}, "steps": 4, "start_from": {"first": "final"}}
    data["phases"] += [
        {
            **common,
            "name": "adamw",
            "optimizer": {"eps": 1.0e-2, "clip": 0},
            "arms": {
                "base": "none",
                "penalties": [{"method": "l2_init", "strength": 0.2}, {"method": "parseval", "strength": 0.2}],
            },
        },
        {
            **common,
            "name": "sgd",
            "optimizer": {"name": "sgd", "lr": 0.3, "min_lr": 0.03, "clip": 0.5},
            "arms": {"s-and-p": {"method": "shrink_perturb", "shrink": 0.5}, "dash": {"method": "dash", "batches": 4}},
        },
        {
            **common,
            "name": "muon",
            "optimizer": {"name": "muon"},
            "arms": {"polar": {"method": "fire", "solver": "polar"}},
        },
    ]
    return data


def losses(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by stage the hash of its batches, its training losses and its held-out NLLs, each by step."""
    found = {}
    for run in [*results["phases"], *(run for arm in results["arms"].values() for run in arm["runs"])]:
        of = {"train": {e["step"]: e["train_loss"] for e in run["curve"] if e["train_loss"] is not None}}
        for corpus in run["final"]:
            of[corpus] = {e["step"]: e["eval"][corpus]["nll"] for e in run["curve"] if e["eval"]}
        found["/".join(filter(None, (run["phase"], run["arm"])))] = {"batches": run["batches_hash"], "losses": of}
    return json.loads(json.dumps(found))


def apart(found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, tuple[Any, Any, float]]:
    """Return, for every number of either, both and their relative difference; inf where one is missing or a hash."""

    def flat(stages: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {f"{name}, batches": stage["batches"] for name, stage in stages.items()}
        for name, stage in stages.items():
            for of, by_step in stage["losses"].items():
                numbers |= {f"{name}, {of}, step {step}": value for step, value in by_step.items()}
        return numbers

    ours, theirs = flat(found), flat(reference)
    both = {name: (theirs.get(name), ours.get(name)) for name in {**theirs, **ours}}

    def difference(was: Any, now: Any) -> float:
        numbers = isinstance(was, float) and isinstance(now, float)
        return abs(now / was - 1) if numbers else 0.0 if was == now else math.inf

    return {name: (was, now, difference(was, now)) for name, (was, now) in both.items()}
