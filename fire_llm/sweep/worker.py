"""A worker of a sweep: take a unit that nobody has, train it, take the next; wait where what is left hangs on others.

There is no scheduler. A unit's lock is held by who trains it and is free again when that process ends, however it ends,
so workers of other commands, and of other machines on the same file system, share the work.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from fire_llm.errors import UserError, redact
from fire_llm.locks import held
from fire_llm.recipe import Cell, load_recipe
from fire_llm.run import Workbench, only_run, train
from fire_llm.staging import writing
from fire_llm.stopping import Stopped, signals_handled
from fire_llm.sweep.jobs import Failures, Job, jobs_of, lock_for, of_arms, take_over
from fire_llm.trainer.heap import keep_freed_memory

POLL_SECONDS = 1.0
"""Between two looks at what others have finished."""


def work(jobs: Sequence[Job], output: Path, failures: Failures, *, progress: bool, log: str | None = None) -> None:
    """Train what can be trained until every job is finished, or hangs on one that failed.

    Args:
        jobs: Of `jobs_of`.
        output: The sweep's folder, with the locks.
        failures: What the workers of this command failed at, which none of them tries again.
        progress: Show progress bars.
        log: Where this worker's errors are told in full.
    """
    benches: dict[str, Workbench] = {}
    keep_freed_memory()
    while left := [job for job in jobs if not job.done() and not failures.has(job)]:
        for job in left:
            if job.ready() and _taken(job, output, failures, benches, progress, log):
                break  # back to the first: what it was waiting for may be there now
        else:
            time.sleep(POLL_SECONDS)


def _taken(
    job: Job, output: Path, failures: Failures, benches: dict[str, Workbench], progress: bool, log: str | None
) -> bool:
    """Train a job or take it over, unless somebody else is at it; tell whether it was this worker's."""
    with held(lock_for(output, job)) as had:
        if not had:
            return False
        if job.done() or failures.has(job) or not job.ready():
            return True  # things changed between the look and the lock
        if job.cell.name not in benches:
            benches.clear()  # one cell's tokens in memory are enough
            if progress and job.cell.name:
                print(f"{job.cell.name}:", file=sys.stderr)
            benches[job.cell.name] = Workbench(job.cell.recipe, job.run, progress)
        try:
            with writing(job.run), only_run(job.run, shared=True):
                if source := job.source():
                    take_over(job, source)
                else:
                    train(job.unit, benches[job.cell.name])
        except Exception as error:  # whatever it is, the other units do not depend on it
            if log is not None:
                traceback.print_exc()
            code = 2 if isinstance(error, UserError) else 1
            failures.add(job, redact(str(error) or type(error).__name__), code, log)
    return True


def main(instructions: str, log: str) -> int:
    """Work in a process of its own, at what a file says, for as long as the standard input stays open."""
    told = json.loads(Path(instructions).read_text(encoding="utf-8"))
    threading.Thread(target=_watch_starter, daemon=True).start()
    output = Path(told["output"])
    cells = [Cell(cell["name"], cell["settings"], load_recipe(cell["recipe"])) for cell in told["cells"]]
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}", file=sys.stderr, flush=True)
    try:
        with signals_handled():
            jobs = of_arms(jobs_of(cells, output), told["arms"])
            work(jobs, output, Failures(Path(told["failures"])), progress=False, log=log)
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
