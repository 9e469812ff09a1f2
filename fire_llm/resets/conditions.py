"""When a reset acts: always, or on weights alone that the phase before has overtrained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

OVERTRAINED = 0.1
"""Nats a token that held-out text may have become worse by, where a condition names no number."""

When = (
    Literal["overtrained"]
    | Annotated[dict[Literal["overtrained"], Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=1)]
    | None
)
"""A condition as it is given: its name, or its name and the nats a token that are too many."""

CONDITIONS = "overtrained, or {overtrained: NATS} with a number of nats a token of 0 or more"
"""What may be given, in words."""


def condition(when: Any) -> dict[str, float] | None:
    """Return a condition with its number filled in, None for none."""
    return {when: OVERTRAINED} if isinstance(when, str) else when


@dataclass(frozen=True)
class Overtraining:
    """What the phase before says of the checkpoint that it handed on: held-out loss and training loss, in nats a token.

    The checkpoint is overtrained if two things are true. Its held-out loss lies more than `threshold` above the lowest
    of the phase so far. Its training loss lies below the training loss at that lowest point. Then held-out text became
    worse while the text that is read became better.
    """

    corpora: tuple[str, ...]
    """The corpora whose held-out text is measured, weighted as the phase reads them."""
    threshold: float
    step: int
    """Optimizer steps behind the checkpoint, within its phase."""
    nll: float
    """Held-out loss of the checkpoint."""
    lowest: float
    """Lowest held-out loss of the phase, from its first step to the checkpoint."""
    lowest_step: int
    train_loss: float
    """Training loss that was logged last before the checkpoint."""
    lowest_train_loss: float
    """Training loss that was logged last before the lowest held-out loss."""
    applied: bool
    """Whether the checkpoint is overtrained, so that the reset acts."""

    @classmethod
    def of(
        cls, history: Iterable[Mapping[str, Any]], key: str, corpora: Iterable[str], threshold: float
    ) -> Overtraining:
        """Judge the last of a phase's measurements.

        The evaluation before the first step is that of other weights, which the phase did not make, and does not count.

        Args:
            history: The log of the phase up to the checkpoint, in order; the last measurement is the checkpoint's.
            key: Of the held-out loss in it.
            corpora: What that is measured on.
            threshold: Nats a token above the lowest.

        Raises:
            ValueError: Nothing was measured, or nothing finite.
        """
        measured: list[tuple[float, int, float]] = []
        loss: float | None = None
        for entry in history:
            loss = entry.get("loss", loss)
            if entry["step"] > 0 and math.isfinite(entry.get(key, math.nan)) and loss is not None:
                measured.append((entry[key], entry["step"], loss))
        if not measured:
            raise ValueError(f"the log holds no finite '{key}' behind a training loss")
        nll, step, train_loss = measured[-1]
        lowest, lowest_step, lowest_train_loss = min(measured)
        overtrained = nll - lowest > threshold and train_loss < lowest_train_loss
        losses = (nll, lowest, lowest_step, train_loss, lowest_train_loss)
        return cls(tuple(corpora), threshold, step, *losses, applied=overtrained)

    def __str__(self) -> str:
        """Return in one line whether the reset acts, and the numbers that say so."""
        on = f"held-out {self.nll:.3f} on {', '.join(self.corpora)}"
        if self.step == self.lowest_step:
            return f"not applied: {on} is the lowest of the {self.step} steps"
        rise = f"{on} is {self.nll - self.lowest:.3f} above the lowest, {self.lowest:.3f} at step {self.lowest_step},"
        losses = f"from {self.lowest_train_loss:.3f} to {self.train_loss:.3f}"
        if self.applied:
            return f"applied: {rise} more than {self.threshold:g}, and the training loss fell {losses}"
        if self.nll - self.lowest > self.threshold:
            return f"not applied: {rise} more than {self.threshold:g}, but the training loss did not fall: {losses}"
        return f"not applied: {rise} not more than {self.threshold:g}"
