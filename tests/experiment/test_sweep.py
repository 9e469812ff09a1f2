"""Sweeps: the trials of a grid, equal stages trained once, workers that share them out, and what survives a kill."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.ranks import PROCESSES
from support.tiny_recipe import recipe

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.cli import main
from fire_llm.core.atomic import checkpoints
from fire_llm.core.locks import held
from fire_llm.experiment import worker
from fire_llm.experiment.jobs import Failures, jobs_of, link_duplicate, lock_for, only_run
from fire_llm.experiment.recipe import load_trials, words
from fire_llm.experiment.run import run_sweep
from fire_llm.experiment.stages import final_checkpoint
from fire_llm.experiment.summary import Summary
from fire_llm.experiment.sweep_report import print_trials, show
from fire_llm.reporting.plots.base import NEUTRAL, palette
from fire_llm.reporting.plots.sweep import key_figure

TWO = ["phases.1.arms={base: keep, fire: {method: fire}}"]
PATIENCE = 300
"""Seconds; a busy machine takes several times what an idle one does."""

GRID = ["phases.1.arms.fire.iterations=[1,5]"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Write a recipe of a second: two phases of two corpora, an arm with a reset."""
    return recipe(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    """Sweep the reset's iterations once, in this process, for every test that only looks; count the trainings."""
    folder, trained = tmp_path_factory.mktemp("sweep") / "s", []
    with pytest.MonkeyPatch.context() as patch:
        real = worker.train
        patch.setattr(worker, "train", lambda stage, *more: (trained.append(stage.folder), real(stage, *more)))
        sweep = run_sweep(load_trials(path, TWO, GRID), folder, workers=1, progress=False)
    return folder, sweep, trained


def weights(folder: Path) -> dict[str, torch.Tensor]:
    final = final_checkpoint(folder)
    assert final is not None, f"{folder} is not finished"
    return load_file(final / "model.safetensors")


def equal(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- the grid


def test_trials_are_the_product_of_the_lists(path):
    grid = ["optimizer.lr=[1.0e-3,3.0e-4]", "phases.0.steps=[3,4]", "phases.1.steps=[5]"]
    trials = load_trials(path, ["log_every_steps=2"], grid)
    expected = list(itertools.product([1.0e-3, 3.0e-4], [3, 4], [5]))
    assert [(c.recipe.optimizer.lr, *(p.steps for p in c.recipe.phases)) for c in trials] == expected
    assert [c.name for c in trials] == [f"lr={lr},0.steps={a},1.steps={b}" for lr, a, b in expected]
    assert {c.recipe.log_every_steps for c in trials} == {2}
    assert trials[0].settings == {"optimizer.lr": 1.0e-3, "phases.0.steps": 3, "phases.1.steps": 5}


def test_the_recipe_has_a_grid_and_the_command_line_adds_to_it(path):
    overrides = ["sweep={optimizer.lr: [1.0e-3], seed: [1, 2]}"]
    trials = load_trials(path, overrides, ["seed=[3]", "batch.tokens_per_step=[64,128]"])
    assert [c.name for c in trials] == ["lr=0.001,seed=3,tokens_per_step=64", "lr=0.001,seed=3,tokens_per_step=128"]
    assert all(not c.recipe.sweep for c in trials)
    assert load_recipe(path, overrides).sweep == {"optimizer.lr": [1.0e-3], "seed": [1, 2]}


def test_without_a_grid_there_is_one_trial_in_the_runs_own_folder(path):
    (trial,) = load_trials(path)
    assert trial.name == "" and trial.folder(Path("runs/x")) == Path("runs/x") and trial.recipe == load_recipe(path)


def test_names_are_safe_short_and_differ_but_for_capitals(path):
    values = json.dumps(["x" * 120, "x" * 121, "../..", "C:\\a b", "{a: [b]}", ""])
    names = [c.name for c in load_trials(path, [], [f"description={values}"])]
    assert len({n.lower() for n in names}) == 6
    for name in names:
        assert len(name) <= 100 and not set(name) & set('/\\ "{}[]:*?<>|') and not name.startswith((".", "-"))
    mixed = [
        c.name for c in load_trials(path, [], ["phases.0.data=[{a: 1.0},{a: 0.9, b: 0.1}]", "phases.0.keep=[[4],[]]"])
    ]
    assert mixed[1::2] == ["data=a-1.0,keep=none", "data=a-0.9,b-0.1,keep=none"]
    signs = [c.name for c in load_trials(path, [], ["description=['-2', '2', 'A', 'a']"])]
    assert signs[:3] == ["description=-2", "description=2", "description=A"] and signs[3].startswith("description=a,")


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (["optimizer.lr=[1.0e-3,-1]"], r"in lr=-1: optimizer\.lr: -1 is not allowed"),
        (["optimizer.lrr=[1,2]"], r"(?m)^  optimizer\.lrr: unknown key"),
        (["phases.7.steps=[1,2]"], r"sweep phases\.7\.steps: the recipe has no 'phases\.7'"),
        (["phases.0.steps=[4,4]"], r"sweep\.phases\.0\.steps: \[4, 4\] names a value twice"),
        (["phases.0.steps=4"], r"sweep\.phases\.0\.steps: 4 is not allowed; give a list of values"),
        (["phases.0.steps=[]"], r"sweep\.phases\.0\.steps: \[\] is not allowed"),
        (["phases.0.steps"], r"--grid phases\.0\.steps: write KEY=VALUE"),
        (["name=[a,b]"], r"'name' cannot be swept over"),
        ([f"phases.0.steps={list(range(1, 30))}", f"phases.1.steps={list(range(1, 30))}"], "841 trials.*at most 500"),
        (["phases.0.steps=[4,5]", "batch.tokens_per_step=[120,128]"], r"in steps=4,.*=120 and steps=5,.*=120: batch"),
    ],
)
def test_faults_of_a_grid_are_told_before_anything_runs(path, grid, told):
    with pytest.raises(UserError, match=told):
        load_trials(path, [], grid)


# ---- what is trained, and what is taken over


def test_equal_stages_are_trained_once_and_linked(whole, path):
    folder, sweep, trained = whole
    assert sorted(trained) == ["first/seed-1", "second/base/seed-1", "second/fire/seed-1", "second/fire/seed-1"]
    assert [c.name for c in sweep.trials] == ["iterations=1", "iterations=5"] and sweep.code == 0
    for stage in ("first/seed-1", "second/base/seed-1"):
        one, two = (final_checkpoint(folder / name / stage) for name in ("iterations=1", "iterations=5"))
        assert os.path.samefile(one / "model.safetensors", two / "model.safetensors")
    assert not equal(folder / "iterations=1/second/fire/seed-1", folder / "iterations=5/second/fire/seed-1")


def test_a_trial_is_what_run_makes_of_its_recipe(whole, path, tmp_path):
    folder, sweep, _ = whole
    results = run_recipe(load_recipe(path, [*TWO, "phases.1.arms.fire.iterations=5"]), tmp_path / "r", progress=False)
    for stage in ("first/seed-1", "second/base/seed-1", "second/fire/seed-1"):
        assert equal(folder / "iterations=5" / stage, tmp_path / "r" / stage)
    own = json.loads((folder / "iterations=5" / "results.json").read_text())
    assert own == sweep.results[1].model_dump(mode="json")
    assert own["arms"]["fire"]["final"] == results["arms"]["fire"]["final"]
    assert json.loads((folder / "iterations=5" / "recipe.json").read_text()) == json.loads(
        (tmp_path / "r" / "recipe.json").read_text()
    )


def test_a_sweep_again_trains_nothing_and_a_larger_grid_only_what_is_new(whole, path, monkeypatch):
    folder, _, _ = whole
    trained = []
    real = worker.train
    monkeypatch.setattr(worker, "train", lambda stage, *more: (trained.append(stage.folder), real(stage, *more)))
    run_sweep(load_trials(path, TWO, GRID), folder, workers=1, progress=False)
    assert trained == []
    run_sweep(load_trials(path, TWO, ["phases.1.arms.fire.iterations=[3,5,1]"]), folder, workers=1, progress=False)
    assert trained == ["second/fire/seed-1"]


def test_of_some_arms_only_what_they_start_from_is_trained_too(path, tmp_path, capsys):
    argv = ["sweep", str(path), "--set", TWO[0], "--grid", GRID[0], "--output", str(tmp_path), "--workers=1"]
    assert main([*argv, "--arm=base", "--dry-run"]) == 0
    assert "2 trials of 4 stages, 2 of them" in capsys.readouterr().out
    assert main([*argv, "--arm=base"]) == 0
    there = {job.stage.folder for job in jobs_of(load_trials(path, TWO, GRID), tmp_path) if job.done()}
    assert there == {"first/seed-1", "second/base/seed-1"}
    assert "base" in capsys.readouterr().out
    assert main([*argv, "--arm=fir"]) == 2
    assert "the recipe has no arm 'fir'. Did you mean 'fire'?" in capsys.readouterr().err


def test_what_is_kept_makes_stages_differ(path, tmp_path):
    jobs = jobs_of(load_trials(path, TWO, ["phases.0.keep=[[4],[]]"]), tmp_path)
    assert [len(job.duplicates) for job in jobs if job.stage.folder == "first/seed-1"] == [0, 0]
    # The arms start from the final checkpoint, which both have.
    assert [len(job.duplicates) for job in jobs if job.stage.arm == "fire"] == [1, 1]


def test_links_become_copies_where_there_are_none(whole, path, tmp_path, monkeypatch):
    folder, _, _ = whole
    source, target = jobs_of(load_trials(path, TWO, GRID), folder)[0], jobs_of(load_trials(path), tmp_path)[0]

    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    link_duplicate(target, source)
    assert equal(target.folder, source.folder)
    assert not os.path.samefile(target.folder / "unit.json", source.folder / "unit.json")


def test_a_begun_stage_is_finished_where_it_was_begun(whole, path, tmp_path):
    trials = load_trials(path, TWO, GRID)
    (
        first,
        *_,
    ) = (job for job in jobs_of(trials, tmp_path) if job.stage.folder == "first/seed-1")
    begun = first.duplicates[0]
    begun.folder.mkdir(parents=True)
    assert first.ready() and begun.ready()  # an empty folder is no beginning
    (begun.folder / "checkpoint-4").mkdir()
    (begun.folder / "checkpoint-4" / "continual_state.json").write_text("{}")
    (begun.folder / "checkpoint-4" / "trainer_state.json").write_text('{"max_steps": 10}')
    assert begun.ready() and not first.ready()


# ---- failures


def test_what_fails_does_not_stop_what_does_not_hang_on_it(path, tmp_path, monkeypatch, capsys):
    real = worker.train

    def fail(stage, run, callbacks):
        if stage.phase.name == "first" and run.folder.name == "tokens_per_step=64":
            raise RuntimeError("the loss is not finite, hf_" + "x" * 34)
        real(stage, run, callbacks)

    monkeypatch.setattr(worker, "train", fail)
    argv = ["sweep", str(path), "--grid", "batch.tokens_per_step=[64,128]", "--output", str(tmp_path), "--workers=1"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "1 failed; the same command tries again" in said and "hf_***" in said
    assert "tokens_per_step=64: first, seed 1: the loss is not finite" in said
    assert "not trained, as they start from those: tokens_per_step=64: second / fire, seed 1" in said
    assert final_checkpoint(tmp_path / "tokens_per_step=128/second/fire/seed-1")
    monkeypatch.setattr(worker, "train", real)
    assert main(argv) == 0
    assert final_checkpoint(tmp_path / "tokens_per_step=64/second/fire/seed-1")
    assert list((tmp_path / ".workers").iterdir()) == []


def test_a_users_mistake_in_a_stage_ends_with_2(path, tmp_path, capsys):
    argv = ["sweep", str(path), "--set=phases.0={name: first, data: {a: 1.0}, tokens: 640, keep: [300]}"]
    assert main([*argv, "--output", str(tmp_path)]) == 2
    assert "keep 300 lies beyond its 5 steps" in capsys.readouterr().err


def test_another_recipes_folder_is_refused(whole, path, capsys):
    folder, _, _ = whole
    argv = ["sweep", str(path), "--set", TWO[0], "--grid", GRID[0], "--output", str(folder), "--set=optimizer.lr=0.1"]
    assert main(argv) == 2
    assert "was begun with another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--workers=0"], "--workers 0: at least 1 is needed"),
        (["--workers=2", "--num-processes=2"], "give one of the two"),
        (["--grid=seed=1"], "give a list of values"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(path, tmp_path, more, told, capsys):
    assert main(["sweep", str(path), "--output", str(tmp_path / "s"), *more]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "s").exists()


# ---- locks


def test_a_lock_is_shared_or_alone_and_free_after_its_holder(tmp_path):
    path = tmp_path / "locks" / "a.lock"
    with held(path) as had:
        assert had
        with held(path) as again, held(path, shared=True) as shared:
            assert not again and not shared
    with held(path, shared=True) as one, held(path, shared=True) as two, held(path) as alone:
        assert one and two and not alone
    holder = [sys.executable, "-c", "import sys, time; from pathlib import Path; from fire_llm.core.locks import held\n"
              "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)", str(path)]  # fmt: skip
    process = subprocess.Popen(holder, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with held(path) as had:
        assert not had
    process.kill()
    process.communicate()
    with held(path) as had:
        assert had


def test_a_run_and_a_sweep_keep_apart_and_sweeps_do_not(path, tmp_path):
    with only_run(tmp_path), pytest.raises(UserError, match="another run is writing into"):
        run_sweep(load_trials(path), tmp_path, workers=1, progress=False)
    with only_run(tmp_path, shared=True):
        with pytest.raises(UserError, match="another run is writing into"):
            run_recipe(load_recipe(path), tmp_path, progress=False)
        with only_run(tmp_path, shared=True):
            pass


def test_a_stage_that_another_worker_has_is_waited_for(whole, path, tmp_path, monkeypatch):
    """What the other one finishes meanwhile is not trained again."""
    folder, _, _ = whole
    trials = load_trials(path, TWO)
    done, jobs = jobs_of(load_trials(path, TWO, GRID), folder), jobs_of(trials, tmp_path)
    by_stage = {job.stage.folder: job for job in done if job.trial.name == "iterations=5"}
    trained, others = [], contextlib.ExitStack()
    assert others.enter_context(held(lock_for(tmp_path, jobs[0])))

    def sleep(_):
        link_duplicate(jobs[0], by_stage["first/seed-1"])
        others.close()

    monkeypatch.setattr(worker.time, "sleep", sleep)
    own = {job.stage.folder: job for job in jobs}

    def train(stage, *_):
        trained.append(stage.folder)
        link_duplicate(own[stage.folder], by_stage[stage.folder])

    monkeypatch.setattr(worker, "train", train)
    worker.work(jobs, tmp_path, Failures(tmp_path / ".workers" / "x"))
    assert trained == ["second/base/seed-1", "second/fire/seed-1"]


# ---- processes


@pytest.fixture
def sweep_process():
    """Start sweeps as the command line does, and leave none behind."""
    started = []

    def start(path: Path, output: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "fire_llm", "sweep", str(path), "--output", str(output), *more]
        # As in one of srun's tasks, which are no ranks of one training.
        environment = {**os.environ, "PMI_SIZE": "4"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _sweep_here(path: Path, output: Path, cache: str) -> None:
    """Sweep in a process of the fork server's, which has a cache of its own otherwise."""
    os.environ["FIRE_LLM_CACHE"] = cache
    trained = []
    real = worker.train
    worker.train = lambda stage, *more: (trained.append(f"{stage.run.folder.name}/{stage.folder}"), real(stage, *more))
    run_sweep(load_trials(path, TWO, GRID), output, workers=1, progress=False)
    (output / f"trained-{os.getpid()}.json").write_text(json.dumps(trained))


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_work_and_end_with_the_weights_of_one(whole, path, tmp_path):
    arguments = (path, tmp_path, os.environ["FIRE_LLM_CACHE"])
    processes = [PROCESSES.Process(target=_sweep_here, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    trained = [json.loads(file.read_text()) for file in tmp_path.glob("trained-*.json")]
    # Nothing was trained twice: the first phase and the base are those of either trial.
    assert sorted(stage.partition("/")[2] for own in trained for stage in own) == [
        "first/seed-1", "second/base/seed-1", "second/fire/seed-1", "second/fire/seed-1",
    ]  # fmt: skip
    for trial, stage in itertools.product(("iterations=1", "iterations=5"), ("first", "second/base", "second/fire")):
        assert equal(whole[0] / trial / stage / "seed-1", tmp_path / trial / stage / "seed-1")


@pytest.mark.slow
def test_two_workers_end_with_the_weights_of_one(whole, path, tmp_path, sweep_process):
    folder, _, _ = whole
    argv = (path, tmp_path, "--set", TWO[0], "--grid", GRID[0], "--workers=2")
    process = sweep_process(*argv, "--arm=base")
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and not list(tmp_path.glob("*/second/fire")), said
    process = sweep_process(*argv)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    for trial, stage in itertools.product(("iterations=1", "iterations=5"), ("first", "second/base", "second/fire")):
        assert equal(folder / trial / stage / "seed-1", tmp_path / trial / stage / "seed-1")
    # A line for each stage that is done.
    assert "6/6" in said and "iterations=5: second / fire, seed 1: " in said
    logs = [log.read_text() for log in (tmp_path / ".workers").iterdir()]
    assert len(logs) == 2 and not any("Error" in log or "Warning" in log for log in logs), logs


def slow(path: Path, folder: Path) -> Path:
    """Write the recipe with a first phase of many short steps, to be cut off in, and a seed a worker."""
    data = yaml.safe_load(path.read_text())
    data["phases"][0]["steps"], data["save_every_steps"], data["seed"] = 200, 20, [1, 2]
    (folder / "slow.yaml").write_text(yaml.safe_dump(data))
    return folder / "slow.yaml"


def until(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_ended_goes_on_to_the_same_weights(path, tmp_path, number, sweep_process):
    import psutil

    recipe, begun = slow(path, tmp_path), tmp_path / "s" / "first" / "seed-1"
    process = sweep_process(recipe, tmp_path / "s", "--workers=2")
    until(lambda: checkpoints(begun), process)
    workers = psutil.Process(process.pid).children()
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), said
    # Workers end with the one that started them, killed or not, and save first.
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]
    assert final_checkpoint(begun) is None
    process = sweep_process(recipe, tmp_path / "s", "--workers=2")
    assert process.communicate(timeout=PATIENCE) and process.returncode == 0
    run_recipe(load_recipe(recipe), tmp_path / "whole", progress=False)
    for stage in ("first/seed-1", "second/fire/seed-1", "first/seed-2", "second/fire/seed-2"):
        assert equal(tmp_path / "s" / stage, tmp_path / "whole" / stage)


@pytest.mark.slow
def test_a_worker_that_is_killed_leaves_its_stage_to_another(path, tmp_path, sweep_process):
    import psutil

    recipe, begun = slow(path, tmp_path), tmp_path / "s" / "first" / "seed-1"
    process = sweep_process(recipe, tmp_path / "s", "--workers=2")
    until(lambda: checkpoints(begun), process)
    psutil.Process(process.pid).children()[0].kill()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    run_recipe(load_recipe(recipe), tmp_path / "whole", progress=False)
    for stage in ("second/fire/seed-1", "second/fire/seed-2"):
        assert equal(tmp_path / "s" / stage, tmp_path / "whole" / stage)


@pytest.mark.slow
def test_ranks_train_one_trial_after_another(whole, path, tmp_path, sweep_process):
    more = ["--set", TWO[0], "--grid", GRID[0], "--num-processes=2", "--accelerate-config"]
    (tmp_path / "cpu.yaml").write_text("{distributed_type: MULTI_CPU, use_cpu: true, num_processes: 2}")
    process = sweep_process(path, tmp_path / "s", *more, str(tmp_path / "cpu.yaml"))
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    one, two = (final_checkpoint(tmp_path / "s" / f"iterations={n}" / "second/base/seed-1") for n in (1, 5))
    assert os.path.samefile(one / "model.safetensors", two / "model.safetensors")
    assert (tmp_path / "s" / "report.html").is_file()


# ---- what is told


def test_the_page_and_the_table_hold_every_arm_once(whole, capsys, tmp_path):
    folder, sweep, _ = whole
    show(sweep, folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('href="iterations%3D5/report.html"') == 1 and (folder / "iterations=5" / "report.html").is_file()
    grey = re.findall(rf'data-arm="([^"]+)"><span style="color:{NEUTRAL}"', page)
    assert grey == ["base"]  # the arm without a reset, and no other
    out = capsys.readouterr().out
    assert f"report: {folder / 'report.html'}" in out.replace("\n", "")
    rows = Summary(sweep.trials, sweep.results).tables()[0].rows
    # The base does not depend on the option that is swept.
    assert [row.names for row in rows] == [
        ("base", "all"), ("fire", "iterations=1"), ("fire", "iterations=5"),
    ]  # fmt: skip
    nll = {trial: r.arms["fire"].final["b"].nll for trial, r in zip((1, 5), sweep.results, strict=True)}
    assert [row.cells[1] for row in rows[1:]] == [f"{nll[1]:.4f}", f"{nll[5]:.4f}"]
    lines = Summary(sweep.trials, sweep.results).lines("phases.1.arms.fire.iterations", "b")
    assert lines["fire", ""] == [(1, [nll[1]]), (5, [nll[5]])]


def test_values_of_many_parts_are_told_in_words_and_drawn_a_line_each():
    value = {"web & text": 0.9, 'a "b"': 0.1, "arms": {"fire": {"iterations": 5}}, "betas": [0.9, 0.95], "none": []}
    said = 'web & text 0.9, a "b" 0.1, arms (fire (iterations 5)), betas (0.9, 0.95), none (none)'
    assert words(value) == said and words("x") == "x" and words(True) == "true" and words(None) == "null"
    points = [("web & text 1.0", [2.0]), ('web & text 0.9, a "b" 0.1', [1.0])]
    drawn = key_figure({("fire", ""): points}, "data", palette(["fire"]))
    assert drawn is not None and drawn["layout"]["xaxis"]["type"] == "category"
    # Plotly reads &amp; and <br> in a label, and would show &quot; as it is written.
    assert list(drawn["data"][0]["x"]) == ["web &amp; text 1.0", 'web &amp; text 0.9<br>a "b" 0.1']


def test_a_sweep_without_arms_compares_its_last_phase(path, tmp_path):
    more = ["phases.1.arms=null"]
    sweep = run_sweep(load_trials(path, more, ["optimizer.lr=[1.0e-3,1.0e-2]"]), tmp_path, workers=1, progress=False)
    rows = Summary(sweep.trials, sweep.results).tables()[0].rows
    assert [row.names for row in rows] == [("second", "lr=0.001"), ("second", "lr=0.01")]
    finals = [r.phases[-1].final["b"].nll for r in sweep.results]
    assert [row.best for row in rows] == [value == min(finals) for value in finals]


def test_a_dry_run_says_what_is_there_and_writes_nothing(whole, path, tmp_path, capsys):
    folder, _, _ = whole
    print_trials(load_trials(path, TWO, GRID), folder)
    assert capsys.readouterr().out.count("finished") >= 6
    assert main(["sweep", str(path), "--grid", GRID[0], "--dry-run", "--output", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    # 10 steps of the first phase once, 8 of the second twice, of 128 tokens.
    assert "2 trials of 4 stages, 3 of them different" in out and f"{(10 + 2 * 8) * 128:,} tokens" in out
    assert "as in iterations=1" in out and not (tmp_path / "s").exists()


def test_check_tells_the_trials_and_run_runs_the_recipe_as_written(path, tmp_path, capsys):
    more = ["--set", "sweep={seed: [1, 2, 3]}"]
    assert main(["check", str(path), *more]) == 0
    assert "3 trials of 6 stages, 6 of them different" in capsys.readouterr().out
    assert main(["run", str(path), *more, "--output", str(tmp_path / "r")]) == 0
    assert "this runs the recipe as it is written; fire-llm sweep runs its grid" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "r" / "first").iterdir()] == ["seed-1"]
