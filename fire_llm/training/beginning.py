"""Hold what a training begins with: `auto_find_batch_size` begins it again where memory runs out."""

from __future__ import annotations

import random
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.distributed import local_part, optimizer_states
from fire_llm.training.progress import report_line
from fire_llm.training.writer import on_host


class Beginning:
    """Hold a plain `Trainer`'s weights and moments for a callback that changes them; put them back before it does so.

    `Trainer` begins again with the weights that it had come to, which a callback would change a second time. The copies
    take host memory in the weights' size.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._moments: list[dict[Any, Any]] = []
        """Of the optimizer and of those that it wraps."""
        self._began: tuple[int, int] | None = None
        """The step that training began at, and the micro-batch's size then."""

    def again(self, args: Any, state: Any, model: Any, optimizer: Any) -> bool:
        """Put weights and moments back where training begins again, and return whether it does; else copy them.

        Raises:
            UserError: It begins again from a checkpoint, whose weights `Trainer` does not read again.
        """
        if not getattr(args, "auto_find_batch_size", False):
            return False
        before, self._began = self._began, (state.global_step, state.train_batch_size)
        weights = {name: local_part(tensor) for name, tensor in model.state_dict().items()}
        if before is not None and before[0] == state.global_step:
            if state.global_step:
                self._began = None
                raise UserError(
                    f"auto_find_batch_size: out of memory after going on from step {state.global_step}, and Trainer "
                    "does not read the checkpoint's weights again. Make a new Trainer with a smaller "
                    "per_device_train_batch_size, and go on from the checkpoint"
                )
            if state.train_batch_size < before[1]:
                _copy_back(self._weights, weights)
                for moments, copied in zip(optimizer_states(optimizer), self._moments, strict=True):
                    moments.clear()
                    moments.update({p: deepcopy(values) for p, values in copied.items()})
                return True
        self._weights = _on_cpu(weights)
        states = optimizer_states(optimizer)
        self._moments = [{p: deepcopy(values) for p, values in state.items()} for state in states]
        return False

    def end(self) -> None:
        """Free the copies: training has ended."""
        self._weights, self._moments, self._began = {}, [], None


class Start:
    """Hold what a `ContinualTrainer` begins a training with, in one process, and put it back.

    Weights, unless a checkpoint has them, and moments of an earlier training take host memory in their size.
    """

    def __init__(self, trainer: Any, checkpoint: str | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint
        self._weights = {} if checkpoint else _on_cpu(trainer.model.state_dict())
        self._stateful = [
            (name, owner := getattr(trainer, name), None if owner is None else _copied(owner.state_dict()))
            for name in ("optimizer", "lr_scheduler")
        ]
        self._scaler = deepcopy(trainer.accelerator.scaler)
        self._device = torch.get_device_module(trainer.args.device)
        self._device = self._device if hasattr(self._device, "set_rng_state") else torch
        self._generators = random.getstate(), np.random.get_state(), torch.get_rng_state(), self._device.get_rng_state()

    def check(self, message: str) -> None:
        """Report that training begins again.

        Raises:
            UserError: Smaller micro-batches would not help.
        """
        trainer, args = self.trainer, self.trainer.args
        size = args.train_batch_size
        if trainer.fetched < 0 or size == 1:
            where = "before the first batch" if trainer.fetched < 0 else "with micro-batches of one sample"
            raise UserError(
                f"auto_find_batch_size: out of memory {where} ({message}). Free memory, or take shorter samples, "
                "gradient_checkpointing or a smaller model"
            )
        step = trainer.state.global_step
        report_line(
            args,
            f"out of memory at step {step + 1} with micro-batches of {size}: begins again with "
            f"{largest_part(size, size // 2)}, and as many samples a step",
        )

    def put_back(self) -> None:
        """Put back weights, moments, schedule, random numbers and the log of resets."""
        trainer = self.trainer
        trainer.model.zero_grad()
        if self.checkpoint:
            trainer._load_from_checkpoint(self.checkpoint)
        else:
            _copy_back(self._weights, trainer.model.state_dict())
        trainer.accelerator.scaler = deepcopy(self._scaler)
        for name, owner, state in self._stateful:
            setattr(trainer, name, owner)
            if owner is not None:
                owner.load_state_dict(deepcopy(state))
            if hasattr(owner, "scaler"):  # accelerate's optimizer, of an earlier training
                owner.scaler = trainer.accelerator.scaler
        trainer.current_flos = 0
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "begin_again"):
                callback.begin_again()
        clear_device_cache(garbage_collection=True)
        python, numpy, cpu, device = self._generators
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        self._device.set_rng_state(device)


def largest_part(size: int, most: int) -> int:
    """Return the largest divisor of a size that is at most `most`: of 8 and 4 it is 4, of 9 and 4 it is 3."""
    return next(part for part in range(max(1, min(size, most)), 0, -1) if size % part == 0)


def _copied(state: Any) -> Any:
    """Return a copy of a state, in host memory where that can be done."""
    copied = on_host(state)
    return deepcopy(state) if copied is None else copied[0]


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}


@torch.no_grad()
def _copy_back(copies: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(copies[name])
