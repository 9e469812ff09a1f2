"""Callbacks: the reset inside any `Trainer`, and what `ContinualTrainer` adds to its own."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fire_llm.core.atomic import write_json
from fire_llm.core.errors import UserError
from fire_llm.models import fresh_model
from fire_llm.resets import ResetReport, ResetsLike, apply_reset, parse_resets
from fire_llm.resets.spec import ResetSpec, refuse_kinds
from fire_llm.training.gradients import gather_gradient
from fire_llm.training.sharding import load_optimizer, refuse_engines


def initial_model(resets: Sequence[ResetSpec], given: Any, config: Any, seed: int) -> Any:
    """Return the initial weights for some resets: those given, else, where one of them wants any, newly drawn ones."""
    wanted = given is None and any(reset.needs_initial for reset in resets)
    return fresh_model(config, seed) if wanted else given


class ResetCallback(TrainerCallback):
    """Apply a reset inside a running `Trainer`: when training begins, or after given steps; never again on resumption.

    Works in any `Trainer`. The state of exactly the touched parameters is cleared in its optimizer. A reset that reads
    the gradient (`dash`) needs a `ContinualTrainer`, which gathers it from the batches to come.

    Args:
        resets: A method's name, a spec, or a list of specs, as `apply_reset` takes them.
        at_steps: Optimizer steps after which it is applied; none means when training begins.
        initial: A model with the run's step-0 weights; where it is wanted and not given, drawn from the model's
            config and `seed`.
        seed: Seed of those weights; the trainer's own by default.
        report_file: Where to write the report as JSON.
        spectra: Whether the report holds singular values.
        training: What other callbacks do during training, for the report.

    Raises:
        UserError: At once, for an unknown reset or option, or a method that acts during training.
    """

    def __init__(
        self,
        resets: ResetsLike = "fire",
        *,
        at_steps: Iterable[int] = (),
        initial: Any = None,
        seed: int | None = None,
        report_file: str | Path | None = None,
        spectra: bool = False,
        training: ResetsLike = (),
    ) -> None:
        self.resets = parse_resets(resets)
        refuse_kinds(self.resets)
        self.training = parse_resets(training)
        self.at_steps = frozenset(at_steps)
        if any(step < 1 for step in self.at_steps):
            raise UserError(
                f"at_steps {sorted(self.at_steps)}: steps count from 1; leave it empty to reset at the start"
            )
        self.initial, self.seed, self.spectra = initial, seed, spectra
        self.report_file = Path(report_file) if report_file else None
        self.reports: list[ResetReport] = []
        self._trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Note the `ContinualTrainer` that this runs in, which calls it."""
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset at the start of training, unless this is a resumption; refuse engines that no reset can reach."""
        refuse_engines(args)
        if not self.at_steps and state.global_step == 0:
            self._apply(args, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset after a listed step; the checkpoint of that step holds the result."""
        if state.global_step in self.at_steps:
            self._apply(args, **kwargs)

    def _apply(self, args: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        seed = args.seed if self.seed is None else self.seed
        initial = initial_model(self.resets, self.initial, model.config, seed)
        gathering = self._trainer is not None and any(r.needs_gradient for r in self.resets)
        if gathering:
            gather_gradient(self._trainer, self.resets)
        report = apply_reset(model, self.resets, initial=initial, optimizer=optimizer, spectra=self.spectra)
        if gathering:
            model.zero_grad()
        report.training = self.training
        self.reports.append(report)
        if self.report_file is not None and args.process_index == 0:
            write_json(self.report_file, report.to_dict())


class KeptOptimizer(TrainerCallback):
    """Begin training with the moments of an earlier checkpoint; rates and schedule are the new ones.

    It stands before a `ResetCallback`, which then clears those of what it touches.

    Args:
        checkpoint: Of the same model, trained by the same kind of optimizer.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Take them over, unless this is a resumption, which has its own."""
        if state.global_step == 0:
            load_optimizer(optimizer, self.checkpoint, settings=False)


class Keeping(TrainerCallback):
    """Save at the listed steps, and log wherever something is saved or measured, so that no average spans it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_evaluate |= last
        control.should_save |= last or state.global_step in args.keep_steps
        if control.should_save or control.should_evaluate:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss} at step {state.global_step}: training stops here")


BAR_DELAY = 2.0
"""Seconds before a progress bar shows; what is done by then needs none."""

LINE_SECONDS = 30.0
"""Between two lines that say how far training is, where there is no terminal to draw a bar on."""


def interactive() -> bool:
    """Return whether bars can be drawn: on a terminal or in a notebook, not in a file or a pipe."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def duration(seconds: float) -> str:
    """Write a duration for people: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Progress(TrainerCallback):
    """Show one bar a phase, with the latest training loss and validation perplexities, or a line now and then."""

    bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm.auto import tqdm

        shown = args.title is not None and not args.disable_tqdm and state.is_world_process_zero
        self.lines = shown and not interactive()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=args.title,
            unit="step",
            delay=BAR_DELAY,
            disable=not shown or self.lines,
        )
        self.shown: dict[str, str] = {}
        self.began, self.first = time.monotonic(), state.global_step
        self.line_at = self.began + LINE_SECONDS

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, now = state.global_step, time.monotonic()
        self.bar.update(step - self.bar.n)
        if self.lines and now >= self.line_at:
            self.line_at = now + LINE_SECONDS
            left = duration((now - self.began) / (step - self.first) * (state.max_steps - step))
            values = ", ".join(f"{name} {value}" for name, value in self.shown.items())
            sys.stderr.write(f"{args.title}: step {step:,} of {state.max_steps:,}, {left} left; {values}\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
        if "tokens_per_second" in logs:
            self.shown["tok/s"] = f"{logs['tokens_per_second']:,.0f}"
        if "mfu" in logs:
            self.shown["MFU"] = f"{logs['mfu']:.0%}"
        for key, value in logs.items():
            if key.startswith("eval_") and key.endswith("_perplexity"):
                self.shown[f"ppl {key[5:-11]}"] = f"{value:.1f}"
        self.bar.set_postfix(self.shown, refresh=False)

    def close(self) -> None:
        """End the bar's line, however training ended."""
        if self.bar is not None:
            self.bar.close()
