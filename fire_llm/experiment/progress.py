"""Show how far all stages of a command are, whichever process trains them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fire_llm.core.atomic import CONTINUAL_STATE, checkpoints
from fire_llm.experiment.collect import measured_nll
from fire_llm.experiment.jobs import Job
from fire_llm.experiment.stages import final_checkpoint
from fire_llm.training.progress import BAR_DELAY, LINE_SECONDS, duration, interactive

REPORT_SECONDS = 1.0
"""Between two reports of a worker."""

RATE_SECONDS = 60.0
"""Over which the speed is taken; evaluations and saves are in it, so that the time left is."""


class StepReport(TrainerCallback):
    """Write which stage this process trains and how far it is into a small file, which `Overview` reads.

    Args:
        path: The file, rewritten at most once in `REPORT_SECONDS`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.key = path, ""
        self._written = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the step."""
        if time.monotonic() - self._written < REPORT_SECONDS:
            return
        self._written = time.monotonic()
        partial = self.path.with_suffix(".partial")
        with suppress(OSError):  # the save of a checkpoint reports a full disk
            partial.write_text(json.dumps([self.key, state.global_step]), encoding="utf-8")
            os.replace(partial, self.path)


class Overview:
    """Show one bar over the steps of all stages, and a line when one ends; without a terminal, a line now and then.

    Args:
        jobs: What is to be trained, finished ones included.
        steps: Optimizer steps of each, by key.
        reports: Where the workers' `StepReport`s are.
        shown: Show anything at all.
    """

    def __init__(self, jobs: Sequence[Job], steps: Mapping[str, int], reports: Path, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.reports, self.shown, self.steps = reports, shown, steps
        self.stages = len(jobs)
        self.left = [job for job in jobs if not job.done()]
        self.tokens_per_step = {job.key: job.trial.recipe.batch.tokens_per_step for job in jobs}
        self.at = {job.key: steps[job.key] if job.done() else _newest_step(job) for job in jobs}
        self.seen: deque[tuple[float, int]] = deque([(time.monotonic(), self._tokens())])
        self.line_at = time.monotonic() + LINE_SECONDS
        self.bar = tqdm(
            total=sum(steps.values()),
            initial=sum(self.at.values()),
            unit="step",
            desc=self._stages(),
            delay=BAR_DELAY,
            mininterval=0.5,
            miniters=0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
            disable=not (shown and interactive()),
        )

    def _tokens(self) -> int:
        return sum(step * self.tokens_per_step[key] for key, step in self.at.items())

    def _stages(self) -> str:
        return f"{self.stages - len(self.left)}/{self.stages} stages"

    def refresh(self) -> None:
        """Read the reports, and show what has changed."""
        for path in self.reports.glob("*.step"):
            with suppress(OSError, ValueError):
                key, step = json.loads(path.read_text(encoding="utf-8"))
                self.at[key] = max(self.at[key], step)
        for job in [*self.left]:
            if (final := final_checkpoint(job.folder)) is not None:
                self.left.remove(job)
                self.at[job.key] = self.steps[job.key]
                self.say(f"{job.title}: {_ended(final)} ({self._stages()})")
        rate = self._rate()
        self.bar.set_description(self._stages(), refresh=False)
        self.bar.set_postfix_str(rate, refresh=False)
        self.bar.update(sum(self.at.values()) - self.bar.n)
        if self.shown and not interactive() and time.monotonic() >= self.line_at:
            self.line_at = time.monotonic() + LINE_SECONDS
            done = f"{sum(self.at.values()):,} of {sum(self.steps.values()):,} steps"
            self.say(", ".join(filter(None, [self._stages(), done, rate])))

    def _rate(self) -> str:
        """Say the speed of the last `RATE_SECONDS`, and how long the rest takes at it."""
        now, tokens = time.monotonic(), self._tokens()
        self.seen.append((now, tokens))
        while now - self.seen[0][0] > RATE_SECONDS:
            self.seen.popleft()
        since, before = self.seen[0]
        if tokens <= before:
            return ""
        rate = (tokens - before) / (now - since)
        left = sum((self.steps[key] - step) * self.tokens_per_step[key] for key, step in self.at.items())
        return f"{rate:,.0f} tokens/s, {duration(left / rate)} left"

    def say(self, line: str) -> None:
        """Write a line above the bar."""
        if self.shown:
            self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """End the bar's line."""
        self.bar.close()


def _newest_step(job: Job) -> int:
    whole = checkpoints(job.folder)
    return whole[-1][1] if whole else 0


def _ended(final: Path) -> str:
    """Say how long a stage took and what it ended at."""
    seconds = json.loads((final / CONTINUAL_STATE).read_text(encoding="utf-8"))["seconds"]
    nll = [f"{corpus} {value:.3f}" for corpus, value in measured_nll(final).items()]
    return f"{seconds:.1f} s, NLL {', '.join(nll)}" if nll else f"{seconds:.1f} s"
