"""Show how far all stages of a command are, whichever process trains them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fire_llm.core.atomic import CONTINUAL_STATE, checkpoints
from fire_llm.core.errors import UserError
from fire_llm.core.manifest import TRAINER_STATE, read_state
from fire_llm.core.terminal import open_console
from fire_llm.experiment.collect import measured_nll
from fire_llm.experiment.jobs import Failures, Job
from fire_llm.experiment.stages import final_checkpoint
from fire_llm.training.progress import BAR_DELAY, LINE_SECONDS, duration, interactive, perplexities

REPORT_SECONDS = 1.0
"""Seconds between two reports of a process that trains."""

RATE_SECONDS = 60.0
"""Seconds over which the speed is measured, with evaluations and saves, as the time that is left has them too."""

Send = Callable[[str, int, dict[str, str]], None]
"""Takes a job's key, its current step, and its latest measures as text."""


def to_file(path: Path) -> Send:
    """Return a function that writes a report into a small file, which the `Overview` of another process reads."""

    def send(key: str, step: int, measures: dict[str, str]) -> None:
        partial = path.with_suffix(".partial")
        with suppress(OSError):  # a full disk is reported when a checkpoint is saved
            partial.write_text(json.dumps([key, step, measures]), encoding="utf-8")
            os.replace(partial, path)

    return send


class StepReport(TrainerCallback):
    """Report which stage this process trains and how far it is, at most once in `REPORT_SECONDS`.

    Args:
        send: Called with each report.
    """

    def __init__(self, send: Send) -> None:
        self.send, self.key = send, ""
        self._sent = 0.0
        self._measures: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the measures of an earlier stage."""
        self._measures = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step."""
        if time.monotonic() - self._sent >= REPORT_SECONDS:
            self._sent = time.monotonic()
            self.send(self.key, state.global_step, self._measures)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Note the latest loss, and the perplexities of an evaluation."""
        if "loss" in logs:
            self._measures["loss"] = f"{logs['loss']:.3f}"
        self._measures |= perplexities(logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the last step, even if the previous report is more recent than `REPORT_SECONDS`."""
        self.send(self.key, state.global_step, self._measures)


class _Speed:
    """Measure tokens a second over the last `RATE_SECONDS`."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, tokens: int) -> float:
        """Record how many tokens are done by now, and return the tokens a second; 0 at the first call."""
        now = time.monotonic()
        self._samples.append((now, tokens))
        while now - self._samples[0][0] > RATE_SECONDS:
            self._samples.popleft()
        since, before = self._samples[0]
        return (tokens - before) / (now - since) if now > since else 0.0


@dataclass(frozen=True)
class _Row:
    """What is shown of one stage, or of all."""

    title: str
    done: int
    """Steps so far."""
    steps: int
    facts: str
    """Speed, time left and the latest measures."""


class Overview:
    """Show a bar for each stage that is being trained, and one for all; without a terminal, lines now and then.

    Args:
        jobs: All jobs of the command, also finished ones.
        steps: Optimizer steps of each job, by key.
        failures: The jobs that failed. Its folder also holds the workers' reports, in files that end in `.step`.
        shown: Show anything at all.
    """

    def __init__(self, jobs: Sequence[Job], steps: Mapping[str, int], failures: Failures, shown: bool) -> None:
        self.steps, self.failures, self.shown = steps, failures, shown
        self.count, self.left = len(jobs), [job for job in jobs if not job.done()]
        self.tokens_per_step = {job.key: job.trial.recipe.batch.tokens_per_step for job in jobs}
        self.at = {job.key: steps[job.key] if job.done() else _newest_step(job) for job in jobs}
        self.training: dict[str, tuple[str, dict[str, str]]] = {}
        """By process, the key of the stage that it trained last, and its measures."""
        self._speeds: defaultdict[str, _Speed] = defaultdict(_Speed)
        self._speeds[""].update(self._tokens(self.at))
        self._began = self._line_at = time.monotonic()
        self._bars: Any = _bars() if shown and interactive() else None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Overview:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.refresh()
        if self._bars is not None:
            self._bars.stop()

    def report(self, key: str, step: int, measures: dict[str, str]) -> None:
        """Take a report of this process, and show the changes."""
        self._take("", key, step, measures)
        self.refresh()

    def refresh(self) -> None:
        """Read the workers' reports, and show the changes."""
        for path in self.failures.folder.glob("*.step"):
            with suppress(OSError, ValueError):
                self._take(path.stem, *json.loads(path.read_text(encoding="utf-8")))
        for job in [*self.left]:
            with suppress(OSError, UserError):  # another process may be deleting what is read here
                if (final := final_checkpoint(job.folder)) is not None:
                    outcome = _outcome(final)
                    self.left.remove(job)
                    self.at[job.key] = self.steps[job.key]
                    self.say(f"{job.title}: {outcome} ({self._stages()})")
        rows = self._rows()
        now = time.monotonic()
        if self._bars is not None and now >= self._began + BAR_DELAY:
            self._draw(rows)
        elif self._bars is None and now >= self._line_at + LINE_SECONDS:
            self._line_at = now
            for row in rows.values():
                self.say(f"{row.title}: {_joined(f'{row.done:,} of {row.steps:,} steps', row.facts)}")

    def say(self, line: str) -> None:
        """Write a line, above the bars if there are any."""
        if self.shown:
            sys.stderr.write(f"{line}\n")

    def _take(self, process: str, key: str, step: int, measures: dict[str, str]) -> None:
        self.at[key] = max(self.at[key], step)
        self.training[process] = key, measures

    def _rows(self) -> dict[str, _Row]:
        """Return a row for each stage that is being trained, by key, and one for all of them under ""."""
        left = {job.key: job for job in reversed(self.left)}
        rows = {}
        for _, (key, measures) in sorted(self.training.items()):
            if key in left and not self.failures.has(left[key]):
                done, steps = self.at[key], self.steps[key]
                latest = ", ".join(f"{name} {value}" for name, value in measures.items())
                rows[key] = _Row(left[key].title, done, steps, _joined(self._speed(key, {key: done}), latest))
        total = sum(self.at.values()), sum(self.steps.values())
        rows[""] = _Row(self._stages(), *total, self._speed("", self.at))
        return rows

    def _speed(self, key: str, at: Mapping[str, int]) -> str:
        """Return in words the tokens a second of the stages in `at`, and how long the rest of them takes."""
        done, steps = self._tokens(at), {job: self.steps[job] for job in at}
        rate = self._speeds[key].update(done)
        return f"{rate:,.0f} tokens/s, {duration((self._tokens(steps) - done) / rate)} left" if rate > 0 else ""

    def _tokens(self, steps: Mapping[str, int]) -> int:
        return sum(count * self.tokens_per_step[key] for key, count in steps.items())

    def _stages(self) -> str:
        return f"{self.count - len(self.left)}/{self.count} stages"

    def _draw(self, rows: Mapping[str, _Row]) -> None:
        self._bars.start()
        for key in self._tasks.keys() - rows.keys():
            self._bars.remove_task(self._tasks.pop(key))
        for key, row in rows.items():
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(row.title, facts="")
            shown = {"description": row.title, "completed": row.done, "total": row.steps, "facts": row.facts}
            self._bars.update(self._tasks[key], **shown)
        self._bars.refresh()


def _bars() -> Any:
    """Return bars on standard error that are drawn at `refresh` and removed at the end; None if none can be drawn."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    out = open_console(stderr=True)
    if not (find_spec("ipywidgets") if out.is_jupyter else out.is_interactive):
        return None
    title, facts = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[facts]"))
    columns = (title, BarColumn(16), MofNCompleteColumn(), facts)
    return Progress(*columns, console=out, auto_refresh=False, transient=True)


def _newest_step(job: Job) -> int:
    complete = checkpoints(job.folder)
    return complete[-1][1] if complete else 0


def _joined(*facts: str) -> str:
    return ", ".join(filter(None, facts))


def _outcome(final: Path) -> str:
    """Return in words how long a stage took and the NLL that it ended at.

    Args:
        final: Its last checkpoint.
    """
    continual, state = read_state(final, CONTINUAL_STATE), read_state(final, TRAINER_STATE)
    took = f"{continual['seconds']:.1f} s"
    if continual.get("stopped"):
        took += f", stopped at step {state['global_step']:,} of {state['max_steps']:,}"
    nll = [f"{corpus} {value:.3f}" for corpus, value in measured_nll(final).items()]
    return f"{took}, NLL {', '.join(nll)}" if nll else took
