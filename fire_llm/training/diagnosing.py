"""Measure plasticity while a `Trainer` trains."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fire_llm.core.errors import UserError
from fire_llm.evaluation.diagnose import LOG_PREFIX, diagnose


class DiagnosticsCallback(TrainerCallback):
    """Log `diag_...` when training begins, every so many steps and when it ends, without an effect on the training.

    Works in any `Trainer`. Every rank measures, and all get the same numbers. What was measured before a resumption is
    in the log of the checkpoint, and is not measured again. Behind a reset's callback it measures the reset weights.

    Args:
        tokens: (N,) token ids of the text to measure on, the same on every rank.
        every_steps: Optimizer steps between two measurements.
        **options: As in `diagnose`.

    Raises:
        UserError: At once for `every_steps` below 1; when training begins for what `diagnose` refuses.
    """

    def __init__(self, tokens: Any, every_steps: int = 100, **options: Any) -> None:
        if every_steps < 1:
            raise UserError(f"every_steps: {every_steps} is not a number of steps; give 1 or more")
        self.tokens, self.every_steps, self.options = tokens, every_steps, options
        self._trainer: Any = None

    def attach(self, trainer: Any) -> DiagnosticsCallback:
        """Add this to a trainer, and log to all its loggers; one of its `callbacks` logs to the trainer's state alone.

        Args:
            trainer: A `Trainer` that has not begun to train.
        """
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step, unless this is a resumption."""
        if state.global_step == 0:
            self._measure(state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after every so many steps and after the last; the checkpoint of that step holds the result."""
        if state.global_step % self.every_steps == 0 or state.global_step >= state.max_steps:
            self._measure(state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where an evaluation ends training, before the checkpoint of that step is written."""
        if control.should_training_stop and state.global_step < state.max_steps:
            self.on_train_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where training was stopped early."""
        key = f"{LOG_PREFIX}dfi_mean"
        if not any(entry["step"] == state.global_step and key in entry for entry in state.log_history):
            self._measure(state, control, **kwargs)

    def _measure(self, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        measures = diagnose(model, self.tokens, **self.options).measures()
        logs = {f"{LOG_PREFIX}{name}": value for name, value in measures.items()}
        if self._trainer is None:
            state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
            return
        # `Trainer.log` clears this flag, which other callbacks set to have the losses of this step logged.
        should_log = control.should_log
        self._trainer.log(logs)
        control.should_log = should_log
