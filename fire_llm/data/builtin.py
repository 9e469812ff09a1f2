"""Build the offline corpora from files that every installation has: Python's documentation, libraries and source."""

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
"""Least characters of a document; shorter ones are one-line stubs."""
MAX_CHARACTERS = 4_000
"""Characters after which a file's next block starts a new document, so that long modules are in both splits."""
MAX_WORKERS = 8
"""Most processes that extract at once; each needs about 100 MB."""

_IN_PROCESS = threading.Lock()
_FILES_A_WORKER = 32  # at least: fewer files are not worth a process
# Tests, bundled copies of other projects, tables of characters, and packages that were installed later.
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "idlelib", "lib2to3", "turtledemo", "_bundled", "_vendor"}
_SKIPPED_FOLDERS |= {"encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Builtin:
    """One offline corpus.

    Attributes:
        kind: kind of blocks, as in `extract.extract_blocks`.
        packages: installed packages that are read; the standard library if there are none.
        topics: whether the language reference (`pydoc_data.topics`) comes first.
        share: share of the files that is read, chosen by a hash of their path: it saves time and keeps the variety.
    """

    kind: str
    packages: tuple[str, ...] = ()
    topics: bool = False
    share: float = 1.0


def fingerprint(builtin: Builtin) -> str:
    """Return text that names all that the corpus depends on: Python, the packages, and the extraction's version."""
    versions = [f"{package}={_version(package)}" for package in builtin.packages]
    return f"builtin {builtin} python={platform.python_version()} {' '.join(versions)} v{extract.EXTRACTION_VERSION}"


@functools.lru_cache(maxsize=4)
def documents(builtin: Builtin) -> tuple[str, ...]:
    """Return the documents of an offline corpus, in a fixed order; each is a topic of the reference or part of a file.

    Blocks (docstrings, comments or source) that occurred before are dropped, and documents of fewer than
    `MIN_CHARACTERS` characters. The result (a few MB) is kept, because both splits and the tokenizer read it.

    Raises:
        UserError: the packages or the standard library's sources are not installed.
    """
    seen: set[str] = set()
    documents: list[str] = []
    for blocks in [*_topics(builtin), *_extract(_files(builtin), builtin.kind)]:
        texts = [""]
        for block in blocks:
            if block not in seen:
                seen.add(block)
                if texts[-1] and len(texts[-1]) + len(block) > MAX_CHARACTERS:
                    texts.append("")
                texts[-1] += block + "\n\n"
        documents += [text.strip() for text in texts if len(text.strip()) >= MIN_CHARACTERS]
    return tuple(documents)


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
    """Return the Python files of a corpus; choice and order are the same on every machine."""
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
                # _sysconfigdata*.py differs between machines: it records where this Python was built.
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

    A fork of a process with torch's threads may deadlock, and multiprocessing's other start methods need a main guard
    in the user's script. Plain subprocesses have neither problem.
    """
    workers = max(1, min(cores(), MAX_WORKERS, len(paths) // _FILES_A_WORKER))
    blocks: list[list[str]] = [[] for _ in paths]
    with ThreadPoolExecutor(workers) as pool:
        # Worker k of n gets every n-th file: neighbours are alike, so that all workers take about equally long.
        shares = [paths[start::workers] for start in range(workers)]
        for start, result in enumerate(pool.map(functools.partial(_work, kind=kind), shares)):
            blocks[start::workers] = result
    return blocks


def _work(paths: list[str], kind: str) -> list[list[str]]:
    """Extract in a subprocess, or in this process if no interpreter can be started (an embedded Python)."""
    command = [sys.executable, "-I", "-X", "utf8", "-W", "ignore", extract.__file__, kind]
    try:
        lines = "\n".join(paths).encode("utf-8", "surrogateescape")
        done = subprocess.run(command, input=lines, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        # One thread at a time: CPython 3.11's parser keeps its depth per interpreter, so that two threads fail.
        with _IN_PROCESS:
            return [extract.extract_blocks(path, kind) for path in paths]
    blocks: list[list[str]] = json.loads(done.stdout)
    return blocks
