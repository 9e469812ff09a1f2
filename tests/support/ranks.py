"""Run a function on several gloo ranks, each a process of its own, and return what every rank returned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

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


class Program:
    """Stand for `subprocess.Popen` of a Python program that logs: in a process that finds everything imported."""

    def __init__(self, command: list[str], *, stdin: int, stdout: Any, stderr: Any, env: dict[str, str]) -> None:
        theirs, self.stdin = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(target=_program, args=(command[2:], dict(env), theirs, stdout.name))
        self._process.start()
        theirs.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)


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
