"""End training by a signal at the same step on every rank, with a checkpoint of that step."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from fire_llm.core.signals import Stopped, asked, handled, set_step_near
from fire_llm.distributed import PATIENCE, active


class Stopping(TrainerCallback):
    """Check at every step's end whether a signal asked one of the ranks to stop; then save and stop all of them.

    Ranks ask each other on the CPU, and read the answer one step later: it travels while the step is computed, no
    rank waits for a device, and all of them read the same answer at the same step.

    Raises:
        Stopped: From `train`, on every rank, when the checkpoint is there.
    """

    def __init__(self) -> None:
        self._number = 0
        self._answer: tuple[Any, torch.Tensor] | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to wait for steps: before the first one, the reset and its evaluation, there is nothing to save."""
        self._number, self._answer = 0, None
        set_step_near(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree, and ask for a checkpoint without the log that would split an interval."""
        if handled():
            self._number = self._agreed() if active() else asked()
            control.should_save |= self._number > 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop: what was to be saved is there."""
        if self._number:
            raise Stopped(self._number, f"saved at step {state.global_step}; the same command goes on")

    def end(self, args: Any, state: Any) -> None:
        """Stop where a signal came too late for a step to look at it; from here on, the next one ends at once.

        What was asked of any rank until then is asked of all: no signal falls between the two.
        """
        set_step_near(False)
        if handled():
            self._number = (self._agreed() or self._answered()) if active() else asked()
            self.on_save(args, state, None)

    def _agreed(self) -> int:
        """Return the largest signal that any rank had one step ago, and ask for the next."""
        number = self._answered()
        if not number:
            largest = torch.tensor(asked())
            group = _cpu_group(dist.group.WORLD)
            self._answer = dist.all_reduce(largest, dist.ReduceOp.MAX, group=group, async_op=True), largest
        return number

    def _answered(self) -> int:
        """Wait for the answer that is under way, if there is one."""
        if self._answer is None:
            return 0
        work, largest = self._answer
        work.wait()
        self._answer = None
        return int(largest)


@functools.cache
def _cpu_group(world: Any) -> Any:
    """Return a gloo group of all ranks, whatever backend they train with; collective where it is made, once."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
