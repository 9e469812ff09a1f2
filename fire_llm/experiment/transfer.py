"""Compute forgetting and forward transfer: differences between checkpoints, with intervals over documents.

Source: Lopez-Paz & Ranzato, Gradient Episodic Memory (arXiv 1706.08840), section 2. Here in nats per byte of held-out
text instead of accuracy, so that a positive number is a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fire_llm.evaluation.scores import Scores
from fire_llm.evaluation.statistics import comparable_unit, paired_difference
from fire_llm.reporting.schema import Transfer


@dataclass(frozen=True)
class PhaseRun:
    """One phase as one arm and seed trained it: from a checkpoint, on some corpora, to a checkpoint."""

    phase: str
    arm: str | None
    seed: int
    trained: tuple[str, ...]
    """The corpora of the phase."""
    start: str
    """The checkpoint that it started from, before any reset; for the first phase, what the run began with."""
    end: str
    """Its last checkpoint."""
    parent: PhaseRun | None

    @property
    def before(self) -> Iterator[tuple[PhaseRun, str]]:
        """Yield the earlier stages, the nearest first, each with the checkpoint that the next one started from."""
        stage = self
        while stage.parent is not None:
            yield stage.parent, stage.start
            stage = stage.parent

    @property
    def root(self) -> str:
        """Return the weights that the run began with."""
        return next((s.start for s, _ in reversed([*self.before])), self.start)


def transfer(
    matrix: Mapping[str, Mapping[str, Scores]], stages: Sequence[PhaseRun], level: float = 0.95
) -> tuple[list[Transfer], list[Transfer]]:
    """Return how much each stage forgot of earlier corpora, and how much earlier stages helped on its own corpora.

    Args:
        matrix: {checkpoint: {corpus: scores}} for every checkpoint that a stage starts from or ends with.
        stages: The stages in the order of the run.
        level: The level of the intervals.

    Returns:
        Forgetting: NLL(end of the stage) − NLL(checkpoint taken from the latest earlier stage that trained on the
        corpus). Positive means lost. `replayed` says whether the stage itself trained on the corpus too.
        Forward transfer: NLL(checkpoint that the stage started from) − NLL(weights that the run began with), for
        corpora that no earlier stage trained on. Negative means helped. Arms that share their start share one entry.
        Both are in nats per byte.
    """
    forgetting: list[Transfer] = []
    forward: dict[tuple[str, str], Transfer] = {}

    def difference(stage: PhaseRun, corpus: str, after: str, before: str, trained_in: str) -> Transfer:
        later, earlier = matrix[after][corpus], matrix[before][corpus]
        result = paired_difference(later, earlier, unit=comparable_unit(later, earlier), level=level)
        names = {"data": corpus, "phase": stage.phase, "seed": stage.seed, "after": after, "before": before}
        return Transfer.model_validate({**names, "trained_in": trained_in, **result.to_dict()})

    for stage in stages:
        for corpus in matrix[stage.end]:
            taken = next(((s, checkpoint) for s, checkpoint in stage.before if corpus in s.trained), None)
            if taken is not None:
                entry = difference(stage, corpus, stage.end, taken[1], taken[0].phase)
                own = {"arm": stage.arm, "replayed": corpus in stage.trained}
                forgetting.append(entry.model_copy(update=own))
            elif corpus in stage.trained and stage.parent is not None and (stage.start, corpus) not in forward:
                forward[stage.start, corpus] = difference(stage, corpus, stage.start, stage.root, stage.phase)
    return forgetting, [*forward.values()]
