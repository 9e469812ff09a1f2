"""Run a tiny recipe in processes of its own, and have one of them send itself a signal at a counted instant."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from fire_llm.training import ContinualArguments
from support.ranks import PROCESSES

KINDS = ("step", "saving", "reset", "tokenising")
WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


@dataclass(frozen=True)
class Instant:
    """Say when a rank sends itself a signal: at the `index`-th event of a kind, counted from 1."""

    kind: str
    index: int
    number: signal.Signals
    rank: int = 0


def beside(patch: pytest.MonkeyPatch) -> None:
    """Have runs write checkpoints beside training from here on, as they do on an accelerator."""
    patch.setattr(
        "fire_llm.experiment.train.ContinualArguments", functools.partial(ContinualArguments, async_save=True)
    )


def run(
    world: int,
    folder: Path,
    path: Path,
    output: Path,
    cache: Path,
    instant: Instant | None = None,
    *more: str,
    **how: Any,
) -> tuple[list[int], str, list[Counter]]:
    """Run a recipe on `world` ranks until all have ended; return as `command` does."""
    argv = ["run", str(path), "--output", str(output), *more]
    return command(argv, folder, output, cache, instant, world=world, **how)


def command(
    argv: list[str],
    folder: Path,
    output: Path,
    cache: Path,
    instant: Instant | None = None,
    *,
    world: int = 1,
    asynchronous: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[int], str, list[Counter]]:
    """Run a command line on `world` ranks, forked from a process that has imported everything, until all have ended.

    Args:
        argv: Behind `fire-llm`.
        folder: For what is said.
        output: What is written below it counts as saving.
        cache: The cache folder; what is written below it counts as tokenising.
        instant: When one of them sends itself a signal.
        world: Ranks.
        asynchronous: Write checkpoints beside training.
        environment: Variables of each rank.

    Returns:
        Exit code of each rank, negative for a signal; what they said; how many events of each kind each came to.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world > 1 else None
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.counts"):
        old.unlink()
    processes = [
        PROCESSES.Process(
            target=_live,
            args=(r, world, store and store.port, folder, argv, cache, output, instant, asynchronous, {**environment}),
        )
        for r in range(world)
    ]
    for process in processes:
        process.start()
    deadline, ended = time.monotonic() + 200, None
    while any(process.is_alive() for process in processes):
        time.sleep(0.01)
        ended = ended or (time.monotonic() if any(process.exitcode for process in processes) else None)
        # As launchers do: what is left of a broken run is asked to end, and made to.
        late = time.monotonic() - (ended or time.monotonic())
        for process in processes if late > 10 or time.monotonic() > deadline else ():
            process.kill() if late > 15 else process.terminate()
    codes = [int(process.exitcode or 0) for process in processes]
    said = "".join((folder / f"{r}.said").read_text(errors="replace") for r in range(world))
    counts = [folder / f"{r}.counts" for r in range(world)]
    return codes, said, [Counter(json.loads(c.read_text())) if c.exists() else Counter() for c in counts]


def _live(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    argv: list[str],
    cache: Path,
    output: Path,
    at: Any,
    asynchronous: bool,
    environment: dict[str, str],
) -> None:
    """Be one rank of a command."""
    os.environ.update(environment)
    with (folder / f"{rank}.said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    os.environ["FIRE_LLM_CACHE"] = str(cache)
    if world > 1:
        import torch.distributed as dist

        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    import fire_llm.cli.run
    import fire_llm.experiment.sweep_report

    fire_llm.cli.run.show_results = lambda *_: None  # the page takes longer than the run
    fire_llm.experiment.sweep_report.show = lambda *_: None
    if asynchronous:
        beside(pytest.MonkeyPatch())
    # Which of several ranks comes first to make a folder is chance.
    writes = WRITES if world == 1 else WRITES - {"os.mkdir"}
    counts = _count_events(output, cache, at if at is not None and at.rank == rank else None, writes)
    code = fire_llm.cli.main(argv)
    (folder / f"{rank}.counts").write_text(json.dumps(counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _count_events(output: Path, cache: Path, at: Instant | None, writing: set[str]) -> Counter:
    """Count what this process does from here on, and send it the signal when it comes to the instant."""
    from fire_llm.data.encode import Encoder
    from fire_llm.resets.execute import ResetExecutor
    from fire_llm.training import ContinualTrainer

    counts: Counter = Counter()

    def happened(kind: str) -> None:
        counts[kind] += 1
        if at is not None and (kind, counts[kind]) == (at.kind, at.index):
            os.kill(os.getpid(), at.number)

    def audit(event: str, args: tuple) -> None:
        if event in writing and args and isinstance(args[0], str | os.PathLike):
            writes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            path = os.fspath(args[0])
            if writes and isinstance(path, str):
                for kind, place in (("saving", output), ("tokenising", cache)):
                    if path.startswith(str(place)):
                        happened(kind)

    sys.addaudithook(audit)
    for owner, name, kind in (
        (ContinualTrainer, "training_step", "step"),
        (ResetExecutor, "_reset", "reset"),
        (Encoder, "__call__", "tokenising"),
    ):
        _before(owner, name, lambda kind=kind: happened(kind))
    _before(os, "fsync", lambda: happened("saving"))
    _before(torch, "save", lambda: happened("saving"))
    return counts


def _before(owner: Any, name: str, tell: Any) -> None:
    wrapped = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        tell()
        return wrapped(*args, **kwargs)

    setattr(owner, name, call)


def outcome(output: Path) -> dict[str, Any]:
    """Return what must be the same whatever happened on the way: weights by their hashes, curves, batches."""
    results = json.loads((output / "results.json").read_text())
    stages = [*results["phases"], *(one for arm in results["arms"].values() for one in arm["runs"])]
    found = {}
    for stage in stages:
        timeless = {k: v for k, v in stage.items() if k not in ("seconds", "reset", "throughput")}
        weights = (output / stage["checkpoint"] / "model.safetensors").read_bytes()
        found[stage["checkpoint"]] = {**timeless, "weights": sha256(weights).hexdigest()}
    return found


def draw(seed: int, counts: list[Counter], kind: str, number: signal.Signals) -> Instant:
    """Draw an instant from those that an uninterrupted run came to."""
    chance = random.Random(f"{seed}/{kind}/{number}/{len(counts)}")
    rank = chance.choice([r for r, c in enumerate(counts) if c[kind]])
    return Instant(kind, chance.randint(1, counts[rank][kind]), number, rank)
