"""Notice a lost machine: its ranks send nothing, and a collective would wait for them for hours.

    every rank ─ a count, every few seconds ─▶ store ─▶ first rank: does every count still grow?
    every rank ◀─ who is lost ─────────────── store ◀─┘        (the others watch the count of the first rank)

The backend notices a broken connection at once, but not one that stays open and silent.
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
"""Environment variable: seconds without a sign of life after which a rank on another machine is lost."""

_LEFT = "left"


def lost_seconds() -> float:
    """Return how long ranks wait for a sign of life from another machine."""
    given = os.environ.get(LOST_SECONDS, "60")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e6:
        raise UserError(f"{LOST_SECONDS}={given}: it must be a number of seconds, at least 1")
    return seconds


class Presence(threading.Thread):
    """Send signs of life to the other machines; end this process, with a message and exit code 1, if one is lost.

    It is a thread with its own connection, because the main thread may be in a call that never returns. The process
    ends at once: a save would need the lost rank too, and earlier checkpoints are whole.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(name="fire_llm presence", daemon=True)
        self.seconds, self.rank, self.world = seconds, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.left = threading.Event()
        self.counts: dict[int, tuple[str, float]] = {}
        """The last count of each rank, and when it was new."""
        self.looked = time.monotonic()
        # Ranks that a launcher starts again find the store with all that earlier ranks wrote.
        self.key = f"fire_llm/presence/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.store: Any = dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it untyped
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=seconds)
        )
        self.store.set(f"{self.key}/{self.rank}", self._sign(0))

    def run(self) -> None:
        """Send signs of life and check those of others, until `leave` is called."""
        number = 0
        unreachable = f"the first machine ({os.environ['MASTER_ADDR']}) did not answer for {self.seconds:g} s"
        while not self.left.wait(self.seconds / 6):
            number += 1
            late = threading.Timer(self.seconds, self._end, [unreachable])
            late.daemon = True  # the store's own time limit applies to its waits only
            late.start()
            try:
                self.store.set(f"{self.key}/{self.rank}", self._sign(number))
                lost = self._lost()
            except RuntimeError:
                lost = f"the first machine ({os.environ['MASTER_ADDR']}) is gone, or the network to it"
            late.cancel()
            if lost and not self.left.wait(self.seconds / 6):  # until the others know, or an error has said more
                self._end(lost)

    def leave(self) -> None:
        """Stop at the end of the work, and tell the other ranks, so that they do not take this one for lost."""
        if not self.left.is_set():
            self.left.set()
            self.join(self.seconds)
            with suppress(RuntimeError):  # the store is gone, and with it the first rank
                self.store.set(f"{self.key}/{self.rank}", _LEFT)

    def _end(self, message: str) -> None:
        report_failure(1, message, ask=False)
        os._exit(1)

    def _sign(self, number: int) -> str:
        return f"{number} {socket.gethostname()}"

    def _lost(self) -> str | None:
        """Return a message about lost ranks, None for none; the first rank finds them and informs the others."""
        if self.rank:
            if self.store.check([f"{self.key}/lost"]):
                return str(self.store.get(f"{self.key}/lost").decode())
            return _silence(self._silent([0]), self.seconds)
        lost = _silence(self._silent(range(1, self.world)), self.seconds)
        if lost:
            self.store.set(f"{self.key}/lost", lost)
        return lost

    def _silent(self, ranks: Any) -> Mapping[int, str]:
        """Return the ranks whose count has not grown for too long, and their machines."""
        now, silent = time.monotonic(), {}
        if now - self.looked > self.seconds / 2:  # this process was suspended, and perhaps the others too
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
    """Start the `Presence` of this process, once, where there are several machines."""
    if not _present and int(os.environ.get("LOCAL_WORLD_SIZE") or 1 << 30) < int(os.environ.get("WORLD_SIZE") or 1):
        _present.append(Presence(lost_seconds()))
        _present[0].start()


def leave() -> None:
    """End the `Presence` of this process."""
    while _present:
        _present.pop().leave()
