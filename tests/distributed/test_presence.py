"""Ranks on other machines that fall silent, leave, or were never asked after."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
from support.ranks import run_ranks

from fire_llm import UserError
from fire_llm.distributed.presence import LOST_SECONDS, Presence, be_present, leave, lost_seconds


def two_machines(rank, world, folder, how):
    """Be one of two machines; the second says once that it is there, or leaves, while the first waits."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    os.environ.update({"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)})
    os.environ.update({LOST_SECONDS: "1", "TORCHELASTIC_ERROR_FILE": str(folder / f"{how}-{rank}.json")})
    if (rank, how) == (1, "silent"):
        Presence(lost_seconds())
    else:
        be_present()
    if (rank, how) == (1, "left"):
        leave()
    time.sleep(4 if rank == 0 else 0.5)
    leave()
    return "here"


@pytest.mark.parametrize("how", ["silent", "left", "both"])
def test_a_rank_that_falls_silent_ends_the_others_and_one_that_leaves_does_not(how, tmp_path):
    first, second = run_ranks(2, two_machines, tmp_path, tmp_path, how, seconds=30)
    assert second == "here"
    if how != "silent":
        assert first == "here" and not (tmp_path / f"{how}-0.json").exists()
        return
    assert first is None  # it was in a call that nothing interrupts
    told = json.loads((tmp_path / "silent-0.json").read_text())
    assert told["code"] == 1 and told["message"].startswith("nothing was heard of rank 1 (on ")
    assert "for 1 s: the machine or the network to it is gone" in told["message"]


@pytest.fixture
def alone(monkeypatch):
    """Make two ranks in this process, whose clock is set by hand; nothing runs beside the test."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clock = [1000.0]
    monkeypatch.setattr("fire_llm.distributed.presence.time", SimpleNamespace(monotonic=lambda: clock[0]))
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}

    def rank(number, restarts="0"):
        for name, value in {**given, "RANK": str(number), "TORCHELASTIC_RESTART_COUNT": restarts}.items():
            monkeypatch.setenv(name, value)
        return Presence(60.0)

    yield rank, clock
    del store  # it serves until then


def test_processes_that_stood_still_together_do_not_miss_each_other(alone):
    """As where a scheduler suspends a job: who wakes first finds nothing new of the others."""
    rank, clock = alone
    both = [rank(0), rank(1)]
    for _ in range(3):
        clock[0] += 10
        assert [one._lost() for one in both] == [None, None]
    clock[0] += 3600
    assert [one._lost() for one in both] == [None, None]
    for _ in range(6):
        clock[0] += 10
        assert both[0]._lost() is None
    clock[0] += 10
    assert "nothing was heard of rank 1 (on " in both[0]._lost()
    assert "nothing was heard of rank 1 (on " in both[1]._lost()
    assert rank(1, restarts="1")._lost() is None  # of ranks that were started again, nothing was said yet


@pytest.mark.parametrize("given", ["0", "-3", "soon", "inf"])
def test_a_wrong_time_is_refused(given, monkeypatch):
    monkeypatch.setenv(LOST_SECONDS, given)
    with pytest.raises(UserError, match=rf"{LOST_SECONDS}={given}: it must be a number of seconds, at least 1"):
        lost_seconds()


def test_one_machine_is_not_watched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    be_present()  # would look for a store that is not there
