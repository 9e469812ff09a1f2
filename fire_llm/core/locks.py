"""Locks on files: exclusive or shared, between processes of all machines, and free again when their holder dies."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fire_llm.core.atomic import writing
from fire_llm.core.errors import UserError


@contextmanager
def held(path: Path, *, shared: bool = False, wait: bool = False, passing: bool = False) -> Iterator[bool]:
    """Hold a lock while the block runs, and yield whether it was free.

    Args:
        path: The lock's file, made where there is none. It is not deleted, because a waiting process has it open.
        shared: Others may share it; exclusive otherwise.
        wait: Wait for it, rather than yield False.
        passing: Delete the file at the end. Such a lock holds no file that another holder has deleted, and no link.

    Raises:
        UserError: Where the file cannot be written, or the file system has no locks.
    """
    import fcntl

    locked = None
    while locked is None:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_NOFOLLOW if passing else 0), 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            locked = True if not passing or _names(path, descriptor) else None
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise UserError(
                    f"'{path}' cannot be locked ({error.strerror}): choose a folder on a file system with locks"
                ) from error
            locked = False
        if locked is None:
            os.close(descriptor)
    try:
        yield locked
    finally:
        if passing and locked:
            path.unlink(missing_ok=True)
        os.close(descriptor)  # which frees the lock


def _names(path: Path, descriptor: int) -> bool:
    """Return whether a path still names an open file."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def lock_of(folder: Path, name: str) -> Path:
    """Return the file of a lock on something that a run's folder holds."""
    return folder / ".locks" / f"{name}.lock"
