"""The trials of a sweep: a recipe once for every point of a grid."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from fire_llm.core.errors import UserError
from fire_llm.core.hashing import digest
from fire_llm.experiment.recipe.plain import plain_faults
from fire_llm.experiment.recipe.reading import assignment, checked, read_data, refuse, set_key
from fire_llm.experiment.recipe.sections import Recipe

MOST_TRIALS = 500
"""The most trials of a sweep. The limit is needed because a few short lists multiply."""

LONGEST_NAME = 100
"""The most characters of a trial's name."""


@dataclass(frozen=True)
class Trial:
    """One point of a grid: the recipe with the swept keys set."""

    name: str
    """The name of its folder in the sweep's; empty without a grid, when the sweep's folder is the run's."""
    settings: dict[str, Any] = field(hash=False)
    """The swept keys, with their values in this trial."""
    recipe: Recipe = field(hash=False)
    """The recipe with these settings and without `sweep`."""

    def folder(self, output: Path) -> Path:
        """Return the folder of the trial's run."""
        return output / self.name if self.name else output


def load_trials(
    source: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), grid: Iterable[str] = ()
) -> list[Trial]:
    """Read a recipe, and check it at every point of the grid that its `sweep` and `--grid` span.

    Args:
        source: As for `load_recipe`.
        overrides: `KEY=VALUE`, for every trial.
        grid: `KEY=[VALUES]`; added to the recipe's `sweep`, or in place of the same key there.

    Returns:
        The trials; the last key's values change fastest. Without a grid, one trial without a name.

    Raises:
        UserError: With every fault; a fault of some trials names them.
    """
    data = read_data(source, overrides)
    swept = data.pop("sweep", None) or {}
    if not isinstance(swept, dict):
        raise UserError(f"sweep: {json.dumps(swept)[:80]} is no grid; write {{optimizer.lr: [1.0e-3, 3.0e-4]}}")
    swept = {**swept, **dict(assignment("--grid", text) for text in grid)}
    refuse(source, _too_many(swept) or plain_faults(swept) or grid_faults(swept))
    points = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    trials: list[Trial] = []
    faults: dict[str, list[str]] = {}
    for name, point in zip(_names(points), points, strict=True):
        trial_data = json.loads(json.dumps(data))
        recipe = None
        try:
            for key, value in point.items():
                set_key(trial_data, "sweep", key, value)
            recipe, problems = checked(trial_data)
        except UserError as error:
            problems = [str(error)]
        if recipe is not None and recipe.hub is not None and len(points) > 1:
            problems.append("hub: the runs of a grid would be pushed over each other; leave hub out of a grid")
        for fault in problems:
            faults.setdefault(fault, []).append(name)
        if recipe is not None:
            trials.append(Trial(name, point, recipe))
    refuse(source, [_located(fault, names, len(points)) for fault, names in faults.items()])
    return trials


def grid_faults(swept: Mapping[str, Any]) -> list[str]:
    """Return the faults of a grid that show before any of its trials is checked."""
    faults = []
    for key, values in swept.items():
        if not isinstance(values, list) or not values:
            faults.append(f"sweep.{key}: {json.dumps(values)[:80]} is not allowed; give a list of values")
        elif len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            faults.append(f"sweep.{key}: {json.dumps(values)[:80]} names a value twice")
        if not key or key.partition(".")[0] in ("sweep", "name"):
            faults.append(f"sweep.{key}: '{key}' cannot be swept over; name a key that a run's results depend on")
    return faults + _too_many(swept)


def _too_many(swept: Mapping[str, Any]) -> list[str]:
    """Return the fault that a grid has too many trials, in a list that is empty if it has not."""
    count = prod(len(values) for values in swept.values() if isinstance(values, list))
    fault = f"sweep: {count:,} trials, the product of the lists' lengths; at most {MOST_TRIALS} are allowed"
    return [fault] if count > MOST_TRIALS else []


def _located(fault: str, names: list[str], trials: int) -> str:
    """Return a fault with the names of the trials that have it, unless all have it."""
    if len(names) == trials:
        return fault
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"in {' and '.join(names[:3])}{others}: {fault}"


def _names(points: list[dict[str, Any]]) -> list[str]:
    """Return a name for each point from the last parts of its keys and its values: `lr=0.001,seed=2`."""
    short = _short_keys(list(points[0]))
    names: list[str] = []
    taken: set[str] = set()
    for point in points:
        name = ",".join(f"{short[key]}={_written(value)}" for key, value in point.items())
        # Some file systems do not tell capital letters from small ones.
        if len(name) > LONGEST_NAME or name.lower() in taken:
            name = f"{name[: LONGEST_NAME - 9]},{digest(json.dumps(point, sort_keys=True), 4)}"
        taken.add(name.lower())
        names.append(name)
    return names


def _short_keys(keys: list[str]) -> dict[str, str]:
    """Return for each key as many of its last parts as tell it from all others."""
    parts = {key: [p for p in re.split(r"[.\[\]]", key) if p] for key in keys}
    short = {}
    for key, own_parts in parts.items():
        tails = range(1, len(own_parts) + 1)
        enough = (n for n in tails if all(key == other or own_parts[-n:] != p[-n:] for other, p in parts.items()))
        short[key] = _safe(".".join(own_parts[-next(enough, len(own_parts)) :]))
    return short


def words(value: Any) -> str:
    """Write a swept value for people: `cleared`, `0.001`, `web-text 0.9, wikitext-2 0.1`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_part(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_part, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _part(value: Any) -> str:
    return f"({words(value)})" if isinstance(value, Mapping | list) else words(value)


def _written(value: Any) -> str:
    return _safe(words(value).replace(", ", ",")) or "none"


def _safe(text: str) -> str:
    return re.sub(r"-*[^A-Za-z0-9._+,@-]+-*", "-", text).rstrip("-.,")
