"""Penalties of an arm: added to the gradients of every step before these are clipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.core.errors import UserError
from fire_llm.resets import RESETS, ResetsLike, ResetSpec, parse_resets
from fire_llm.resets.plan import Plan
from fire_llm.resets.spec import refuse_kinds
from fire_llm.training.callbacks import initial_model
from fire_llm.training.sharding import placed_like


class PenaltyCallback(TrainerCallback):
    """Train with `l2_init`, `parseval` or the like in the loss, in a `ContinualTrainer`.

    The gradient of a penalty is added once a step to that of the accumulated batch: it is clipped with it, and goes
    through the optimizer, as if the penalty were part of the loss. The loss that is logged stays the language model's.
    Nothing is kept from step to step, so that resumption needs nothing; replicas add the same.

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
        self._terms: list[tuple[ParameterSlice, Callable[[Tensor], Tensor]]] = []
        self._added = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find what is penalised, and the weights it is drawn to."""
        seed = args.seed if self.seed is None else self.seed
        initial = initial_model(self.penalties, self.initial, model.config, seed)
        plan = Plan.of(model, self.penalties, initial, "penalty")
        starts = {slice_.parameter: slice_.tensor for slice_ in plan.start.values()}
        self._terms = []
        for spec in self.penalties:
            for slice_ in _given(plan, spec):
                beside = [_placed(starts[slice_.parameter], slice_)] if spec.needs_initial else []
                act = partial(RESETS[spec.method].act, options=spec.options, kernel=slice_.kernel)
                self._terms.append((slice_, partial(_gradient, act, beside)))

    @torch.no_grad()
    def add(self, scale: float) -> None:
        """Add the penalties' gradients to those of a step.

        Args:
            scale: What the gradients are multiplied by at this point: fp16's loss scale, or 1.
        """
        self._added = True
        for slice_, gradient in self._terms:
            if slice_.tensor.grad is None:
                slice_.tensor.grad = torch.zeros_like(slice_.tensor)
            held, slope = (replace(slice_, tensor=_local(t)) for t in (slice_.tensor, slice_.tensor.grad))
            slope.write_(slope.read().add(gradient(held.read()), alpha=scale))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse to train without what was asked for."""
        if not self._added:
            raise UserError("PenaltyCallback acts before gradients are clipped: use fire_llm's ContinualTrainer")
        self._added = False


def add_penalties(trainer: Any) -> None:
    """Add the gradients of a trainer's penalties, once those of all micro-batches and ranks are there."""
    scaler = trainer.accelerator.scaler
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PenaltyCallback):
            callback.add(1.0 if scaler is None else scaler.get_scale())  # fp16's gradients are still scaled


def _gradient(act: Callable[..., Tensor], beside: list[Tensor], w: Tensor) -> Tensor:
    return act(w, *beside)


def _given(plan: Plan, spec: ResetSpec) -> list[ParameterSlice]:
    """List the slices that a penalty is given; of a parameter in shards, the parameter, if any part of it will do.

    Raises:
        UserError: A matrix has to be whole and is not.
    """
    given: list[ParameterSlice] = []
    for parameter, slices in groupby(plan.slices, attrgetter("parameter")):
        own = [(slice_, spec.why_not(slice_) is None) for slice_ in slices]
        chosen = [slice_ for slice_, wanted in own if wanted]
        if chosen and hasattr(chosen[0].tensor, "to_local"):
            if not RESETS[spec.method].elementwise or len(chosen) < len(own):
                raise UserError(
                    f"'{spec.method}' needs the matrices of '{parameter}' whole, and FSDP2 shards them: train replicas"
                )
            chosen = [replace(chosen[0], spec=None)]
        given += chosen
    return given


def _local(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _placed(whole: Tensor, slice_: ParameterSlice) -> Tensor:
    """Return the part of a whole parameter that a slice stands for, where and as the slice is."""
    if hasattr(slice_.tensor, "to_local"):
        return _local(placed_like(slice_.tensor, whole.detach()))
    return replace(slice_, tensor=whole).read().to(slice_.tensor, copy=True)  # `initial` may be the model itself
