"""`scripts/slurm.sbatch` in a real Slurm of one node: submit, preempt, requeue, resume, end as if nothing had been.

`pytest -m slow -s tests/distributed/test_slurm.py` prints how long each took.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.killing import outcome, run
from support.slurm import Slurm, missing, slurm
from support.tiny_recipe import recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]

FIRST = {"name": "first", "data": {"a": 1.0}}
SECOND = {"name": "second", "data": {"b": 1.0}, "steps": 8, "arms": {"fire": {"method": "fire"}}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def submit(cluster: Slurm, folder: Path, *options: str, steps: int) -> str:
    """Submit a run of two processes, as the documentation says; return the job's number."""
    path = recipe(folder, phases=[{**FIRST, "steps": steps}, SECOND], save_every_steps=10)
    given = ["sbatch", "--parsable", "--output", str(folder / "log"), "--nodes", "1", *options]
    cache = str(folder / "cache")
    return cluster.do(*given, "scripts/slurm.sbatch", str(path), "--output", str(folder / "out"), FIRE_LLM_CACHE=cache)


def comes(path: Path, folder: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)


def again(cluster: Slurm, job: str) -> None:
    """Wait until a job is back in the queue, and have it start at once; Slurm itself lets it wait for two minutes."""
    cluster.wait(job, "PENDING")
    while cluster.job(job)["JobState"] == "PENDING":  # while it is still ending, that fails or is forgotten
        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(1)
    cluster.wait(job, "RUNNING", "COMPLETED")


def test_a_job_that_is_preempted_twice_ends_as_one_that_is_not(cluster, tmp_path):
    began = time.monotonic()
    job = submit(cluster, tmp_path, "--gpus-per-node", "2", steps=150)
    stage = tmp_path / "out" / "first" / "seed-1"
    comes(stage / "checkpoint-10", tmp_path)
    print(f"\n{time.monotonic() - began:.0f} s from submission to the first checkpoint")
    asked = time.monotonic()
    cluster.do("scancel", "--batch", "--signal=USR1", job)  # as ahead of the time limit
    cluster.wait(job, "PENDING")
    print(f"{time.monotonic() - asked:.1f} s from the signal to the queue")
    said = (tmp_path / "log").read_text()
    assert "about to be ended, back into the queue" in said and "ended by SIGTERM; saved at step" in said, said
    assert said.count("fire-llm: ") == 1 and "Traceback" not in said
    again(cluster, job)
    started = time.monotonic()
    while "goes on from step" not in (tmp_path / "log").read_text():
        assert time.monotonic() < started + 300
        time.sleep(0.1)
    print(f"{time.monotonic() - started:.0f} s from the start to where it goes on")
    cluster.do("scontrol", "requeue", job)  # as an administrator or a preempting partition
    again(cluster, job)
    cluster.wait(job, "COMPLETED")
    log = (tmp_path / "log").read_text()
    assert cluster.job(job)["Restarts"] == "2" and log.count("goes on from step") >= 2, log
    codes, said, _ = run(2, tmp_path / "alone", tmp_path / "tiny.yaml", tmp_path / "whole", tmp_path / "cache")
    assert codes == [0, 0], said
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_a_time_limit_is_met_before_it_comes_on_a_node_without_gpus(cluster, tmp_path):
    limit = ["--gpus-per-node", "0", "--cpus-per-task", "2", "--time", "3", "--signal", "B:USR1@60"]
    job = submit(cluster, tmp_path, *limit, steps=100_000)
    cluster.wait(job, "RUNNING")
    cluster.wait(job, "PENDING", seconds=240)
    log = (tmp_path / "log").read_text()
    cluster.do("scancel", job)
    assert "about to be ended, back into the queue" in log and "TIME LIMIT" not in log, log
    assert "ended by SIGTERM; saved at step" in log, log
