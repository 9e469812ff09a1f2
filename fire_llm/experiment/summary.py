"""Compare the arms of all trials of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fire_llm.experiment.collect import mean_finals
from fire_llm.experiment.recipe import Trial, words
from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.schema import Arm, Results
from fire_llm.reporting.table import DASH, Row, Table


@dataclass(frozen=True)
class Entry:
    """An arm, with the trials that have it: several trials if they share its stages."""

    arm: str
    trials: list[Trial]
    comparison: Comparison
    """The comparison of the first of these trials."""

    def where(self, every_trial: Sequence[Trial]) -> str:
        """Name the trials: by the settings that they share, if no other trial has the same ones."""
        first = self.trials[0]
        if len(self.trials) == 1:
            return first.name
        shared = {k: v for k, v in first.settings.items() if all(trial.settings[k] == v for trial in self.trials)}
        meant = [trial for trial in every_trial if all(trial.settings[k] == v for k, v in shared.items())]
        if len(meant) > len(self.trials):
            return f"{first.name} and {len(self.trials) - 1} more"
        return ", ".join(f"{key.rpartition('.')[2]}={words(value)}" for key, value in shared.items()) or "all"


class Summary:
    """Compute what the table and the page of a sweep show."""

    def __init__(self, trials: Sequence[Trial], results: Sequence[Results]) -> None:
        """Take the trials, and the results of each."""
        self.trials = list(trials)
        self.comparisons = [Comparison(with_arms(one)) for one in results]

    @cached_property
    def entries(self) -> list[Entry]:
        """Return the arms of every trial; an arm that several trials share is listed once."""
        by_content: dict[str, Entry] = {}
        for trial, comparison in zip(self.trials, self.comparisons, strict=True):
            for arm in comparison.arms:
                same = json.dumps([arm, *(run.model_dump(mode="json") for run in comparison.runs(arm))])
                by_content.setdefault(same, Entry(arm, [], comparison)).trials.append(trial)
        arms = list(dict.fromkeys(entry.arm for entry in by_content.values()))
        return sorted(by_content.values(), key=lambda entry: arms.index(entry.arm))

    @cached_property
    def corpora(self) -> list[str]:
        """Return the corpora measured on, those of the first trial first."""
        return list(dict.fromkeys(corpus for comparison in self.comparisons for corpus in comparison.corpora))

    @cached_property
    def arms(self) -> list[str]:
        """Return the arms' names."""
        return list(dict.fromkeys(entry.arm for entry in self.entries))

    def tables(self) -> list[Table]:
        """Return a table for each corpus, with a row for each arm of each trial and without empty columns."""
        return [self._table(corpus) for corpus in self.corpora]

    def _table(self, corpus: str) -> Table:
        parts = {id(c): table for c in self.comparisons for table in c.tables() if table.caption == corpus}
        joined = self._joined(corpus, parts, self._lowest(corpus))
        used = [name for i, name in enumerate(joined.columns) if any(row.cells[i] != DASH for row in joined.rows)]
        return joined.only(used)

    def averaged(self) -> list[Table]:
        """Return a table of the weights' moving averages beside the weights, a row for each arm of each trial."""
        parts = {id(c): table for c in self.comparisons for table in c.averaged()}
        return [self._joined(next(iter(parts.values())).caption, parts)] if parts else []

    def _joined(self, caption: str, parts: Mapping[int, Table], best: Entry | None = None) -> Table:
        """Join the tables of several trials into one.

        Args:
            caption: Of the joined table.
            parts: By the identity of the trial's comparison, its table.
            best: The entry whose row is marked as the best.
        """
        columns = list(dict.fromkeys(name for part in parts.values() for name in part.columns))
        rows = []
        for entry in self.entries:
            part = parts.get(id(entry.comparison))
            for row in part.rows if part is not None else ():
                if part is not None and row.name == entry.arm:
                    texts = dict(zip(part.columns, row.cells, strict=True))
                    cells = tuple(texts.get(column, DASH) for column in columns)
                    rows.append(Row((entry.arm, entry.where(self.trials)), cells, entry is best))
        return Table(caption, tuple(columns), tuple(rows), ("arm", "trial"))

    def reading(self) -> list[str]:
        """Return which arm of which trial ends lowest on each corpus."""
        texts = []
        for corpus in self.corpora:
            if entry := self._lowest(corpus):
                nll = entry.comparison.nll(entry.arm, corpus)
                texts.append(f"Lowest on {corpus}: {entry.arm} ({entry.where(self.trials)}), {nll:.4f} nats per token.")
        return texts or ["No arm of any trial has a finite loss."]

    def _lowest(self, corpus: str) -> Entry | None:
        """Return the arm with the lowest final NLL on a corpus, among those that lack no seed."""
        complete = [entry for entry in self.entries if entry.arm not in entry.comparison.partial]
        scored = [(n, i) for i, e in enumerate(complete) if (n := e.comparison.nll(e.arm, corpus)) is not None]
        return complete[min(scored)[1]] if scored else None

    def legend(self) -> str:
        """Return how the trials' numbers were measured, each way once, and what ± means if there are several seeds."""
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


def with_arms(results: Results) -> Results:
    """Return results in which the last phase stands as the only arm, if no phase has arms."""
    last = next(reversed(results.phase_corpus), None)
    runs = [run for run in results.phases if run.phase == last]
    if results.arms or not runs:
        return results
    curve = runs[0].curve if len(runs) == 1 else []
    arm = Arm(final=mean_finals(runs), curve=curve, runs=runs)
    return results.model_copy(update={"arms": {runs[0].phase: arm}})
