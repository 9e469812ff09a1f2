"""How much a reset raised the loss at the moment it was applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from fire_llm.training.progress import report_line


def loss_jump(before: float, after: float, vocabulary: int) -> dict[str, float | None]:
    """Compare the losses right before and right after a reset, on the same held-out text.

    The model has learned ln V − before: one that knows nothing gives every token the same probability, and freshly
    drawn weights come within a few hundredths of that. A reset that touches nothing undoes 0 of it, a full reset 1.
    More than 1 is worse than knowing nothing, which forgetting alone does not explain.

    Args:
        before: NLL of the checkpoint, nats a token.
        after: NLL right after the reset, before any step.
        vocabulary: V.

    Returns:
        `before`, `after`, `uniform` = ln V, and `undone` = (after − before) / (ln V − before), None where the
        checkpoint knew nothing.
    """
    uniform = math.log(vocabulary)
    known = uniform - before
    return {
        "before": before,
        "after": after,
        "uniform": uniform,
        "undone": (after - before) / known if known > 0 else None,
    }


def sentence(corpus: str, jump: Mapping[str, Any]) -> str:
    """Describe a `loss_jump` in one sentence."""
    text = f"NLL on {corpus} {jump['after']:.3f} after the reset, {jump['before']:.3f} before"
    if jump["undone"] is None:
        return f"{text}, which was already worse than a uniform guess, {jump['uniform']:.3f}"
    text += f": it undid {jump['undone']:.0%} of what sets the checkpoint apart from a uniform guess"
    beyond = f", {jump['uniform']:.3f}. That is worse than knowing nothing: expect a slow start"
    return text + (beyond if jump["undone"] > 1.05 else f" ({jump['uniform']:.3f})")


class LossJumpCallback(TrainerCallback):
    """Report, at the evaluation before the first step, how far the reset raised the loss.

    Args:
        before: NLL of the checkpoint that training starts from, by corpus.
        vocabulary: Tokens of the model.
    """

    def __init__(self, before: Mapping[str, float], vocabulary: int) -> None:
        self.before, self.vocabulary = before, vocabulary

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        """Write a line a corpus to stderr."""
        for corpus, before in self.before.items() if state.global_step == 0 and args.title is not None else ():
            after = metrics.get(f"eval_{corpus}_nll", math.nan)
            if math.isfinite(after):
                report_line(args, sentence(corpus, loss_jump(before, after, self.vocabulary)))
