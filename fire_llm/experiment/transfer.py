"""Forgetting and forward transfer: differences between rows of a matrix, with intervals over documents.

Source: Lopez-Paz & Ranzato, Gradient Episodic Memory (arXiv 1706.08840), section 3; in nats per byte of held-out text
instead of accuracy, so that a positive number is a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fire_llm.evaluation.scores import Scores
from fire_llm.evaluation.statistics import paired_difference

Json = dict[str, Any]


@dataclass(frozen=True)
class PhaseRun:
    """One phase as one arm and seed went through it: from a checkpoint, on some corpora, to a checkpoint."""

    phase: str
    arm: str | None
    seed: int
    trained: tuple[str, ...]
    """Corpora of the phase."""
    start: str
    """Checkpoint that it started from, before any reset; of the first phase, what the run began with."""
    end: str
    """Its last checkpoint."""
    parent: PhaseRun | None

    @property
    def before(self) -> Iterator[tuple[PhaseRun, str]]:
        """Yield the stages that led here, the nearest first, each with the checkpoint that was taken from it."""
        stage = self
        while stage.parent is not None:
            yield stage.parent, stage.start
            stage = stage.parent

    @property
    def root(self) -> str:
        """Return what the run began with."""
        return next((s.start for s, _ in reversed([*self.before])), self.start)


def transfer(matrix: Mapping[str, Mapping[str, Scores]], stages: Sequence[PhaseRun], level: float = 0.95) -> Json:
    """Return what each stage forgot of earlier corpora, and what earlier stages did for those it began to train on.

    Args:
        matrix: {checkpoint: {corpus: scores}}, of every checkpoint that a stage starts from or ends with.
        stages: In the order of the run.
        level: Of the intervals.

    Returns:
        `forgetting`: NLL(end of the stage) − NLL(checkpoint taken from the latest earlier stage that trained on the
        corpus): positive is lost. `replayed` tells whether the stage itself trained on it too.
        `forward_transfer`: NLL(checkpoint the stage started from) − NLL(what the run began with), of corpora that no
        stage before it trained on: negative helps. Arms that share their start share one entry.
        Both nats per byte, as `Difference.to_dict()` behind the names of the two checkpoints.
    """
    forgetting: list[Json] = []
    forward: dict[tuple[str, str], Json] = {}

    def entry(stage: PhaseRun, corpus: str, after: str, before: str) -> Json:
        found = paired_difference(matrix[after][corpus], matrix[before][corpus], unit="byte", level=level)
        names = {"data": corpus, "phase": stage.phase, "arm": stage.arm, "seed": stage.seed}
        return {**names, "after": after, "before": before, **found.to_dict()}

    for stage in stages:
        for corpus in matrix[stage.end]:
            taken = next(((s, checkpoint) for s, checkpoint in stage.before if corpus in s.trained), None)
            if taken is not None:
                told = {"trained_in": taken[0].phase, "replayed": corpus in stage.trained}
                forgetting.append({**entry(stage, corpus, stage.end, taken[1]), **told})
            elif corpus in stage.trained and stage.parent is not None and (stage.start, corpus) not in forward:
                told = {"trained_in": stage.phase}
                forward[stage.start, corpus] = {**entry(stage, corpus, stage.start, stage.root), "arm": None, **told}
    return {"forgetting": forgetting, "forward_transfer": [*forward.values()]}
