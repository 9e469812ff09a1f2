"""Locks: had or not, handed on when their file is deleted, and a file system without any."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

import pytest

from fire_llm import UserError
from fire_llm.core.locks import held


def test_one_holds_alone_and_many_share(tmp_path):
    lock = tmp_path / "folder" / "a.lock"
    with held(lock) as had, held(lock) as other, held(lock, shared=True) as sharing:
        assert (had, other, sharing) == (True, False, False)
    with held(lock, shared=True) as had, held(lock, shared=True) as other, held(lock) as alone:
        assert (had, other, alone) == (True, True, False)


def test_who_waited_for_a_passing_lock_holds_the_file_that_is_there(tmp_path):
    """The file that was waited for is deleted by its holder: a lock on it would keep nobody out."""
    lock, waiting, seen = tmp_path / "a.lock", threading.Event(), []

    def wait() -> None:
        waiting.set()
        with held(lock, wait=True, passing=True) as had, held(lock) as another:
            seen.append((had, another, lock.exists()))

    thread = threading.Thread(target=wait)
    with held(lock, passing=True):
        before = os.stat(lock).st_ino
        thread.start()
        waiting.wait()
        assert os.stat(lock).st_ino == before and not seen
    thread.join(60)
    assert seen == [(True, False, True)] and not lock.exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def flock(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"a\.lock' cannot be locked \(No locks available\): choose a folder"):
        held(tmp_path / "a.lock").__enter__()
