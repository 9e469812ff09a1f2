"""Keep what is not finite from the weights: every rank stops before the optimizer step, or skips the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fire_llm.core.atomic import checkpoints, write_json
from fire_llm.distributed import gather_objects
from fire_llm.training.progress import report_line

NONFINITE_FILE = "nonfinite.json"
"""File in a stage's folder: the samples of a step whose loss or gradient was not finite."""

SKIPPED = "skipped_steps"
"""Key of a trainer's log: steps skipped so far."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return the same loss, but with gradients that are not finite where the loss is not.

    A loss may be infinite and its gradient finite: that of a token that the model rules out. With this, the norm of the
    gradients shows both faults, and every rank sees them once gradients are averaged.
    """
    return loss * (1 + 0 * loss.detach())


@dataclass
class _Unread:
    """A step whose norm the host has not read yet; where it is not finite, the device has skipped the update."""

    step: int
    losses: list[Tensor]
    bad: Tensor
    """Whether the norm is not finite: () bool, on the host once `copied`."""
    copied: Any
    """CUDA event; None where nothing has to be waited for."""
    optimizer: Any
    """Whose `found_inf` was set."""


class FiniteGuard:
    """Check each step's gradient norm before the optimizer steps.

    The norm is taken over gradients that all ranks have averaged, or is summed over their shards. So every rank sees
    the same norm and does the same, without a message.

    On an accelerator the host would wait for the norm before every update. There `found_inf` makes a fused optimizer
    skip the update, as gradient scaling does. The host reads the norm a step later, or before anything is logged,
    measured or saved. With other optimizers it waits.

    Args:
        trainer: A `ContinualTrainer`; its `args.nonfinite` says what to do: halt or skip.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.skipped = 0
        self._losses: list[Tensor] = []
        self.before: Tensor | None = None
        """Sum of losses before the step whose batches were fetched last."""
        self._unread: _Unread | None = None

    def resume(self, history: list[dict[str, Any]]) -> None:
        """Take the count from a checkpoint's log, and forget a training that an error ended."""
        self._losses, self._unread = [], None
        self.skipped = next((entry[SKIPPED] for entry in reversed(history) if SKIPPED in entry), 0)

    def begin(self) -> None:
        """Note the sum of losses before a step's first micro-batch: a step that is skipped must not change it."""
        self.before = self.trainer._tr_loss.clone()

    def note(self, loss: Tensor) -> None:
        """Keep a micro-batch's loss, (), for the report of a step that is not finite, without waiting for it."""
        self._losses.append(loss)

    def passes(self, model: nn.Module, norm: Any) -> bool:
        """Return whether a step may be taken; where it is skipped, remove its gradients.

        Args:
            model: Whose gradients they are.
            norm: Their norm before clipping, over all ranks.

        Raises:
            FloatingPointError: It is not finite and `nonfinite` is halt.
        """
        losses, self._losses = self._losses, []
        trainer = self.trainer
        step = trainer.state.global_step + 1
        if (optimizer := _device_guarded(trainer, norm)) is not None:
            self.settle()
            self._unread = self._leave_to_device(optimizer, norm, step, losses)
            return True
        if math.isfinite(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)):
            return True
        scaler = trainer.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1:
            return True  # fp16 overflows now and then: the scaler skips the step and lowers its scale
        self._skip(step, losses)
        for parameter in model.parameters():
            parameter.grad = None  # an optimizer passes over what has none
        trainer._tr_loss.copy_(self.before)
        return False

    def _leave_to_device(self, optimizer: Any, norm: Tensor, step: int, losses: list[Tensor]) -> _Unread:
        """Let the device skip this step's update, and keep its loss out of the sum, where the norm is not finite."""
        bad = ~torch.isfinite(norm)
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        assert self.before is not None
        summed = self.trainer._tr_loss
        summed.copy_(torch.where(bad, self.before, summed))
        on_host = torch.empty((), dtype=torch.bool, pin_memory=norm.is_cuda)
        on_host.copy_(bad, non_blocking=True)
        copied = torch.cuda.Event() if norm.is_cuda else None
        if copied is not None:
            copied.record()
        return _Unread(step, losses, on_host, copied, optimizer)

    def settle(self) -> bool:
        """Read the norm of the step that was left to the device, if there is one; return whether it was updated.

        Raises:
            FloatingPointError: It was not finite, and `nonfinite` is halt. The weights are those from before it.
        """
        unread, self._unread = self._unread, None
        if unread is None:
            return True
        unread.optimizer.found_inf = None  # set for that step alone
        if unread.copied is not None:
            unread.copied.synchronize()
        if unread.bad:
            self._skip(unread.step, unread.losses)
        return not unread.bad

    def _skip(self, step: int, losses: list[Tensor]) -> None:
        """Halt, or count a skipped step."""
        if self.trainer.args.nonfinite == "halt":
            self._halt(step, [float(loss) for loss in losses])
        # The logged loss is a mean over the steps since the last log, without this one.
        self.trainer._globalstep_last_logged += 1
        self.skipped += 1
        text = f"step {step} skipped, its loss or gradient is not finite ({self.skipped} so far)"
        report_line(self.trainer.args, text)

    def _halt(self, step: int, losses: list[float]) -> None:
        """Write which samples the step was trained on, and raise."""
        trainer, args = self.trainer, self.trainer.args
        micro, world = args.train_batch_size, args.world_size
        numbered = trainer.order == "numbered"
        first = trainer.first_sample(step - 1)
        batches = []
        for number, loss in enumerate(losses):
            begin = first + (number * world + args.process_index) * micro
            samples = [describe(trainer.train_dataset, i) for i in range(begin, begin + micro)] if numbered else []
            finite = math.isfinite(loss)
            batches.append({"loss": loss if finite else None, "finite": finite, "samples": samples})
        ranks = gather_objects(None, {"rank": args.process_index, "batches": batches})
        culprit = "gradient" if all(b["finite"] for rank in ranks for b in rank["batches"]) else "loss"
        file = Path(args.output_dir) / NONFINITE_FILE
        if trainer.is_world_process_zero():
            write_json(file, {"step": step, "not_finite": culprit, "ranks": ranks})
        trainer.settle(report=True)
        newest = checkpoints(Path(args.output_dir))[-1:]
        saved = f"the newest checkpoint is '{newest[0][0]}'" if newest else "no checkpoint was written yet"
        raise FloatingPointError(
            f"the training {culprit} is not finite at step {step}. The step was not taken; {saved}. '{file}' lists the "
            "samples. Lower the learning rate, or leave such steps out with nonfinite: skip"
        )


def _device_guarded(trainer: Any, norm: Any) -> Any:
    """Return the optimizer that reads `found_inf` on an accelerator; None where the host has to wait."""
    if not getattr(norm, "is_cuda", False) or hasattr(norm, "full_tensor") or trainer.accelerator.scaler is not None:
        return None
    return takes_found_inf(trainer.optimizer)


def takes_found_inf(optimizer: Any) -> Any:
    """Return the optimizer inside of accelerate's, if it is torch's own fused Adam or AdamW: these read `found_inf`.

    A class derived from them may step otherwise, and loading a state can change which groups are fused.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    reads = type(inner) in (torch.optim.Adam, torch.optim.AdamW) and all(g.get("fused") for g in inner.param_groups)
    return inner if reads else None


def describe(dataset: Any, index: int) -> dict[str, Any]:
    """Describe a sample by its index and, where a `Mixture` made it, by its place in a corpus.

    Returns:
        `index`; of a mixture also `corpus`, `tokens` [first, end) and `documents` [first, last] of that corpus.
    """
    sample: dict[str, Any] = {"index": index}
    if hasattr(dataset, "locate"):
        corpus, _, block = dataset.locate(index)
        begin = block * dataset.context
        end = begin + dataset.context + 1
        ends = dataset.sources[corpus].ends[:, 0]
        first, last = (int(d) for d in ends.searchsorted([begin, end - 1], side="right"))
        sample |= {"corpus": corpus, "tokens": [begin, end], "documents": [first, last]}
    return sample
