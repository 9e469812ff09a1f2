"""Build the offline corpora from what every installation has: Python's own documentation, libraries and source."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fire_llm.core.errors import UserError
from fire_llm.core.hashing import digest
from fire_llm.core.launch import cores
from fire_llm.data import extract

MIN_CHARACTERS = 80
"""Characters below which a document is dropped: one-line stubs that say nothing."""
MAX_CHARACTERS = 4_000
"""Characters beyond which a file's blocks go on in a new document: no long module weighs on one split alone."""
MAX_WORKERS = 8
"""Processes that extract at once; each needs about 100 MB."""

_IN_PROCESS = threading.Lock()
_FILES_A_WORKER = 32  # fewer are not worth a process
# Tests and bundled copies of other projects; tables of characters; packages that were installed later.
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "idlelib", "lib2to3", "turtledemo", "_bundled", "_vendor"}
_SKIPPED_FOLDERS |= {"encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Builtin:
    """One offline corpus.

    Attributes:
        kind: what is taken from a file, as in `extract.extract_blocks`.
        packages: installed packages that are read; none: the standard library.
        topics: whether the prose of the language reference (`pydoc_data.topics`) comes first.
        share: part of the files that is read, chosen by a hash of their path: bounds the seconds, not the variety.
    """

    kind: str
    packages: tuple[str, ...] = ()
    topics: bool = False
    share: float = 1.0


def fingerprint(builtin: Builtin) -> str:
    """Return what the text depends on: the versions of Python, of the packages and of the extraction."""
    versions = [f"{package}={_version(package)}" for package in builtin.packages]
    return f"builtin {builtin} python={platform.python_version()} {' '.join(versions)} v{extract.EXTRACTION_VERSION}"


@functools.lru_cache(maxsize=4)
def documents(builtin: Builtin) -> tuple[str, ...]:
    """Return the documents of an offline corpus, in a fixed order: a topic of the reference or part of a file each.

    A block (docstring, comment or source) that was seen before is dropped, as are documents of fewer than
    `MIN_CHARACTERS` characters. The result is kept (a few MB), for both splits and the tokenizer read it.

    Raises:
        UserError: where the packages or the standard library's sources are not installed.
    """
    seen: set[str] = set()
    found: list[str] = []
    for blocks in [*_topics(builtin), *_extract(_files(builtin), builtin.kind)]:
        stretches = [""]
        for block in blocks:
            if block not in seen:
                seen.add(block)
                if stretches[-1] and len(stretches[-1]) + len(block) > MAX_CHARACTERS:
                    stretches.append("")
                stretches[-1] += block + "\n\n"
        found += [text.strip() for text in stretches if len(text.strip()) >= MIN_CHARACTERS]
    return tuple(found)


def _topics(builtin: Builtin) -> list[list[str]]:
    """Return the topics of the language reference, by name."""
    if not builtin.topics:
        return []
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            f"this Python ({sys.executable}) comes without pydoc_data, which 'python-docs' is made of. "
            "Install the whole standard library, or name a local file as the corpus."
        ) from error
    return [[topics[name]] for name in sorted(topics)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"an offline corpus needs the package '{package}'. Install it: pip install {package}"
        ) from error


def _files(builtin: Builtin) -> list[str]:
    """Return the Python files a corpus is made of, in an order and a choice that the machine has no part in."""
    if builtin.packages:
        roots = []
        for package in builtin.packages:
            _version(package)
            spec = importlib.util.find_spec(package)
            roots += [(package, Path(folder)) for folder in (spec and spec.submodule_search_locations) or ()][:1]
    else:
        roots = [("stdlib", Path(sysconfig.get_path("stdlib")))]
    chosen: list[tuple[str, str]] = []
    for label, root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
            for name in names:
                # _sysconfigdata*.py records where this very Python was built: text that differs between machines.
                if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                    path = Path(folder, name)
                    key = f"{label}/{path.relative_to(root).as_posix()}"
                    draw = int(digest(key.encode(errors="replace"), 4), 16)
                    if draw < builtin.share * 2**32:
                        chosen.append((key, str(path)))
    if not chosen:
        raise UserError(
            f"no Python source files were found for the offline corpus in {', '.join(str(root) for _, root in roots)}. "
            "Name a local file as the corpus instead."
        )
    return [path for _, path in sorted(chosen)]


def _extract(paths: list[str], kind: str) -> list[list[str]]:
    """Return the blocks of every file, extracted by worker processes that share no memory with this one.

    A fork of a process that runs torch's threads may deadlock, and multiprocessing's other ways need a main guard in
    the user's script; plain subprocesses need neither.
    """
    workers = max(1, min(cores(), MAX_WORKERS, len(paths) // _FILES_A_WORKER))
    blocks: list[list[str]] = [[] for _ in paths]
    with ThreadPoolExecutor(workers) as pool:
        # Every n-th file to each of n workers: neighbours are of one kind, so that the shares take equally long.
        shares = [paths[start::workers] for start in range(workers)]
        for start, result in enumerate(pool.map(functools.partial(_work, kind=kind), shares)):
            blocks[start::workers] = result
    return blocks


def _work(paths: list[str], kind: str) -> list[list[str]]:
    """Extract in a subprocess, or here where no interpreter can be started (an embedded Python)."""
    command = [sys.executable, "-I", "-X", "utf8", "-W", "ignore", extract.__file__, kind]
    try:
        done = subprocess.run(
            command, input="\n".join(paths).encode("utf-8", "surrogateescape"), capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        # One thread at a time: CPython 3.11's parser keeps its depth per interpreter and fails on two at once.
        with _IN_PROCESS:
            return [extract.extract_blocks(path, kind) for path in paths]
    blocks: list[list[str]] = json.loads(done.stdout)
    return blocks
