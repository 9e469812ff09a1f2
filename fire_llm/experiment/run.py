"""Run what one command asks for: train the stages of a run, or of all trials of a sweep, and write the results.

A run is a sweep of one trial. It has its folder to itself, and it ends at its first failure.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fire_llm.core.atomic import write_json, writing
from fire_llm.core.errors import UserError
from fire_llm.core.locks import held, lock_of
from fire_llm.core.ranks import launched, settle_launcher
from fire_llm.core.signals import signals_handled
from fire_llm.distributed import ranks, together
from fire_llm.experiment.bars import library_bars
from fire_llm.experiment.batch import phase_steps
from fire_llm.experiment.collect import collect
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.generation import check_prompts
from fire_llm.experiment.jobs import Failures, Job, clear_jobs, jobs_of, link_duplicate, of_arms, only_run
from fire_llm.experiment.norms import norm_warnings
from fire_llm.experiment.processes import Workers
from fire_llm.experiment.progress import Overview, StepReport
from fire_llm.experiment.pushing import check_hub, push_stage
from fire_llm.experiment.recipe import Recipe, Trial, stop_fault
from fire_llm.experiment.resources import registered_here, small, threads_asked_for, worker_count
from fire_llm.experiment.stages import Stage, check_resets, refuse_links, refuse_other_recipe
from fire_llm.experiment.train import mixture_of, train
from fire_llm.experiment.worker import work
from fire_llm.reporting.schema import Results
from fire_llm.training.heap import keep_freed_memory, release_memory
from fire_llm.training.trackers import check_trackers

SCHEMA_VERSION = 1
"""Of `sweep.json`."""

_TASK_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which srun and mpirun say how many tasks they started; accelerate takes tasks for ranks."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep ended with."""

    trials: list[Trial]
    results: list[Results]
    """The content of each trial's `results.json`: the stages that are finished."""
    failures: list[dict[str, Any]]
    """Stages that failed, each {stage, message, code, log}; empty if all are finished."""
    left: list[str]
    """Stages that were not trained, because they start from one that failed."""

    @property
    def code(self) -> int:
        """Return the exit code: 0 for success, 1 if the work failed, 2 if the user's input is wrong."""
        return max((int(failure["code"]) for failure in self.failures), default=0)

    def failed_text(self) -> str:
        """Return in words which stages failed, and which were not trained for that reason."""
        lines = [f"{len(self.failures)} failed; the same command tries again:"]
        for failure in self.failures:
            log = f" (see '{failure['log']}')" if failure["log"] else ""
            lines.append(": ".join(filter(None, [failure["stage"], failure["message"]])) + log)
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
    """Run the stages of a recipe that are not finished yet, and write and return the results.

    Stages that do not depend on each other, such as arms and seeds, are trained side by side where that pays.

    Args:
        recipe: From `load_recipe`.
        output: The run's folder, `runs/NAME` by default. What in it is finished is skipped, what was cut off resumes.
        arms: Only these arms (and the phases they start from); all by default.
        workers: Processes that train, each a stage of its own: by default one a GPU; on a CPU one a core where the
            model is small (docs/scaling.md), else one. The weights do not depend on it. This process trains itself
            for as long as one process is enough. Under a launcher, its ranks train one stage after another together.
        progress: Show how far training is.

    Returns:
        The content of `results.json` as plain data (see docs/results-schema.md), to save, print or put into a table;
        `fire_llm.reporting.schema.Results.model_validate` gives it types.

    Raises:
        UserError: The folder belongs to a different recipe or is in use, an arm is unknown, or the disk is full.
        Stopped: A KeyboardInterrupt, after SIGINT or SIGTERM: the current step was saved (docs/reliability.md).
    """
    folder = Path(os.path.expanduser(output or Path("runs") / recipe.name))
    with library_bars(progress):
        sweep = _Command([Trial("", {}, recipe)], folder, list(arms), progress, alone=True).run(workers)
    return sweep.results[0].model_dump(mode="json")


def run_sweep(
    trials: Sequence[Trial],
    output: str | Path,
    *,
    arms: Iterable[str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Run the stages of a sweep's trials that are not finished yet, and write the results of each trial.

    Args:
        trials: From `load_trials`.
        output: The sweep's folder. It holds a folder for the run of each trial; without a grid, it is the run's folder.
        arms: Only these arms (and the phases they start from); all by default.
        workers: As in `run_recipe`.
        progress: Show how far training is.

    Raises:
        UserError: A folder belongs to another recipe or is in use by `fire-llm run`, or an arm is unknown.
        Stopped: A KeyboardInterrupt, after SIGINT or SIGTERM: every worker saved its current step.
    """
    folder = Path(os.path.expanduser(output))
    with library_bars(progress):
        return _Command(trials, folder, list(arms), progress, alone=False).run(workers)


@dataclass(frozen=True)
class _Command:
    """What one command has to run."""

    trials: Sequence[Trial]
    output: Path
    arms: list[str]
    progress: bool
    alone: bool
    """Whether this is a run rather than a sweep."""

    def run(self, workers: int | None) -> Sweep:
        """Train what is not finished, here, in workers or on the ranks of a launcher, and gather the results."""
        self._check_launcher(workers)
        refuse_links(self.output, [])
        jobs = jobs_of(self.trials, self.output, self.progress)
        wanted = of_arms(jobs, self.arms)
        self._check_ahead(jobs, [job.stage for job in wanted if not job.done()])
        if ranks().num_processes > 1 or launched():
            return Sweep(list(self.trials), self._on_ranks(jobs, wanted), [], [])
        with ExitStack() as stack:
            with writing(self.output):
                self.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(signals_handled())
            stack.enter_context(only_run(self.output, shared=not self.alone))
            _prepare(self.trials, wanted, jobs, self.output, self.alone)
            failures = Failures(stack.enter_context(_failures_folder(self.output)))
            killed = self._train(wanted, failures, workers)
            failed = failures.all()
            failed_stages = {failure["stage"] for failure in failed}
            left = [job.title for job in wanted if not job.done() and job.title not in failed_stages]
            if self.alone and failed:
                raise failures.error()
            if self.alone and left:
                raise RuntimeError(f"{'; '.join(killed)}; the same command goes on from the newest checkpoints")
            failed += [{"stage": "", "message": message, "code": 1, "log": None} for message in killed if left]
            for job in jobs:
                push_stage(job.stage)
            with held(lock_of(self.output, "results"), wait=True):
                results = [_gather(trial, jobs) for trial in self.trials]
        return Sweep(list(self.trials), results, failed, left)

    def _check_launcher(self, workers: int | None) -> None:
        """Refuse a number of workers, or tasks of srun and mpirun, with which the command cannot be meant."""
        if workers is not None and workers < 1:
            raise UserError(f"--workers {workers}: at least 1 is needed")
        settle_launcher()
        if launched() and workers is not None:
            raise UserError(
                f"--workers {workers}: a launcher started this process (RANK or WORLD_SIZE is set), and its ranks "
                "train each stage together. Leave --workers out, or start without a launcher"
            )
        for name in () if launched() else _TASK_COUNTS:
            if self.alone:
                _check_tasks(name)
            else:
                os.environ.pop(name, None)

    def _check_ahead(self, jobs: Sequence[Job], ahead: Sequence[Stage]) -> None:
        """Find what would end the command hours later: resets, prompts, the login to the Hub, trackers."""
        check_resets(ahead)
        for run in {stage.run for stage in ahead}:
            check_prompts(run)
        done = [job.stage for job in jobs if job.done()]
        together(None, lambda: check_hub(ahead, done) if ranks().is_main_process else None, "hub")
        if ahead:
            together(None, self._check_trackers, "trackers")
        if self.progress and ranks().is_main_process:
            sys.stderr.writelines(f"warning: {warning}\n" for warning in norm_warnings(ahead))

    def _check_trackers(self) -> None:
        for names, project in {(tuple(trial.recipe.report_to), trial.recipe.name) for trial in self.trials}:
            if ranks().is_main_process:
                check_trackers(names, project, begin=True)

    def _train(self, wanted: Sequence[Job], failures: Failures, workers: int | None) -> list[str]:
        """Train jobs, in this process for as long as one is enough; return why workers ended that were killed."""
        number = worker_count(workers, wanted)
        if all(job.done() for job in wanted):
            return []
        asked = threads_asked_for()
        if (asked or 1) > 1 and self.progress and any(small(trial.recipe) for trial in self.trials):
            sys.stderr.write(f"each stage trains on {asked} threads, as OMP_NUM_THREADS says\n")
        options: dict[str, Any] = {"one_thread": asked is None, "alone": self.alone}
        # This process trains until two stages can be trained at once. With several GPUs it trains nothing itself:
        # each worker is to see one GPU alone.
        most = None if number == 1 else 1
        if torch.cuda.device_count() > 1 and workers != 1 and not registered_here():
            most = 0
        with Overview(wanted, self._tokenised(wanted), failures, self.progress) as overview:
            report = StepReport(overview.report) if self.progress else None
            work(wanted, self.output, failures, report=report, most=most, **options)
            if all(job.done() or failures.has(job) for job in wanted):
                return []
            overview.say(f"{number} worker(s); what they say is kept in '{self.output / '.workers'}'")
            options["progress"] = self.alone and self.progress
            known = {job.trial.name: job.run.known() for job in wanted}
            return Workers(number, self.trials, self.arms, self.output, failures, options, known).train(overview)

    def _tokenised(self, wanted: Sequence[Job]) -> dict[str, int]:
        """Make all tokenizers and tokens before training, with all cores, and return the steps of each job by key."""
        runs: dict[str, RunContext] = {}
        steps: dict[str, int] = {}
        for job in wanted:
            recipe, stage = job.trial.recipe, job.stage
            data = str([stage.spec[part] for part in ("model", "tokenizer")] + sorted(stage.spec["corpora"].items()))
            run = runs.setdefault(data, job.run)
            tokens = 0
            try:
                if not job.done():
                    check_prompts(job.run, run.tokenizer)
                    for name in recipe.evaluated():  # held-out text is shorter: its faults are found sooner
                        run.held_out(name)
                    for name in stage.phase.data:
                        run.tokens(name, "train")
                if stage.phase.epochs is not None:
                    tokens = mixture_of(stage, run).epoch_tokens
            except Exception:
                if self.alone:
                    raise
                # A fault in one trial's text must not end the others: training the stage raises it again.
            steps[job.key] = phase_steps(stage.phase, recipe.batch.tokens_per_step, tokens)
            if self.alone and not job.done() and (fault := stop_fault(recipe, stage.phase, steps[job.key])):
                raise UserError(f"phase '{stage.phase.name}': {fault}")
        for run in runs.values():
            if run is not wanted[0].run:  # the first to be trained needs its tokens soon
                run.release()
        return steps

    def _on_ranks(self, jobs: Sequence[Job], wanted: Sequence[Job]) -> list[Results]:
        """Run one trial after another on all ranks of a launcher, and return their results."""
        results = []
        for trial in self.trials:
            folder, own = trial.folder(self.output), [job for job in wanted if job.trial is trial]
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder, [job.stage for job in own])
            with signals_handled(), only_run(folder):
                refuse_other_recipe(folder, [job.stage for job in own], _stages(trial, jobs))
                keep_freed_memory()
                if ranks().is_main_process:
                    write_json(folder / "recipe.json", trial.recipe.model_dump(mode="json"))
                    if self.trials[0].name:
                        write_json(self.output / "sweep.json", described(self.trials))
                    clear_jobs(own, self.output)
                    for job in own:  # a duplicate in an earlier trial is finished
                        if not job.done() and (source := job.source()):
                            link_duplicate(job, source)
                ranks().wait_for_everyone()
                with writing(folder):
                    for job in own:
                        if not job.done():
                            train(job.stage, job.run)
                            release_memory()
                for stage in _stages(trial, jobs) if ranks().is_main_process else ():
                    push_stage(stage)
                results.append(_gather(trial, jobs))
        return results


def _check_tasks(name: str) -> None:
    """Refuse to be one of several tasks of srun or mpirun if MASTER_ADDR does not say where they meet.

    Raises:
        UserError: Naming the variable.
    """
    number = os.environ.get(name, "1")
    if (number.isdecimal() and int(number) < 2) or os.environ.get("MASTER_ADDR"):
        return
    raise UserError(
        f"{name}={number} in the environment: srun or mpirun started tasks that are to train together, and MASTER_ADDR "
        f"does not say where they meet. Unset {name} to train in one process, or start one task and --num-processes"
    )


def _stages(trial: Trial, jobs: Sequence[Job]) -> list[Stage]:
    return [job.stage for job in jobs if job.trial is trial]


def _prepare(trials: Sequence[Trial], wanted: Sequence[Job], jobs: Sequence[Job], output: Path, alone: bool) -> None:
    """Compare the folders of all trials with their recipes, clear what killed processes left, and write recipes."""
    with held(lock_of(output, "recipes"), wait=True):
        for trial in trials:
            folder = trial.folder(output)
            stages = _stages(trial, jobs)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder, stages)
            refuse_other_recipe(folder, _stages(trial, wanted) if alone else stages, stages)
        for trial in trials:
            with nullcontext() if alone else only_run(trial.folder(output), shared=True):
                write_json(trial.folder(output) / "recipe.json", trial.recipe.model_dump(mode="json"))
                clear_jobs([job for job in jobs if job.trial is trial], output)
        if trials[0].name:
            write_json(output / "sweep.json", described(trials))


@contextmanager
def _failures_folder(output: Path) -> Iterator[Path]:
    """Yield a folder in which the workers of this command report; those of commands that died are deleted."""

    def clear(name: str) -> None:
        shutil.rmtree(output / ".workers" / name, ignore_errors=True)
        (output / ".workers" / f"{name}.todo").unlink(missing_ok=True)
        lock_of(output, name).unlink(missing_ok=True)  # no process waits for this lock

    for lock in lock_of(output, "").parent.glob("command-*.lock"):
        with held(lock) as had:
            if had:
                clear(lock.stem)
    name = f"command-{uuid.uuid4().hex}"
    with held(lock_of(output, name), wait=True):
        try:
            yield output / ".workers" / name
        finally:
            clear(name)


def described(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the content of `sweep.json`: the grid and its trials."""
    grid: dict[str, list[Any]] = {}
    for trial in trials:
        for key, value in trial.settings.items():
            values = grid.setdefault(key, [])
            values += [value] if value not in values else []
    named = [{"name": trial.name, "settings": trial.settings} for trial in trials]
    return {"schema_version": SCHEMA_VERSION, "grid": grid, "cells": named}


def _gather(trial: Trial, jobs: Sequence[Job]) -> Results:
    """Return the results of a trial's finished stages; the first rank writes them."""
    stages = _stages(trial, jobs)
    run = stages[0].run
    results = collect(stages, run)
    if ranks().is_main_process:
        write_json(run.folder / "results.json", results.model_dump(mode="json"))
    run.release()
    return results
