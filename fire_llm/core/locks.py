"""Locks on files: held alone or shared, by this process or another machine's, and free again when their holder dies."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fire_llm.core.atomic import writing
from fire_llm.core.errors import UserError


@contextmanager
def held(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold a lock while the block runs, and yield whether it was had.

    Args:
        path: The lock's file, made where there is none. It is never deleted: who waits has it open already.
        shared: Others may share it; alone otherwise.
        wait: Wait for it, rather than yield False.

    Raises:
        UserError: Where the file cannot be written, or the file system has no locks.
    """
    import fcntl

    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        had = True
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"'{path}' cannot be locked ({error.strerror}): choose a folder on a file system with locks"
                ) from error
            had = False
        yield had
    finally:
        os.close(descriptor)  # which frees the lock


def lock_of(folder: Path, name: str) -> Path:
    """Return the file of a lock on something that a run's folder holds."""
    return folder / ".locks" / f"{name}.lock"
