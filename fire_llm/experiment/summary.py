"""Set the arms of all trials beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fire_llm.experiment.collect import mean_scores
from fire_llm.experiment.recipe import Trial, words
from fire_llm.reporting.comparison import Comparison

Json = dict[str, Any]
DASH = "–"


@dataclass(frozen=True)
class Entry:
    """An arm, with the trials that have it: several where their stages were the same ones."""

    arm: str
    trials: list[Trial]
    of: Comparison
    """The first trial's."""

    def where(self, every_trial: Sequence[Trial]) -> str:
        """Name the trials: by the settings that they share, where all trials with these are meant."""
        first = self.trials[0]
        if len(self.trials) == 1:
            return first.name
        shared = {k: v for k, v in first.settings.items() if all(trial.settings[k] == v for trial in self.trials)}
        meant = [trial for trial in every_trial if all(trial.settings[k] == v for k, v in shared.items())]
        if len(meant) > len(self.trials):
            return f"{first.name} and {len(self.trials) - 1} more"
        return ", ".join(f"{key.rpartition('.')[2]}={words(value)}" for key, value in shared.items()) or "all"


class Summary:
    """Answer what the sweep's table and its page ask."""

    def __init__(self, trials: Sequence[Trial], results: Sequence[Json]) -> None:
        """Take the trials, and of each what its results.json holds."""
        self.trials = list(trials)
        self.comparisons = [Comparison(with_arms(one)) for one in results]

    @cached_property
    def entries(self) -> list[Entry]:
        """Return the arms of every trial; what is the same in several trials stands once."""
        found: dict[str, Entry] = {}
        for trial, comparison in zip(self.trials, self.comparisons, strict=True):
            for arm in comparison.arms:
                same = json.dumps([arm, comparison.runs(arm)], sort_keys=True)
                found.setdefault(same, Entry(arm, [], comparison)).trials.append(trial)
        arms = list(dict.fromkeys(entry.arm for entry in found.values()))
        return sorted(found.values(), key=lambda entry: arms.index(entry.arm))

    @cached_property
    def corpora(self) -> list[str]:
        """Return the corpora measured on, those of the first trial first."""
        return list(dict.fromkeys(corpus for comparison in self.comparisons for corpus in comparison.corpora))

    @cached_property
    def arms(self) -> list[str]:
        """Return the arms' names."""
        return list(dict.fromkeys(entry.arm for entry in self.entries))

    def tables(self) -> list[Json]:
        """Return a table a corpus: {corpus, columns, rows: [{arm, trial, best, cells}]}, cells as text."""
        tables = []
        for corpus in self.corpora:
            parts = {id(c): next((t for t in c.tables() if t["corpus"] == corpus), None) for c in self.comparisons}
            columns = list(dict.fromkeys(name for part in parts.values() if part for name in part["columns"]))
            lowest = self._lowest(corpus)
            rows: list[Json] = []
            for entry in self.entries:
                part = parts[id(entry.of)]
                if part is None:
                    continue
                own = next(row["cells"] for row in part["rows"] if row["arm"] == entry.arm)
                texts = dict(zip(part["columns"], own, strict=True))
                rows.append(
                    {
                        "trial": entry.where(self.trials),
                        "arm": entry.arm,
                        "best": entry is lowest,
                        "cells": [texts.get(column, DASH) for column in columns],
                    }
                )
            used = [i for i in range(len(columns)) if any(row["cells"][i] != DASH for row in rows)]
            for row in rows:
                row["cells"] = [row["cells"][i] for i in used]
            tables.append({"corpus": corpus, "columns": [columns[i] for i in used], "rows": rows})
        return tables

    def reading(self) -> list[str]:
        """Say which arm of which trial ends lowest on each corpus."""
        said = []
        for corpus in self.corpora:
            if entry := self._lowest(corpus):
                nll = entry.of.nll(entry.arm, corpus)
                said.append(f"Lowest on {corpus}: {entry.arm} ({entry.where(self.trials)}), {nll:.4f} nats per token.")
        return said or ["No arm of any trial has a finite loss."]

    def _lowest(self, corpus: str) -> Entry | None:
        """Return the arm that ends lowest on a corpus, among those that lack no seed."""
        whole = [entry for entry in self.entries if entry.arm not in entry.of.partial]
        scored = [(n, i) for i, e in enumerate(whole) if (n := e.of.nll(e.arm, corpus)) is not None]
        return whole[min(scored)[1]] if scored else None

    def legend(self) -> str:
        """Return how the trials' numbers were measured, once each way, and what ± means where there are seeds."""
        return " ".join(dict.fromkeys(filter(None, (comparison.legend() for comparison in self.comparisons))))

    def swept(self) -> list[str]:
        """Return the keys with two values or more."""
        keys = self.trials[0].settings
        return [key for key in keys if len({json.dumps(trial.settings[key]) for trial in self.trials}) > 1]

    def lines(self, key: str, corpus: str) -> dict[tuple[str, str], list[tuple[Any, list[float]]]]:
        """Return (arm, other settings) → (the key's value, as a number or in words; NLL of each seed) on a corpus."""
        lines: dict[tuple[str, str], list[tuple[Any, list[float]]]] = {}
        for trial, comparison in zip(self.trials, self.comparisons, strict=True):
            others = [f"{k}={words(v)}" for k, v in trial.settings.items() if k != key and k in self.swept()]
            for arm in comparison.arms:
                if seeds := list(comparison.by_seed(arm, corpus).values()):
                    value = trial.settings[key]
                    value = value if isinstance(value, int | float) else words(value)
                    lines.setdefault((arm, ", ".join(others)), []).append((value, seeds))
        return lines


def with_arms(results: Json) -> Json:
    """Return results with the last phase in the place of the arms, where no phase has any."""
    phases = results.get("phases") or []
    if results.get("arms") or not phases:
        return results
    last = results["recipe"]["phases"][-1]["name"]
    runs = [run for run in phases if run["phase"] == last]
    if not runs:
        return results
    finals = {corpus: mean_scores([run["final"][corpus] for run in runs]) for corpus in runs[0]["final"]}
    curve = runs[0]["curve"] if len(runs) == 1 else []
    return {**results, "arms": {last: {"label": "", "final": finals, "curve": curve, "runs": runs}}}
