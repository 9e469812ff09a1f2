"""Two hosts, joined by a link: a run, a reset in shards, a host that dies, a link that breaks, going on alone.

`pytest -m slow -s tests/distributed/test_hosts.py` prints how long each took.
"""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from support.hosts import Hosts, missing, two_hosts, with_programs
from support.killing import outcome
from support.ranks import run_ranks
from support.runs import recipe_data, run_rank
from support.training import FSDP2, HSDP

from fire_llm import load_recipe, run_recipe
from fire_llm.experiment.recipe.reading import recipes_folder
from fire_llm.experiment.stages import final_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch.sh"
LOST = 6.0
SECONDS = 300.0


@pytest.fixture
def hosts():
    with two_hosts() as made:
        yield made


def launch(hosts: Hosts, folder: Path, data: dict, processes: int = 1, **variables: str) -> list[subprocess.Popen]:
    """Start a recipe on both hosts, as the documentation says."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    command = [str(LAUNCH), str(folder / "tiny.yaml"), "--output", str(folder / "out"), "--arm", "fire"]
    shared = {"NODES": "2", "MAIN_ADDRESS": Hosts.ADDRESSES[0], "PROCESSES": str(processes), **variables}
    shared["FIRE_LLM_LOST_SECONDS"] = f"{LOST:g}"
    return [hosts.start(host, command, folder / f"host-{host}.log", NODE_RANK=str(host), **shared) for host in (0, 1)]


def ends(folder: Path, started: list[subprocess.Popen], seconds: float = SECONDS) -> list[tuple[int, str]]:
    """Wait for the commands of both hosts; return exit codes and what each printed."""
    deadline = time.monotonic() + seconds
    codes = [process.wait(max(1, deadline - time.monotonic())) for process in started]
    return [(code, (folder / f"host-{host}.log").read_text()) for host, code in enumerate(codes)]


def comes(path: Path, started: list[subprocess.Popen], folder: Path) -> float:
    """Wait until a file is there; return how long that took."""
    began = time.monotonic()
    while not path.exists():
        gone = [(folder / f"host-{h}.log").read_text() for h, p in enumerate(started) if p.poll() is not None]
        assert not gone and time.monotonic() < began + SECONDS, gone
        time.sleep(0.05)
    return time.monotonic() - began


def save_seconds(checkpoint: Path) -> float:
    """Return the time from a checkpoint's first file to the rename that makes it one."""
    return checkpoint.stat().st_ctime - min(file.stat().st_ctime for file in checkpoint.iterdir())


def faults(log: str) -> list[str]:
    assert "Traceback" not in log, log
    return re.findall(r"fire-llm: (.*)", log)


@pytest.mark.parametrize(("how", "processes"), [("replicas", 1), ("fsdp2", 1), ("hsdp", 2)])
def test_two_hosts_end_as_as_many_processes_on_one(how, processes, hosts, texts, tmp_path):
    data = recipe_data(texts)
    data["batch"]["sequences_per_device"] = 1
    variables, environment = {}, {}
    if how != "replicas":
        settings = yaml.safe_load((recipes_folder() / "accelerate" / f"{how}.yaml").read_text())
        settings["parallelism_config"] = {f"parallelism_config_dp_{k}_size": 2 for k in ("replicate", "shard")}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        variables = {"ACCELERATE_CONFIG": str(tmp_path / "config.yaml") if how == "hsdp" else how}
        environment = HSDP if how == "hsdp" else FSDP2
    started = launch(hosts, tmp_path, data, processes, **variables)
    start = comes(tmp_path / "out" / "first" / "seed-1" / "checkpoint-4", started, tmp_path)
    (first, said), (second, other) = ends(tmp_path, started)
    assert (first, second) == (0, 0), said + other
    assert "fire" in said and not faults(other) and not faults(said)
    save = save_seconds(final_checkpoint(tmp_path / "out" / "first" / "seed-1"))
    print(f"\n{how} on 2 x {processes}: {start:.0f} s to the first checkpoint, a save {save:.2f} s")

    world = 2 * processes
    one = tmp_path / "one"
    each = run_ranks(world, run_rank, tmp_path, data, one, environment, ["fire"], seconds=SECONDS)
    assert len(each) == world and outcome(one) == outcome(tmp_path / "out")


def resumes_alone(folder: Path, data: dict, texts: Path) -> tuple[str, float]:
    """Go on in one process on one host; compare with a run that nothing interrupted; return what was said."""
    began = time.monotonic()
    command = [str(LAUNCH), str(folder / "tiny.yaml"), "--output", str(folder / "out"), "--arm", "fire"]
    done = subprocess.run(
        command, env={**with_programs(), "PROCESSES": "1"}, capture_output=True, text=True, timeout=SECONDS
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    run_recipe(load_recipe(data), folder / "whole", arms=["fire"], progress=False)
    mine, whole = outcome(folder / "out"), outcome(folder / "whole")
    assert mine.keys() == whole.keys()
    for name, stage in mine.items():
        assert stage["batches_hash"] == whole[name]["batches_hash"]
        for one, other in zip(stage["curve"], whole[name]["curve"], strict=True):
            assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
    return done.stderr, seconds


@pytest.mark.parametrize("how", ["killed", "unreachable"])
def test_a_host_that_is_lost_is_noticed_and_the_other_goes_on(how, hosts, texts, tmp_path):
    data = recipe_data(texts)
    data["phases"][0] |= {"steps": 120, "keep": []}
    data |= {"save_every_steps": 20, "log_every_steps": 20, "evaluate": {"data": ["b", "a"], "every_steps": 100}}
    started = launch(hosts, tmp_path, data)
    comes(tmp_path / "out" / "first" / "seed-1" / "checkpoint-20", started, tmp_path)
    began = time.monotonic()
    if how == "killed":
        hosts.kill(1)
    else:
        hosts.cut()
    first = started[0].wait(60)
    noticed = time.monotonic() - began
    second = started[1].wait(60)
    log, other = ((tmp_path / f"host-{host}.log").read_text() for host in (0, 1))
    print(f"\n{how}: noticed after {noticed:.1f} s, the other after {time.monotonic() - began:.1f} s")
    (said,) = faults(log)
    print(f"host 0: {said}")
    assert first == 1 and said.endswith("the same command goes on from the newest checkpoint")
    if how == "killed":
        assert second == -9 and ("another rank is gone" in said or "rank 1 (on host-1)" in said)
    else:
        (theirs,) = faults(other)
        print(f"host 1: {theirs}")
        assert "nothing was heard of rank 1 (on host-1) for 6 s" in said
        assert second == 1 and "the first machine (10.77.0.1)" in theirs
    assert noticed < 4 * LOST + 10
    log, seconds = resumes_alone(tmp_path, data, texts)
    goes_on = next(line for line in log.splitlines() if "goes on from step" in line)
    assert "on 1 process(es) instead of 2" in goes_on
    print(f"{goes_on}; done after {seconds:.0f} s")


def test_a_host_that_does_not_come_is_told(hosts, tmp_path, texts):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_data(texts)))
    command = [str(LAUNCH), str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out")]
    given = {"NODES": "2", "PROCESSES": "1", "MAIN_ADDRESS": Hosts.ADDRESSES[0], "FIRE_LLM_MEET_SECONDS": "5"}
    started = [hosts.start(1, command, tmp_path / "host-1.log", NODE_RANK="1", **given)]
    assert started[0].wait(SECONDS) == 1
    (said,) = faults((tmp_path / "host-1.log").read_text())
    assert "the 2 machines did not meet at 10.77.0.1, port 29500, within 5 s" in said
    assert not (tmp_path / "out").exists()
