"""End a run by a signal: at a step's end where one is near, at once elsewhere, and at once at the second signal.

Ctrl-C (SIGINT) and a scheduler's SIGTERM mean the same here.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fire_llm.core.ranks import first_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM)

SAME_SECONDS = 2.0
"""Signals this near to the first are the same one: schedulers signal every process, and launchers pass it on."""


class Stopped(KeyboardInterrupt):
    """Report that a signal ended the work.

    Args:
        number: Of the signal.
        said: What was done first; None where there was nothing to save.
    """

    def __init__(self, number: int, said: str | None = None) -> None:
        super().__init__(said or signal.Signals(number).name)
        self.number, self.said = number, said

    @property
    def code(self) -> int:
        """Return the exit code: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


@dataclass
class _Asked:
    """What was asked of this process, for its handlers to write and its steps to read."""

    process: int | None = None
    number: int | None = None
    since: float = 0.0
    near_a_step: bool = False
    before: dict[int, Any] = field(default_factory=dict)


_asked = _Asked()


@contextmanager
def signals_handled() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `Stopped` while the block runs: at once, or where `asked` is looked at.

    One of several ranks does so only while a step is near: elsewhere it may be waiting for another rank in a call that
    no handler interrupts, and its launcher must be able to end it. Does nothing outside of the main thread, and leaves
    alone a signal that this process was started to ignore.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread() or handled():
        yield
        return
    _asked = _Asked(os.getpid())
    _asked.before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) != signal.SIG_IGN}
    _install("RANK" not in os.environ)
    try:
        yield
    finally:
        _install(False)
        _asked = _Asked()


def _install(ours: bool) -> None:
    for number, before in _asked.before.items():
        signal.signal(number, _handle if ours else before)


def handled() -> bool:
    """Return whether signals are being waited for."""
    return _asked.process == os.getpid()


def asked() -> int:
    """Return the signal that asked this process to stop, 0 for none."""
    return _asked.number or 0


def set_step_near(near: bool) -> None:
    """Set whether a step's end is near, where `asked` is looked at; elsewhere a signal ends the work at once."""
    if not handled() or threading.current_thread() is not threading.main_thread():
        return
    _asked.near_a_step = near
    if "RANK" in os.environ:
        _install(near)


def _handle(number: int, frame: Any) -> None:
    if not handled():  # a child that was forked off: not one to save anything
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    now = time.monotonic()
    if _asked.number is None:
        _asked.number, _asked.since = number, now
        if not _asked.near_a_step:
            raise Stopped(number)
        if first_rank():
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: the step is completed and saved first; a second one ends at once\n".encode())
    elif now - _asked.since > SAME_SECONDS:
        os.write(2, b"\nended at once, without saving; what was saved before stays\n")
        os._exit(128 + number)
