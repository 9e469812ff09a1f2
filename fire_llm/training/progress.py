"""Show the progress of a phase: a bar where one can be drawn, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

BAR_DELAY = 2.0
"""Seconds before a progress bar appears; shorter phases show none."""

LINE_SECONDS = 30.0
"""Seconds between two lines of progress, where there is no terminal to draw a bar on."""


def interactive() -> bool:
    """Return whether bars can be drawn: on a terminal or in a notebook, not in a file or a pipe."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def duration(seconds: float) -> str:
    """Write a duration for people: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def perplexities(logs: Mapping[str, Any]) -> dict[str, str]:
    """Return the perplexities in an entry of a `Trainer`'s log, formatted: {"ppl CORPUS": "12.3"}."""
    return {
        f"ppl {key[5:-11]}": f"{value:.1f}" if value < 1e6 else f"{value:.2g}"
        for key, value in logs.items()
        if key.startswith("eval_") and key.endswith("_perplexity")
    }


def report_line(args: Any, text: str, subject: str | None = None) -> None:
    """Write a line about a training to stderr, on the first rank; `subject` stands before it, or the run's title."""
    if args.process_index == 0:
        sys.stderr.write(f"{subject or args.title or 'training'}: {text}\n")


def in_run(args: Any) -> bool:
    """Return whether a training is a stage of a run, which has a title and reports by itself."""
    return getattr(args, "title", None) is not None


class Progress(TrainerCallback):
    """Show one bar a phase, with the latest training loss and validation perplexities, or a line now and then."""

    bar: Any = None
    """Made when training begins; None before."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the bar, at the step that training goes on from; it stays hidden where there are lines or nothing."""
        from tqdm.auto import tqdm

        shown = not args.disable_tqdm and state.is_world_process_zero
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
        """Move the bar, or write a line where one is due."""
        step, now = state.global_step, time.monotonic()
        self.bar.update(step - self.bar.n)
        if self.lines and now >= self.line_at:
            self.line_at = now + LINE_SECONDS
            remaining = duration((now - self.began) / (step - self.first) * (state.max_steps - step))
            values = ", ".join(f"{name} {value}" for name, value in self.shown.items())
            report_line(args, f"step {step:,} of {state.max_steps:,}, {remaining} left; {values}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Show the latest values."""
        if self.bar is None:
            return
        for key, name, form in (("loss", "loss", ".3f"), ("tokens_per_second", "tok/s", ",.0f"), ("mfu", "MFU", ".0%")):
            if key in logs:
                self.shown[name] = format(logs[key], form)
        self.shown |= perplexities(logs)
        self.bar.set_postfix(self.shown, refresh=False)

    def close(self) -> None:
        """End the bar, however training ended."""
        if self.bar is not None:
            self.bar.close()
