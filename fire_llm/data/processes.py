"""Tokenise a corpus in parts, by several processes and machines that know each other only by locks.

    CACHE/.NAME.parts/manifest.json             how the corpus is cut: the same for all processes
    CACHE/.NAME.parts/part-00007/               a finished part, a token file of its own
    CACHE/.NAME.parts/.part-00007.lock          held by the process that makes the part

A part appears whole. A process that finds no free part waits for the parts of the others, and makes again the part of
a process that died.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fire_llm.core.atomic import partial_of, read_json, remove, renamed, write_json, writing
from fire_llm.core.errors import UserError
from fire_llm.core.locks import held
from fire_llm.core.signals import end_with
from fire_llm.data.cache import refuse_changed
from fire_llm.data.corpora import CorpusSpec, resolve
from fire_llm.data.encode import Encoder
from fire_llm.data.spec import TextParts, not_blank
from fire_llm.data.writing import META, write_tokens

MANIFEST = "manifest.json"
_PROGRAM = (
    "import sys, os; sys.path[:] = sys.argv.pop(1).split(os.pathsep); "
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from fire_llm.data.processes import main; raise SystemExit(main())"
)
"""It finds modules where its parent does, not in the current folder, and leaves Ctrl-C to its parent."""


@dataclass(frozen=True)
class Job:
    """A split of a corpus that is tokenised in parts.

    Attributes:
        folder: folder of the parts.
        final: the token file that they become; if it exists, nothing is left to do.
        parts: how the corpus is cut and read.
        split: "train" or "validation".
        plan: the parts, as `parts.read` takes them.
        common: what meta.json says beside sizes and hashes.
        states: the state (`file_state`) that each file had when its text was compared with the fingerprint.
    """

    folder: Path
    final: Path
    parts: TextParts
    split: str
    plan: Sequence[Any]
    common: Mapping[str, Any]
    states: Mapping[Path, str]

    @property
    def places(self) -> list[Path]:
        """Return the folders of the parts, in order."""
        return [self.folder / f"part-{number:05d}" for number in range(len(self.plan))]

    @classmethod
    def made_in(cls, folder: Path) -> list[Path]:
        """Return the folders of all parts that a corpus was cut into.

        Raises:
            UserError: a part is missing.
        """
        advice = "give the command again, which makes what is missing"
        number = len(read_json(folder / MANIFEST, advice)["parts"])
        places = [folder / f"part-{n:05d}" for n in range(number)]
        for place in places:
            if not place.exists():
                raise UserError(f"'{place}' is gone: {advice}")
        return places

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Describe how the corpus is cut, as plain data."""
        parts = [self.parts.cut(part) for part in self.plan]
        return dict(json.loads(json.dumps({"split": self.split, "parts": parts, **self.common})))

    def settled(self) -> bool:
        """Return whether the manifest on disk is that of this job."""
        path = self.folder / MANIFEST
        return path.exists() and read_json(path, f"delete '{self.folder}'") == self.manifest

    def settle(self) -> None:
        """Write the manifest; delete parts that were cut in another way."""
        with held(self.folder / ".lock", wait=True):
            if not self.settled():
                for place in self.folder.glob("part-*"):
                    remove(place)
                write_json(self.folder / MANIFEST, self.manifest)


def tokenize_parts(job: Job, encoder: Encoder, processes: int, advance: Callable[[int, int], object]) -> None:
    """Make all parts that are missing.

    Args:
        job: the split and its parts.
        encoder: encoder of the tokenizer.
        processes: most processes to start, each for one core; 1 works in this process, on all cores.
        advance: called with the bytes and tokens of finished work, first of the parts that exist already.

    Raises:
        UserError: any fault of the corpus.
        RuntimeError: a process was killed.
    """
    job.settle()
    done = [place for place in job.places if place.exists()]
    for place in done:
        meta = read_json(place / META, f"delete '{place}'")
        advance(int(meta["n_bytes"]), int(meta["n_tokens"]))
    processes = min(processes, len(job.plan) - len(done))
    if processes < 2 or not encoder.is_fast:
        work(job, encoder, advance)
        return
    instructions = {
        "folder": job.folder, "final": job.final, "spec": job.parts.settings().model_dump(), "split": job.split,
        "plan": job.plan, "common": job.common, "states": {str(path): state for path, state in job.states.items()},
        "encoder": encoder.state(),
    }  # fmt: skip
    line = json.dumps(instructions, default=str).encode() + b"\n"
    inherited = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PROGRAM, os.pathsep.join(sys.path)]
    started: list[subprocess.Popen[bytes]] = []
    pool = ThreadPoolExecutor(processes)
    lock = threading.Lock()

    def advance_alone(n_bytes: int, n_tokens: int) -> None:
        with lock:
            advance(n_bytes, n_tokens)

    try:
        for _ in range(processes):
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=inherited))
        for ended in as_completed([pool.submit(_supervise, process, line, advance_alone) for process in started]):
            ended.result()
    finally:
        for process in started:
            process.terminate()
        pool.shutdown()
        for process in started:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # the process ended before it had read its line
                        pipe.close()


def work(job: Job, encoder: Encoder, advance: Callable[[int, int], object]) -> None:
    """Make the parts that no other process is making, one after another; then wait for the rest."""

    def is_made(place: Path) -> bool:
        return place.exists() or job.final.exists()  # in this order: the parts are deleted once the whole exists

    for wait in (False, True):
        for part, place in zip(job.plan, job.places, strict=True):
            if is_made(place):
                continue
            with held(job.folder / f".{place.name}.lock", wait=wait) as had:
                if had and not is_made(place):
                    _make(job, part, place, encoder, advance)


def _make(job: Job, part: Any, place: Path, encoder: Encoder, advance: Callable[[int, int], object]) -> None:
    """Make a part, if its files are unchanged and the corpus is still cut as in this job."""
    corpus = f"corpus '{job.common['corpus']}'"
    with renamed(partial_of(place), place) as partial:
        write_tokens(partial, not_blank(job.parts.read(job.split, part)), encoder, job.common, advance)
        refuse_changed(corpus, {path: job.states[path] for path in job.parts.files(part)})
        if not job.settled():
            raise UserError(
                f"another command cuts {corpus} in another way, below '{job.folder}': it is of another version or "
                "revision. Wait until it is done"
            )


def _supervise(process: subprocess.Popen[bytes], line: bytes, advance: Callable[[int, int], object]) -> None:
    """Tell a process what to do, and take what it reports until it ends."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):  # the process has ended: its exit code is reported below
        process.stdin.write(line)
        process.stdin.flush()
    for report in map(json.loads, process.stdout):
        if isinstance(report, str):
            raise UserError(report)
        advance(*report)
    if code := process.wait():
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = ", most often because the machine ran out of memory" if code == -signal.SIGKILL else ""
        raise RuntimeError(f"a process that tokenised {how}{hint}; the same command goes on from the finished parts")


def main() -> int:
    """Make parts of the job that the parent process describes on standard input; end when the parent does."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return 1  # the parent has ended
    end_with(sys.stdin.fileno())
    pipe, sys.stdout = sys.stdout, sys.stderr  # the parent reads no more than what `say` writes

    def say(what: Any) -> None:
        pipe.write(json.dumps(what) + "\n")
        pipe.flush()

    try:
        given = json.loads(line)
        parts = resolve(given["common"]["corpus"], CorpusSpec(**given["spec"])).parts
        assert parts is not None
        states = {Path(path): state for path, state in given["states"].items()}
        folders = (Path(given["folder"]), Path(given["final"]))
        job = Job(*folders, parts, given["split"], given["plan"], given["common"], states)
        with writing(job.folder):
            work(job, Encoder.restored(given["encoder"]), lambda *sizes: say(sizes))
    except UserError as error:
        say(str(error))
        return 2
    return 0
