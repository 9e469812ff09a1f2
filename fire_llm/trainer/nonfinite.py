"""What is not finite does not reach the weights: every rank stops before the optimizer step, or leaves the step out."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fire_llm.staging import checkpoints, write_json

NONFINITE_FILE = "nonfinite.json"
"""What a step was trained on whose loss or gradient was not finite, in the unit's folder."""

SKIPPED = "skipped_steps"
"""Key of a trainer's log: steps left out so far."""


def contagious(loss: Tensor) -> Tensor:
    """Return a loss as it is, whose gradients are not finite where it is not.

    A loss may be infinite and its gradient finite (a token that the model rules out). With this, the norm of the
    gradients tells of both, and averaging gradients tells every rank.
    """
    return loss * (1 + 0 * loss.detach())


class FiniteGuard:
    """Look at each step's gradient norm before the optimizer does.

    The norm is taken over gradients that all ranks have averaged, or is summed over their shards: every rank sees the
    same one and does the same, with no message of its own. On an accelerator the host waits for it once a step.

    Args:
        trainer: A `ContinualTrainer`; its `args.nonfinite` says what to do: halt or skip.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.skipped = 0
        self._losses: list[Tensor] = []
        self._before: Tensor | None = None

    def resume(self, history: list[dict[str, Any]]) -> None:
        """Count on from a checkpoint's log."""
        self.skipped = next((entry[SKIPPED] for entry in reversed(history) if SKIPPED in entry), 0)

    def begin(self) -> None:
        """Note, before a step's first micro-batch, the sum of losses that a skipped step must not change."""
        if not self._losses:
            self._before = self.trainer._tr_loss.clone()

    def saw(self, loss: Tensor) -> None:
        """Note a micro-batch's loss."""
        self._losses.append(loss)

    def passes(self, model: nn.Module, norm: Any) -> bool:
        """Tell whether a step may be taken; where it may not and is to be skipped, take its gradients away.

        Args:
            model: Whose gradients they are.
            norm: Their norm before clipping, over all ranks.

        Raises:
            FloatingPointError: It is not finite and `nonfinite` is halt.
        """
        losses, self._losses = self._losses, []
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm):
            return True
        trainer = self.trainer
        scaler = trainer.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1:
            return True  # fp16 overflows now and then: the scaler leaves the step out and lowers its scale
        step = trainer.state.global_step + 1
        if trainer.args.nonfinite == "halt":
            self._halt(step, [float(loss) for loss in losses])
        for parameter in model.parameters():
            parameter.grad = None  # an optimizer passes over what has none
        # The logged loss is a mean over the steps since the last log: this one is not among them.
        trainer._tr_loss.copy_(self._before)
        trainer._globalstep_last_logged += 1
        self.skipped += 1
        self._say(f"step {step} skipped, its loss or gradient is not finite ({self.skipped} so far)")
        return False

    def _halt(self, step: int, losses: list[float]) -> None:
        from accelerate.utils import gather_object

        trainer, args = self.trainer, self.trainer.args
        micro, world = args.train_batch_size, args.world_size
        first = (step - 1) * len(losses) * world * micro
        batches = []
        for number, loss in enumerate(losses):
            begin = first + (number * world + args.process_index) * micro
            samples = [describe(trainer.train_dataset, i) for i in range(begin, begin + micro)]
            finite = math.isfinite(loss)
            batches.append({"loss": loss if finite else None, "finite": finite, "samples": samples})
        found = gather_object([{"rank": args.process_index, "batches": batches}])
        culprit = "gradient" if all(b["finite"] for rank in found for b in rank["batches"]) else "loss"
        file = Path(args.output_dir) / NONFINITE_FILE
        if trainer.is_world_process_zero():
            write_json(file, {"step": step, "not_finite": culprit, "ranks": found})
        newest = checkpoints(Path(args.output_dir))[-1:]
        left = f"the newest checkpoint is '{newest[0][0]}'" if newest else "no checkpoint was written yet"
        raise FloatingPointError(
            f"the training {culprit} is not finite at step {step}. The step was not taken; {left}. '{file}' lists the "
            "samples. Lower the learning rate, or leave such steps out with nonfinite: skip"
        )

    def _say(self, words: str) -> None:
        if self.trainer.is_world_process_zero():
            sys.stderr.write(f"{self.trainer.args.title or 'training'}: {words}\n")


def describe(dataset: Any, index: int) -> dict[str, Any]:
    """Say which sample it was: its index, and where a `Mixture` took it from.

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
