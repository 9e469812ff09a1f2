"""The cache folder, and the hashes of files that are remembered in it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fire_llm.core.errors import UserError
from fire_llm.core.hashing import digest, hash_file
from fire_llm.core.progress import progress_bar
from fire_llm.core.ranks import first_rank

CACHE_VARIABLE = "FIRE_LLM_CACHE"
TICK = 0.02
"""Seconds within which two writes may give a file the same time: the system's clock ticks every 1 to 10 ms."""
_DIGITS = 64
_unwritten: dict[str, str] = {}  # hashes by state that the cache folder did not take; they last as long as this process


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the cache folder: `cache`, else $FIRE_LLM_CACHE, else ~/.cache/fire_llm."""
    return Path(os.path.expanduser(cache or os.environ.get(CACHE_VARIABLE) or "~/.cache/fire_llm"))


@contextmanager
def reporting(what: str, path: Path) -> Iterator[None]:
    """Turn errors of the file system and of decompressors into a message that names the file.

    Args:
        what: Owner of the file, for the message: `corpus 'a'`.
        path: The file.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what}: cannot read {path}: {error.strerror or error}. "
            "Check its permissions and the disk; fetch it again if it is damaged or truncated."
        ) from error


def content_hashes(what: str, paths: Sequence[Path]) -> list[str]:
    """Return the hash of each file's content (`hash_file`), whatever its place and times are.

    A file is read once, at hundreds of MB/s: its hash is remembered in the cache folder under its `file_state`. If that
    folder cannot be written to, each process reads the file once.

    Args:
        what: owner of the files, for messages and the progress bar: `corpus 'a'`.
        paths: existing files.

    Raises:
        UserError: for a file that cannot be read, or that changes while it is read.
    """
    folder = cache_folder() / "hashes"
    states: dict[Path, str] = {}
    for path in paths:
        with reporting(what, path):
            states[path] = file_state(path)
    hashes = {path: known for path, state in states.items() if (known := _remembered(folder, state))}
    unread = [path for path in paths if path not in hashes]
    size = sum(path.stat().st_size for path in unread)
    with progress_bar(f"hashing {what}", size, "B", shown=first_rank()) as bar:
        for path in unread:
            with reporting(what, path):
                _outlive_tick(path)
                hashes[path], state = hash_file(path, advance=bar.update), states[path]
                refuse_changed(what, {path: state})
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / state).write_text(hashes[path] + _check(state, hashes[path]))
            except OSError:
                _unwritten[state] = hashes[path]
    return [hashes[path] for path in paths]


def file_state(path: Path) -> str:
    """Return a hash of a file's path, inode, size and times, which changes whenever the file is written to.

    One of the times is that of the last change of the inode, which no program can set back.
    """
    stat = path.stat()
    return digest(f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}", 16)


def refuse_changed(what: str, states: Mapping[Path, str]) -> None:
    """Raise `UserError` for a file that has been written to since it had its state in `states`."""
    for path, state in states.items():
        if not path.exists() or file_state(path) != state:
            raise UserError(
                f"{what}: {path} was changed while it was read. Wait until it is whole, then give the command again."
            )


def _outlive_tick(path: Path) -> None:
    """Wait until a new write to a file would change its time."""
    age = time.time() - path.stat().st_ctime
    if 0 <= age < TICK:
        time.sleep(TICK - age)


def _remembered(folder: Path, state: str) -> str | None:
    """Return the remembered hash of a file in this state; a damaged note is ignored."""
    with suppress(OSError, UnicodeDecodeError):
        text = (folder / state).read_text()
        if text[_DIGITS:] == _check(state, text[:_DIGITS]):
            return text[:_DIGITS]
    return _unwritten.get(state)


def _check(state: str, content_hash: str) -> str:
    """Return a checksum of a remembered hash, which shows whether the note is damaged."""
    return digest(state + content_hash, 8)
