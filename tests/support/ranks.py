"""Run a function on several gloo ranks, each a process of its own, and return what every rank returned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import stat
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "hypothesis", "pytest", "torch.distributed.fsdp", "transformers.models.gpt2.modeling_gpt2",
        "fire_llm.cli.apply", "fire_llm.cli.run", "fire_llm.cli.sweep", "fire_llm.checkpoint.rewrite",
        "fire_llm.experiment.run", "rich.progress", "rich.table", "transformers.trainer",
    ]
)  # fmt: skip
"""Starts processes that find everything heavy imported."""


class _Process(ForkServerProcess):
    """Leave what is imported out of searches for cycles, as `conftest.py` does."""

    def run(self) -> None:
        gc.freeze()
        super().run()


PROCESSES.Process = _Process


def fork_the_server() -> None:
    """Fork the process that starts all others from this one, which has imported every test, before any has run."""
    import torch

    # Elsewhere it is a new process, which imports the list above; CUDA, once asked for, does not outlast a fork.
    if sys.platform == "linux" and not torch.cuda.is_available():
        resource_tracker.ensure_running()
        with mock.patch("multiprocessing.util.spawnv_passfds", _forked), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: xdist's thread is only reading
            forkserver.ensure_running()


def _forked(_: bytes, command: list[str], passed: list[int]) -> int:
    """Stand for the start of `python -c CODE`, the last of the command, with two open files passed on."""
    if pid := os.fork():
        return pid
    try:
        for name in os.listdir("/proc/self/fd"):  # an end of a pipe that is held here never closes
            with suppress(OSError):
                mode = os.fstat(int(name)).st_mode
                if int(name) > 2 and int(name) not in passed and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                    os.close(int(name))
        forkserver._forkserver.__init__()  # whose lock is held
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)  # as in a new process
        gc.freeze()
        exec(command[-1])
    finally:
        os._exit(0)


class Program:
    """Stand for `subprocess.Popen` of a Python program that logs: in a process that finds everything imported."""

    context: Any = PROCESSES
    """Starts it; in a program that is one itself, multiprocessing's "fork"."""

    def __init__(self, command: list[str], *, stdin: int, stdout: Any, stderr: Any, env: dict[str, str]) -> None:
        theirs, self.stdin = self.context.Pipe(duplex=False)
        self._process = self.context.Process(target=_program, args=(command[2:], dict(env), theirs, stdout.name))
        self._process.start()
        theirs.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _program(words: list[str], environment: dict[str, str], stdin: Connection, log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(stdin.fileno(), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code, *arguments = words
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


class Raised(str):
    """Hold what a rank raised, as `TypeName: message`."""


def run_ranks(world: int, function: Callable[..., Any], folder: Path, *args: Any, seconds: float = 120) -> list[Any]:
    """Call `function(rank, world, *args)` on `world` ranks.

    Returns:
        What each returned, `Raised` where it raised, or None where it died.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [folder / f"{function.__name__}-{world}-{rank}.pkl" for rank in range(world)]
    processes = [
        PROCESSES.Process(target=_rank, args=(rank, world, store.port, files[rank], function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} of {world} ranks still ran after {seconds} s"
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _rank(rank: int, world: int, port: int, file: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        result = function(rank, world, *args)
    except Exception as error:
        traceback.print_exc()
        result = Raised(f"{type(error).__name__}: {error}")
    file.write_bytes(pickle.dumps(result))
    if not isinstance(result, Raised):
        dist.destroy_process_group()
