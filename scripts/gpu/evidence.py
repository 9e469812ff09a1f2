"""Run arms of a recipe that is shortened to the time that is left."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fire_llm import load_recipe, run_recipe
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.recipe import Recipe
from fire_llm.experiment.recipe.reading import read_data

RECIPE = "gpt-0.1b/quarter-hour"
ASSUMED_RATE = 250_000
"""Tokens a second that are assumed if training was not measured."""
OVERHEAD = 12
"""Seconds that a stage takes beside its steps: loading, hashing, resetting, evaluating, saving."""
TOKENISING = 8
LEAST_SHARE = 0.5
"""The least share of the recipe's steps. Before it takes fewer, arms are left out from the end, down to `FEWEST`."""
FEWEST = 2


def prepare(args: argparse.Namespace) -> None:
    """Tokenise the texts of later stages while the GPU runs the tests."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokens_of(args, Path(folder))
    except Exception as error:  # the stage that reads them fails in the same way
        print(f"preparing: {error}", file=sys.stderr)


def recipe_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the plain data of the recipe, with this machine's folders."""
    data = read_data(RECIPE)
    for phase in data["phases"]:
        phase["steps"] = phase.pop("tokens") // data["batch"]["tokens_per_step"]
    data |= {"seed": [args.seed], "data_root": str(args.data), "tokenizer": {"path": str(args.data / "gpt2-tokenizer")}}
    if args.size == "tiny":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 1}
        data |= {"model": {"preset": "gpt-tiny", "context": 16, "config": sizes}, "precision": "fp32"}
        data["batch"] = {"tokens_per_step": 64}
        data["evaluate"] = data.get("evaluate", {}) | {"max_tokens": 8000}
        for phase in data["phases"]:
            phase["steps"] = 8
            if "max_corpus_tokens" in phase:
                phase["max_corpus_tokens"] = 20_000
    return data


def tokens_of(args: argparse.Namespace, folder: Path) -> tuple[Recipe, Any]:
    """Return the recipe, and the validation tokens of its second phase's heaviest corpus."""
    recipe = load_recipe(recipe_of(args))
    run = RunContext(recipe, folder)
    for name in recipe.corpus_names():
        run.tokens(name, "train")
        run.tokens(name, "validation")
    mixture = recipe.phases[-1].data
    return recipe, run.tokens(max(mixture, key=mixture.__getitem__), "validation")


def fitted(data: dict[str, Any], rate: float, seconds: float) -> dict[str, Any]:
    """Return a recipe with as many of its steps and arms as fit.

    Both phases are shortened by one factor. Before it falls below `LEAST_SHARE`, arms are left out, from the end.

    Args:
        data: A recipe of two phases with steps, the second with arms.
        rate: Trained tokens a second.
        seconds: The time for everything.
    """
    data = copy.deepcopy(data)
    first, second = data["phases"]
    arms = [*second["arms"]]
    step = data["batch"]["tokens_per_step"] / rate

    def share(count: int) -> float:
        full = (first["steps"] + count * second["steps"]) * step
        return (seconds - TOKENISING - OVERHEAD * (1 + count)) / full

    count = len(arms)
    while count > FEWEST and share(count) < LEAST_SHARE:
        count -= 1
    factor = min(1.0, max(0.02, share(count)))
    for phase in (first, second):
        phase["steps"] = max(8, int(phase["steps"] * factor))
    second["arms"] = {name: second["arms"][name] for name in arms[:count]}
    if every := data.get("evaluate", {}).get("every_steps"):
        data["evaluate"]["every_steps"] = max(1, int(every * factor))
    return data


def evidence(stage: Any) -> None:
    """Run the recipe of a quarter of an hour, one arm after another, and write the results after each."""
    args = stage.args
    rate = ASSUMED_RATE if args.device == "cuda" else 2000
    measured = args.output / "training.json"
    if measured.exists():
        found = json.loads(measured.read_text(encoding="utf-8")).get("contestants", {}).get("ours", {})
        rate = found.get("median") or found.get("first_round_rate") or rate
    whole = recipe_of(args)
    data = whole if args.size == "tiny" else fitted(whole, rate, stage.left() - 5)
    if args.size == "tiny":
        data["phases"][1]["arms"] = dict([*data["phases"][1]["arms"].items()][:2])
    arms = [*data["phases"][1]["arms"]]
    stage.note(
        recipe=RECIPE,
        rate_counted_on=rate,
        seed=args.seed,
        steps=[phase["steps"] for phase in data["phases"]],
        steps_of_the_recipe=[phase["steps"] for phase in whole["phases"]],
        tokens_per_step=data["batch"]["tokens_per_step"],
        arms=arms,
        arms_left_out=[name for name in whole["phases"][1]["arms"] if name not in arms],
        finished=[],
    )
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=fast, ignore_cleanup_errors=True) as folder:
        recipe = load_recipe(data)
        took = 0.0
        for name in arms:
            if stage.found["finished"] and stage.left() < took + 5:
                stage.found["failures"][name] = ["not begun: no time was left"]
                continue
            began = time.monotonic()
            results = run_recipe(recipe, Path(folder) / "run", arms=[name], workers=1, progress=False)
            if stage.found["finished"]:
                took = max(took, time.monotonic() - began)
            else:
                took = results["arms"][name]["runs"][0]["seconds"] + OVERHEAD
            stage.file("results.json", results)
            summary = {arm: _summary(results, arm) for arm in results["arms"]}
            phases = [{k: stage[k] for k in ("phase", "steps", "seconds", "final")} for stage in results["phases"]]
            stage.note(finished=[*summary], results=summary, first_phase=phases, measured=results["measurement"])
            gc.collect()
    for name, arm in stage.found.get("results", {}).items():
        finals = ", ".join(f"{corpus} {nll:.4f}" for corpus, nll in arm["nll"].items())
        stage.say(f"{name:24} {finals}; {arm['seconds']:.0f} s, {arm['tokens_per_second'] or 0:,.0f} tokens/s")


def _summary(results: dict[str, Any], name: str) -> dict[str, Any]:
    (run,) = results["arms"][name]["runs"]
    rates = [entry["tokens_per_second"] for entry in run["throughput"] if entry.get("tokens_per_second")]
    return {
        "nll": {corpus: score["nll"] for corpus, score in run["final"].items()},
        "seconds": run["seconds"],
        "tokens_per_second": statistics.median(rates) if rates else None,
        "peak_memory_bytes": max((entry.get("peak_memory_bytes") or 0 for entry in run["throughput"]), default=0),
        "reset": results["arms"][name]["label"],
    }
