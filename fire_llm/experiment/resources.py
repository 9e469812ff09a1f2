"""Choose the threads of a stage and the processes of a command by the recipe and the hardware, never by the load.

Otherwise a busy machine would change results: another number of threads rounds sums in another order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fire_llm.architectures.lookup import REGISTERED
from fire_llm.core.errors import UserError
from fire_llm.core.flops import flops_per_token
from fire_llm.core.launch import cores
from fire_llm.experiment.batch import split_batch
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.jobs import Job
from fire_llm.experiment.recipe import Recipe, Trial
from fire_llm.models import model_on_meta
from fire_llm.resets import RESETS

SMALL_PASS_FLOPS = 1e11
"""A stage trains on one CPU thread if a micro-batch, forward and backward, takes at most this (docs/scaling.md)."""

WORTH_PROCESSES_FLOPS = 1e12
"""If all unfinished stages take less than this, processes take longer to start than they save."""

THREADS = "OMP_NUM_THREADS"
"""In this variable the user may choose the number of threads."""

_LIBRARIES = (THREADS, "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
"""torch, NumPy and tokenizers start a thread a core each, unless these say otherwise."""

_flops: dict[str, tuple[float, float]] = {}


def flops_of(recipe: Recipe) -> tuple[float, float]:
    """Return the floating-point operations (of a token, of a micro-batch on a CPU), forward and backward.

    Raises:
        UserError: The tokens of a step do not divide into sequences.
    """
    # Most trials of a sweep share these keys, and building a model takes a tenth of a second.
    key = recipe.model_dump_json(include={"model", "tokenizer", "batch"})
    if key not in _flops:
        run = RunContext(recipe)
        model, length = model_on_meta(run.planned_config), run.sequence_length
        a_token = flops_per_token(model, length) or 6.0 * sum(p.numel() for p in model.parameters())
        sequences, _ = split_batch(run, 1, memory=0)
        _flops[key] = a_token, a_token * sequences * length
    return _flops[key]


def small(recipe: Recipe) -> bool:
    """Return whether a recipe's stages train on one thread: on a CPU, with `SMALL_PASS_FLOPS` a micro-batch at most.

    The threads of a process wait for each other after every operation. A small model has thousands of operations a
    second. So a second thread gains little on an idle machine, and if another process takes its core, all threads wait.
    """
    return not torch.accelerator.is_available() and flops_of(recipe)[1] <= SMALL_PASS_FLOPS


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with this number of threads while the block runs; None changes nothing."""
    if number is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def worker_count(workers: int | None, jobs: Sequence[Job]) -> int:
    """Return how many processes train the unfinished jobs: at most as many as can be trained at the same time.

    Args:
        workers: The number that the user gave. By default one a GPU; on a CPU one a core if all models are small and
            there is enough work, else one.
        jobs: The jobs of the command.

    Raises:
        UserError: The user wants several processes, but this one has registered resets or layouts that others lack.
    """
    undone = [job for job in jobs if not job.done()]
    parents = {job.parent.key for job in undone if job.parent is not None}
    at_once = len({job.key for job in undone} - parents)
    if registered := registered_here():
        if (workers or 1) > 1:
            raise UserError(
                f"--workers {workers}: this process has registered {', '.join(registered)}, which other processes do "
                "not know. Train with one worker, or add them to fire_llm itself (docs/adding.md)"
            )
        return 1
    if workers is None:
        workers = torch.cuda.device_count() or _one_a_core(undone)
    return max(1, min(workers, at_once))


def _one_a_core(undone: Sequence[Job]) -> int:
    """Return the number of workers on a CPU: one a core if all models are small and there is enough work, else one."""
    if torch.accelerator.is_available() or not all(small(job.trial.recipe) for job in undone):
        return 1
    if sum(job_flops(job) for job in {job.key: job for job in undone}.values()) < WORTH_PROCESSES_FLOPS:
        return 1
    return max(1, _allowed_cores() // (threads_asked_for() or 1))


def job_flops(job: Job) -> float:
    """Return the floating-point operations of a job, infinite where its length depends on its corpora."""
    phase, recipe = job.stage.phase, job.trial.recipe
    tokens = phase.tokens or (phase.steps or math.inf) * recipe.batch.tokens_per_step
    return tokens * flops_of(recipe)[0]


def _allowed_cores() -> int:
    """Return the number of cores, or what a container's limit of CPU time amounts to."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return min(cores(), max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores()


def threads_asked_for() -> int | None:
    """Return the number of threads that the user set in the environment; None if there is none."""
    value = os.environ.get(THREADS, "").partition(",")[0].strip()  # one number a level of nesting
    return int(value) if value.isdigit() and int(value) > 0 else None


def environment(n: int, workers: int, trials: Iterable[Trial]) -> dict[str, str]:
    """Return the environment of the n-th of several workers: its GPU, and its share of threads for each library."""
    inherited = dict(os.environ)
    if (count := torch.cuda.device_count()) > 0:
        names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        devices = [name for name in names if name] or [str(i) for i in range(count)]
        # CUDA ignores all names from the first unknown one on.
        inherited["CUDA_VISIBLE_DEVICES"] = devices[:count][n % min(count, len(devices))]
        # By default each worker would start as many compilers as there are cores.
        inherited.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores() // workers)))
    own_threads = threads_asked_for()
    if own_threads is None:
        own_threads = 1 if all(small(trial.recipe) for trial in trials) else max(1, cores() // workers)
    for name in _LIBRARIES:
        inherited.setdefault(name, str(own_threads))
    # Tokenizers have little to do while a model trains, and their pool of threads does not survive a fork.
    inherited.setdefault("TOKENIZERS_PARALLELISM", "false")
    return inherited


def registered_here() -> list[str]:
    """Return the resets and layouts that a program registered in this process, by name."""
    resets = [name for name, m in RESETS.items() if not getattr(m.function, "__module__", "").startswith("fire_llm.")]
    return [*resets, *(f"{block}.{child}" for block, child in REGISTERED)]
