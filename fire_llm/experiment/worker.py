"""A worker: take a stage that nobody has, train it, take the next; wait where what is left depends on others.

There is no scheduler. A stage's lock is held by who trains it and is free again when that process ends, however it
ends, so workers of other commands, and of other machines on the same file system, share the work.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from fire_llm.core.atomic import writing
from fire_llm.core.errors import UserError, redact
from fire_llm.core.locks import held
from fire_llm.core.signals import Stopped, signals_handled
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.jobs import Failures, Job, jobs_of, link_duplicate, lock_for, of_arms, only_run
from fire_llm.experiment.progress import StepReport, to_file
from fire_llm.experiment.recipe import Trial, load_recipe
from fire_llm.experiment.resources import small, threads
from fire_llm.experiment.train import train
from fire_llm.training.heap import keep_freed_memory, release_memory

POLL_SECONDS = 1.0
"""Between two looks at what others have finished."""

QUIET = "| "
"""Begins a line of a log that is for the log alone."""


def work(
    jobs: Sequence[Job],
    output: Path,
    failures: Failures,
    *,
    one_thread: bool = True,
    alone: bool = False,
    log: str | None = None,
    report: StepReport | None = None,
    most: int | None = None,
) -> None:
    """Train what can be trained until every job is finished, or starts from one that failed.

    Args:
        jobs: Of `jobs_of`.
        output: The command's folder, with the locks.
        failures: What the workers of this command failed at, which none of them tries again.
        one_thread: Train small models on one thread.
        alone: This is a run: its folder is held by the command, and the first failure ends it.
        log: Where this worker's errors are written in full; None in the command's own process, which raises those of a
            run.
        report: Called with how far this process is.
        most: Return as soon as more stages than these can be trained at once.
    """
    worker = _Worker(output, failures, one_thread, alone, log, report)
    keep_freed_memory()
    while left := [job for job in jobs if not job.done() and not failures.has(job)]:
        if alone and failures.any():
            return
        if most is not None and _more_at_once(left, most):
            return
        # Back to the first after each: what it was waiting for may be there now.
        if not any(job.ready() and worker.take(job) for job in left):
            time.sleep(POLL_SECONDS)


def _more_at_once(left: Sequence[Job], most: int) -> bool:
    ready: set[str] = set()
    for job in left:
        if job.key not in ready and job.ready():
            ready.add(job.key)
        if len(ready) > most:
            return True
    return False


@dataclass
class _Worker:
    output: Path
    failures: Failures
    one_thread: bool
    alone: bool
    log: str | None
    report: StepReport | None
    run: RunContext | None = None

    def take(self, job: Job) -> bool:
        """Train a job or take it over, unless somebody else is at it; return whether it was this worker's."""
        with held(lock_for(self.output, job)) as had:
            if not had:
                return False
            if job.done() or self.failures.has(job) or not job.ready():
                return True  # things changed between the look and the lock
            try:
                with writing(job.run.folder), nullcontext() if self.alone else only_run(job.run.folder, shared=True):
                    if source := job.source():
                        link_duplicate(job, source)
                    else:
                        self._train(job)
            except Exception as error:  # whatever it is, the other stages do not depend on it
                if self.alone and self.log is None:
                    raise
                if self.log is not None:
                    sys.stderr.writelines(f"{QUIET}{line}\n" for line in redact(traceback.format_exc()).splitlines())
                self.failures.add(job, error, self.log)
            finally:
                release_memory()
        return True

    def _train(self, job: Job) -> None:
        if self.run is not job.run:
            if self.run is not None:
                self.run.release()  # one trial's tokenizer and tokens in memory are enough
            if job.run.progress and job.trial.name:
                print(f"{job.trial.name}:", file=sys.stderr)
            self.run = job.run
        if self.report is not None:
            self.report.key = job.key
        with threads(1 if self.one_thread and small(job.trial.recipe) else None):
            train(job.stage, job.run, [self.report] if self.report else [])


def main(instructions: str, n: str, log: str) -> int:
    """Work in a process of its own, at what a file says, for as long as the standard input stays open."""
    gc.freeze()  # what is imported stays: a search for cycles between two stages takes a tenth of the time without it
    given = json.loads(Path(instructions).read_text(encoding="utf-8"))
    threading.Thread(target=_watch_starter, daemon=True).start()
    output, failures = Path(given["output"]), Failures(Path(given["failures"]))
    trials = [Trial(trial["name"], trial["settings"], load_recipe(trial["recipe"])) for trial in given["trials"]]
    print(f"{QUIET}{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}", file=sys.stderr, flush=True)
    report = StepReport(to_file(failures.folder / f"{n}.step"))
    try:
        with signals_handled():
            options = given["options"]
            jobs = of_arms(jobs_of(trials, output, options.pop("progress")), given["arms"])
            work(jobs, output, failures, **options, log=log, report=report)
    except KeyboardInterrupt as stopped:
        return stopped.code if isinstance(stopped, Stopped) else 130
    except UserError as error:
        print(f"fire-llm: {redact(str(error))}", file=sys.stderr)
        return 2
    return 0


def _watch_starter() -> None:
    """End this worker, its step saved, when the process that started it is gone."""
    while os.read(0, 1):  # nothing is ever written: the system closes the pipe with the process
        pass
    os.kill(os.getpid(), signal.SIGTERM)
