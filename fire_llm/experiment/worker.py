"""A worker: take a stage that no other worker trains, train it, take the next; wait for parents that others train.

There is no scheduler. A worker holds the lock of the stage that it trains. The lock is free again when the process
ends, however it ends. So workers of other commands, and of other machines on the same file system, share the work.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from fire_llm.core.atomic import writing
from fire_llm.core.errors import UserError, redact
from fire_llm.core.locks import held
from fire_llm.core.signals import Stopped, end_with, signals_handled
from fire_llm.core.terminal import standard_streams
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.jobs import Failures, Job, jobs_of, link_duplicate, lock_for, of_arms, only_run
from fire_llm.experiment.progress import StepReport, to_file
from fire_llm.experiment.recipe import Trial, load_recipe
from fire_llm.experiment.resources import small, threads
from fire_llm.experiment.train import train
from fire_llm.training.heap import keep_freed_memory, release_memory

POLL_SECONDS = 1.0
"""Seconds between two looks at what other workers have finished."""

QUIET = "| "
"""Begins a line of a worker's log that the command does not show."""


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
        jobs: From `jobs_of`.
        output: The command's folder, with the locks.
        failures: Jobs that failed during this command; no worker tries them again.
        one_thread: Train small models on one thread.
        alone: This is a run: the command locks its folder, and the first failure ends it.
        log: This worker's log, which gets full tracebacks; None in the command's own process, where a run's errors are
            raised.
        report: Told how far this process is.
        most: Return as soon as more stages than this can be trained at the same time.
    """
    worker = _Worker(output, failures, one_thread, alone, log, report)
    keep_freed_memory()
    while left := [job for job in jobs if not job.done() and not failures.has(job)]:
        if alone and failures.any():
            return
        if most is not None and _more_at_once(left, most):
            return
        # After each stage the search begins again: the first job's parent may be finished now.
        if not any(job.ready() and worker.take(job) for job in left):
            time.sleep(POLL_SECONDS)


def _more_at_once(left: Sequence[Job], most: int) -> bool:
    """Return whether more than `most` different stages can be trained now."""
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
        """Train a job or link its duplicate; return False if another worker holds its lock."""
        with held(lock_for(self.output, job)) as locked:
            if not locked:
                return False
            if job.done() or self.failures.has(job) or not job.ready():
                return True  # another worker was faster
            try:
                with writing(job.run.folder), nullcontext() if self.alone else only_run(job.run.folder, shared=True):
                    if source := job.source():
                        link_duplicate(job, source)
                    else:
                        self._train(job)
            except Exception as error:  # other stages may still be trained
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
    """Train in a process of its own what a file says; end when the standard input is closed."""
    gc.freeze()  # imported objects stay: without them, collecting garbage between stages takes a tenth of the time
    content = json.loads(Path(instructions).read_text(encoding="utf-8"))
    end_with(sys.stdin.fileno())
    output, failures = Path(content["output"]), Failures(Path(content["failures"]))
    trials = [Trial(trial["name"], trial["settings"], load_recipe(trial["recipe"])) for trial in content["trials"]]
    print(f"{QUIET}{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}", file=sys.stderr, flush=True)
    report = StepReport(to_file(failures.folder / f"{n}.step"))
    try:
        with standard_streams(), signals_handled():  # a log on a full disk ends no stage
            options = content["options"]
            jobs = of_arms(jobs_of(trials, output, options.pop("progress"), content["known"]), content["arms"])
            work(jobs, output, failures, **options, log=log, report=report)
    except KeyboardInterrupt as stopped:
        return stopped.code if isinstance(stopped, Stopped) else 130
    except UserError as error:
        print(f"fire-llm: {redact(str(error))}", file=sys.stderr)
        return 2
    return 0
