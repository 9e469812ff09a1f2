"""Train one phase: transformers' `Trainer` with exact losses, arithmetic data order and checkpoints that are whole.

Shapes: B = sequences a micro-batch, T = tokens a sequence.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer import SCHEDULER_NAME

from fire_llm.evaluation import perplexity, token_nll
from fire_llm.staging import CONTINUAL_STATE, STAGING_SUFFIX, checkpoints, sync, write_json, writing
from fire_llm.trainer.callbacks import Keeping, Progress
from fire_llm.trainer.sharding import (
    OPTIMIZER,
    load_optimizer,
    load_weights,
    refuse_engines,
    sharding,
    whole_optimizer,
    whole_weights,
)


@dataclass
class EvaluationSet:
    """Hold one corpus to measure perplexity on."""

    tokens: Any
    """(N,) token ids."""
    n_bytes: int | None = None
    """UTF-8 bytes of the text behind them."""
    prefix: int | None = None
    """Token read before the first, so that the first is scored too."""


@dataclass
class ContinualArguments(TrainingArguments):
    """Add to `TrainingArguments` what a phase of continual pretraining needs."""

    eval_context: int | None = field(default=None, metadata={"help": "Tokens an evaluation window."})
    best_corpora: dict[str, float] | None = field(
        default=None, metadata={"help": "Weights of the corpora whose mean validation NLL decides the best checkpoint."}
    )
    keep_best: bool = field(default=False, metadata={"help": "Keep the checkpoint with the lowest validation NLL."})
    keep_steps: list[int] = field(default_factory=list, metadata={"help": "Optimizer steps whose checkpoints stay."})
    title: str | None = field(default=None, metadata={"help": "Title of the progress bar; None for none."})

    def __post_init__(self) -> None:
        """Set what makes losses exact and resumption arithmetic."""
        self.logging_nan_inf_filter = False  # it hides bad losses, and costs a host sync a micro-batch
        self.ignore_data_skip = True  # the sampler starts where the checkpoint stopped: nothing to skip
        self.remove_unused_columns = False
        super().__post_init__()


class _FromStep(torch.utils.data.Sampler[int]):
    """Yield sample indices in order from a start, but count them all: a resumed phase is the rest of a whole one."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class ContinualTrainer(Trainer):
    """Pretrain a causal LM on one phase's mixture.

    Differs from `Trainer` in four things: the loss is the exact mean over the tokens of the accumulated batch, for
    every architecture; sample i of the phase is always the i-th the dataset gives, at any world size and after any
    resumption; evaluation is exact perplexity a corpus; a checkpoint folder appears in one rename, when it is whole.

    Args:
        model: A causal LM from transformers.
        args: `ContinualArguments` with `max_steps` set.
        train_dataset: Gives `{"input_ids": (T,), "labels": (T,)}` for any index ≥ 0, labels already shifted.
        evaluation_sets: Corpora by name; metrics are `eval_<name>_nll`, `…_perplexity`, `…_bits_per_byte`.
        callbacks, processing_class, optimizers: As in `Trainer`.
    """

    args: ContinualArguments
    control: TrainerControl

    def __init__(
        self,
        model: Any,
        args: ContinualArguments,
        train_dataset: Any,
        evaluation_sets: dict[str, EvaluationSet] | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self.evaluation_sets = evaluation_sets or {}
        self._resumed_step = 0
        self._seconds_before = 0.0
        self._began = time.monotonic()
        self._staging: Path | None = None
        # Samples are full: nothing is padded, and tokenizers such as GPT-2's have no token to pad with.
        kwargs.setdefault("data_collator", default_data_collator)
        # `Trainer` insists on a dataset wherever an evaluation strategy is set; ours are in `evaluation_sets`.
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=self.evaluation_sets,
            callbacks=[*callbacks],
            **kwargs,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(Keeping())
        self.add_callback(Progress())
        # `compute_loss` divides by the tokens of the whole accumulated batch; this is how `Trainer` is told so.
        self.model_accepts_loss_kwargs = True
        self.batches_hash = torch.zeros((), dtype=torch.int64, device=args.device)
        """Hash of every token id trained on, the step it was seen at included; order within a step does not count."""

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, FSDP2's shards on CPUs included, and refuse what cannot be reset."""
        refuse_engines(self.args)
        with sharding(self):
            super().create_accelerator_and_postprocess()

    # ---- data: sample i of the phase, whatever happened before

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _FromStep(self._resumed_step * a_step, self.args.max_steps * a_step)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train to `max_steps`, from a checkpoint folder where one is given."""
        if resume_from_checkpoint:
            folder = Path(str(resume_from_checkpoint))
            state = json.loads((folder / CONTINUAL_STATE).read_text(encoding="utf-8"))
            self._resumed_step, self._seconds_before = state["step"], state["seconds"]
            self._say_resumed(state)
            if self.is_world_process_zero():
                self.batches_hash.fill_(state["batches_hash"])
            self.args.eval_on_start = False
        self._began = time.monotonic()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _say_resumed(self, state: dict[str, Any]) -> None:
        before, now = state.get("world_size"), self.args.world_size
        if self.args.title is None or not self.is_world_process_zero():
            return
        changed = f", on {now} process(es) instead of {before}: the same batches" if before not in (None, now) else ""
        sys.stderr.write(f"{self.args.title}: goes on from step {state['step']}{changed}\n")

    # ---- loss

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward, and count its tokens into the hash."""
        self.batches_hash += hash_batch(inputs["input_ids"].to(self.batches_hash.device), self.state.global_step)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return Σ nll over the tokens of the accumulated batch: the exact mean once accumulated and averaged by ranks.

        Models of transformers divide by counts of their own (GPT-2's includes a token it never predicts).
        """
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        nll = token_nll(outputs.logits, inputs["labels"]).sum()
        loss = nll / (inputs["labels"].numel() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> int:
        # Every sample is full, so a rank's count is known without asking the others or reading a label.
        return sum(batch["labels"].numel() for batch in batch_samples)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Decay tensors of two dimensions and more, as the paper does."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2]

    # ---- evaluation

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Measure exact perplexity on every evaluation set."""
        metrics: dict[str, float] = {}
        for name, corpus in self.evaluation_sets.items():
            measured = perplexity(
                self.model,
                corpus.tokens,
                context=self.args.eval_context,
                batch_size=self.args.per_device_eval_batch_size,
                prefix=corpus.prefix,
                n_bytes=corpus.n_bytes,
                progress=f"evaluating {name}" if self.args.title and self.is_world_process_zero() else None,
                share=True,
            )
            for key in ("nll", "perplexity", "bits_per_byte", "tokens", "bytes"):
                metrics[f"{metric_key_prefix}_{name}_{key}"] = getattr(measured, key)
        chosen = {k: w for k, w in (self.args.best_corpora or {}).items() if k in self.evaluation_sets}
        if chosen:
            nll = sum(w * metrics[f"{metric_key_prefix}_{k}_nll"] for k, w in chosen.items()) / sum(chosen.values())
            metrics[f"{metric_key_prefix}_nll"] = nll
            better = self.state.best_metric is None or nll < self.state.best_metric
            if self.args.keep_best and better and self.state.global_step > 0:
                self.state.best_metric, self.state.best_global_step = nll, self.state.global_step
                self.control.should_save = True
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the share of the phase that is done as the epoch; `Trainer` counts it from the resumption."""
        self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint under a temporary name, flush it, and rename it once."""
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        final, self._staging = output / name, output / f"{name}{STAGING_SUFFIX}"
        total = self._hash_over_ranks()
        try:
            with writing(output):
                if self.is_world_process_zero():
                    shutil.rmtree(self._staging, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    written = self._staging / name
                    (written / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing reads it
                    seconds = self._seconds_before + time.monotonic() - self._began
                    own = {
                        "step": self.state.global_step,
                        "batches_hash": total,
                        "seconds": seconds,
                        "world_size": self.args.world_size,
                    }
                    write_json(written / CONTINUAL_STATE, own)
                    sync(written)
                    shutil.rmtree(final, ignore_errors=True)
                    written.rename(final)
                    self._staging.rmdir()
                    self._prune(output)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as an ordinary folder; of shards, `Trainer` would keep pickles beside it."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        weights = whole_weights(self.model)
        self._save(output_dir or self.args.output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _prune(self, output: Path) -> None:
        """Delete the checkpoints that are neither the newest, nor the best, nor listed."""
        kept = {*self.args.keep_steps, self.state.global_step}
        if self.args.keep_best:
            kept.add(self.state.best_global_step)
        for folder, step in checkpoints(output):
            if step not in kept:
                shutil.rmtree(folder)

    def _hash_over_ranks(self) -> int:
        return int(self.accelerator.reduce(self.batches_hash.clone(), "sum"))

    def hash_of_batches(self) -> str:
        """Return the hash over all ranks of every batch so far, 16 hexadecimal digits."""
        return f"{self._hash_over_ranks() & (2**64 - 1):016x}"


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
