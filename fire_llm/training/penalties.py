"""Add the penalties of an arm to the gradients of every step, before these are clipped."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fire_llm.core.errors import UserError
from fire_llm.resets import Penalties, ResetsLike, parse_resets
from fire_llm.resets.spec import refuse_kinds
from fire_llm.training.callbacks import initial_model


class PenaltyCallback(TrainerCallback):
    """Train with `l2_init`, `parseval` or the like in the loss, in a `ContinualTrainer`.

    The gradient of a penalty is added once a step to that of the accumulated batch, and is clipped with it, as if the
    penalty were part of the loss. The logged loss stays that of the language model. No state is kept from step to step,
    and replicas add the same.

    Args:
        penalties: A method's name, a spec, or a list of specs.
        initial: A model with the run's initial weights; where it is wanted and not given, drawn from the model's
            config and `seed`. A copy of what is penalised stays on the model's device.
        seed: Seed of those weights; the trainer's own by default.
        **options: Options of the method, where `penalties` is its name: `PenaltyCallback("l2_init", strength=1e-4)`.

    Raises:
        UserError: At once, for an unknown method or option, or one that is no penalty; when training begins, where
            FSDP2 shards what has to be whole; at the first step, in another `Trainer`.
    """

    def __init__(self, penalties: ResetsLike, *, initial: Any = None, seed: int | None = None, **options: Any) -> None:
        self.penalties = parse_resets(penalties, options)
        refuse_kinds(self.penalties, "penalty")
        self.initial, self.seed = initial, seed
        self._work: Penalties | None = None
        self._added = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find the penalised weights, and those that they are drawn to."""
        seed = args.seed if self.seed is None else self.seed
        self._work = Penalties(model, self.penalties, initial=initial_model(self.penalties, self.initial, model, seed))

    def add(self, scale: float) -> None:
        """Add the penalties' gradients to those of a step.

        Args:
            scale: Factor of the gradients at this point: fp16's loss scale, or 1.
        """
        assert self._work is not None
        self._added = True
        self._work.add_(scale)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse to train without the penalties: another `Trainer` adds none."""
        if not self._added:
            raise UserError("PenaltyCallback acts before gradients are clipped: use fire_llm's ContinualTrainer")
        self._added = False


def add_penalties(trainer: Any) -> None:
    """Add the gradients of a trainer's penalties, once those of all micro-batches and ranks are there."""
    scaler = trainer.accelerator.scaler
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PenaltyCallback):
            callback.add(1.0 if scaler is None else scaler.get_scale())  # fp16's gradients are still scaled
