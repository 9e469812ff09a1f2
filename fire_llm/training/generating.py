"""Let a model continue prompts while it trains, without an effect on the training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fire_llm.core.errors import UserError
from fire_llm.core.terminal import shown
from fire_llm.evaluation.generation import Prompts, continuations
from fire_llm.training.progress import in_run, report_line

SAMPLES = "samples"
"""Key of an entry in a training's log that holds text: the continuation of each prompt."""

PROMPTS = "prompts"
"""Key beside it: the prompts, in their order."""

BEFORE = "before_reset"
"""Key beside it: whether the weights before the reset wrote the texts."""

_LINE = 100
"""Characters of a text in a line on stderr."""


class GenerationCallback(TrainerCallback):
    """Log what the model writes at step 0, at evaluations or every so many steps, and at the end.

    Works in any `Trainer`, among its callbacks, behind those that change weights. Texts go into the log of its state,
    and so into each checkpoint: what was written before a resumption is not written again.

    Args:
        prompts: What the model continues.
        every_steps: Optimizer steps between two times; None: at every evaluation.
    """

    def __init__(self, prompts: Prompts, every_steps: int | None = None) -> None:
        if every_steps is not None and every_steps < 1:
            raise UserError(f"every_steps: {every_steps} is not a number of steps; give 1 or more, or None")
        self.prompts, self.every_steps = prompts, every_steps

    def before_reset(self) -> TrainerCallback:
        """Return a callback that logs what the model writes before the callbacks behind it reset it."""
        return _BeforeReset(self)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write before the first step, unless this is a resumption."""
        if state.global_step == 0:
            self.write(args, state, "at step 0", **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write after every so many steps and after the last; the checkpoint of that step holds the texts."""
        last = state.global_step >= state.max_steps
        if last or (self.every_steps is not None and state.global_step % self.every_steps == 0):
            self.write(args, state, f"at the last step, {state.global_step:,}" if last else "", **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write beside an evaluation, and where it ends training."""
        if 0 < state.global_step < state.max_steps:
            if control.should_training_stop:
                self.write(args, state, f"at the last step, {state.global_step:,}", **kwargs)
            elif self.every_steps is None:
                self.write(args, state, "", **kwargs)

    def write(self, args: Any, state: Any, when: str, *, before: bool = False, model: Any = None, **_: Any) -> None:
        """Log what the model writes, once a step; show the first text on stderr behind `when`, unless that is empty."""
        if any(SAMPLES in e and (e["step"], e[BEFORE]) == (state.global_step, before) for e in state.log_history):
            return
        texts = continuations(model, self.prompts)
        entry = {PROMPTS: list(self.prompts.texts), SAMPLES: texts, BEFORE: before}
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
        if when and in_run(args):
            line = shown(f"{self.prompts.texts[0]!r} → {texts[0]!r}")
            report_line(args, f"{when}: {line if len(line) <= _LINE else line[:_LINE] + '…'}")


class _BeforeReset(TrainerCallback):
    def __init__(self, callback: GenerationCallback) -> None:
        self.callback = callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.callback.write(args, state, "before the reset", before=True, **kwargs)
