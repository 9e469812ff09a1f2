"""What a training begins with, for a `Trainer` that begins it again: with `auto_find_batch_size`, out of memory."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fire_llm.core.errors import UserError


class Beginning:
    """Hold weights and moments while a training with `auto_find_batch_size` lasts; put them back when it begins again.

    `Trainer` itself begins again with the weights that it had come to, so that what a callback does to them at the
    beginning would be done twice. What is held takes host memory in the weights' size.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._moments: dict[Any, Any] = {}
        self._at: tuple[int, int] | None = None
        """The step that training began at, and the micro-batch's size."""

    def again(self, args: Any, state: Any, model: Any, optimizer: Any) -> bool:
        """Return whether this is the beginning of a training that began before, whose weights are then put back.

        Args:
            args: As a callback is given it in `on_train_begin`.
            state: The same.
            model: The same.
            optimizer: The same.

        Raises:
            UserError: It begins again from a checkpoint, whose weights `Trainer` does not read again.
        """
        if not getattr(args, "auto_find_batch_size", False):
            return False
        before, self._at = self._at, (state.global_step, state.train_batch_size)
        weights = {name: local(tensor) for name, tensor in model.state_dict().items()}
        if before is not None and before[0] == state.global_step:
            if state.global_step:
                self._at = None
                raise UserError(
                    f"auto_find_batch_size: out of memory after going on from step {state.global_step}, and Trainer "
                    "does not read the checkpoint's weights again. Make a new Trainer with a smaller "
                    "per_device_train_batch_size, and go on from the checkpoint"
                )
            if state.train_batch_size < before[1]:
                with torch.no_grad():
                    for name, tensor in weights.items():
                        tensor.copy_(self._weights[name])
                if optimizer is not None:
                    optimizer.state.clear()
                    optimizer.state.update({p: deepcopy(held) for p, held in self._moments.items()})
                return True
        self._weights = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
        self._moments = {} if optimizer is None else {p: deepcopy(held) for p, held in optimizer.state.items()}
        return False

    def end(self) -> None:
        """Let go of what is held: training has ended."""
        self._weights, self._moments, self._at = {}, {}, None


def local(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor."""
    local: Tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    return local
