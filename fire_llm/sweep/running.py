"""Start the workers of a sweep, show how far they are, and gather what they made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fire_llm.errors import UserError
from fire_llm.launch import cores, launched
from fire_llm.locks import held, lock_of
from fire_llm.recipe import Cell
from fire_llm.results import collect
from fire_llm.run import Workbench, only_run, run_recipe
from fire_llm.staging import CONTINUAL_STATE, write_json, writing
from fire_llm.stopping import Stopped, signals_handled
from fire_llm.sweep.jobs import Failures, Job, jobs_of, of_arms, take_over
from fire_llm.sweep.worker import POLL_SECONDS, work
from fire_llm.units import final_checkpoint, refuse_links, refuse_other_recipe

SCHEMA_VERSION = 1

_TASKS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Set by srun and mpirun in each of several tasks, which accelerate would take for the ranks of one training."""

_PROGRAM = "import sys; from fire_llm.sweep.worker import main; raise SystemExit(main(*sys.argv[1:]))"


@dataclass(frozen=True)
class Sweep:
    """What a sweep ended with."""

    cells: list[Cell]
    results: list[dict[str, Any]]
    """The content of each cell's `results.json`; of the units that are finished."""
    failures: list[dict[str, Any]]
    """Units that failed, each {unit, message, code, log}; empty where all are finished."""
    left: list[str]
    """Units that hang on those."""

    @property
    def code(self) -> int:
        """Give the exit code: 0, 1 where the work failed, 2 where the user's input is wrong."""
        return max((int(failure["code"]) for failure in self.failures), default=0)

    def told(self) -> str:
        """Say what failed, each once, and what hangs on it."""
        lines = [f"{len(self.failures)} failed; the same command tries again:"]
        for failure in self.failures:
            log = f" (see '{failure['log']}')" if failure["log"] else ""
            lines.append(": ".join(filter(None, [failure["unit"], failure["message"]])) + log)
        if self.left:
            lines.append(f"not trained, as they start from those: {'; '.join(self.left)}")
        return "\n  ".join(lines)


def run_sweep(
    cells: Sequence[Cell],
    output: str | Path,
    *,
    arms: Iterable[str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Run what of a sweep's cells is not finished yet, and write the results of each.

    Args:
        cells: From `load_cells`.
        output: The sweep's folder. A cell's run is a folder in it, or all of it where there is no grid.
        arms: Only these arms (and the phases they start from); all by default.
        workers: Processes that train; by default one a GPU, or one. One is this process. Under a launcher, its ranks
            train one unit after another together instead.
        progress: Show progress bars.

    Raises:
        UserError: Where a folder belongs to another recipe or is in use by `fire-llm run`, or an arm is unknown.
        Stopped: A KeyboardInterrupt, after SIGINT or SIGTERM: every worker saved the step it was in.
    """
    arms = list(arms)
    if launched():
        return Sweep(list(cells), _in_order(cells, Path(output), arms, progress), [], [])
    for name in _TASKS:
        os.environ.pop(name, None)
    if workers is None:
        workers = max(1, torch.cuda.device_count())
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    output = Path(output)
    jobs = jobs_of(cells, output)
    wanted = of_arms(jobs, arms)
    with ExitStack() as stack:
        stack.enter_context(signals_handled())
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        stack.enter_context(only_run(output, shared=True))
        _prepare(cells, jobs, output)
        own = output / ".workers" / uuid.uuid4().hex
        stack.callback(shutil.rmtree, own, ignore_errors=True)
        failures = Failures(own)
        ended: list[str] = []
        if workers == 1:
            work(wanted, output, failures, progress=progress)
        elif any(not job.done() for job in wanted):
            ended = _work_in_processes(cells, arms, wanted, output, failures, workers, progress)
        failed = [*failures.all()]
        left = [job.title for job in wanted if not job.done() and job.title not in {f["unit"] for f in failed}]
        failed += [{"unit": "", "message": message, "code": 1, "log": None} for message in ended if left]
        with held(lock_of(output, "results"), wait=True):
            results = [_gather(cell, jobs, output, progress) for cell in cells]
    return Sweep(list(cells), results, failed, left)


def _in_order(cells: Sequence[Cell], output: Path, arms: list[str], progress: bool) -> list[dict[str, Any]]:
    """Run one cell after another on all ranks of a launcher, and return their results."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    jobs = of_arms(jobs_of(cells, output), arms)
    results = []
    for cell in cells:
        if state.is_main_process:
            for job in jobs:
                # Earlier cells are finished.
                if job.cell is cell and not job.done() and (source := job.source()):
                    take_over(job, source)
            if cells[0].name:
                write_json(output / "sweep.json", described(cells))
        state.wait_for_everyone()
        results.append(run_recipe(cell.recipe, cell.folder(output), arms=arms, progress=progress))
    return results


def _prepare(cells: Sequence[Cell], jobs: Sequence[Job], output: Path) -> None:
    """Compare the folders of all cells with what they were begun with, and say in them what they are."""
    with held(lock_of(output, "recipes"), wait=True):
        for cell in cells:
            folder = cell.folder(output)
            units = [job.unit for job in jobs if job.cell is cell]
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder, units)
            refuse_other_recipe(folder, units)
        for cell in cells:
            with only_run(cell.folder(output), shared=True):
                write_json(cell.folder(output) / "recipe.json", cell.recipe.model_dump(mode="json"))
        if cells[0].name:
            write_json(output / "sweep.json", described(cells))


def described(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the content of `sweep.json`: the grid and its cells."""
    grid: dict[str, list[Any]] = {}
    for cell in cells:
        for key, value in cell.settings.items():
            values = grid.setdefault(key, [])
            values += [value] if value not in values else []
    named = [{"name": cell.name, "settings": cell.settings} for cell in cells]
    return {"schema_version": SCHEMA_VERSION, "grid": grid, "cells": named}


def _gather(cell: Cell, jobs: Sequence[Job], output: Path, progress: bool) -> dict[str, Any]:
    """Write a cell's results, of the units that are finished."""
    folder = cell.folder(output)
    units = [job.unit for job in jobs if job.cell is cell]
    results = collect(cell.recipe, units, folder, Workbench(cell.recipe, folder, progress))
    write_json(folder / "results.json", results)
    return results


def _work_in_processes(
    cells: Sequence[Cell],
    arms: list[str],
    jobs: Sequence[Job],
    output: Path,
    failures: Failures,
    workers: int,
    progress: bool,
) -> list[str]:
    """Start the workers, wait until they end, and return what ended those that did not end by themselves.

    Raises:
        Stopped: A signal came; it was passed on, and every worker has ended.
    """
    told = {
        "output": str(output),
        "failures": str(failures.folder),
        "arms": arms,
        "cells": [{"name": c.name, "settings": c.settings, "recipe": c.recipe.model_dump(mode="json")} for c in cells],
    }
    instructions = failures.folder.with_suffix(".todo")
    write_json(instructions, told)
    logs = [output / ".workers" / f"{socket.gethostname()}-{n + 1}.log" for n in range(workers)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for n, log in enumerate(logs):
            with writing(output):
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("a", encoding="utf-8") as file:
                    process = subprocess.Popen(
                        [sys.executable, "-c", _PROGRAM, str(instructions), str(log)],
                        stdin=subprocess.PIPE,
                        stdout=file,
                        stderr=file,
                        env=_environment(n, workers),
                    )
            processes.append(process)
        _watch(processes, jobs, progress)
    except KeyboardInterrupt as stopped:
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        for process in processes:
            process.wait()
        raise Stopped(int(number), "the workers saved the steps they were in; the same command goes on") from None
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()  # which ends a worker that is left, should this process fail
        instructions.unlink()
    return [_verdict(p.returncode, n, logs[n]) for n, p in enumerate(processes) if p.returncode]


def _environment(n: int, workers: int) -> dict[str, str]:
    """Return what a worker inherits: its share of the GPUs, or of the cores."""
    environment = dict(os.environ)
    if (present := torch.cuda.device_count()) > 0:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        devices = visible or [str(i) for i in range(present)]
        environment["CUDA_VISIBLE_DEVICES"] = devices[n % len(devices)]
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    return environment


def _watch(processes: Sequence[subprocess.Popen[bytes]], jobs: Sequence[Job], progress: bool) -> None:
    """Show one bar over all units until every worker has ended."""
    from tqdm import tqdm

    left = [job for job in jobs if final_checkpoint(job.folder) is None]
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="unit", disable=not progress) as bar:
        while True:
            alive = any(process.poll() is None for process in processes)
            for job in [*left]:
                if (final := final_checkpoint(job.folder)) is None:
                    continue
                left.remove(job)
                bar.update()
                bar.write(f"{job.title}: {_seconds(final):.1f} s", file=sys.stderr)
            if not alive:
                return
            time.sleep(POLL_SECONDS)


def _seconds(checkpoint: Path) -> float:
    state: Mapping[str, Any] = json.loads((checkpoint / CONTINUAL_STATE).read_text(encoding="utf-8"))
    return float(state["seconds"])


def _verdict(code: int, n: int, log: Path) -> str:
    """Say what ended a worker."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = ", most often because the machine ran out of memory" if code == -signal.SIGKILL else ""
    return f"worker {n + 1} {how}{hint}; see '{log}'"
