"""Train one phase: transformers' `Trainer` with exact losses, arithmetic data order and checkpoints that are whole.

Shapes: B = sequences a micro-batch, T = tokens a sequence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    default_data_collator,
)

from fire_llm.core.compat import check_trainer
from fire_llm.core.errors import UserError
from fire_llm.core.signals import set_step_near
from fire_llm.evaluation import perplexity
from fire_llm.evaluation.measurement import PRECISIONS
from fire_llm.linalg.matmul import settings_kept
from fire_llm.training.callbacks import Keeping, Progress, ResetCallback, interactive
from fire_llm.training.optimizers import Optimizing, OptimizingArguments
from fire_llm.training.preemption import Stopping
from fire_llm.training.saving import SavingTrainer
from fire_llm.training.sharding import refuse_engines, sharding
from fire_llm.training.stepping import Stepping


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
class ContinualArguments(OptimizingArguments):
    """Add to `TrainingArguments` what a phase of continual pretraining needs."""

    eval_context: int | None = field(default=None, metadata={"help": "Tokens an evaluation window."})
    eval_precision: str = field(
        default="fp32", metadata={"help": "Evaluate in fp32, or in the precision of training: fp32 or training."}
    )
    bf16_params: bool = field(
        default=False,
        metadata={"help": "With bf16: read parameters in bf16 too, norms and residual stream, not the products alone."},
    )
    best_corpora: dict[str, float] | None = field(
        default=None, metadata={"help": "Weights of the corpora whose mean validation NLL decides the best checkpoint."}
    )
    keep_best: bool = field(default=False, metadata={"help": "Keep the checkpoint with the lowest validation NLL."})
    keep_last: int = field(default=1, metadata={"help": "Newest checkpoints that stay."})
    keep_steps: list[int] = field(default_factory=list, metadata={"help": "Optimizer steps whose checkpoints stay."})
    async_save: bool | None = field(
        default=None,
        metadata={"help": "Write checkpoints while training goes on; None: on accelerators, one process, FSDP2 never."},
    )
    nonfinite: str = field(
        default="halt", metadata={"help": "Where a loss or gradient is not finite: halt, or skip the step."}
    )
    title: str | None = field(default=None, metadata={"help": "Title of the progress bar; None for none."})

    def __post_init__(self) -> None:
        """Set what makes losses exact and resumption arithmetic."""
        self.logging_nan_inf_filter = False  # it hides bad losses, and costs a host sync a micro-batch
        self.ignore_data_skip = True  # the sampler starts where the checkpoint stopped: nothing to skip
        self.remove_unused_columns = False
        if self.eval_precision not in PRECISIONS:
            raise UserError(f"eval_precision '{self.eval_precision}': it must be one of {', '.join(PRECISIONS)}")
        if self.bf16_params and not self.bf16:
            raise UserError("bf16_params goes with bf16=True: it says what of a pass in bf16 is in bf16")
        if self.bf16_params and (self.gradient_checkpointing or getattr(self, "activation_checkpointing", False)):
            raise UserError(
                "bf16_params cannot be had with checkpointed activations, which are computed again from parameters in "
                "fp32: leave one of them out"
            )
        # With torch_compile, transformers turns TF32 on, in the whole process, unless `tf32` is given.
        with settings_kept() if self.tf32 is None else nullcontext():
            super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """Give one GPU a process: `Trainer` would take all that it sees, by DataParallel, with a batch for each."""
        return min(1, int(super().n_gpu))


class _FromStep(torch.utils.data.Sampler[int]):
    """Yield sample indices in order from a start, but count them all: a resumed phase is the rest of a whole one."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class ContinualTrainer(Stepping, Optimizing, SavingTrainer):
    """Pretrain a causal LM on one phase's mixture.

    Differs from `Trainer` in this: the loss is the exact mean over the tokens of the accumulated batch, for every
    architecture, and what is not finite stops it before the weights change; sample i of the phase is always the i-th
    the dataset gives, at any world size and after any resumption; evaluation is exact perplexity a corpus; a checkpoint
    folder appears in one rename, when it is whole, and is verified before it is used.

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
        check_trainer(Trainer)
        self.evaluation_sets = evaluation_sets or {}
        self._resumed_step = 0
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
        self.add_callback(Stopping())  # behind what asks for a log where something is saved: a signal's save has none
        self._progress = Progress()
        self.add_callback(self._progress)

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

    # ---- data: sample i of the phase, whatever happened before

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _FromStep(self._resumed_step * a_step, self.args.max_steps * a_step)

    def get_train_dataloader(self) -> Any:
        """Give the loader a generator of its own: drawing its seed from torch's would move dropout on resumption."""
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train to `max_steps`, from a checkpoint folder where one is given."""
        if resume_from_checkpoint:
            state = self._read_state(Path(str(resume_from_checkpoint)))
            self._resumed_step = state["step"]
            self._say_resumed(state)
            self.args.eval_on_start = False
        self._began = time.monotonic()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ResetCallback):
                callback.attach(self)
        try:
            trained = super().train(resume_from_checkpoint, *args, **kwargs)
            self.guard.settle()  # of the last step, where a callback ended training and nothing was logged
            self.settle()
            return trained
        except BaseException:
            self.settle(say=True)
            raise
        finally:
            set_step_near(False)
            self._progress.close()

    def _say_resumed(self, state: dict[str, Any]) -> None:
        before, now = state["world_size"], self.args.world_size
        if self.args.title is None or not self.is_world_process_zero():
            return
        changed = f", on {now} process(es) instead of {before}: the same batches" if before != now else ""
        sys.stderr.write(f"{self.args.title}: goes on from step {state['step']}{changed}\n")

    # ---- evaluation

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Measure exact perplexity on every evaluation set, in fp32 unless `eval_precision` says otherwise."""
        metrics: dict[str, float] = {}
        shown = self.args.title and not self.args.disable_tqdm and self.is_world_process_zero() and interactive()
        for name, corpus in self.evaluation_sets.items():
            measured = perplexity(
                self.model,
                corpus.tokens,
                context=self.args.eval_context,
                batch_size=self.args.per_device_eval_batch_size,
                prefix=corpus.prefix,
                n_bytes=corpus.n_bytes,
                mixed=self.args.eval_precision == "training",
                progress=f"evaluating {name}" if shown else None,
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
