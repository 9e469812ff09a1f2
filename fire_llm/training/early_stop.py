"""End a phase where the loss on a corpus no longer falls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback

from fire_llm.core.errors import UserError
from fire_llm.training.progress import report_line


class EarlyStopCallback(TrainerCallback):
    """End a `ContinualTrainer`'s phase, with a checkpoint, once the NLL of a corpus has stopped falling.

    It counts evaluations in the log, which every checkpoint holds: a resumed training ends at the same step. The
    evaluation before the first step counts as the first.

    Args:
        corpus: One of the `evaluation_sets`.
        patience: Successive evaluations without a fall that end the phase.
        min_delta: A fall is more than so many nats a token below the lowest NLL so far.

    Raises:
        UserError: For a `patience` below 1 or a `min_delta` below 0.
    """

    def __init__(self, corpus: str, patience: int = 3, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise UserError(f"patience: {patience} is not a number of evaluations; give 1 or more")
        if not 0 <= min_delta < math.inf:
            raise UserError(f"min_delta: {min_delta} should be a number of nats a token, 0 or more")
        self.corpus, self.patience, self.min_delta = corpus, patience, min_delta
        self.stopped = False
        """Whether this ended the training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin again."""
        self.stopped = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Count the evaluations without a fall, and end training with a checkpoint after `patience` of them."""
        key = f"eval_{self.corpus}_nll"
        if metrics is None or key not in metrics or not 0 < state.global_step < state.max_steps:
            return
        if evaluations_without_fall(state.log_history, key, self.min_delta) >= self.patience:
            self.stopped = control.should_training_stop = control.should_save = True
            report_line(
                args,
                f"stopped at step {state.global_step:,} of {state.max_steps:,}: the NLL of {self.corpus} has not "
                f"fallen {f'by more than {self.min_delta:g} ' if self.min_delta else ''}for {self.patience} "
                "evaluation(s)",
            )


def evaluations_without_fall(history: Iterable[Mapping[str, Any]], key: str, min_delta: float = 0.0) -> int:
    """Return how many evaluations have passed since the last new lowest value.

    Args:
        history: Entries of a log, in order.
        key: Of the value; entries without it do not count.
        min_delta: A new lowest value is lower by more than this.
    """
    lowest, without = math.inf, 0
    for entry in history:
        if key in entry:
            fell = entry[key] < lowest - min_delta
            lowest, without = (entry[key], 0) if fell else (lowest, without + 1)
    return without
