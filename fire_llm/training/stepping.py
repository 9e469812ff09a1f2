"""What one optimizer step does: its loss, the guard before its update, its hash and its speed.

Shapes: B = sequences a micro-batch, T = tokens a sequence.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from fire_llm.core.flops import flops_per_token, peak_flops
from fire_llm.evaluation import token_nll
from fire_llm.training.loss import SummedLoss
from fire_llm.training.nonfinite import SKIPPED, FiniteGuard, propagate_nonfinite
from fire_llm.training.penalties import PenaltyCallback
from fire_llm.training.throughput import Throughput


class Stepping(Trainer):
    """Take exact losses without holding logits, stop before what is not finite, and measure the speed."""

    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `compute_loss` divides by the tokens of the whole accumulated batch; this is how `Trainer` is told so.
        self.model_accepts_loss_kwargs = True
        self.guard = FiniteGuard(self)
        self.batches_hash = torch.zeros((), dtype=torch.int64, device=self.args.device)
        """Hash of every token id trained on, the step it was seen at included; order within a step does not count."""

    @cached_property
    def _summed_loss(self) -> SummedLoss:
        args = self.args
        compiling = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        options = compiling if args.torch_compile else None
        # FSDP2 gathers shards in bf16 by itself.
        params = torch.bfloat16 if args.bf16_params and not self.is_fsdp_enabled else None
        loss = SummedLoss(self.model, self.accelerator.autocast, fp16=args.fp16, params=params, compiling=options)
        loss.say = self.guard.say
        return loss

    @cached_property
    def _weights(self) -> int:
        return int(self.model.num_parameters(exclude_embeddings=True))

    @cached_property
    def _speed(self) -> Throughput:
        args, context = self.args, len(self.train_dataset[0]["input_ids"])
        peak = peak_flops(args.device, half=args.bf16 or args.fp16)
        every = None if peak is None else peak * args.world_size
        return Throughput(flops_per_token(self.model, context), every, args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Any]:
        """Fetch a step's micro-batches, with an eye on the clock, and count their tokens into the hash."""
        with self._speed.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self._speed.count(items * self.args.world_size)
        if batches:
            ids = torch.cat([batch["input_ids"] for batch in batches]).to(self.batches_hash.device)
            self.batches_hash += hash_batch(ids, self.state.global_step)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> int:
        # Every sample is full, so a rank's count is known without asking the others or reading a label.
        return sum(batch["labels"].numel() for batch in batch_samples)

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward."""
        self.guard.begin()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.check_finite(loss)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return Σ nll over the tokens of the accumulated batch: the exact mean once accumulated and averaged by ranks.

        Models of transformers divide by counts of their own (GPT-2's includes a token it never predicts).
        """
        read = {name: value for name, value in inputs.items() if name != "labels"}
        labels = inputs["labels"]
        outputs = model(**read, use_cache=False) if return_outputs else None  # under autocast, whatever `bf16_params`
        nll = self._summed_loss(model, labels, **read) if outputs is None else token_nll(outputs.logits, labels).sum()
        loss = propagate_nonfinite(nll / (labels.numel() if num_items_in_batch is None else num_items_in_batch))
        return loss if outputs is None else (loss, outputs)

    def _clip_grad_norm(self, model: Any) -> Any:
        self._penalise()
        return super()._clip_grad_norm(model)

    def _penalise(self) -> None:
        """Add the gradients of an arm's penalties, once those of all micro-batches and ranks are there."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PenaltyCallback):
                scaler = self.accelerator.scaler
                callback.add(1.0 if scaler is None else scaler.get_scale())  # fp16's gradients are still scaled

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of a step's gradients; None where they are not finite and the step is left out."""
        if grad_norm is None:  # nothing was clipped
            self._penalise()
        norm = super()._get_grad_norm(model, grad_norm)
        return norm if self.guard.passes(model, norm) else None

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Return what `Trainer` does, without counting the model's parameters at every micro-batch."""
        return 6 * inputs["input_ids"].numel() * self._weights

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if (control.should_log or control.should_evaluate or control.should_save) and not self.guard.settle():
            grad_norm = None  # of a step that was left out
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            self._speed.stop()  # what was just evaluated and saved is no part of the next measurement

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the speed beside each loss, and with the share of the phase that is done as the epoch."""
        if "loss" in logs:
            logs |= self._speed.read()
        if self.guard.skipped:
            logs[SKIPPED] = self.guard.skipped
        self.state.epoch = self.state.global_step / self.state.max_steps  # `Trainer` counts it from the resumption
        super().log(logs, start_time)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        begin = super()._init_training_state(*args, **kwargs)
        self.guard.resume(self.state.log_history)
        return begin


def hash_batch(ids: Tensor, step: int) -> Tensor:
    """Hash token ids, their places and their step; sums of hashes tell multisets of rows apart.

    Args:
        ids: (B, T) int64.
        step: Optimizer step, counted from zero.

    Returns:
        () int64, wrapped around; the same on every device.
    """

    def mix(x: Tensor) -> Tensor:
        # The finaliser of splitmix64; its constants as signed integers. Source: Steele et al., OOPSLA 2014.
        x = (x ^ (x >> 30)) * -4658895280553007687
        x = (x ^ (x >> 27)) * -7723592293110705685
        return x ^ (x >> 31)

    place = torch.arange(1, ids.shape[-1] + 1, device=ids.device) * -7046029254386353131
    when = ((step + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63  # wrapped around, as the tensors' products are
    return mix(mix(ids + place).sum(-1) + when).sum()
