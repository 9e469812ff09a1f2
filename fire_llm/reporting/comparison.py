"""Compare the arms of one results.json: differences, steps saved, forgetting, and the sentences that sum them up.

Differences are in nats per token, paired by seed, negative where the arm is better. An arm is compared with the base
and the full reset that started from the same checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from statistics import fmean, stdev

from fire_llm.core.atomic import AVERAGED
from fire_llm.evaluation.measurement import described
from fire_llm.evaluation.statistics import student_t
from fire_llm.reporting.schema import CurveEntry, ResetEntry, Results, Run, Scores
from fire_llm.reporting.table import DASH, Row, Table, first_few

BASE = "none"
"""The method of an arm without a reset."""

LEVEL = 0.95
"""How often an interval over seeds holds the true mean."""

_UNKNOWN = Scores(nll=None)


def evaluations(curve: Sequence[CurveEntry], corpus: str, checkpoint: str = "final") -> list[tuple[int, float]]:
    """Return (step, NLL) wherever the curve was evaluated on the corpus with a finite result, by step.

    Args:
        curve: Of a run.
        corpus: Name of the corpus.
        checkpoint: Label of the checkpoint; the curve holds the scores of `ema`, the averaged weights, by themselves.
    """
    by_step = [(entry.step, entry.ema if checkpoint == AVERAGED else entry.eval) for entry in curve]
    pairs = [(step, scores[corpus].nll) for step, scores in by_step if corpus in scores]
    return sorted((step, nll) for step, nll in pairs if nll is not None)


def steps_saved(curve: Sequence[CurveEntry], reference_curve: Sequence[CurveEntry], corpus: str) -> float | None:
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
    before: tuple[float, float] = points[0]
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
    reach = student_t(level, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - reach, fmean(values) + reach


class Comparison:
    """Answer the questions the table, the page and the summary ask of the results of one run."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.arms = results.arms
        self.new = results.new_corpus
        self.first = results.first_corpus
        model = (results.recipe or {}).get("model")
        given = isinstance(model, dict) and "checkpoint" in model
        self.one_phase = given and self.first == self.new and not results.phases
        """Whether the arms' phase is the only one, and goes on from a checkpoint that was given."""
        # The other texts that such a run measures are texts that the given checkpoint may know.
        self.old = [c for c in self.corpora if c != self.new and (self.one_phase or c == self.first)]
        self.first = next(iter(self.old), self.first)

    @cached_property
    def corpora(self) -> list[str]:
        """Return the evaluated corpora, the new one first, the first phase's next."""
        seen = [c for arm in self.arms.values() for c in arm.final]
        first = self.results.first_corpus
        return sorted(dict.fromkeys(seen), key=lambda c: (c != self.new, c != first, seen.index(c)))

    def runs(self, arm: str) -> list[Run]:
        """Return an arm's runs, one a seed."""
        return self.arms[arm].runs

    def seeds(self, arm: str) -> int:
        """Count an arm's seeds."""
        return len({run.seed for run in self.runs(arm)}) or 1

    @cached_property
    def partial(self) -> list[str]:
        """Return the arms with fewer seeds than others: their means are of other data and weights."""
        most = max(map(self.seeds, self.arms), default=1)
        return [arm for arm in self.arms if self.seeds(arm) < most]

    def nll(self, arm: str, corpus: str) -> float | None:
        """Return an arm's final NLL on a corpus, in nats per token, the mean over its seeds."""
        final = self.arms[arm].final
        return final[corpus].nll if corpus in final else None

    def methods(self, arm: str) -> list[str]:
        """List the methods of an arm's resets, from its first report or, without one, as the recipe plans them."""
        report = self.report(arm)
        return [reset.method for reset in report.resets] if report and report.resets else self.arms[arm].methods

    def report(self, arm: str) -> ResetEntry | None:
        """Return the report of an arm's resets, from the first of its runs that has one."""
        return next((run.reset for run in self.runs(arm) if run.reset), None)

    def start(self, arm: str) -> tuple[str, str] | None:
        """Return the phase and the name of the checkpoint an arm started from."""
        return next(((run.start.phase, run.start.checkpoint) for run in self.runs(arm) if run.start), None)

    def always(self, arm: str, method: str) -> bool:
        """Check whether an arm, and every run that it continues, applies this method and no other."""
        earlier = [run.reset for first in self.runs(arm)[:1] for run in self.ancestors(first) if run.reset]
        applied = [self.methods(arm), *([reset.method for reset in report.resets] for report in earlier)]
        conditional = self.conditional(arm) or any(reset.when for report in earlier for reset in report.resets)
        return not conditional and all(methods == [method] for methods in applied)

    def conditional(self, arm: str) -> bool:
        """Check whether a reset of an arm has a condition, so that it acts in some seeds and not in others."""
        return any(reset.when for run in self.runs(arm) if run.reset for reset in run.reset.resets)

    @cached_property
    def bases(self) -> list[str]:
        """Return the arms that reset nothing, neither in this phase nor in an earlier one that they continue."""
        return [arm for arm in self.arms if self.always(arm, BASE)]

    def reference(self, arm: str, method: str) -> str | None:
        """Return the arm with only this method (`BASE`, `full_reset`) that started from the same checkpoint.

        If there is none, as in a sequence of phases with arms, it is the only arm that never applied another method.
        """
        candidates = [other for other in self.arms if self.methods(other) == [method] and not self.conditional(other)]
        pure = [other for other in candidates if self.always(other, method)]
        start = self.start(arm)
        same_start = [other for other in candidates if self.start(other) == start and (other != arm or arm in pure)]
        return same_start[0] if same_start else pure[0] if len(pure) == 1 else None

    def by_seed(self, arm: str, corpus: str) -> dict[int, float]:
        """Return an arm's final NLL on a corpus by seed, without seeds that have none."""
        finals = {run.seed: run.final[corpus].nll for run in self.runs(arm) if corpus in run.final}
        return {seed: nll for seed, nll in finals.items() if nll is not None}

    def differences(self, arm: str, other: str | None, corpus: str) -> list[float]:
        """Return NLL(arm) - NLL(other), seed by seed; from the arms' means where no seed has both."""
        if other is None or other == arm:
            return []
        mine, theirs = self.by_seed(arm, corpus), self.by_seed(other, corpus)
        shared = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        a, b = self.nll(arm, corpus), self.nll(other, corpus)
        return shared or ([a - b] if a is not None and b is not None else [])

    def saved(self, arm: str) -> tuple[float | None, list[float]]:
        """Return the steps saved against full reset on the new corpus: of the mean curves, of all seeds that arrive.

        Where seeds stopped at different steps, the first is the mean over the seeds, None unless all arrive.
        """
        reference = self.reference(arm, "full_reset")
        if reference is None or self.new is None:
            return None, []
        curves = {run.seed: run.curve for run in self.runs(reference)}
        seeds = [steps_saved(run.curve, curves.get(run.seed, []), self.new) for run in self.runs(arm)]
        arrived = [s for s in seeds if s is not None]
        if any(len({run.steps for run in self.runs(either)}) > 1 for either in (arm, reference)):
            # A mean curve ends at the step where its first seed stopped, not at the final loss.
            return fmean(arrived) if arrived and len(arrived) == len(seeds) else None, arrived
        return steps_saved(self.arms[arm].curve, self.arms[reference].curve, self.new), arrived

    @cached_property
    def earlier(self) -> dict[tuple[str, str | None, int], Run]:
        """Return the runs before the arms, by (phase, arm, seed)."""
        return {(run.phase, run.arm, run.seed): run for run in self.results.phases}

    def parent(self, run: Run) -> Run | None:
        """Return the run that a run of the same seed starts from."""
        return self.earlier.get((run.start.phase, run.start.arm, run.seed)) if run.start else None

    def ancestors(self, run: Run) -> list[Run]:
        """Return the run that a run starts from, that run's own parent, and so on back to the first phase."""
        ancestors: list[Run] = []
        parent = self.parent(run)
        while parent is not None and parent not in ancestors:
            ancestors.append(parent)
            parent = self.parent(parent)
        return ancestors

    def _parent_nll(self, run: Run, arm: str, corpus: str) -> float | None:
        """Return the NLL on a corpus of the checkpoint that a run starts from.

        It is read from the parent's curve or, where that lacks it, from the base's curve at step 0.
        """
        if run.start and run.start.step is not None and (parent := self.parent(run)):
            measured = dict(evaluations(parent.curve, corpus, run.start.checkpoint))
            if run.start.step in measured:
                return measured[run.start.step]
        base = self.reference(arm, BASE)
        curve = next((other.curve for other in self.runs(base) if other.seed == run.seed), []) if base else []
        return dict(evaluations(curve, corpus)).get(0)

    def retention(self, arm: str) -> list[tuple[float, float]]:
        """Return (final NLL on the new corpus, forgetting on the first corpus) of each seed."""
        if not self.new or self.first not in self.old:
            return []
        new, lost = self.by_seed(arm, self.new), self.forgotten(arm, self.first)
        return [(new[seed], lost[seed]) for seed in new if seed in lost]

    def forgotten(self, arm: str, corpus: str) -> dict[int, float]:
        """Return, by seed, the final NLL on a corpus less that of the checkpoint that the run started from."""
        parents = {run.seed: self._parent_nll(run, arm, corpus) for run in self.runs(arm)}
        final = self.by_seed(arm, corpus)
        return {seed: final[seed] - nll for seed, nll in parents.items() if nll is not None and seed in final}

    def ranked(self) -> list[str]:
        """Return the arms with a finite NLL on the new corpus, best first; arms that lack seeds come last."""
        scores = {arm: nll for arm in self.arms if (nll := self.nll(arm, self.new or "")) is not None}
        return sorted(scores, key=lambda arm: (arm in self.partial, scores[arm]))

    def tables(self) -> list[Table]:
        """Return a table a corpus, a row an arm."""
        return [self._table(corpus) for corpus in self.corpora]

    def _table(self, corpus: str) -> Table:
        last = "steps saved" if corpus == self.new else "forgetting" if corpus in self.old else None
        whole = {arm: nll for arm in self.arms if arm not in self.partial if (nll := self.nll(arm, corpus)) is not None}
        rows = []
        for arm, entry in self.arms.items():
            final = entry.final.get(corpus, _UNKNOWN)
            cells = [
                _plain(final.perplexity, 2),
                spread(final.nll, final.nll_std),
                _plain(final.bits_per_byte, 4),
                *(paired(self.differences(arm, self.reference(arm, m), corpus)) for m in (BASE, "full_reset")),
            ]
            if last == "steps saved":
                value, reference = self.saved(arm)[0], self.reference(arm, "full_reset")
                never = "never" if reference and final.nll is not None else DASH
                cells.append(DASH if reference == arm else never if value is None else f"{value:.0%}")
            elif last:
                cells.append(paired([*self.forgotten(arm, corpus).values()]))
            rows.append(Row((arm,), tuple(cells), arm in whole and final.nll == min(whole.values())))
        columns = ("perplexity", "NLL", "bits/byte", "vs base", "vs full reset")
        return Table(corpus, (*columns, last) if last else columns, tuple(rows))

    def averaged(self) -> list[Table]:
        """Return a table of the weights' moving averages beside the weights, a row an arm; nothing without any."""
        averages = {arm: [run.final_ema for run in self.runs(arm) if run.final_ema] for arm in self.arms}
        averages = {arm: seeds for arm, seeds in averages.items() if seeds}
        if not averages:
            return []
        corpora = [c for c in self.corpora if all(c in scores for seeds in averages.values() for scores in seeds)]
        rows = []
        for arm, seeds in averages.items():
            cells: list[str] = []
            for corpus in corpora:
                nlls = [nll for scores in seeds if (nll := scores[corpus].nll) is not None]
                mean = fmean(nlls) if nlls and len(nlls) == len(self.runs(arm)) else None
                cells += [_plain(self.nll(arm, corpus), 4), _plain(mean, 4)]
            rows.append(Row((arm,), tuple(cells)))
        columns = tuple(name for corpus in corpora for name in (corpus, f"{corpus} (EMA)"))
        return [Table("NLL of the last weights and of their moving average (EMA)", columns, tuple(rows))]

    def legend(self) -> str:
        """Return how the numbers of the tables were measured, and what ± means where there are several seeds."""
        measurement = self.results.measurement
        sentences = [f"Measured {described(measurement.model_dump())}."] if measurement else []
        if max(map(self.seeds, self.arms), default=1) > 1:
            sentences.append(
                "NLL ± its standard deviation over seeds; differences, paired by seed, ± half their "
                f"{LEVEL:.0%} interval."
            )
            if self.partial:
                sentences.append(f"Of fewer seeds than the others: {', '.join(self.partial)}.")
        return " ".join(sentences)

    def batches(self) -> tuple[bool | None, str]:
        """Return whether all arms saw the same batches in the same order, None where that is not known; a sentence."""
        hashes: dict[int, dict[str, list[str]]] = {}
        for arm in self.arms:
            for run in self.runs(arm):
                if run.batches_hash:
                    hashes.setdefault(run.seed, {}).setdefault(run.batches_hash, []).append(arm)
        if sum(len(arms) for seed in hashes.values() for arms in seed.values()) < 2:
            if len(self.arms) < 2:
                return None, f"{'One arm alone' if self.arms else 'No arms'}: there are no batches to compare."
            return None, "Whether the arms saw the same batches is not recorded."
        steps = {arm: sorted({run.steps for run in self.runs(arm) if run.steps is not None}) for arm in self.arms}
        if self._stopped() and len({tuple(numbers) for numbers in steps.values()}) > 1:
            by_arm = ", ".join(f"{arm} {' and '.join(f'{n:,}' for n in numbers)}" for arm, numbers in steps.items())
            return None, (
                f"The arms trained for different numbers of steps ({by_arm}), so that the hashes of their batches "
                "cannot be compared: differences mix the reset with the length."
            )
        split = "; ".join(
            f"seed {seed}: " + " ≠ ".join(", ".join(arms) for arms in by_hash.values())
            for seed, by_hash in hashes.items()
            if len(by_hash) > 1
        )
        if split:
            return False, f"The arms did not see the same batches ({split}): differences mix the reset with the data."
        each = " (seed by seed)" if len(hashes) > 1 else ""
        return True, f"Every arm saw the same batches in the same order{each}: the hashes of their token ids agree."

    def reading(self) -> list[str]:
        """Return sentences that claim no more than the numbers: the outcome, its spread, retention, failures."""
        ranked, sentences = self.ranked(), self._unfinished()
        if not self.arms:
            return [*sentences, "No arm was run."]
        if not ranked or self.new is None:
            return [*sentences, "No arm has a finite loss on the new corpus: there is nothing to compare."]
        best = ranked[0]
        final = self.arms[best].final[self.new]
        reached = f"{final.nll:.3f} nats per token (perplexity {_plain(final.perplexity, 2)})"
        if len(ranked) == 1:
            alone = "no other arm has a finite loss to compare it with"
            sentences.append(f"{best} ends at {reached} on {self.new}; {alone}.")
        else:
            sentences += self._margins(best, ranked[1], reached)
        kept = {arm: fmean(y for _, y in pairs) for arm in ranked if (pairs := self.retention(arm))}
        if len(kept) > 1 and best in kept:
            least = min(kept, key=lambda a: kept[a])
            also = "the least forgetting" if least == best else f"the least: {least}, {_apart(kept[least])}"
            which = "the first of the other texts" if self.one_phase else "the first corpus"
            sentences.append(f"On {self.first}, {which}, it ends {_apart(kept[best])} its parent checkpoint ({also}).")
        if len(ranked) < len(self.arms):
            without = ", ".join(arm for arm in self.arms if arm not in ranked)
            sentences.append(f"Without a finite loss on {self.new}: {without}.")
        return [*sentences, *self._stopped()]

    def _unfinished(self) -> list[str]:
        """Return a sentence that names the stages not trained to their end; nothing if there are none."""
        stages = [f"{folder} ({state})" for folder, state in self.results.unfinished.items()]
        return [f"Unfinished, what follows is of the rest: {first_few(stages)}."] if stages else []

    def _stopped(self) -> list[str]:
        """Return a sentence that names the runs that ended before their last step; nothing if there are none."""
        runs = [*self.results.phases, *(run for arm in self.arms for run in self.runs(arm))]
        early = [
            f"{run.arm or run.phase} (seed {run.seed}) at step {run.steps:,} of {run.planned_steps:,}"
            for run in runs
            if run.planned_steps is not None and run.steps is not None
        ]
        return [f"Stopped early, within the learning rate's schedule: {first_few(early)}."] if early else []

    def _margins(self, best: str, second: str, reached: str) -> list[str]:
        """Return by how much the best arm leads, and over how many seeds."""
        new = self.new or ""
        rivals = {"base": self.reference(best, BASE), "full reset": self.reference(best, "full_reset")}
        pairs = [(name, self.differences(best, rival, new)) for name, rival in rivals.items()]
        gaps = " and ".join(f"{_apart(fmean(by_seed))} {name}" for name, by_seed in pairs if by_seed)
        sentences = [f"{best} ends lowest on {new}, at {reached}{': ' if gaps else ''}{gaps}."]
        # Each arm against the base of its own start.
        against_base = (self.differences(arm, self.reference(arm, BASE), new) for arm in self.arms)
        if rivals["base"] == best and not any(by_seed and fmean(by_seed) < 0 for by_seed in against_base):
            sentences.append("No reset did better than leaving the weights alone.")
        saved = self.saved(best)[0]
        if saved is not None and saved > 0 and rivals["full reset"] != best:
            sentences.append(f"{best} reaches the final loss of {rivals['full reset']} in {saved:.0%} fewer steps.")
        gap = self.differences(best, second, new)
        if len(gap) > 1:
            wins = f"lower in {sum(d < 0 for d in gap)} of {len(gap)} seeds"
            sentences.append(f"Next is {second}: the difference, seed by seed, is {paired(gap)} ({wins}).")
        else:
            sentences.append(f"Next is {second}, {abs(gap[0]):.3f} away.")
            sentences.append("One seed: no spread is known, so small margins may be chance.")
        return sentences


def _apart(difference: float) -> str:
    """Write a signed difference in words: `0.120 below`."""
    return f"{abs(difference):.3f} {'above' if difference > 0 else 'below'}"


def _plain(value: float | None, digits: int) -> str:
    """Write a number with this many decimals, a dash where there is none."""
    return DASH if value is None else f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def spread(value: float | None, std: float | None) -> str:
    """Write a mean with its standard deviation over seeds where there is one."""
    return DASH if value is None else f"{value:.4f}" + (f" ± {std:.4f}" if std is not None else "")


def paired(values: Sequence[float]) -> str:
    """Write the mean of differences with half the width of its interval, a dash where there are none."""
    if not values:
        return DASH
    interval = paired_interval(values)
    return f"{fmean(values):+.4f}" + (f" ± {(interval[1] - interval[0]) / 2:.4f}" if interval else "")
