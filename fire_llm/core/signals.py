"""End a run by a signal: at the end of a step during training, at once elsewhere, and at once at the second signal.

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
"""Signals within this time count as one: schedulers signal every process, and launchers pass signals on."""


class Stopped(KeyboardInterrupt):
    """Report that a signal ended the work.

    Args:
        number: The signal.
        said: What was saved, for the message; None for nothing.
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
    """The signal that this process got: its handler writes it, and its steps read it."""

    process: int | None = None
    """The process that handles signals; a forked child does not."""
    number: int | None = None
    """The signal; None for none so far."""
    since: float = 0.0
    """When it came, by the monotonic clock."""
    dropped: bool = False
    """Whether Python dropped the `Stopped` that was raised, so that it has to be raised again."""
    near_a_step: bool = False
    before: dict[int, Any] = field(default_factory=dict)
    """The handlers to be put back, by signal."""
    hook: Any = None
    """The `sys.unraisablehook` to be put back."""


_asked = _Asked()


def end_with(pipe: int) -> None:
    """Send this process SIGTERM when the process that holds the other end of a pipe is gone, for whatever reason.

    Args:
        pipe: File descriptor of the end to read; nothing is ever written to the other one.
    """

    def watch() -> None:
        with suppress(OSError):
            while os.read(pipe, 1):
                pass
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def signals_handled() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM in the block into `Stopped`: at once, or where a step checks `asked`.

    One of several ranks handles signals only while a step is near. Elsewhere it may wait for another rank in a call
    that no handler interrupts, and its launcher must be able to end it. Nothing happens outside of the main thread, nor
    to a signal that this process was started to ignore.
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
    """Raise `Stopped` again where Python dropped it: in a finaliser, or in the callback of a weak reference."""
    if isinstance(dropped.exc_value, Stopped) and handled():
        _asked.dropped = True
        _thread.start_new_thread(_signal_again, (dropped.exc_value.number,))  # locks of `threading` may be held here
    else:
        (_asked.hook or sys.__unraisablehook__)(dropped)


def _signal_again(number: int) -> None:
    """Signal the main thread once it has left the finaliser; the signal interrupts whatever it waits for then."""
    time.sleep(0.01)
    if handled():
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _install(ours: bool) -> None:
    for number, before in _asked.before.items():
        signal.signal(number, _handle if ours else before)


def handled() -> bool:
    """Return whether this process turns signals into `Stopped`."""
    return _asked.process == os.getpid()


def asked() -> int:
    """Return the signal that asked this process to stop, 0 for none."""
    return _asked.number or 0


def set_step_near(near: bool) -> None:
    """Set whether a step's end is near, which checks `asked`; elsewhere a signal ends the work at once."""
    if not handled() or threading.current_thread() is not threading.main_thread():
        return
    before, _asked.near_a_step = _asked.near_a_step, near
    if "RANK" in os.environ:
        _install(near)
    elif near and not before and _asked.number is not None:
        raise Stopped(_asked.number)  # it was raised before, and something caught it


def _handle(number: int, frame: Any) -> None:
    if not handled():  # a forked child, which saves nothing
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
