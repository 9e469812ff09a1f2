"""Make a folder under a temporary name and rename it once; a lock keeps two processes from making the same folder.

    .DST.fire_llm.lock ─ held, names ─▶ .DST.0a1b2c3d.partial ─ flushed, renamed ─▶ DST

The lock's file names the temporary folder. So the leftover of a killed process is known exactly, without a guess.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fire_llm.core.atomic import STAGING_SUFFIX, remove, remove_empty, renamed, writing
from fire_llm.core.errors import UserError
from fire_llm.core.locks import held


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `destination` in one rename when the block ends without an error.

    A process killed at any instant leaves either nothing under that name or the whole folder. The next process deletes
    its temporary folder.

    Raises:
        UserError: Where the destination exists or another process is making it, or the disk is full or read-only.
    """
    absent = [p for p in destination.parents if not p.exists()]
    with writing(destination.parent):
        try:
            with _claimed(destination) as lock:
                if os.path.lexists(destination):
                    raise UserError(f"'{destination}' exists already: name a new folder, or delete that one")
                staging = staging_of(destination, secrets.token_hex(4))
                lock.write_bytes(os.fsencode(staging.name))
                with renamed(staging, destination) as folder:
                    yield folder
        except BaseException:
            remove_empty(absent)
            raise


def clear_leftovers(destination: Path) -> None:
    """Delete the temporary folder of a process that died while it made a folder; nothing else is touched."""
    if os.path.lexists(_lock(destination)):
        with _claimed(destination):
            pass


def staging_of(destination: Path, mark: str = "0" * 8) -> Path:
    """Return the temporary name of a folder, with 8 hexadecimal digits that no two writers share."""
    return destination.with_name(f".{destination.name}.{mark}{STAGING_SUFFIX}")


def _lock(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.fire_llm.lock")


@contextmanager
def _claimed(destination: Path) -> Iterator[Path]:
    """Hold the lock of a folder to be made, delete the last holder's temporary folder, and yield the lock's file."""
    lock = _lock(destination)
    with held(lock, passing=True) as locked:
        if not locked:
            raise UserError(f"another process is making '{destination}': wait for it to end, or name another folder")
        leftover = os.fsdecode(lock.read_bytes())
        if re.fullmatch(re.escape(staging_of(destination, "*").name).replace(r"\*", "[0-9a-f]{8}"), leftover):
            with suppress(FileNotFoundError):
                remove(destination.with_name(leftover))
        yield lock
