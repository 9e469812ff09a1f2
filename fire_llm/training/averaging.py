"""An exponential moving average of the weights, kept beside them while a phase trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback

from fire_llm.architectures.names import plain_name
from fire_llm.core.atomic import AVERAGED
from fire_llm.core.errors import UserError
from fire_llm.distributed import is_dtensor, local_part, make_current
from fire_llm.training.sharding import load_weights


class Averaging(TrainerCallback):
    """Average the weights of a `ContinualTrainer` after each step, where `args.ema_decay` asks for it.

    average ← decay · average + (1 − decay) · weights, beginning with the weights after a reset, before the first step.
    It stands behind all callbacks that change weights at a step's end. Each rank averages what it holds, replicas and
    shards alike. Averages are in fp32 or fp64, like the weights: rounded to bf16, small changes would be lost.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._averages: dict[str, Tensor] = {}
        """What this rank holds of each average, by parameter."""

    @property
    def on(self) -> bool:
        """Return whether there is an average."""
        return bool(self._averages)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin with the present weights, or with the average in the checkpoint that training goes on from.

        Raises:
            UserError: Weights are coarser than fp32, or not those of a whole model; or the checkpoint holds no average.
        """
        self._averages = {}
        if args.ema_decay is None:
            return
        model, resumed = self.trainer.model, self.trainer.saver.resumed_from
        coarse = [name for name, p in model.named_parameters() if p.is_floating_point() and p.element_size() < 4]
        if coarse:
            raise UserError(
                f"ema_decay: '{coarse[0]}' is in 16 bits or fewer, too coarse for the small steps of an average; "
                "train weights in fp32 (bf16=True computes in bf16), or leave it out"
            )
        if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
            raise UserError(f"ema_decay: a {type(model).__name__} is no whole model of transformers; leave it out")
        if resumed is not None and not (resumed / AVERAGED).is_dir():
            raise UserError(
                f"ema_decay: '{resumed}' holds no average, as it was not asked for there: leave it out, or begin a new "
                "training"
            )
        self._averages = {name: local_part(p).clone() for name, p in self._weights().items()}
        if resumed is not None:
            with self.applied():
                load_weights(model, resumed / AVERAGED)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Average the weights in."""
        if self.on:
            weights = [local_part(p) for p in self._weights().values()]
            get_ema_multi_avg_fn(args.ema_decay)([*self._averages.values()], weights, 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the weights and their average inside the block, bit for bit; collective where they are sharded."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def placed(self) -> dict[str, Tensor]:
        """Return the averages, each in shards where its parameter is."""
        from torch.distributed.tensor import DTensor

        weights = self._weights()
        return {
            name: DTensor.from_local(average, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            if is_dtensor(p := weights[name])
            else average
            for name, average in self._averages.items()
        }

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self._weights().items():
            weights, average = local_part(p), self._averages[name]
            before = weights.clone()
            weights.copy_(average)
            average.copy_(before)

    def _weights(self) -> dict[str, Any]:
        """Return the parameters by name, FSDP2's in shards."""
        make_current(self.trainer.model)
        return {plain_name(name): p for name, p in self.trainer.model.named_parameters()}
