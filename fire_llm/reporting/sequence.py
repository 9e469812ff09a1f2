"""Runs with several phases that have arms: what each arm learned in each phase, and how much of it was kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from statistics import fmean, stdev

from fire_llm.reporting.comparison import BASE, Comparison, evaluations, paired, spread
from fire_llm.reporting.table import Row, Table
from fire_llm.reporting.waiting import waiting_tables

ByPhase = dict[str, dict[int, float]]
"""By phase, nats per token by seed."""

LEARNED = "learned: NLL on a phase's corpus when the phase ended"
AGAINST_BASE = "learned, against the base"
FORGOTTEN = "forgotten: NLL at the end less that when the corpus's phase ended"


class PhaseSequence:
    """Follow the arms of the last phase back through the phases that led to them."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self._corpus = comparison.results.phase_corpus
        self._learned = {arm: self._scores(arm) for arm in comparison.arms}

    @cached_property
    def phases(self) -> dict[str, str]:
        """Return the heaviest corpus of each phase on the way to the arms; nothing if only the last phase has arms."""
        if not any(arm for _, arm, _ in self.comparison.earlier):
            return {}
        learned_in = {phase for scores in self._learned.values() for phase in scores}
        return {phase: corpus for phase, corpus in self._corpus.items() if phase in learned_in}

    @property
    def armed(self) -> list[str]:
        """Return the phases that have arms."""
        without_arms = {phase for phase, arm, _ in self.comparison.earlier if not arm}
        return [phase for phase in self.phases if phase not in without_arms]

    def learned(self, arm: str) -> ByPhase:
        """Return the NLL on each phase's own corpus at the checkpoint from which this arm's next phase began."""
        return self._learned[arm]

    def _scores(self, arm: str) -> ByPhase:
        scores: ByPhase = {}
        for run in self.comparison.runs(arm):
            step, label = None, "final"
            for current in (run, *self.comparison.ancestors(run)):
                measured = evaluations(current.curve, self._corpus.get(current.phase, ""), label)
                nll = dict(measured).get(step if step is not None else measured[-1][0]) if measured else None
                if nll is not None:
                    scores.setdefault(current.phase, {})[run.seed] = nll
                step, label = (current.start.step, current.start.checkpoint) if current.start else (None, "final")
        return scores

    def against_base(self, arm: str) -> dict[str, list[float]]:
        """Return, by phase with arms, the arm's learned NLL less that of its base, seed by seed."""
        base = self.comparison.reference(arm, BASE)
        if base is None:
            return {}
        mine, theirs = self.learned(arm), self.learned(base)
        return {p: [mine[p][s] - theirs[p][s] for s in mine.get(p, {}) if s in theirs.get(p, {})] for p in self.armed}

    def forgotten(self, arm: str) -> dict[str, list[float]]:
        """Return, by phase but the last, the final NLL on its corpus less the learned one, seed by seed."""
        learned, forgotten = self.learned(arm), {}
        for phase in [*self.phases][:-1]:
            final = self.comparison.by_seed(arm, self.phases[phase])
            forgotten[phase] = [final[seed] - nll for seed, nll in learned.get(phase, {}).items() if seed in final]
        return forgotten

    def tables(self) -> list[Table]:
        """Return tables of what was learned, also against the base, and forgotten; none for one phase with arms."""
        if not self.phases:
            return []

        def against_base(arm: str) -> dict[str, list[float]]:
            return {} if self.comparison.reference(arm, BASE) == arm else self.against_base(arm)

        return [
            self._table(LEARNED, self.armed, lambda arm, phase: _spread(self.learned(arm).get(phase, {}))),
            self._table(AGAINST_BASE, self.armed, lambda arm, phase: paired(against_base(arm).get(phase, []))),
            self._table(FORGOTTEN, [*self.phases][:-1], lambda arm, phase: paired(self.forgotten(arm).get(phase, []))),
        ]

    def name(self, phase: str) -> str:
        """Return the name of a phase's corpus if no other phase has the same corpus, else the phase's own name."""
        corpora = list(self.phases.values())
        return self.phases[phase] if len(set(corpora)) == len(corpora) else phase

    def _table(self, caption: str, phases: list[str], cell: Callable[[str, str], str]) -> Table:
        rows = tuple(Row((arm,), tuple(cell(arm, phase) for phase in phases)) for arm in self.comparison.arms)
        return Table(caption, tuple(self.name(phase) for phase in phases), rows)


def every_table(comparison: Comparison) -> list[Table]:
    """Return all tables of a run: its arms, averaged weights, earlier phases with arms, resets with a condition."""
    sequence = PhaseSequence(comparison).tables()
    return [*comparison.tables(), *comparison.averaged(), *sequence, *waiting_tables(comparison)]


def _spread(by_seed: Mapping[int, float]) -> str:
    values = list(by_seed.values())
    return spread(fmean(values) if values else None, stdev(values) if len(values) > 1 else None)
