"""Stages side by side: threads and processes by the recipe, the same weights whatever they are, one message."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from support.ranks import Program
from support.tiny_recipe import recipe
from transformers import TrainerCallback

from fire_llm import UserError, load_recipe, register_reset, run_recipe
from fire_llm.cli import main
from fire_llm.core.atomic import checkpoints
from fire_llm.experiment import processes, progress, resources
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.jobs import Failures, jobs_of
from fire_llm.experiment.progress import Overview, StepReport, to_file
from fire_llm.experiment.recipe import Trial
from fire_llm.experiment.resources import environment, flops_of, small, threads, worker_count
from fire_llm.experiment.run import run_sweep
from fire_llm.experiment.stages import expand
from fire_llm.experiment.train import train
from fire_llm.resets import RESETS
from fire_llm.training.progress import BAR_DELAY, LINE_SECONDS

ARMS = "phases.1.arms={base: keep, fire: {method: fire}, rescale: rescale}"
STAGES = ("first", "second/base", "second/fire", "second/rescale")
SCRIPT = """
import sys
from fire_llm import load_recipe, run_recipe
results = run_recipe(load_recipe(sys.argv[1], [sys.argv[3]]), sys.argv[2], workers=int(sys.argv[4]))
"""
"""As in a notebook: nothing keeps a process that imports it from running it."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Write a recipe of a second."""
    return recipe(tmp_path_factory.mktemp("texts"))


def without_threads() -> dict[str, str]:
    """Return the environment of a user who has set no number of threads."""
    return {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}


def hashes(output: Path, seed: int = 1) -> dict[str, str]:
    """Return the hash of each stage's final weights."""
    found = {}
    for stage in STAGES:
        newest = checkpoints(output / stage / f"seed-{seed}")[-1][0]
        found[stage] = hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()
    return found


# ---- the rule


def test_threads_follow_the_work_of_a_micro_batch(path):
    """Flops by hand: 6 a weight that is multiplied and 12·layers·width·context a token; 8 sequences of 16 a step.

    The vocabulary of 280 is padded to 320.
    """
    tiny = load_recipe(path, ["batch={tokens_per_step: 128}"])
    block = 4 * 16 * 16 + 4 * 16 + 8 * 16 * 16 + 5 * 16 + 4 * 16  # attention, MLP, their biases, two norms
    a_token = 6 * (320 * 16 + block + 2 * 16) + 12 * 16 * 16
    assert flops_of(tiny) == (a_token, 128 * a_token) and small(tiny)
    assert small(load_recipe("demo"))
    large = ["model={preset: gpt-0.1b}", "tokenizer={train: 50257}", "batch={tokens_per_step: 4096}"]
    assert not small(load_recipe(path, large))


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(1):  # noqa: PT012  # the block is what is tested
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before


def jobs_for(path: Path, folder: Path, *sets: str):
    return jobs_of([Trial("", {}, load_recipe(path, [ARMS, *sets]))], folder)


def test_workers_are_as_many_as_stages_that_can_run_at_once(path, tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "_allowed_cores", lambda: 8)
    monkeypatch.setattr(resources, "threads_asked_for", lambda: None)
    jobs = jobs_for(path, tmp_path)
    assert worker_count(None, jobs) == 1  # so little work is done before another process has begun
    monkeypatch.setattr(resources, "WORTH_PROCESSES_FLOPS", 0)
    assert worker_count(None, jobs) == 3 == worker_count(9, jobs) and worker_count(2, jobs) == 2
    assert worker_count(None, jobs_for(path, tmp_path, "seed=[1,2]")) == 6
    assert worker_count(None, jobs_for(path, tmp_path, "seed=[1,2]", "phases.1.arms=null")) == 2
    assert worker_count(4, jobs_for(path, tmp_path, "phases.1.arms=null")) == 1  # a chain: one after another
    monkeypatch.setattr(resources, "threads_asked_for", lambda: 4)
    assert worker_count(None, jobs) == 2
    monkeypatch.setattr(resources, "SMALL_PASS_FLOPS", 0)
    assert worker_count(None, jobs) == 1  # one with all cores


def test_libraries_of_a_worker_start_no_threads_of_their_own(path, monkeypatch):
    trials = [Trial("", {}, load_recipe(path))]
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(resources, "cores", lambda: 8)
    assert [environment(0, 2, trials)[name] for name in names] == ["1"] * 4
    monkeypatch.setattr(resources, "SMALL_PASS_FLOPS", 0)
    assert [environment(0, 2, trials)[name] for name in names] == ["4"] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    assert [environment(0, 2, trials)[name] for name in names] == ["3", "3", "3", "7"]


def test_a_users_number_of_threads_is_respected_and_told(path, tmp_path, monkeypatch, capsys):
    from fire_llm.experiment import worker

    seen = []
    real = worker.train
    monkeypatch.setattr(worker, "train", lambda *given: (seen.append(torch.get_num_threads()), real(*given)))
    short = ["phases.0.steps=1", "phases.1.steps=1", "evaluate.max_tokens=200"]
    torch.set_num_threads(2)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        run_recipe(load_recipe(path, short), tmp_path / "two")
        assert seen == [2, 2] and "2 threads, as OMP_NUM_THREADS says" in capsys.readouterr().err
        monkeypatch.delenv("OMP_NUM_THREADS")
        run_recipe(load_recipe(path, short), tmp_path / "one")
        assert seen[2:] == [1, 1] and torch.get_num_threads() == 2 and "OMP_" not in capsys.readouterr().err
    finally:
        torch.set_num_threads(1)


def test_no_model_of_an_earlier_stage_is_left_when_one_begins(path, tmp_path, monkeypatch):
    """On a GPU it would hold 16 bytes a parameter; one that failed held them in its traceback too."""
    from fire_llm.experiment import train as module
    from fire_llm.experiment import worker

    made, alive = [], []
    real_train, real_model = worker.train, module.starting_model

    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise RuntimeError("in the middle of a step")

    def train(stage, run, callbacks):
        alive.append(sum(model() is not None for model in made))
        real_train(stage, run, [*callbacks, Failing()] if stage.arm == "base" else callbacks)

    def starting_model(stage, run):
        model = real_model(stage, run)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(module, "starting_model", starting_model)
    sweep = run_sweep([Trial("", {}, load_recipe(path, [ARMS]))], tmp_path, workers=1, progress=False)
    assert [failure["message"] for failure in sweep.failures] == ["in the middle of a step"]
    assert len(made) == 4 and alive == [0] * 4


def test_what_other_processes_would_not_know_is_trained_here(path, tmp_path):
    register_reset("halve")(lambda w: w / 2)
    try:
        with_own = load_recipe(path, ["phases.1.arms={base: keep, own: halve}"])
        with pytest.raises(UserError, match=r"--workers 2: this process has registered halve, which other processes"):
            run_recipe(with_own, tmp_path, workers=2, progress=False)
        assert set(run_recipe(with_own, tmp_path, progress=False)["arms"]) == {"base", "own"}
    finally:
        del RESETS["halve"]


def test_two_arms_that_are_the_same_are_trained_once_and_not_waited_for(path, tmp_path):
    arms = ["phases.1.arms={a: keep, b: keep}"]
    run_recipe(load_recipe(path, arms), tmp_path, arms=["a"], progress=False)
    cut = tmp_path / "second" / "a" / "seed-1"
    for checkpoint, step in checkpoints(cut):
        if step == 8:
            checkpoint.rename(tmp_path / "away")
    (cut / "checkpoint-4").mkdir()
    for name in ("continual_state.json", "trainer_state.json"):
        (cut / "checkpoint-4" / name).write_bytes((tmp_path / "away" / name).read_bytes())
    # a is begun and not asked for: b does not wait until somebody finishes it.
    results = run_recipe(load_recipe(path, arms), tmp_path, arms=["b"], progress=False)
    assert results["arms"]["b"]["runs"][0]["steps"] == 8


# ---- processes


@pytest.fixture(scope="module")
def one(path, tmp_path_factory) -> Path:
    """Run three arms in one process, one after another."""
    output = tmp_path_factory.mktemp("one") / "run"
    run_recipe(load_recipe(path, [ARMS]), output, workers=1, progress=False)
    assert not (output / ".workers").exists()
    return output


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_two_workers_end_with_the_weights_of_one(busy, path, one, tmp_path):
    """In a script without `if __name__ == "__main__"`, which has set no number of threads."""
    output, others = tmp_path / "two", (os.cpu_count() or 1) if busy else 0
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        command = [sys.executable, "-c", SCRIPT, str(path), str(output), ARMS, "2"]
        done = subprocess.run(command, env=without_threads(), capture_output=True, text=True, timeout=280)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert done.returncode == 0, done.stderr
    assert hashes(output) == hashes(one)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, output))
    for arm, results in first["arms"].items():
        assert results["final"] == second["arms"][arm]["final"]
        assert [e["train_loss"] for e in results["curve"]] == [e["train_loss"] for e in second["arms"][arm]["curve"]]
    # The first phase is trained here; then a line a stage, and what the workers say of their resets.
    assert "2 worker(s)" in done.stderr and "4/4 stages" in done.stderr
    assert "second / rescale, seed 1: " in done.stderr and "second / fire: NLL on a " in done.stderr
    assert "Traceback" not in done.stderr and "| 20" not in done.stderr
    left = sorted(p.name.rpartition("-")[2] for p in (output / ".workers").iterdir())
    assert left == ["1.log", "2.log"]


MISTAKE = ["phases.1.steps=null", "phases.1.tokens=640", "phases.1.keep=[300]"]
DIVERGES = ["phases.1.optimizer={lr: 1.0e+30, min_lr: 1.0e+30, warmup: 0.0}", "optimizer.clip=1.0e+30"]


@pytest.mark.parametrize(
    ("sets", "code", "told"),
    [
        (MISTAKE, 2, "fire-llm: phase 'second': keep 300 lies beyond its 5 steps\n"),
        (DIVERGES, 1, "nonfinite.json' lists the samples. Lower the learning rate"),
    ],
)
def test_what_fails_in_a_worker_is_told_once_as_if_it_had_failed_here(
    sets, code, told, path, tmp_path, capsys, monkeypatch
):
    """In workers that find everything imported; where two end with the weights of one, they are started as they are."""
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=Program, PIPE=subprocess.PIPE))
    argv = ["run", str(path), "--output", str(tmp_path / "run"), "--workers=2"]
    assert main([*argv, *(f"--set={s}" for s in [ARMS, *sets])]) == code
    said = capsys.readouterr().err
    assert told in said and said.count("fire-llm: ") == 1 and "Traceback" not in said
    assert not (tmp_path / "run" / "results.json").exists()


def test_failures_come_back_as_what_they_were(path, tmp_path):
    job = jobs_for(path, tmp_path)[0]
    for n, (error, kind, message) in enumerate(
        [
            (FloatingPointError("the loss is nan"), FloatingPointError, "the loss is nan"),
            (UserError("free some space"), UserError, "free some space"),
            (RuntimeError("no"), RuntimeError, "first, seed 1: no (see 'l')"),
            (KeyError("x"), RuntimeError, "first, seed 1: KeyError: 'x' (see 'l')"),
        ]
    ):
        failures = Failures(tmp_path / str(n))
        assert not failures.any()
        failures.add(job, error, "l")
        found = failures.error()
        assert failures.any() and type(found) is kind and str(found) == message


def slow_recipe(path: Path, folder: Path) -> Path:
    """Write the recipe with two seeds, each with a long first phase."""
    data = yaml.safe_load(path.read_text())
    data["phases"][0]["steps"], data["save_every_steps"], data["seed"] = 96, 16, [1, 2]
    data["evaluate"]["every_steps"] = 48
    (folder / "slow.yaml").write_text(yaml.safe_dump(data))
    return folder / "slow.yaml"


def begun(output: Path, process: Any) -> list[psutil.Process]:
    """Wait until both seeds have a checkpoint, and return the workers."""
    deadline = time.monotonic() + 250
    while not all(checkpoints(output / "first" / f"seed-{seed}") for seed in (1, 2)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    return workers


def step_of(output: Path, seed: int) -> int:
    return checkpoints(output / "first" / f"seed-{seed}")[-1][1]


COMMAND = """
import multiprocessing, os, subprocess
from types import SimpleNamespace
from fire_llm.__main__ import program
from fire_llm.experiment import processes
from support.ranks import Program
os.setsid()
Program.context = multiprocessing.get_context("fork")
processes.subprocess = SimpleNamespace(Popen=Program, PIPE=subprocess.PIPE)
program()
"""
"""`fire-llm` in a session of its own, whose workers find everything imported."""


def test_a_signal_saves_in_every_worker_and_one_process_goes_on(path, tmp_path, capsys):
    recipe, output, log = slow_recipe(path, tmp_path), tmp_path / "run", tmp_path / "said"
    command = [sys.executable, "-c", COMMAND, "run", str(recipe), "--workers=2", f"--output={output}"]
    with log.open("w") as file:
        process = Program(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=dict(os.environ))
    workers = begun(output, process)
    with pytest.raises(UserError, match="another run is writing into"):
        run_recipe(load_recipe(recipe), output, progress=False)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches all of them
    process.wait(120)
    said = log.read_text()
    assert process.returncode == 130 and said.count("fire-llm: ") == 1, said
    assert said.endswith("fire-llm: interrupted; the workers saved the steps they were in; the same command goes on\n")
    assert not psutil.wait_procs(workers, timeout=1)[1]
    steps = [step_of(output, seed) for seed in (1, 2)]
    capsys.readouterr()
    run_recipe(load_recipe(recipe), output, workers=1)
    said = capsys.readouterr().err
    assert all(f"first: goes on from step {step}\n" in said for step in steps)
    run_recipe(load_recipe(recipe, ["seed=2"]), tmp_path / "whole", workers=1, progress=False)
    for stage in ("first", "second/fire"):
        weights = [
            (checkpoints(folder / stage / "seed-2")[-1][0] / "model.safetensors").read_bytes()
            for folder in (output, tmp_path / "whole")
        ]
        assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_command_that_started_them(number, path, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "fire_llm", "run", str(slow_recipe(path, tmp_path)), "--workers=2"]
    process = subprocess.Popen(
        [*command, "--output", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        workers = begun(output, process)
        process.send_signal(number)  # to the command alone, as a scheduler or the system does
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == (143 if number == signal.SIGTERM else -9), said
    assert not psutil.wait_procs(workers, timeout=120)[1]


# ---- progress


class State:
    """What a callback is told of the step."""

    def __init__(self, step: int) -> None:
        self.global_step = step


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Give the time, which moves only where a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_without_a_terminal_two_workers_are_told_a_line_each_and_one_for_all(path, tmp_path, clock, capsys):
    """Three arms of 8 steps after a first phase of 10, of 128 tokens a step; the base is finished, two are trained."""
    recipe = load_recipe(path, [ARMS])
    run_recipe(recipe, tmp_path / "run", arms=["base"], progress=False)
    capsys.readouterr()
    jobs = jobs_of([Trial("", {}, recipe)], tmp_path / "run")
    keys = {job.stage.arm: job.key for job in jobs}
    failures = Failures(tmp_path / "failures")
    failures.folder.mkdir()
    with Overview(jobs, {job.key: job.stage.phase.steps for job in jobs}, failures, shown=True) as overview:
        workers = [StepReport(to_file(failures.folder / f"{n}.step")) for n in range(2)]
        for worker, arm, logs in zip(
            workers, ("fire", "rescale"), ({"loss": 5.25}, {"eval_a_perplexity": 80.04}), strict=True
        ):
            worker.key = keys[arm]
            worker.on_log(None, None, None, logs)
            worker.on_step_end(None, State(2), None)
            worker.on_step_end(None, State(3), None)  # too soon after the first
        clock[0] += 2
        overview.refresh()
        assert capsys.readouterr().err == ""  # lines come now and then
        clock[0] += LINE_SECONDS - 2
        workers[0].on_step_end(None, State(6), None)
        overview.refresh()
        # 4 steps in 28 s, and 2 are left; nothing of the other; 18 finished, 8 of 16 others in 30 s, and 8 are left.
        assert capsys.readouterr().err.splitlines() == [
            "second / fire, seed 1: 6 of 8 steps, 18 tokens/s, 14 s left, loss 5.250",
            "second / rescale, seed 1: 2 of 8 steps, ppl a 80.0",
            "2/4 stages: 26 of 34 steps, 34 tokens/s, 30 s left",
        ]
        failures.add(next(job for job in jobs if job.stage.arm == "rescale"), RuntimeError("no"), None)
        clock[0] += LINE_SECONDS
        overview.refresh()
        assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == [
            "second / fire, seed 1", "2/4 stages",
        ]  # fmt: skip
        run_recipe(recipe, tmp_path / "run", arms=["fire"], progress=False)
        capsys.readouterr()
    said = capsys.readouterr().err
    assert re.fullmatch(r"second / fire, seed 1: \d+\.\d s, NLL a \d\.\d{3}, b \d\.\d{3} \(3/4 stages\)\n", said)


def test_a_terminal_shows_a_bar_a_stage_and_one_for_all(path, tmp_path, clock, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    jobs = jobs_for(path, tmp_path)
    with Overview(jobs, {job.key: job.stage.phase.steps for job in jobs}, Failures(tmp_path), shown=True) as overview:
        overview.report(jobs[0].key, 3, {"loss": "5.250"})
        assert terminal.getvalue() == ""  # what is done soon needs no bar
        clock[0] += BAR_DELAY
        overview.report(jobs[0].key, 5, {"loss": "5.125"})
        overview.say("first: a line of its own")
        sys.stderr.write("another\n")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(
        r"first, seed 1 \S+ +5/10 128 tokens/s, 5 s left, loss 5.125 *\r?\n0/4 stages +\S+ +5/34 ", shown
    ), shown
    assert "first: a line of its own\n" in shown and "another\n" in shown
    assert sys.stderr is terminal


@pytest.mark.parametrize(("seconds", "words"), [(45.4, "45 s"), (150, "2 min"), (9000, "2.5 h")])
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words


def test_one_process_shows_the_same_lines(path, tmp_path, monkeypatch, capsys):
    for name in ("LINE_SECONDS", "REPORT_SECONDS"):
        monkeypatch.setattr(progress, name, 0.0)
    run_recipe(load_recipe(path), tmp_path / "run")
    said = capsys.readouterr().err
    measures = r"ppl a [\d.]+, ppl b [\d.]+, loss 5\.\d+"
    assert re.search(rf"^first, seed 1: 4 of 10 steps, [\d,]+ tokens/s, \d+ s left, {measures}$", said, re.M), said
    assert re.search(r"^0/2 stages: 4 of 18 steps, [\d,]+ tokens/s, \d+ s left$", said, re.M)
    assert re.search(r"^second / fire, seed 1: \d+\.\d s, NLL a .* \(2/2 stages\)$", said, re.M) and "\r" not in said


def test_a_stage_of_several_ranks_shows_itself(path, tmp_path, monkeypatch, capsys):
    """There the trainer does it, whose callbacks are those of any script."""
    monkeypatch.setattr("fire_llm.training.progress.LINE_SECONDS", 0.0)
    run = RunContext(load_recipe(path), tmp_path, progress=True)
    train(expand(run)[0], run)
    said = capsys.readouterr().err
    assert re.search(r"^first: step 4 of 10, \d+ s left; ppl a [\d.]+, ppl b [\d.]+, loss 5\.\d+, tok/s", said, re.M), (
        said
    )
    assert "\r" not in said
