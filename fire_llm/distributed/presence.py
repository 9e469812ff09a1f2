"""Notice a machine that is gone: no rank there says anything, and a collective would wait for it for hours.

    every rank ─ a count, every few seconds ─▶ store ─▶ first rank: does every count still move?
    every rank ◀─ who is lost ─────────────── store ◀─┘        and that of the first rank, for all others

A connection that breaks is noticed by the backend at once. One over which nothing comes any more is not.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fire_llm.core.errors import UserError
from fire_llm.core.launch import report_failure

LOST_SECONDS = "FIRE_LLM_LOST_SECONDS"
"""Environment variable: for how many seconds nothing may be heard of a rank on another machine."""

_LEFT = "left"


def lost_seconds() -> float:
    """Return how long ranks wait for a sign of life from another machine.

    Raises:
        UserError: The environment says something else than a number of seconds.
    """
    given = os.environ.get(LOST_SECONDS, "60")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e6:
        raise UserError(f"{LOST_SECONDS}={given}: it must be a number of seconds, at least 1")
    return seconds


class Presence(threading.Thread):
    """Tell the other machines that this rank is there, and end it, with 1 and a message, when one of them is gone.

    A thread with a connection of its own: the main thread may be in a call that never returns. What it would save
    needs the lost rank too, so the process ends at once; checkpoints appear whole or not at all.

    Args:
        seconds: As `lost_seconds` returns it.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(name="fire_llm presence", daemon=True)
        self.seconds, self.rank, self.world = seconds, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.gone = threading.Event()
        self.counts: dict[int, tuple[str, float]] = {}
        self.looked = time.monotonic()
        # Ranks that a launcher starts again find the store, and what was said in it, as the ones before left it.
        self.key = f"fire_llm/presence/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=seconds)
        )
        self.store.set(f"{self.key}/{self.rank}", self._sign(0))

    def run(self) -> None:
        """Give signs of life and look for those of others, until `leave` is called."""
        number = 0
        unreachable = f"the first machine ({os.environ['MASTER_ADDR']}) did not answer for {self.seconds:g} s"
        while not self.gone.wait(self.seconds / 6):
            number += 1
            late = threading.Timer(self.seconds, self._end, [unreachable])
            late.daemon = True  # the store's own limit holds for waits alone
            late.start()
            try:
                self.store.set(f"{self.key}/{self.rank}", self._sign(number))
                lost = self._lost()
            except RuntimeError:
                lost = f"the first machine ({os.environ['MASTER_ADDR']}) is gone, or the network to it"
            late.cancel()
            if lost and not self.gone.wait(self.seconds / 6):  # until the others know, or an error has said more
                self._end(lost)

    def leave(self) -> None:
        """Stop, at the end of the work, so that nobody misses this rank."""
        if not self.gone.is_set():
            self.gone.set()
            self.join(self.seconds)
            with suppress(RuntimeError):  # nobody is there to miss it
                self.store.set(f"{self.key}/{self.rank}", _LEFT)

    def _end(self, message: str) -> None:
        report_failure(1, message, ask=False)
        os._exit(1)

    def _sign(self, number: int) -> str:
        return f"{number} {socket.gethostname()}"

    def _lost(self) -> str | None:
        """Return who is lost, as the first rank finds it; what the first rank said, or that it is lost, elsewhere."""
        if self.rank:
            if self.store.check([f"{self.key}/lost"]):
                return str(self.store.get(f"{self.key}/lost").decode())
            return _silence(self._silent([0]), self.seconds)
        lost = _silence(self._silent(range(1, self.world)), self.seconds)
        if lost:
            self.store.set(f"{self.key}/lost", lost)
        return lost

    def _silent(self, ranks: Any) -> Mapping[int, str]:
        """Return the ranks of whom nothing is new for too long, and their machines."""
        now, silent = time.monotonic(), {}
        if now - self.looked > self.seconds / 2:  # this process stood still: the others may have done so with it
            self.counts.clear()
        self.looked = now
        for rank in ranks:
            key = f"{self.key}/{rank}"
            count = self.store.get(key).decode() if self.store.check([key]) else "0 ?"
            known, since = self.counts.get(rank, (None, now))
            if count != known:
                self.counts[rank] = (count, now)
            elif count != _LEFT and now - since > self.seconds:
                silent[rank] = count.partition(" ")[2]
        return silent


def _silence(silent: Mapping[int, str], seconds: float) -> str | None:
    if not silent:
        return None
    ranks, machines = ", ".join(map(str, silent)), ", ".join(sorted(set(silent.values())))
    return (
        f"nothing was heard of rank {ranks} (on {machines}) for {seconds:g} s: the machine or the network to it is gone"
    )


_present: list[Presence] = []


def be_present() -> None:
    """Watch over the ranks on other machines, where there are several machines; once a process."""
    if not _present and int(os.environ.get("LOCAL_WORLD_SIZE") or 1 << 30) < int(os.environ.get("WORLD_SIZE") or 1):
        _present.append(Presence(lost_seconds()))
        _present[0].start()


def leave() -> None:
    """End what `be_present` began."""
    while _present:
        _present.pop().leave()
