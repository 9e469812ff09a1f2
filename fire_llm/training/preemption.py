"""What signals and clocks ask for, at the same step on every rank: a checkpoint of it, and the end of training."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from fire_llm.core.signals import Stopped, asked, handled, set_step_near
from fire_llm.distributed import active, cpu_group, is_first


class Agreement:
    """Let all ranks know, at the same step, the largest number that one of them had.

    Ranks ask each other on the CPU, and read the answer one step later: it travels while the step is computed, no
    rank waits for a device, and all of them read the same answer at the same step.
    """

    def __init__(self) -> None:
        self._answer: tuple[Any, torch.Tensor] | None = None

    def at_step(self, number: int) -> int:
        """Return the largest number that any rank had one step ago, and ask for the next; of one process its own."""
        if not active():
            return number
        found = self.last()
        if not found:
            largest = torch.tensor(number)
            group = cpu_group(dist.group.WORLD, "agreement")
            self._answer = dist.all_reduce(largest, dist.ReduceOp.MAX, group=group, async_op=True), largest
        return found

    def last(self) -> int:
        """Wait for the answer that is under way, if there is one."""
        if self._answer is None:
            return 0
        work, largest = self._answer
        work.wait()
        self._answer = None
        return int(largest)


class Stopping(TrainerCallback):
    """Check at every step's end whether a signal asked one of the ranks to stop; then save and stop all of them.

    Raises:
        Stopped: From `train`, on every rank, when the checkpoint is there.
    """

    def __init__(self) -> None:
        self.number, self._ranks = 0, Agreement()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin again."""
        self.number, self._ranks = 0, Agreement()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to wait for steps: before the first one, the reset and its evaluation, there is nothing to save."""
        set_step_near(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree, and ask for a checkpoint without the log that would split an interval."""
        if handled():
            self.number = self._ranks.at_step(asked())
            control.should_save |= self.number > 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop: what was to be saved is there."""
        if self.number:
            raise Stopped(self.number, f"saved at step {state.global_step}; the same command goes on")

    def end(self, args: Any, state: Any) -> None:
        """Stop where a signal came too late for a step to look at it; from here on, the next one ends at once.

        What was asked of any rank until then is asked of all: no signal falls between the two.
        """
        set_step_near(False)
        if handled():
            self.number = self._ranks.at_step(asked()) or self._ranks.last()
            self.on_save(args, state, None)


class TimedSaves(TrainerCallback):
    """Ask for a checkpoint where the newest is `save_every_minutes` old, by the first rank's clock.

    It stands behind what asks for a log where something is saved: when a clock asks, nothing is logged that would not
    be, so that results do not depend on the time.
    """

    def __init__(self) -> None:
        self._since, self._ranks = 0.0, Agreement()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin again."""
        self._since, self._ranks = 0.0, Agreement()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock with the first step: before it there is nothing to save."""
        self._since = self._since or time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree, and ask for a checkpoint."""
        if args.save_every_minutes is None:
            return
        due = is_first() and time.monotonic() - self._since >= 60 * args.save_every_minutes
        control.should_save |= bool(self._ranks.at_step(int(due)))
        if control.should_save:
            self._since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the answer that nobody needs."""
        self._ranks.last()
