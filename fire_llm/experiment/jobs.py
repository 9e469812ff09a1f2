"""The units of a sweep: which can be trained now, which is there already, which another cell has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

from fire_llm.core.atomic import checkpoints, staged, write_json
from fire_llm.core.errors import UserError, redact
from fire_llm.core.locks import lock_of
from fire_llm.experiment.recipe import Cell
from fire_llm.experiment.stages import Unit, expand, select
from fire_llm.experiment.train import finished


@dataclass
class Job:
    """One unit of one cell."""

    cell: Cell
    unit: Unit
    run: Path
    """Folder of the cell's run."""
    key: str
    """The same for units of several cells that end with the same checkpoints."""
    parent: Job | None
    twins: list[Job] = field(default_factory=list, repr=False)
    """Those of other cells with the same key."""
    _done: bool = False

    @property
    def folder(self) -> Path:
        """Give the unit's own folder."""
        return self.run / self.unit.folder

    @property
    def title(self) -> str:
        """Name the job for people: `lr=0.001: second / fire, seed 1`."""
        of = f"{self.cell.name}: " if self.cell.name else ""
        return f"{of}{self.unit.title}, seed {self.unit.seed}"

    def done(self) -> bool:
        """Tell whether the unit's last checkpoint is there; what was once does not go away."""
        self._done = self._done or finished(self.folder)
        return self._done

    def source(self) -> Job | None:
        """Return a finished twin to take the unit over from, where nothing of its own was begun."""
        return None if self.folder.exists() else next((twin for twin in self.twins if twin.done()), None)

    def ready(self) -> bool:
        """Tell whether the unit can be trained or taken over now, as far as others' work goes."""
        if self.parent is not None and not self.parent.done():
            return False
        begun_elsewhere = any(checkpoints(twin.folder) and not twin.done() for twin in self.twins)
        return self.folder.exists() or self.source() is not None or not begun_elsewhere


def jobs_of(cells: Sequence[Cell], output: Path) -> list[Job]:
    """Return the jobs of all cells, those of one cell after those of the one before, parents before children."""
    jobs: list[Job] = []
    by_key: dict[str, list[Job]] = {}
    for cell in cells:
        own: dict[str, Job] = {}
        for unit in expand(cell.recipe):
            # What is kept, and what is left out, are no part of the spec: they change what a folder holds.
            identity = [unit.spec, unit.phase.keep, cell.recipe.nonfinite]
            key = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()
            parent = own[unit.parent.folder] if unit.parent else None
            own[unit.folder] = job = Job(cell, unit, cell.folder(output), key, parent)
            by_key.setdefault(key, []).append(job)
        jobs += own.values()
    for job in jobs:
        job.twins = [twin for twin in by_key[job.key] if twin is not job]
    return jobs


def of_arms(jobs: Sequence[Job], arms: Sequence[str]) -> list[Job]:
    """Return the jobs of the named arms, in all cells, and those that they start from; all of them for no arms.

    Raises:
        UserError: For an arm that a cell has not.
    """
    chosen: list[Job] = []
    for _, own in groupby(jobs, lambda job: job.cell.name):
        by_folder = {job.unit.folder: job for job in own}
        chosen += [by_folder[unit.folder] for unit in select([job.unit for job in by_folder.values()], arms)]
    wanted = {id(job) for job in chosen}
    for job in chosen:  # what nobody is going to finish is not waited for
        job.twins = [twin for twin in job.twins if id(twin) in wanted or twin.done()]
    return chosen


def take_over(job: Job, source: Job) -> None:
    """Make a unit's folder out of its finished twin's, by links to the same files, or copies where there are none."""

    def link(origin: str, copy: str) -> None:
        try:
            os.link(origin, copy)
        except OSError:
            shutil.copy2(origin, copy)

    with staged(job.folder) as partial:
        shutil.copytree(source.folder, partial, copy_function=link, dirs_exist_ok=True)


def lock_for(output: Path, job: Job) -> Path:
    """Return the lock's file that whoever trains a job, or a twin of it, holds."""
    return lock_of(output, job.key)


class Failures:
    """Keep what failed during one command, where all of its workers see it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, job: Job, error: Exception, log: str | None) -> None:
        """Keep why a job failed: the message, the exit code it stands for, and where more is told."""
        kind = type(error).__name__
        message = redact(str(error) or kind)
        code = 2 if isinstance(error, UserError) else 1
        content = {"unit": job.title, "message": message, "code": code, "log": log, "kind": kind}
        write_json(self.folder / f"{job.key}.json", content)

    def has(self, job: Job | None) -> bool:
        """Tell whether a job, or what it starts from, failed."""
        return job is not None and ((self.folder / f"{job.key}.json").exists() or self.has(job.parent))

    def any(self) -> bool:
        """Tell whether something failed."""
        return next(self.folder.glob("*.json"), None) is not None

    def all(self) -> list[dict[str, str | int | None]]:
        """Return what failed, by unit."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("*.json")]
        return sorted(found, key=lambda failure: str(failure["unit"]))

    def error(self) -> Exception:
        """Return the first failure as the exception that it was, a user's mistake before others."""
        failure = max(self.all(), key=lambda failure: int(failure["code"] or 0))
        message, kind = str(failure["message"]), str(failure["kind"])
        if failure["code"] == 2:
            return UserError(message)
        if kind in ("FloatingPointError", "MemoryError"):
            return {"FloatingPointError": FloatingPointError, "MemoryError": MemoryError}[kind](message)
        named = message if kind == "RuntimeError" else f"{kind}: {message}"
        return RuntimeError(f"{failure['unit']}: {named} (see '{failure['log']}')")
