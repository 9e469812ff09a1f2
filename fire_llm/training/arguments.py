"""Arguments of one phase: transformers' `TrainingArguments`, and those that continual pretraining adds."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from fire_llm.core.errors import UserError
from fire_llm.evaluation.measurement import PRECISIONS
from fire_llm.linalg.matmul import settings_kept
from fire_llm.training.contract import LESS_IS_BETTER


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ContinualArguments(TrainingArguments):
    """Add Muon, schedules, exact evaluation and what becomes of checkpoints to `TrainingArguments`.

    What `ContinualTrainer` makes of the options of `TrainingArguments` is in docs/trainer.md.

    Raises:
        UserError: What `TrainingArguments` refuses; an unknown `eval_precision`, `reduce_precision` or `nonfinite`;
            `bf16_params` without `bf16`, or with checkpointed activations; `keep_last` beside another
            `save_total_limit`.
    """

    muon: bool = _option(False, "Train the matrices of attention and MLPs with Muon, the rest with AdamW.")
    muon_lr: float | None = _option(None, "Peak learning rate of Muon, an update's RMS a step; None: learning_rate.")
    muon_momentum: float = _option(0.95, "Share of Muon's momentum that a step keeps, 0 to 1.")
    schedule: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Arguments of `multiplier`, in steps and shares of the peak; None: as transformers has it."},
    )
    eval_context: int | None = _option(None, "Tokens an evaluation window; None: the longest that the model reads.")
    eval_precision: str = _option("fp32", "Precision of evaluations: fp32, or training for that of the phase.")
    bf16_params: bool = _option(
        False, "With bf16: read the parameters in bf16, so that norms and the residual stream are in bf16 too."
    )
    reduce_precision: str = _option("fp32", "What FSDP2 adds gradients up in over the ranks: fp32, or bf16.")
    best_corpora: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Weights, by corpus, of the mean NLL (nats a token) that decides the best checkpoint."},
    )
    ema_decay: float | None = _option(
        None, "Share of a moving average of the weights that a step keeps, saved as ema/ in checkpoints; None: none."
    )
    keep_best: bool = _option(False, "Keep the checkpoint with the lowest validation NLL.")
    keep_last: int | None = _option(None, "Number of the newest checkpoints that stay; None: save_total_limit, else 1.")
    keep_steps: list[int] = field(
        default_factory=list, metadata={"help": "Optimizer steps, from 1, whose checkpoints are written and stay."}
    )
    save_every_minutes: float | None = _option(
        None, "Minutes, of the first rank's clock, after which a checkpoint is written too; None: by steps alone."
    )
    async_save: bool | None = _option(
        None, "Write checkpoints while training goes on; None: one process on an accelerator, and models in shards."
    )
    nonfinite: str = _option("halt", "Where a loss or gradient is not finite: halt, or skip the step.")
    title: str | None = _option(None, "Title of the progress bar and of lines on stderr; None: a bar without one.")
    labels_shifted: bool | None = _option(
        None, "Whether label t is the token after position t, not the one at it; None: as the first batch shows."
    )

    def __post_init__(self) -> None:
        """Set what makes losses exact and resumption arithmetic."""
        self.logging_nan_inf_filter = False  # it hides bad losses, and costs a host sync a micro-batch
        if self.eval_precision not in PRECISIONS:
            raise UserError(f"eval_precision '{self.eval_precision}': it must be one of {', '.join(PRECISIONS)}")
        if self.reduce_precision not in ("fp32", "bf16"):
            raise UserError(f"reduce_precision '{self.reduce_precision}': it must be one of fp32, bf16")
        if self.bf16_params and not self.bf16:
            raise UserError("bf16_params goes with bf16=True: it says what of a pass in bf16 is in bf16")
        if self.bf16_params and (self.gradient_checkpointing or getattr(self, "activation_checkpointing", False)):
            raise UserError(
                "bf16_params cannot be had with checkpointed activations, which are computed again from parameters in "
                "fp32: leave one of them out"
            )
        if self.save_every_minutes is not None and not self.save_every_minutes > 0:
            raise UserError(f"save_every_minutes {self.save_every_minutes}: it must be above 0, or None")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay {self.ema_decay}: it must lie between 0 and 1, such as 0.999, or be None")
        if self.nonfinite not in ("halt", "skip"):
            raise UserError(f"nonfinite '{self.nonfinite}': it must be one of halt, skip")
        if None not in (self.keep_last, self.save_total_limit) and self.keep_last != self.save_total_limit:
            raise UserError(
                f"keep_last={self.keep_last} and save_total_limit={self.save_total_limit} say the same twice, and "
                "differently: give one of them"
            )
        # mypy reads this before it knows the types of the parent's fields, hence the ignore.
        if self.greater_is_better is None and str(self.metric_for_best_model or "").endswith(LESS_IS_BETTER):  # type: ignore[has-type]
            self.greater_is_better = False  # transformers knows this of names that end in "loss" alone
        # With torch_compile, transformers turns TF32 on, in the whole process, unless `tf32` is given.
        with settings_kept() if self.tf32 is None else nullcontext():
            try:
                super().__post_init__()
            except UserError:
                raise
            except ValueError as error:
                raise UserError(str(error)) from error

    @property
    def n_gpu(self) -> int:
        """One GPU a process: `Trainer` would use all GPUs that it sees, by DataParallel, with a batch for each."""
        return min(1, int(super().n_gpu))


OWN = tuple(f for f in fields(ContinualArguments) if f.name not in {known.name for known in fields(TrainingArguments)})
"""Fields that `TrainingArguments` does not have."""


def plain(args: TrainingArguments) -> bool:
    """Return whether arguments are `Trainer`'s own: logs and checkpoints then hold what `Trainer` puts into them."""
    return not isinstance(args, ContinualArguments)


def adopted(args: TrainingArguments | None) -> Any:
    """Return arguments that a `ContinualTrainer` can read: plain `TrainingArguments` get the options they lack.

    Args:
        args: As a user gave them; None: `Trainer`'s own folder, `tmp_trainer`.

    Returns:
        The same object, with its own options as they were. Plain arguments keep every checkpoint where
        `save_total_limit` is None, as in `Trainer`.
    """
    if args is None:
        return ContinualArguments("tmp_trainer")
    if not isinstance(args, TrainingArguments):
        raise UserError(f"args: {args!r:.80} is no TrainingArguments; give ContinualArguments(output_dir, max_steps=…)")
    if plain(args):
        given: Any = args
        for own in OWN:
            default = own.default if own.default_factory is MISSING else own.default_factory()
            if not hasattr(given, own.name):
                setattr(given, own.name, default)
        if given.keep_last is None and given.save_total_limit is None:
            given.keep_last = sys.maxsize
        given._n_gpu = min(1, given.n_gpu)
    return args
