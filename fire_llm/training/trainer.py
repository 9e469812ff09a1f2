"""Train one phase: transformers' `Trainer`, with what has to be exact overridden.

The class says when something happens, in the order in which a phase is trained; the files beside it say how.
Shapes: B = sequences a micro-batch, T = tokens a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, default_data_collator
from transformers.trainer import SCHEDULER_NAME
from transformers.training_args import OptimizerNames

from fire_llm.core.compat import check_trainer
from fire_llm.core.errors import UserError
from fire_llm.core.signals import set_step_near
from fire_llm.evaluation import token_nll
from fire_llm.evaluation.texts import EvaluationSet
from fire_llm.linalg.matmul import settings_kept
from fire_llm.training.arguments import ContinualArguments
from fire_llm.training.batches import FromStep, hash_batch
from fire_llm.training.callbacks import Keeping, ResetCallback
from fire_llm.training.loss import summed_loss
from fire_llm.training.nonfinite import SKIPPED, FiniteGuard, propagate_nonfinite
from fire_llm.training.optimizers import muon_adamw, scheduled
from fire_llm.training.penalties import add_penalties
from fire_llm.training.preemption import Stopping
from fire_llm.training.progress import Progress, report_line
from fire_llm.training.saving import Saver
from fire_llm.training.sharding import load_optimizer, load_weights, refuse_engines, sharding, whole_weights
from fire_llm.training.throughput import throughput
from fire_llm.training.validation import validate


class ContinualTrainer(Trainer):
    """Pretrain a causal LM on one phase's mixture.

    Args:
        model: A causal LM from transformers.
        args: `ContinualArguments` with `max_steps` set.
        train_dataset: Returns `{"input_ids": (T,), "labels": (T,)}` for any index ≥ 0, labels already shifted.
        evaluation_sets: Corpora by name; metrics are `eval_<name>_nll`, `…_perplexity`, `…_bits_per_byte`.
        callbacks, processing_class, optimizers: As in `Trainer`.

    Raises:
        UserError: The installed `Trainer` does not call what is overridden here, or its engine cannot be reset.

    Overridden, beside `__init__` and `train`; † is in transformers from 5.3 on, the others are older, and
    `core/compat.py` checks that the installed `Trainer` calls each of them:

        create_accelerator_and_postprocess  FSDP2 and fp16 on CPUs too; engines that no reset reaches are refused
        _get_train_sampler                  sample i of the phase is the i-th, at any world size, after any resumption
        get_train_dataloader                the loader draws from a generator of its own: dropout is as it would be
        create_optimizer                    Muon for matrices
        create_scheduler                    infinite and WSD schedules
        get_decay_parameter_names           tensors of two dimensions and more decay, as in the paper
        _init_training_state †              steps left out are counted on from the checkpoint
        get_batch_samples                   the batches' hash, their tokens, and the wait for data
        _get_num_items_in_batch             known without reading labels or asking other ranks: samples are full
        training_step                       the guard against what is not finite keeps each micro-batch's loss
        compute_loss                        the exact mean over the accumulated batch, without holding its logits
        floating_point_ops                  `Trainer` counts the parameters again at every micro-batch
        _clip_grad_norm †                   penalties are added before gradients are clipped
        _get_grad_norm †                    what is not finite does not reach the weights
        _maybe_log_save_evaluate            faults of the last step and the last save are raised before the next
        log                                 speed beside each loss, and the share of the phase that is done
        evaluate                            exact perplexity a corpus; the best checkpoint is saved
        _get_output_dir                     a checkpoint is written under another name
        _save_checkpoint                    it is listed, flushed and renamed once, by all ranks or by none
        save_model                          one format for replicas and shards; copies may be written later
        _save_optimizer_and_scheduler       the same
        _load_from_checkpoint               shards are loaded from that format
        _load_optimizer_and_scheduler       the same
        _load_rng_state                     losses that were summed but not logged are restored too
    """

    args: ContinualArguments
    control: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any,
        args: ContinualArguments,
        train_dataset: Any,
        evaluation_sets: dict[str, EvaluationSet] | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        check_trainer(Trainer)
        self.evaluation_sets = evaluation_sets or {}
        self.saver = Saver(self)
        self.guard = FiniteGuard(self)
        self._resumed_step = 0
        # Samples are full: nothing is padded, and tokenizers such as GPT-2's have no token to pad with.
        kwargs.setdefault("data_collator", default_data_collator)
        # `Trainer` insists on a dataset wherever an evaluation strategy is set; ours are in `evaluation_sets`.
        datasets = {"train_dataset": train_dataset, "eval_dataset": self.evaluation_sets}
        super().__init__(model, args, callbacks=[*callbacks], **datasets, **kwargs)
        # `compute_loss` divides by the tokens of the whole accumulated batch; this is how `Trainer` learns of it.
        self.model_accepts_loss_kwargs = True
        self.batches_hash = torch.zeros((), dtype=torch.int64, device=args.device)
        """Hash of every token id trained on, the step it was seen at included; order within a step does not count."""
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._progress = Progress()
        # Stopping is behind what asks for a log where something is saved: a signal's save has none.
        for callback in (Keeping(), Stopping(), self._progress):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train to `max_steps`, from a checkpoint folder where one is given.

        Raises:
            UserError: A checkpoint could not be written, or a callback's settings do not fit the model.
            FloatingPointError: A loss or gradient is not finite, and `nonfinite` is halt.
            Stopped: A signal ended training; the checkpoint of its last step is written.
        """
        self._resumed_step = self.saver.begin(resume_from_checkpoint)
        if resume_from_checkpoint:
            self.args.eval_on_start = False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ResetCallback):
                callback.attach(self)
        try:
            trained = super().train(resume_from_checkpoint, *args, **kwargs)
            self.guard.settle()  # of the last step, where a callback ended training and nothing was logged
            self.settle()
            return trained
        except BaseException:
            self.settle(report=True)
            raise
        finally:
            set_step_near(False)
            self._progress.close()

    # ---- before the first step

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, FSDP2's shards and fp16 on CPUs included, and refuse what cannot be reset."""
        refuse_engines(self.args)
        # accelerate, too, turns TF32 on where it compiles in fp32.
        with sharding(self), settings_kept() if self.args.tf32 is None else nullcontext():
            super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.args.device.type == "cpu":
            # accelerate leaves fp16 out on CPUs, without a word, and would train in fp32.
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return FromStep(self._resumed_step * a_step, self.args.max_steps * a_step)

    def get_train_dataloader(self) -> Any:
        """Return the loader, with a generator of its own: a seed from torch's would move dropout on resumption."""
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer, Muon where it is asked for.

        Raises:
            UserError: transformers cannot make it, for want of a library, say; or Muon has nothing to train.
        """
        if self.args.muon and self.optimizer is None:
            self.optimizer = muon_adamw(model or self.model, self.args)
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError) as error:
            name = OptimizerNames(self.args.optim).value
            raise UserError(f"the optimizer '{name}' cannot be made: {error}") from error

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule, ours where one is given."""
        if self.args.schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = scheduled(optimizer or self.optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return the names of tensors of two dimensions and more, which decay, as in the paper."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        begin = super()._init_training_state(*args, **kwargs)
        self.guard.resume(self.state.log_history)
        return begin

    # ---- a step: its batches, its losses, its gradients

    _summed_loss = cached_property(summed_loss)
    _throughput = cached_property(throughput)

    @cached_property
    def _weights(self) -> int:
        return int(self.model.num_parameters(exclude_embeddings=True))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Any]:
        """Fetch a step's micro-batches, with an eye on the clock, and count their tokens into the hash."""
        with self._throughput.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self._throughput.count(items * self.args.world_size)
        if batches:
            ids = torch.cat([batch["input_ids"] for batch in batches]).to(self.batches_hash.device)
            self.batches_hash += hash_batch(ids, self.state.global_step)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> int:
        return sum(batch["labels"].numel() for batch in batch_samples)

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward; return its loss, (), detached."""
        self.guard.begin()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.note(loss)
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

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Return 6 operations a token and weight, as `Trainer` does."""
        return 6 * inputs["input_ids"].numel() * self._weights

    def _clip_grad_norm(self, model: Any) -> Any:
        add_penalties(self)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of a step's gradients; None where they are not finite and the step is left out."""
        if grad_norm is None:  # nothing was clipped
            add_penalties(self)
        norm = super()._get_grad_norm(model, grad_norm)
        return norm if self.guard.passes(model, norm) else None

    # ---- after a step: logs and evaluations

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if (control.should_log or control.should_evaluate or control.should_save) and not self.guard.settle():
            grad_norm = None  # of a step that was left out
        self.saver.writer.check()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            self._throughput.stop()  # what was just evaluated and saved is no part of the next measurement

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the speed beside each loss, and with the share of the phase that is done as the epoch."""
        if "loss" in logs:
            logs |= self._throughput.read()
        if self.guard.skipped:
            logs[SKIPPED] = self.guard.skipped
        self.state.epoch = self.state.global_step / self.state.max_steps  # `Trainer` counts it from the resumption
        super().log(logs, start_time)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Measure and log perplexity on every evaluation set, and ask for a save where it is the best so far.

        Returns:
            The metrics, as in `validate`.
        """
        metrics = validate(self.model, self.evaluation_sets, self.args, metric_key_prefix)
        state, best = self.state, self.state.best_metric
        nll = metrics.get(f"{metric_key_prefix}_nll", math.inf) if self.args.keep_best else math.inf
        if state.global_step > 0 and nll < (math.inf if best is None else best):
            state.best_metric, state.best_global_step = nll, state.global_step
            self.control.should_save = True
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, state, self.control, metrics)
        return metrics

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saver.staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.saver.save(partial(super()._save_checkpoint, model, trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as an ordinary folder, the same for replicas and shards."""
        if self.saver.copies is not None and output_dir is not None and _internal_call:
            self.saver.save_model_later(Path(output_dir))
        elif self.is_fsdp_enabled:  # `Trainer` would keep pickles beside it
            self._save(output_dir or self.args.output_dir, state_dict=whole_weights(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.saver.copies is not None:
            self.saver.save_optimizer_and_scheduler(Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            load_weights(model or self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # transformers below 5.18 cannot load replicas' states on CPUs: torch knows no place "cpu:0".
        if checkpoint is not None:
            load_optimizer(self.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.saver.restore_unlogged()

    def settle(self, *, report: bool = False) -> None:
        """Wait until the last checkpoint is written.

        Args:
            report: Write a failure to stderr instead of raising it, because something else is about to be raised.

        Raises:
            UserError: It could not be written, for a reason that the user can do something about.
            RuntimeError: It could not be written, for another.
        """
        try:
            self.saver.writer.wait()
        except Exception as error:
            if not report:
                raise
            report_line(self.args, str(error))

    def hash_of_batches(self) -> str:
        """Return the hash over all ranks of every batch so far, 16 hexadecimal digits; collective."""
        return f"{self.saver.hash_over_ranks() & (2**64 - 1):016x}"
