"""Compare the arms of one results.json: differences, steps saved, forgetting, and the sentences that sum them up.

Differences are in nats per token, paired by seed, negative where the arm is better. An arm is compared with the base
and the full reset that started from the same checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from fire_llm.evaluation.measurement import described

Json = dict[str, Any]

LEVEL = 0.95
"""How often an interval over seeds holds the true mean."""


def finite(value: Any) -> Any:
    """Copy JSON-like data with every non-finite number as None: browsers refuse NaN."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluations(curve: Sequence[Json], corpus: str) -> list[tuple[float, float]]:
    """Return (step, NLL) wherever the curve was evaluated on the corpus with a finite result, by step."""
    pairs = [(e.get("step"), ((e.get("eval") or {}).get(corpus) or {}).get("nll")) for e in curve]
    return sorted((s, n) for s, n in pairs if s is not None and n is not None and math.isfinite(n))


def steps_saved(curve: Sequence[Json], reference_curve: Sequence[Json], corpus: str) -> float | None:
    """Return 1 - step/total: how much sooner an arm first reaches the NLL on which the reference arm ends.

    Args:
        curve: the arm's curve, entries as in results.json.
        reference_curve: the reference arm's; `total` is its last evaluated step.
        corpus: name of the corpus both are judged on.

    Returns:
        A fraction, linear between evaluations; None where the arm never gets there or nothing was measured.
    """
    points, reference = evaluations(curve, corpus), evaluations(reference_curve, corpus)
    if not points or not reference or reference[-1][0] <= 0:
        return None
    total, target = reference[-1]
    before = points[0]
    for step, nll in points:
        if nll <= target:
            fraction = (before[1] - target) / (before[1] - nll) if before[1] > nll else 1.0
            return 1 - (before[0] + (step - before[0]) * fraction) / total
        before = (step, nll)
    return None


def paired_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Return Student's interval (low, high) of the mean of differences paired by seed; None for fewer than two.

    It takes the differences for normal, which three seeds can neither show nor refute.

    Args:
        values: a difference a seed.
        level: how often such an interval holds the true mean, between 0 and 1.
    """
    if len(values) < 2:
        return None
    from fire_llm.evaluation.statistics import student_t  # its room imports torch

    reach = student_t(level, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - reach, fmean(values) + reach


def _method_names(resets: Sequence[Json]) -> list[str]:
    """Return the methods by the names that they had first: `none` was called `keep`."""
    names = [reset if isinstance(reset, str) else reset.get("method", "") for reset in resets]
    return ["keep" if name == "none" else name for name in names]


class Comparison:
    """Answer the questions the table, the page and the summary ask of one results.json."""

    def __init__(self, results: Json) -> None:
        """Take results as `load_results` returns them."""
        self.results = finite(results)
        self.arms: dict[str, Json] = self.results.get("arms") or {}
        self.new: str | None = self.results.get("new_corpus")
        self.first: str | None = self.results.get("first_corpus")

    @cached_property
    def corpora(self) -> list[str]:
        """Return the evaluated corpora, the new one first, the first phase's next."""
        seen = [c for arm in self.arms.values() for c in arm.get("final") or {}]
        return sorted(dict.fromkeys(seen), key=lambda c: (c != self.new, c != self.first, seen.index(c)))

    def runs(self, arm: str) -> list[Json]:
        """Return an arm's runs, one a seed."""
        return self.arms[arm].get("runs") or []

    def seeds(self, arm: str) -> int:
        """Count an arm's seeds."""
        return len({run.get("seed") for run in self.runs(arm)}) or 1

    @cached_property
    def partial(self) -> list[str]:
        """Return the arms with fewer seeds than others: their means are of other data and weights."""
        most = max(map(self.seeds, self.arms), default=1)
        return [arm for arm in self.arms if self.seeds(arm) < most]

    def nll(self, arm: str, corpus: str) -> float | None:
        """Return an arm's final NLL on a corpus, in nats per token, the mean over its seeds."""
        return ((self.arms[arm].get("final") or {}).get(corpus) or {}).get("nll")

    def methods(self, arm: str) -> list[str]:
        """List the resets an arm applies, from its report or, before there is one, from the recipe."""
        resets = next((r["reset"].get("resets") for r in self.runs(arm) if r.get("reset")), None)
        if not resets:
            phases = (self.results.get("recipe") or {}).get("phases") or []
            plans = [(p.get("arms") or {}).get(arm.split("@")[0]) for p in phases if isinstance(p, dict)]
            plan: Any = next((p for p in reversed(plans) if p), [])
            resets = plan if isinstance(plan, list) else [plan]
        return _method_names(resets)

    def start(self, arm: str) -> str:
        """Name the checkpoint an arm started from."""
        start: Json = next((r["start"] for r in self.runs(arm) if r.get("start")), {})
        return f"{start.get('phase')}/{start.get('checkpoint')}"

    def always(self, arm: str, method: str) -> bool:
        """Say whether an arm and those of earlier phases that it goes on from apply this method and no other."""
        reports = [run["reset"] for own in self.runs(arm)[:1] for run in self.ancestors(own) if run.get("reset")]
        before = (_method_names(report.get("resets") or []) for report in reports)
        return all(names == [method] for names in [self.methods(arm), *before])

    def reference(self, arm: str, method: str) -> str | None:
        """Return the arm with only this method (`keep`: the base, `full_reset`) that shares the arm's start.

        Where none does, as in a stream, it is the one that never applied another.
        """
        found = [other for other in self.arms if self.methods(other) == [method]]
        whole = [other for other in found if self.always(other, method)]
        beside = [other for other in found if self.start(other) == self.start(arm) and (other != arm or arm in whole)]
        return beside[0] if beside else whole[0] if len(whole) == 1 else None

    def by_seed(self, arm: str, corpus: str) -> dict[Any, float]:
        """Return the final NLL of each seed that has one."""
        pairs = {run.get("seed"): ((run.get("final") or {}).get(corpus) or {}).get("nll") for run in self.runs(arm)}
        return {seed: nll for seed, nll in pairs.items() if nll is not None}

    def differences(self, arm: str, other: str | None, corpus: str) -> list[float]:
        """Return NLL(arm) - NLL(other), seed by seed; from the arms' means where no seed has both."""
        if other is None or other == arm:
            return []
        mine, theirs = self.by_seed(arm, corpus), self.by_seed(other, corpus)
        shared = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        a, b = self.nll(arm, corpus), self.nll(other, corpus)
        return shared or ([a - b] if a is not None and b is not None else [])

    def saved(self, arm: str) -> tuple[float | None, list[float]]:
        """Return the steps saved against full reset on the new corpus: of the mean curves, of all seeds that arrive."""
        reference = self.reference(arm, "full_reset")
        if reference is None or self.new is None:
            return None, []
        curves = {run.get("seed"): run.get("curve") or [] for run in self.runs(reference)}
        seeds = [steps_saved(r.get("curve") or [], curves.get(r.get("seed"), []), self.new) for r in self.runs(arm)]
        mean = steps_saved(self.arms[arm].get("curve") or [], self.arms[reference].get("curve") or [], self.new)
        return mean, [s for s in seeds if s is not None]

    @cached_property
    def earlier(self) -> dict[tuple[Any, Any, Any], Json]:
        """Return the runs before the arms, by (phase, arm, seed)."""
        runs = self.results.get("phases") or []
        return {(run.get("phase"), run.get("arm"), run.get("seed")): run for run in runs}

    def parent(self, run: Json) -> Json | None:
        """Return the run that a run of the same seed starts from."""
        start = run.get("start") or {}
        return self.earlier.get((start.get("phase"), start.get("arm"), run.get("seed")))

    def ancestors(self, run: Json) -> list[Json]:
        """Return the run that a run starts from, the one that that starts from, and so on."""
        found: list[Json] = []
        at = self.parent(run)
        while at is not None and at not in found:
            found.append(at)
            at = self.parent(at)
        return found

    def _parent_nll(self, run: Json, arm: str) -> float | None:
        """Return the first corpus's NLL of the checkpoint a run starts from, there or by the base at step 0."""
        start, seed = run.get("start") or {}, run.get("seed")
        if self.first and (parent := self.parent(run)):
            measured = dict(evaluations(parent.get("curve") or [], self.first))
            if start.get("step") in measured:
                return measured[start["step"]]
        base = self.reference(arm, "keep")
        curve = next((r.get("curve") or [] for r in self.runs(base) if r.get("seed") == seed), []) if base else []
        return dict(evaluations(curve, self.first or "")).get(0)

    def retention(self, arm: str) -> list[tuple[float, float]]:
        """Return each seed's (final NLL on the new corpus, forgetting: that on the first less the parent's)."""
        if not self.new or not self.first or self.new == self.first:
            return []
        new, first = self.by_seed(arm, self.new), self.by_seed(arm, self.first)
        parents = {run.get("seed"): self._parent_nll(run, arm) for run in self.runs(arm)}
        pairs = [(new[s], first[s], parents.get(s)) for s in new if s in first]
        return [(x, y - parent) for x, y, parent in pairs if parent is not None]

    def ranked(self) -> list[str]:
        """Return the arms with a finite NLL on the new corpus, best first, and behind those what lacks seeds."""
        scores = {arm: self.nll(arm, self.new or "") for arm in self.arms}
        return sorted((a for a in scores if scores[a] is not None), key=lambda a: (a in self.partial, scores[a] or 0.0))

    def tables(self) -> list[Json]:
        """Return a table a corpus: {corpus, columns, rows: [{arm, best, cells}]}, cells as text."""
        tables = []
        for corpus in self.corpora:
            last = {self.new: "steps saved", self.first: "forgetting"}.get(corpus)
            whole = [arm for arm in self.arms if arm not in self.partial]
            values = [n for arm in whole if (n := self.nll(arm, corpus)) is not None]
            rows = []
            for arm in self.arms:
                final = (self.arms[arm].get("final") or {}).get(corpus) or {}
                cells = [_plain(final.get("perplexity"), 2), spread(final.get("nll"), final.get("nll_std"))]
                cells.append(_plain(final.get("bits_per_byte"), 4))
                cells += [paired(self.differences(arm, self.reference(arm, m), corpus)) for m in ("keep", "full_reset")]
                if last == "steps saved":
                    value = self.saved(arm)[0]
                    never = "never" if self.reference(arm, "full_reset") and final.get("nll") is not None else "–"
                    itself = self.reference(arm, "full_reset") == arm
                    cells.append("–" if itself else never if value is None else f"{value:.0%}")
                elif last:
                    cells.append(paired([y for _, y in self.retention(arm)]))
                rows.append(
                    {
                        "arm": arm,
                        "best": bool(values) and arm in whole and final.get("nll") == min(values),
                        "cells": cells,
                    }
                )
            columns = ["perplexity", "NLL", "bits/byte", "vs base", "vs full reset", *([last] if last else [])]
            tables.append({"corpus": corpus, "columns": columns, "rows": rows})
        return tables

    def legend(self) -> str:
        """Return how the numbers of the tables were measured, and what ± means where there are several seeds."""
        measured = self.results.get("measured")
        said = [f"Measured {described(measured)}."] if measured else []
        if max(map(self.seeds, self.arms), default=1) > 1:
            said.append(
                "NLL ± its standard deviation over seeds; differences, paired by seed, ± half their "
                f"{LEVEL:.0%} interval."
            )
            if self.partial:
                said.append(f"Of fewer seeds than the others: {', '.join(self.partial)}.")
        return " ".join(said)

    def batches(self) -> tuple[bool | None, str]:
        """Say whether all arms saw the same batches in the same order: (None where it cannot be told, sentence)."""
        hashes: dict[Any, dict[str, list[str]]] = {}
        for arm in self.arms:
            for run in self.runs(arm):
                if run.get("batches_hash"):
                    hashes.setdefault(run.get("seed"), {}).setdefault(run["batches_hash"], []).append(arm)
        if sum(len(arms) for seed in hashes.values() for arms in seed.values()) < 2:
            if len(self.arms) == 1:
                return None, "One arm alone: there are no batches to compare."
            return None, "Whether the arms saw the same batches is not recorded."
        split = [
            f"seed {seed}: " + " ≠ ".join(", ".join(a) for a in kinds.values())
            for seed, kinds in hashes.items()
            if len(kinds) > 1
        ]
        if split:
            told = f"The arms did not see the same batches ({'; '.join(split)})"
            return False, f"{told}: differences mix the reset with the data."
        each = " (seed by seed)" if len(hashes) > 1 else ""
        return True, f"Every arm saw the same batches in the same order{each}: the hashes of their token ids agree."

    def reading(self) -> list[str]:
        """Say what happened, claiming no more than the numbers: the outcome, its spread, retention, failures."""
        ranked = self.ranked()
        if not self.arms:
            return ["No arm was run."]
        if not ranked or self.new is None:
            return ["No arm has a finite loss on the new corpus: there is nothing to compare."]
        best, said = ranked[0], []
        final = self.arms[best]["final"][self.new]
        told = f"{final['nll']:.3f} nats per token (perplexity {_plain(final.get('perplexity'), 2)})"
        if len(ranked) == 1:
            said.append(f"{best} ends at {told} on {self.new}; no other arm has a finite loss to compare it with.")
        else:
            said += self._margins(best, ranked[1], told)
        kept = {arm: fmean(y for _, y in pairs) for arm in ranked if (pairs := self.retention(arm))}
        if len(kept) > 1 and best in kept:
            least = min(kept, key=lambda a: kept[a])
            also = "the least forgetting" if least == best else f"the least: {least}, {_apart(kept[least])}"
            said.append(
                f"On {self.first}, the first corpus, it ends {_apart(kept[best])} its parent checkpoint ({also})."
            )
        lost = [arm for arm in self.arms if arm not in ranked]
        return said + ([f"Without a finite loss on {self.new}: {', '.join(lost)}."] if lost else [])

    def _margins(self, best: str, second: str, told: str) -> list[str]:
        """Say by how much the best arm leads, and over how many seeds."""
        new = self.new or ""
        rivals = {"base": self.reference(best, "keep"), "full reset": self.reference(best, "full_reset")}
        pairs = [(name, self.differences(best, rival, new)) for name, rival in rivals.items()]
        gaps = " and ".join(f"{_apart(fmean(found))} {name}" for name, found in pairs if found)
        said = [f"{best} ends lowest on {new}, at {told}{': ' if gaps else ''}{gaps}."]
        if rivals["base"] == best:
            said.append("No reset did better than leaving the weights alone.")
        saved = self.saved(best)[0]
        if saved is not None and saved > 0 and rivals["full reset"] != best:
            said.append(f"{best} reaches the final loss of {rivals['full reset']} in {saved:.0%} fewer steps.")
        gap = self.differences(best, second, new)
        if len(gap) > 1:
            wins = f"lower in {sum(d < 0 for d in gap)} of {len(gap)} seeds"
            said.append(f"Next is {second}: the difference, seed by seed, is {paired(gap)} ({wins}).")
        else:
            said.append(f"Next is {second}, {abs(gap[0]):.3f} away.")
            said.append("One seed: no spread is known, small margins may be chance.")
        return said


def _apart(difference: float) -> str:
    """Write a signed difference in words, to be followed by what it is measured from."""
    return f"{abs(difference):.3f} {'above' if difference > 0 else 'below'}"


def _plain(value: float | None, digits: int) -> str:
    """Write a number with this many decimals, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def spread(value: float | None, std: float | None) -> str:
    """Write a mean with its standard deviation over seeds where there is one."""
    return "–" if value is None else f"{value:.4f}" + (f" ± {std:.4f}" if std is not None else "")


def paired(values: Sequence[float]) -> str:
    """Write the mean of differences with half the width of its interval, a dash where there are none."""
    if not values:
        return "–"
    interval = paired_interval(values)
    return f"{fmean(values):+.4f}" + (f" ± {(interval[1] - interval[0]) / 2:.4f}" if interval else "")
