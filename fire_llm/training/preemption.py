"""Save, or save and stop, at the same step on every rank, where a signal or a clock asks for it."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from fire_llm.core.signals import Stopped, asked, handled, set_step_near
from fire_llm.distributed import active, cpu_group, is_first


class Agreement:
    """Exchange a number between ranks at each step, so that all of them learn of the largest at the same step.

    Ranks exchange it on the CPU while the next step is computed, and read the result after that step. So no rank waits
    for a device.
    """

    def __init__(self) -> None:
        self._exchange: tuple[Any, torch.Tensor] | None = None

    def at_step(self, number: int) -> int:
        """Return the largest number that any rank had one step ago, and send this one; one process returns its own."""
        if not active():
            return number
        largest = self.last()
        if not largest:
            sent = torch.tensor(number)
            group = cpu_group(dist.group.WORLD, "agreement")
            self._exchange = dist.all_reduce(sent, dist.ReduceOp.MAX, group=group, async_op=True), sent
        return largest

    def last(self) -> int:
        """Wait for the exchange that is under way, and return its result; 0 without one."""
        if self._exchange is None:
            return 0
        work, largest = self._exchange
        work.wait()
        self._exchange = None
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
        """Wait for steps from here on: during the reset and its evaluation there is nothing to save yet."""
        set_step_near(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree, and ask for a checkpoint, but for no log, which would split an interval."""
        if handled():
            self.number = self._ranks.at_step(asked())
            control.should_save |= self.number > 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, now that the checkpoint is saved."""
        if self.number:
            raise Stopped(self.number, f"saved at step {state.global_step}; the same command goes on")

    def end(self, args: Any, state: Any) -> None:
        """Stop where a signal came after the last step looked for one; later signals end the process at once.

        A signal that any rank got until then counts for all ranks, so that none is lost.
        """
        set_step_near(False)
        if handled():
            self.number = self._ranks.at_step(asked()) or self._ranks.last()
            self.on_save(args, state, None)


class TimedSaves(TrainerCallback):
    """Ask for a checkpoint where the newest is `save_every_minutes` old, by the first rank's clock.

    It stands behind the callback that logs wherever something is saved. So a save by the clock logs nothing, and
    results do not depend on the time.
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
        """Complete the last exchange, whose result nobody needs."""
        self._ranks.last()
