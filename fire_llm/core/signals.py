"""End a run by a signal: at a step's end where one is near, at once elsewhere, and at once at the second signal.

Ctrl-C (SIGINT) and a scheduler's SIGTERM mean the same here.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    dropped: bool = False
    """Whether `Stopped` was raised where nothing can raise out of, and is to be raised again."""
    near_a_step: bool = False
    before: dict[int, Any] = field(default_factory=dict)
    hook: Any = None


_asked = _Asked()


def end_with(pipe: int) -> None:
    """Signal this process, SIGTERM, when the process that holds a pipe's other end is gone, killed or not.

    Args:
        pipe: File descriptor of the end to read; nothing is ever written.
    """

    def watch() -> None:
        with suppress(OSError):
            while os.read(pipe, 1):
                pass
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


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
    _asked.hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    _install("RANK" not in os.environ)
    try:
        yield
    finally:
        _install(False)
        sys.unraisablehook = _asked.hook
        _asked = _Asked()


def _unraisable(dropped: sys.UnraisableHookArgs) -> None:
    """Raise `Stopped` again where Python drops it: in a finaliser, or in the callback of a weak reference."""
    if isinstance(dropped.exc_value, Stopped) and handled():
        _asked.dropped = True
        _thread.start_new_thread(_again, (dropped.exc_value.number,))  # `threading`'s own locks may be held here
    else:
        (_asked.hook or sys.__unraisablehook__)(dropped)


def _again(number: int) -> None:
    """Signal the main thread once it has left what dropped the exception; no wait of its own outlasts a signal."""
    time.sleep(0.01)
    if handled():
        signal.pthread_kill(threading.main_thread().ident or 0, number)


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
    before, _asked.near_a_step = _asked.near_a_step, near
    if "RANK" in os.environ:
        _install(near)
    elif near and not before and _asked.number is not None:
        raise Stopped(_asked.number)  # it came before, and something caught it


def _handle(number: int, frame: Any) -> None:
    if not handled():  # a child that was forked off: not one to save anything
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    now = time.monotonic()
    if _asked.number is None or _asked.dropped:
        _asked.number, _asked.since, _asked.dropped = number, now, False
        if not _asked.near_a_step:
            raise Stopped(number)
        if first_rank():
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: the step is completed and saved first; a second one ends at once\n".encode())
    elif now - _asked.since > SAME_SECONDS:
        os.write(2, b"\nended at once, without saving; what was saved before stays\n")
        os._exit(128 + number)
