"""The stages of a command: which can be trained now, which are finished, which another trial shares, which failed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fire_llm.core.atomic import CONTINUAL_STATE, STAGING_SUFFIX, checkpoints, clear_partial_checkpoints, write_json
from fire_llm.core.errors import UserError, explained, redact
from fire_llm.core.locks import held, lock_of
from fire_llm.core.manifest import REPLACED, prune, read_state
from fire_llm.core.staging import clear_leftovers, staged
from fire_llm.distributed import ranks
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.recipe import Trial
from fire_llm.experiment.stages import Stage, expand, finished, kept_checkpoints, labelled_checkpoint, select


@dataclass
class Job:
    """One stage of one trial."""

    trial: Trial
    stage: Stage
    key: str
    """Stages of several trials have the same key if they end with the same checkpoints."""
    parent: Job | None
    duplicates: list[Job] = field(default_factory=list, repr=False)
    """Jobs of other trials with the same key."""
    _done: bool = False

    @property
    def run(self) -> RunContext:
        """Return the trial's run."""
        return self.stage.run

    @property
    def folder(self) -> Path:
        """Return the stage's own folder."""
        return self.run.folder / self.stage.folder

    @property
    def title(self) -> str:
        """Return the job's name for people: `lr=0.001: second / fire, seed 1`."""
        trial = f"{self.trial.name}: " if self.trial.name else ""
        return f"{trial}{self.stage.title}, seed {self.stage.seed}"

    def done(self) -> bool:
        """Return whether the stage is finished; once it is, the disk is not asked again."""
        self._done = self._done or finished(self.folder)
        return self._done

    def source(self) -> Job | None:
        """Return a finished duplicate whose files can be linked; None if there is none or the stage was begun."""
        if self.folder.exists():
            return None
        return next((duplicate for duplicate in self.duplicates if duplicate.done()), None)

    def ready(self) -> bool:
        """Return whether the stage can be trained or linked now: its parent is finished and no duplicate is begun."""
        if self.parent is not None and not self.parent.done():
            return False
        begun_elsewhere = any(checkpoints(duplicate.folder) and not duplicate.done() for duplicate in self.duplicates)
        return self.folder.exists() or self.source() is not None or not begun_elsewhere


def jobs_of(
    trials: Sequence[Trial], output: Path, progress: bool = False, known: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Job]:
    """Return the jobs of all trials, trial by trial, parents before children.

    Args:
        trials: The trials of the command.
        output: The command's folder.
        progress: Show what takes long.
        known: By trial, the hashes from `RunContext.known`; without them, text, models and tokenizers are hashed.
    """
    jobs: list[Job] = []
    by_key: dict[str, list[Job]] = {}
    for trial in trials:
        by_folder: dict[str, Job] = {}
        run = RunContext(trial.recipe, trial.folder(output), progress, (known or {}).get(trial.name))
        for stage in expand(run):
            parent = by_folder[stage.parent.folder] if stage.parent else None
            by_folder[stage.folder] = job = Job(trial, stage, stage.key(stage.spec), parent)
            by_key.setdefault(job.key, []).append(job)
        jobs += by_folder.values()
    for job in jobs:
        job.duplicates = [duplicate for duplicate in by_key[job.key] if duplicate is not job]
    return jobs


def of_arms(jobs: Sequence[Job], arms: Sequence[str]) -> list[Job]:
    """Return the jobs of the named arms in all trials, and the jobs that they start from; without arms, all jobs.

    Raises:
        UserError: A trial has no such arm.
    """
    chosen: list[Job] = []
    for _, trial_jobs in groupby(jobs, lambda job: job.trial.name):
        by_folder = {job.stage.folder: job for job in trial_jobs}
        chosen += [by_folder[stage.folder] for stage in select([job.stage for job in by_folder.values()], arms)]
    wanted = {id(job) for job in chosen}
    for job in chosen:  # a duplicate that this command does not train is not waited for
        job.duplicates = [duplicate for duplicate in job.duplicates if id(duplicate) in wanted or duplicate.done()]
    return chosen


def link_duplicate(job: Job, source: Job) -> None:
    """Fill a stage's folder with links to the files of its finished duplicate, or with copies."""

    def link(origin: str, copy: str) -> None:
        try:
            os.link(origin, copy)
        except OSError:
            shutil.copy2(origin, copy)

    with staged(job.folder) as partial:
        shutil.copytree(source.folder, partial, copy_function=link, dirs_exist_ok=True)


def clear_jobs(jobs: Sequence[Job], output: Path) -> None:
    """Delete half-written and replaced files of dead processes from the folders of stages; live ones hold locks."""
    for job in jobs:
        replaced = _undeleted(job) if job.done() else []
        if replaced or any(job.folder.glob(f"*{STAGING_SUFFIX}")):
            with held(lock_for(output, job)) as locked:
                if locked:
                    clear_partial_checkpoints(job.folder)
                    for partial in job.folder.glob(f"*.json{STAGING_SUFFIX}"):
                        partial.unlink()
                    with suppress(UserError):  # the last checkpoint is damaged: an older one is still of use
                        prune(labelled_checkpoint(job.folder, "final"), replaced)
        with suppress(UserError):  # another process is writing the folder
            clear_leftovers(job.folder)


def _undeleted(job: Job) -> list[int]:
    """Return the steps of the checkpoints that a finished stage's last one replaced and that still exist."""
    final, kept = labelled_checkpoint(job.folder, "final"), kept_checkpoints(job.stage)
    steps = read_state(final, CONTINUAL_STATE).get(REPLACED, [])
    return [n for n in steps if (older := final.with_name(f"checkpoint-{n}")).is_dir() and older not in kept]


def lock_for(output: Path, job: Job) -> Path:
    """Return the file of the lock that a process holds while it trains a job or a duplicate of it."""
    return lock_of(output, job.stage.lock)


@contextmanager
def only_run(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock a run's folder against other runs; sweeps and their workers share the lock (`shared`).

    Raises:
        UserError: Another process holds the lock.
    """
    if not ranks().is_main_process:
        yield
        return
    with held(folder / ".lock", shared=shared) as locked:
        if not locked:
            raise UserError(f"another run is writing into '{folder}': wait for it to end, or choose another --output")
        yield


class Failures:
    """Keep what failed during one command in files that all of its workers see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, job: Job, error: Exception, log: str | None) -> None:
        """Keep why a job failed: the message, the exit code and the log that says more."""
        code = 2 if isinstance(error, UserError) else 1
        content = {"stage": job.title, "message": redact(explained(error)), "code": code, "log": log}
        content["kind"] = type(error).__name__
        write_json(self.folder / f"{job.key}.json", content)

    def has(self, job: Job | None) -> bool:
        """Return whether a job, or what it starts from, failed."""
        return job is not None and ((self.folder / f"{job.key}.json").exists() or self.has(job.parent))

    def any(self) -> bool:
        """Return whether any job failed."""
        return next(self.folder.glob("*.json"), None) is not None

    def all(self) -> list[dict[str, Any]]:
        """Return the failures, ordered by stage."""
        failures = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("*.json")]
        return sorted(failures, key=lambda failure: failure["stage"])

    def error(self) -> Exception:
        """Return the first failure as an exception of its own type; a user's mistake comes before others."""
        failure = max(self.all(), key=lambda failure: failure["code"])
        message, kind = failure["message"], failure["kind"]
        if failure["code"] == 2:
            return UserError(message)
        if (builtin := {"FloatingPointError": FloatingPointError, "MemoryError": MemoryError}.get(kind)) is not None:
            return builtin(message)
        named = message if kind == "RuntimeError" else f"{kind}: {message}"
        return RuntimeError(f"{failure['stage']}: {named} (see '{failure['log']}')")
