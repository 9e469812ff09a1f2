"""Trackers: what they show is what the results say, once, and they change nothing, whatever becomes of them."""

from __future__ import annotations

import json
import math
import random
import struct
from argparse import Namespace
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import tiny_gpt2
from support.tiny_recipe import recipe
from support.training import Samples, arguments, losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from fire_llm import ContinualTrainer, UserError, load_recipe, run_recipe
from fire_llm.cli.launching import command_line
from fire_llm.cli.parser import parser, set_report_to
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.estimate import plan
from fire_llm.experiment.stages import expand
from fire_llm.experiment.train import train
from fire_llm.training.trackers import RECORD, check_trackers

NAMES = ["tensorboard", "trackio", "wandb"]
STAGES = ("first/seed-1", "second/fire/seed-1")
SPEED = {
    "created", "seconds", "measuring_seconds", "copying_seconds", "tokens_per_second", "peak_memory_bytes",
    "data_wait_share",
}  # fmt: skip


class Interrupt(TrainerCallback):
    """End training as Ctrl-C does, after a step that has been reported and not been saved."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            random.random(), np.random.rand()  # what draws from them has no part in the weights
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run a recipe without trackers, and with three of them, interrupted at step 7; return folders and results."""
    folder = tmp_path_factory.mktemp("trackers")
    settings = {"every_steps": 5, "max_tokens": 600, "diagnostics_every_steps": 10}
    path, averaged = recipe(folder, name="tracked", evaluate=settings), "phases.0.ema={decay: 0.9}"
    plain = run_recipe(load_recipe(path, [averaged]), folder / "plain", progress=False, workers=1)
    tracked = load_recipe(path, [averaged, f"report_to={json.dumps(NAMES)}"])
    output = folder / "output"
    run = RunContext(tracked, output)
    with pytest.raises(KeyboardInterrupt):
        train(expand(run)[0], run, [Interrupt(7)])
    return folder / "plain", plain, output, run_recipe(tracked, output, progress=False, workers=1)


def without_speed(data):
    if isinstance(data, dict):
        return {key: without_speed(value) for key, value in data.items() if key not in SPEED | {"report_to"}}
    return [without_speed(value) for value in data] if isinstance(data, list) else data


def test_results_and_weights_are_those_without_trackers(runs):
    plain_folder, plain, folder, tracked = runs
    assert without_speed(tracked) == without_speed(plain)
    for stage in STAGES:
        one, other = (json.loads((at / stage / "unit.json").read_text()) for at in (folder, plain_folder))
        assert one.keys() == other.keys() and all(one[key] == other[key] for key in one if key != "reset")  # in seconds
    assert not [path for pattern in ("*tfevents*", RECORD, "wandb") for path in plain_folder.rglob(pattern)]


def of_tensorboard(folder, stage):
    events = EventAccumulator(str(folder / stage))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_trackio(folder, stage):
    from trackio.sqlite_storage import SQLiteStorage

    found = defaultdict(list)
    for row in SQLiteStorage.get_logs("tracked", " / ".join(["tracked", folder.name, *stage.split("/")])):
        for tag, value in row.items():
            if tag.startswith(("train/", "eval/")) and tag != "train/global_step":
                found[tag].append((row["train/global_step"], value))
    return found


def wandb_records(path):
    """Read W&B's file: blocks of 32 KiB after a header of 7 bytes, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def of_wandb(folder, stage):
    found, name = defaultdict(list), " / ".join(["tracked", folder.name, *stage.split("/")])
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        records = list(wandb_records(path))
        run = next(r.run for r in records if r.HasField("run"))
        if run.display_name != name:
            continue
        assert (run.project, run.run_group, run.job_type) == ("tracked", folder.name, stage.partition("/")[0])
        assert run.run_id == json.loads((folder / stage / RECORD).read_text())["wandb"]["id"]
        for record in records:
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for tag in row.keys() - {"train/global_step"}:
                if tag.startswith(("train/", "eval/")):
                    found[tag].append((row["train/global_step"], row[tag]))
    return found


@pytest.mark.parametrize("read", [of_tensorboard, of_trackio, of_wandb])
def test_curves_are_those_of_the_results_each_step_once(runs, read):
    *_, folder, results = runs
    expected = {STAGES[0]: results["phases"][0], STAGES[1]: results["arms"]["fire"]["runs"][0]}
    for stage, run in expected.items():
        shown = read(folder, stage)
        for tag, points in shown.items():
            assert max(Counter(step for step, _ in points).values()) == 1 or tag == "train/epoch", (tag, points)
            assert [step for step, _ in points] == sorted(step for step, _ in points), tag
        curve = run["curve"]
        for corpus in "ab":
            for measure in ("nll", "bits_per_byte", "perplexity"):
                points = [(e["step"], e["eval"][corpus][measure]) for e in curve if e["eval"]]
                assert shown[f"eval/{corpus}_{measure}"] == [(s, pytest.approx(v, rel=1e-6)) for s, v in points]
                averaged = [(e["step"], e["ema"][corpus][measure]) for e in curve if corpus in e["ema"]]
                found = shown.get(f"train/ema_{corpus}_{measure}", [])
                assert found == [(s, pytest.approx(v, rel=1e-6)) for s, v in averaged] and (found or stage != STAGES[0])
        for tag, key in (("train/loss", "train_loss"), ("train/learning_rate", "learning_rate")):
            points = [(e["step"], e[key]) for e in curve if e[key] is not None]
            assert shown[tag] == [(s, pytest.approx(v, rel=1e-6)) for s, v in points]
        measured = [(e["step"], e["diagnostics"]["srank"]) for e in curve if e.get("diagnostics")]
        assert shown["train/diag_srank"] == measured != []
        for tag in ("grad_norm", "tokens_per_second", "peak_memory_bytes", "data_wait_share"):
            assert [s for s, _ in shown[f"train/{tag}"]] == [s for s, _ in shown["train/loss"]]
        averages = [(e["step"], e["ema"]["a"]["nll"]) for e in curve if e["ema"]]
        assert shown.get("train/ema_a_nll", []) == [(s, pytest.approx(v, rel=1e-6)) for s, v in averages]
        lengths = {tag for tag in shown if tag.endswith(("_tokens", "_bytes"))}
        assert lengths == {"train/peak_memory_bytes"}


def test_the_reset_is_shown_in_numbers(runs):
    *_, folder, results = runs
    shown = {tag: points for tag, points in of_tensorboard(folder, STAGES[1]).items() if "reset" in tag}
    jump = results["arms"]["fire"]["runs"][0]["loss_jump"]
    touched = json.loads((folder / STAGES[1] / "reset.json").read_text())["touched"]
    numbers = {
        "train/reset_sfe": sum(row["sfe"] for row in touched),
        "train/reset_norm_after": math.hypot(*(row["norm_after"] for row in touched)),
        "train/reset_dfi_before": np.mean([r["dfi_before"] for r in touched if r["dfi_before"] is not None]),
        "eval/a_nll_before_reset": jump["a"]["before"],
        "eval/a_undone_by_reset": jump["a"]["undone"],
    }
    for tag, number in numbers.items():
        assert shown[tag] == [(0, pytest.approx(number, rel=1e-5))]


def test_the_config_is_the_recipe_and_the_stage(runs):
    import trackio

    *_, folder, _ = runs
    config = {run.name: run.config for run in trackio.Api().runs("tracked")}[
        "tracked / output / second / fire / seed-1"
    ]
    assert (config["phase"], config["arm"], config["seed"]) == ("second", "fire", 1)
    assert config["recipe"]["batch"] == json.loads((folder / "recipe.json").read_text())["batch"]
    events = EventAccumulator(str(folder / STAGES[1]))
    events.Reload()
    assert "arm: fire" in events.Tensors("stage/text_summary")[0].tensor_proto.string_val[0].decode()


def test_another_run_of_the_same_name_gets_a_name_of_its_own(runs, tmp_path):
    import trackio

    *_, output, _ = runs
    again = tmp_path / output.name
    run = RunContext(load_recipe(recipe(tmp_path, name="tracked"), ["report_to=trackio"]), again)
    train(expand(run)[0], run)
    name = json.loads((again / STAGES[0] / RECORD).read_text())["trackio"]["name"]
    assert name.startswith("tracked / output / first / seed-1 / ")
    assert {"tracked / output / first / seed-1", name} <= {known.name for known in trackio.Api().runs("tracked")}


def test_a_tracker_that_is_named_later_is_sent_what_it_missed(tmp_path):
    path = recipe(tmp_path)
    for settings, callbacks in (([], [Interrupt(7)]), (["report_to=tensorboard"], [])):
        run = RunContext(load_recipe(path, settings), tmp_path / "out")
        with pytest.raises(KeyboardInterrupt) if callbacks else nullcontext():
            train(expand(run)[0], run, callbacks)
    state = json.loads((tmp_path / "out" / STAGES[0] / "checkpoint-10" / "trainer_state.json").read_text())
    shown = of_tensorboard(tmp_path / "out", STAGES[0])
    for tag, key in (("train/loss", "loss"), ("eval/a_nll", "eval_a_nll")):
        known = [(log["step"], pytest.approx(log[key], rel=1e-6)) for log in state["log_history"] if key in log]
        assert shown[tag] == known and known[0][0] < 4


class Broken:
    """Write two numbers, then fail as a network does."""

    def __init__(self):
        self.calls = []

    def add_scalar(self, tag, value, step):
        self.calls.append(step)
        random.random(), np.random.rand(), torch.rand(1)
        if len(self.calls) > 2:
            raise OSError("the network is gone\nfor good")

    def add_text(self, *_):
        pass

    def flush(self):
        pass

    def close(self):
        raise OSError("and nobody is there to close it")


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(tmp_path, capsys):
    model = {"resid_pdrop": 0.1}  # dropout draws from torch's generator
    writer = Broken()
    trainers = []
    for callbacks in ([], [TensorBoardCallback(writer)]):
        settings = arguments(tmp_path / str(len(callbacks)))
        trainers.append(ContinualTrainer(tiny_gpt2(**model), settings, Samples(), callbacks=callbacks))
        trainers[-1].train()
    alone, tracked = trainers
    assert losses(tracked) == losses(alone)
    assert all(map(torch.equal, alone.model.state_dict().values(), tracked.model.state_dict().values()))
    said = [line for line in capsys.readouterr().err.splitlines() if "tensorboard" in line]
    assert said == ["training: tensorboard failed and is left out from step 1 on: the network is gone"]
    assert len(writer.calls) == 3
    tracked.remove_callback(TensorBoardCallback)  # by its type, as in any Trainer
    assert not any(isinstance(callback, TensorBoardCallback) for callback in tracked.callback_handler.callbacks)


def test_the_arguments_of_a_trainer_are_as_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = ContinualTrainer(tiny_gpt2(), arguments(tmp_path, report_to="tensorboard", save_strategy="no"), Samples())
    trainer.train()
    shown = of_tensorboard(tmp_path, "events")
    assert [value for _, value in shown["train/loss"]] == pytest.approx(losses(trainer), rel=1e-6)
    with pytest.raises(UserError, match="tensorbord"):
        ContinualTrainer(tiny_gpt2(), arguments(tmp_path, report_to="tensorbord"), Samples())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tensorbord", r"no tracker 'tensorbord'\. Did you mean 'tensorboard'\? Known: .*wandb"),
        ("[wandb, all]", "no tracker 'all'"),
        ("[trackio, trackio]", "'trackio' is named twice"),
        ("3", "report_to"),
    ],
)
def test_names_that_are_none_are_faults_of_the_recipe(tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        load_recipe(recipe(tmp_path), [f"report_to={given}"])


def test_none_is_none(tmp_path):
    path = recipe(tmp_path)
    for given in ("none", "[]", "[none]", "null"):
        assert load_recipe(path, [f"report_to={given}"]).report_to == []
    assert load_recipe(path, ["report_to=trackio"]).report_to == ["trackio"]


def test_what_is_not_installed_is_told_by_check_and_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    wanted = load_recipe(recipe(tmp_path), ["report_to=[tensorboard, trackio]"])
    said = r"tensorboard cannot be used: .*pip install tensorboard\n  report_to: trackio .*pip install trackio"
    with pytest.raises(UserError, match=said):
        plan(wanted)
    with pytest.raises(UserError, match=said):
        run_recipe(wanted, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_wandb_without_a_login_is_refused(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    try:
        with pytest.raises(UserError, match=r"wandb cannot be used: nobody is logged in.*WANDB_MODE=offline"):
            check_trackers(["wandb"], "tiny")
    finally:
        wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"], "tiny", begin=True)
    wandb.teardown()


def test_a_folder_or_project_that_trackio_cannot_have_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="tiny_configs"):
        check_trackers(["trackio"], "tiny_configs")
    from trackio.sqlite_storage import SQLiteStorage

    (tmp_path / "file").write_text("")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "file" / "below")
    with pytest.raises(UserError, match="Set TRACKIO_DIR to a folder of yours"):
        check_trackers(["trackio"], "never-written", begin=True)
    assert not SQLiteStorage.get_project_db_path("never-written").exists()


def test_every_integration_of_the_installed_transformers_is_allowed_and_tried(tmp_path):
    path = recipe(tmp_path)
    for name in INTEGRATION_TO_CALLBACK:
        assert load_recipe(path, [f"report_to={name}"]).report_to == [name]
    missing = [name for name in INTEGRATION_TO_CALLBACK if name not in get_available_reporting_integrations()]
    for name in missing:
        with pytest.raises(UserError, match=rf"{name} cannot be used: .*(pip install|KUBEFLOW)"):
            check_trackers([name], "tiny")


def test_the_option_is_the_key_on_every_rank(tmp_path):
    for verb in (["run", "demo"], ["sweep", "demo"], ["demo"]):
        given = parser().parse_args(
            [*verb, "--set", "seed=2", "--report-to", "trackio", "--report-to=wandb,tensorboard"]
        )
        set_report_to(given)
        assert given.set == ["seed=2", 'report_to=["trackio", "wandb", "tensorboard"]']
        again: Namespace = parser().parse_args(command_line(given))
        set_report_to(again)
        assert again.set == given.set
        overridden = load_recipe(recipe(tmp_path, report_to="mlflow"), given.set)
        assert overridden.report_to == ["trackio", "wandb", "tensorboard"]
    none = parser().parse_args(["run", "demo", "--report-to", "none"])
    set_report_to(none)
    assert load_recipe(recipe(tmp_path, report_to="mlflow"), none.set).report_to == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--workers", "2"], ["--num-processes", "2"]])
def test_stages_in_processes_of_their_own_report_once(tmp_path, how):
    import subprocess
    import sys

    arms = "phases.1.arms={base: keep, fire: {method: fire}}"
    command = [sys.executable, "-m", "fire_llm", "run", str(recipe(tmp_path)), "--output", str(tmp_path / "out")]
    options = ["--report-to", "tensorboard", "--report-to", "wandb", "--set", arms, *how]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is left out" not in done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for arm in ("base", "fire"):
        shown = of_tensorboard(tmp_path / "out", f"second/{arm}/seed-1")
        curve = results["arms"][arm]["runs"][0]["curve"]
        expected = [(e["step"], e["eval"]["b"]["nll"]) for e in curve if e["eval"]]
        assert shown["eval/b_nll"] == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected]
    runs = sorted(path.name for path in Path(tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(runs) == 3
