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
"""Seconds that the times of files are exact to, with some to spare: the system's clock ticks every 1 to 10 ms."""
_DIGITS, _CHECK = 64, 8
_untaken: dict[str, str] = {}  # what the cache folder did not take, for as long as this process lives


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the folder of what is computed once: `cache`, else $FIRE_LLM_CACHE, else ~/.cache/fire_llm."""
    return Path(os.path.expanduser(cache or os.environ.get(CACHE_VARIABLE) or "~/.cache/fire_llm"))


@contextmanager
def reporting(what: str, path: Path) -> Iterator[None]:
    """Turn what the file system and the decompressors raise into a message that names the file.

    Args:
        what: The file belongs to: `corpus 'a'`.
        path: The file.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{what}: cannot read {path}: {error.strerror or error}. "
            "Check its permissions and the disk; fetch it again if it is damaged or truncated."
        ) from error


def content_hashes(what: str, paths: Sequence[Path]) -> list[str]:
    """Return the hash of what each file holds (`hash_file`), wherever it lies and however old it is.

    A file is read once, at hundreds of MB/s: its hash is remembered in the cache folder, under its `file_state`. Where
    that folder cannot be written to, each process reads it once.

    Args:
        what: the files belong to: `corpus 'a'`, for messages and the progress bar.
        paths: files that are there.

    Raises:
        UserError: for a file that cannot be read, or that changes while it is.
    """
    folder = cache_folder() / "hashes"
    states: dict[Path, str] = {}
    for path in paths:
        with reporting(what, path):
            states[path] = file_state(path)
    found = {path: known for path, state in states.items() if (known := _remembered(folder, state))}
    unread = [path for path in paths if path not in found]
    size = sum(path.stat().st_size for path in unread)
    with progress_bar(f"hashing {what}", size, "B", shown=first_rank()) as bar:
        for path in unread:
            with reporting(what, path):
                _outlive_tick(path)
                found[path], state = hash_file(path, advance=bar.update), states[path]
                refuse_changed(what, {path: state})
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / state).write_text(found[path] + _check(state, found[path]))
            except OSError:
                _untaken[state] = found[path]
    return [found[path] for path in paths]


def file_state(path: Path) -> str:
    """Return what changes whenever a file is written to, without reading it: path, inode, size and times, hashed.

    The time of the last change of its inode is among them, which no program can set back.
    """
    stat = path.stat()
    return digest(f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}", 16)


def refuse_changed(what: str, states: Mapping[Path, str]) -> None:
    """Compare files with the states they were in before they were read.

    Raises:
        UserError: for one that was written to since.
    """
    for path, state in states.items():
        if not path.exists() or file_state(path) != state:
            raise UserError(
                f"{what}: {path} was changed while it was read. Wait until it is whole, then give the command again."
            )


def _outlive_tick(path: Path) -> None:
    """Wait until another write to a file would give it another time."""
    age = time.time() - path.stat().st_ctime
    if 0 <= age < TICK:
        time.sleep(TICK - age)


def _remembered(folder: Path, state: str) -> str | None:
    """Return a hash that was written down whole, or that could not be."""
    with suppress(OSError, UnicodeDecodeError):
        text = (folder / state).read_text()
        if text[_DIGITS:] == _check(state, text[:_DIGITS]):
            return text[:_DIGITS]
    return _untaken.get(state)


def _check(state: str, found: str) -> str:
    """Return digits that show a note to be what was written."""
    return digest(state + found, _CHECK)
