"""Run what one command asks for: the units of a run, or of all cells of a sweep, and gather what they made.

A run is a sweep of one cell that has its folder to itself, and that ends at its first failure.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fire_llm.core.atomic import write_json, writing
from fire_llm.core.errors import UserError
from fire_llm.core.launch import launched
from fire_llm.core.locks import held, lock_of
from fire_llm.core.signals import signals_handled
from fire_llm.distributed import ranks
from fire_llm.experiment.collect import collect
from fire_llm.experiment.jobs import Failures, Job, jobs_of, of_arms, take_over
from fire_llm.experiment.processes import Workers
from fire_llm.experiment.progress import Overview
from fire_llm.experiment.recipe import Cell, Recipe
from fire_llm.experiment.resources import registered_here, small, threads_asked_for, worker_count
from fire_llm.experiment.stages import phase_steps, refuse_links, refuse_other_recipe
from fire_llm.experiment.train import Workbench, only_run, train
from fire_llm.experiment.worker import work
from fire_llm.training.heap import keep_freed_memory, release_memory

SCHEMA_VERSION = 1

_TASKS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Set by srun and mpirun in each of several tasks, which accelerate would take for the ranks of one training."""


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


def run_recipe(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    arms: Iterable[str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run what of a recipe is not finished yet, and return (and write) the results.

    Units that do not depend on each other, such as arms and seeds, are trained side by side where that pays.

    Args:
        recipe: From `load_recipe`.
        output: The run's folder, `runs/NAME` by default. What in it is finished is skipped, what was cut off resumes.
        arms: Only these arms (and the phases they start from); all by default.
        workers: Processes that train, each a unit of its own: by default one a GPU; on a CPU one a core where the
            model is small (docs/scaling.md), else one. The weights do not depend on it. What one process can do at a
            time is done in this one. Under a launcher, its ranks train one unit after another together.
        progress: Show progress bars.

    Returns:
        The content of `results.json` (see docs/results-schema.md).

    Raises:
        UserError: Where the folder belongs to a different recipe or is in use, an arm is unknown, or the disk is full.
        Stopped: A KeyboardInterrupt, after SIGINT or SIGTERM: the step they came in is saved (docs/reliability.md).
    """
    folder = Path(output or Path("runs") / recipe.name)
    return _Command([Cell("", {}, recipe)], folder, list(arms), progress, alone=True).run(workers).results[0]


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
        workers: As in `run_recipe`.
        progress: Show progress bars.

    Raises:
        UserError: Where a folder belongs to another recipe or is in use by `fire-llm run`, or an arm is unknown.
        Stopped: A KeyboardInterrupt, after SIGINT or SIGTERM: every worker saved the step it was in.
    """
    return _Command(cells, Path(output), list(arms), progress, alone=False).run(workers)


@dataclass(frozen=True)
class _Command:
    """What one command is to run."""

    cells: Sequence[Cell]
    output: Path
    arms: list[str]
    progress: bool
    alone: bool
    """A run rather than a sweep."""

    def run(self, workers: int | None) -> Sweep:
        """Train what is not finished, here, in workers or on the ranks of a launcher, and gather the results."""
        if workers is not None and workers < 1:
            raise UserError(f"--workers {workers}: at least 1 is needed")
        if launched() and workers is not None:
            raise UserError(
                f"--workers {workers}: a launcher started this process (RANK or WORLD_SIZE is set), and its ranks "
                "train each unit together. Leave --workers out, or start without a launcher"
            )
        if not launched() and not self.alone:
            for name in _TASKS:
                os.environ.pop(name, None)
        jobs = jobs_of(self.cells, self.output)
        wanted = of_arms(jobs, self.arms)
        if ranks().num_processes > 1 or launched():
            return Sweep(list(self.cells), self._on_ranks(jobs, wanted), [], [])
        with ExitStack() as stack:
            with writing(self.output):
                self.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(signals_handled())
            stack.enter_context(only_run(self.output, shared=not self.alone))
            _prepare(self.cells, wanted if self.alone else jobs, self.output, self.alone)
            own = self.output / ".workers" / uuid.uuid4().hex
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            failures = Failures(own)
            ended = self._train(wanted, failures, workers)
            failed = [*failures.all()]
            left = [job.title for job in wanted if not job.done() and job.title not in {f["unit"] for f in failed}]
            if self.alone and failed:
                raise failures.error()
            if self.alone and left:
                raise RuntimeError(f"{'; '.join(ended)}; the same command goes on from the newest checkpoints")
            failed += [{"unit": "", "message": message, "code": 1, "log": None} for message in ended if left]
            with held(lock_of(self.output, "results"), wait=True):
                results = [_gather(cell, jobs, self.output, self._bench(cell)) for cell in self.cells]
        return Sweep(list(self.cells), results, failed, left)

    def _train(self, wanted: Sequence[Job], failures: Failures, workers: int | None) -> list[str]:
        """Train jobs, in this process for as long as one is enough; return what ended workers that were ended."""
        number = worker_count(workers, wanted)
        one_thread = threads_asked_for() is None
        if not one_thread and self.progress and threads_asked_for() != 1 and any(small(c.recipe) for c in self.cells):
            sys.stderr.write(f"each unit trains on {threads_asked_for()} threads, as OMP_NUM_THREADS says\n")
        options: dict[str, Any] = {"one_thread": one_thread, "alone": self.alone}
        # Where there are several GPUs, each process is to see one; else this process does what one can do at a time.
        most = None if number == 1 else 1
        if torch.cuda.device_count() > 1 and workers != 1 and not registered_here():
            most = 0
        work(wanted, self.output, failures, progress=self.progress, most=most, **options)
        if all(job.done() or failures.has(job) for job in wanted):
            return []
        overview = Overview(wanted, self._tokenised(wanted), failures.folder, self.progress)
        overview.say(f"{number} worker(s); what they say is kept in '{self.output / '.workers'}'")
        options["progress"] = self.alone and self.progress
        return Workers(number, self.cells, self.arms, self.output, failures, options).train(overview)

    def _tokenised(self, wanted: Sequence[Job]) -> dict[str, int]:
        """Make tokenizers and tokens before workers want them, with all cores, and return the jobs' steps by key."""
        benches: dict[str, Workbench] = {}
        steps: dict[str, int] = {}
        for job in wanted:
            recipe, unit = job.cell.recipe, job.unit
            data = str([unit.spec[part] for part in ("model", "tokenizer")] + sorted(unit.spec["corpora"].items()))
            bench = benches.setdefault(data, self._bench(job.cell))
            tokens = 0
            try:
                for name in unit.phase.data if not job.done() else ():
                    bench.tokens(name, "train")
                for name in recipe.evaluated() if not job.done() else ():
                    bench.tokens(name, "validation")
                if unit.phase.epochs is not None:
                    tokens = bench.mixture(unit).epoch_tokens
            except UserError:
                if self.alone:
                    raise
                # Other cells may have other text: the worker that trains the unit reports it.
            steps[job.key] = phase_steps(unit.phase, recipe.batch.tokens_per_step, tokens)
        return steps

    def _bench(self, cell: Cell) -> Workbench:
        return Workbench(cell.recipe, cell.folder(self.output), self.progress)

    def _on_ranks(self, jobs: Sequence[Job], wanted: Sequence[Job]) -> list[dict[str, Any]]:
        """Run one cell after another on all ranks of a launcher, and return their results."""
        state = ranks()
        results = []
        for cell in self.cells:
            folder, own = cell.folder(self.output), [job for job in wanted if job.cell is cell]
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with signals_handled(), only_run(folder):
                refuse_links(folder, [job.unit for job in own])
                refuse_other_recipe(folder, [job.unit for job in own])
                keep_freed_memory()
                if state.is_main_process:
                    write_json(folder / "recipe.json", cell.recipe.model_dump(mode="json"))
                    if self.cells[0].name:
                        write_json(self.output / "sweep.json", described(self.cells))
                    for job in own:
                        # Earlier cells are finished.
                        if not job.done() and (source := job.source()):
                            take_over(job, source)
                state.wait_for_everyone()
                bench = self._bench(cell)
                with writing(folder):
                    for job in own:
                        if not job.done():
                            train(job.unit, bench)
                            release_memory()
                results.append(_gather(cell, jobs, self.output, bench, state.is_main_process))
        return results


def _prepare(cells: Sequence[Cell], jobs: Sequence[Job], output: Path, alone: bool) -> None:
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
            with nullcontext() if alone else only_run(cell.folder(output), shared=True):
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


def _gather(cell: Cell, jobs: Sequence[Job], output: Path, bench: Workbench, first: bool = True) -> dict[str, Any]:
    """Return a cell's results, of the units that are finished; the first rank writes them."""
    folder = cell.folder(output)
    results = collect(cell.recipe, [job.unit for job in jobs if job.cell is cell], folder, bench)
    if first:
        write_json(folder / "results.json", results)
    return results
