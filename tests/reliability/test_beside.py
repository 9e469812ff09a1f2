"""Checkpoints that a thread writes while training goes on: the same files, of the step at which they were begun."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama
from support.training import Samples, arguments
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TrackioCallback, WandbCallback

from fire_llm import ContinualTrainer, UserError
from fire_llm.core.atomic import checkpoints
from fire_llm.core.manifest import damage
from fire_llm.core.signals import Stopped, signals_handled
from fire_llm.evaluation import texts
from fire_llm.training import EvaluationSet, RecyclingCallback, saving, writer
from fire_llm.training.rounded import rounded
from fire_llm.training.trackers import reads_checkpoints
from fire_llm.training.writer import Writer, on_host

SAVE = ContinualTrainer._save


def trainer_of(model, folder, callbacks=(), sets=None, **changes) -> ContinualTrainer:
    settings = {"async_save": True, "keep_last": 9, **changes}
    return ContinualTrainer(model, arguments(folder, **settings), Samples(), sets, callbacks)


def steps(folder: Path) -> list[int]:
    return [step for _, step in checkpoints(folder)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights_of(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class At(TrainerCallback):
    """Do something at the end of a step, or when it was evaluated."""

    def __init__(self, step: int, do, when: str = "on_step_end") -> None:
        def call(args, state, control, **_):
            if state.global_step == step:
                do()

        setattr(self, when, call)


@pytest.fixture
def slow(monkeypatch):
    """Have the thread wait, before it writes anything, until the event is set; return the event and a log."""
    go, log = threading.Event(), []

    def wait(trainer, output_dir, state_dict=None):
        if threading.current_thread() is not threading.main_thread():
            log.append(Path(output_dir).name)
            assert go.wait(60)
        SAVE(trainer, output_dir, state_dict=state_dict)

    monkeypatch.setattr(ContinualTrainer, "_save", wait)
    return SimpleNamespace(go=go, log=log)


@pytest.fixture
def begun(monkeypatch) -> list[int]:
    """Return a list that grows by one at each checkpoint that a thread writes."""
    start, found = Writer.start, []
    monkeypatch.setattr(Writer, "start", lambda self, work: (found.append(1), start(self, work))[1])
    return found


KINDS = {
    "gpt2": (tiny_gpt2, {}),  # its head is tied to its embeddings
    "llama": (tiny_llama, {}),
    "muon": (tiny_gpt2, {"muon": True}),
    "sgd": (tiny_gpt2, {"optim": "sgd"}),  # whose state is empty
    "weights alone": (tiny_gpt2, {"save_only_model": True}),
    "fp16": (tiny_gpt2, {"fp16": True}),
}


@pytest.mark.parametrize(
    "kind", [k if k in ("gpt2", "muon") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_the_files_are_those_of_a_save_that_is_waited_for(kind, tmp_path, monkeypatch, begun):
    """Byte for byte, the list with their hashes among them."""
    build, options = KINDS[kind]
    save = ContinualTrainer._save_checkpoint

    def both(trainer, *given):
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: 7.0))
        for beside in (False, True):
            trainer.args.async_save, trainer.args.output_dir = beside, str(tmp_path / str(beside))
            save(trainer, *given)

    monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", both)
    recycling = [RecyclingCallback("continual_backprop", seed=1)] if kind == "gpt2" else []
    trainer_of(build(), tmp_path / "none", recycling, **options).train()
    assert len(begun) == 2  # the last step is waited for
    waited, beside = files(tmp_path / "False"), files(tmp_path / "True")
    assert {f"checkpoint-{n}/{name}" for n in (4, 8, 12) for name in ("manifest.json", "model.safetensors")} <= {
        *waited
    }
    assert ("checkpoint-4/optimizer.pt" in waited) == (kind != "weights alone")
    assert ("checkpoint-4/recycling.safetensors" in waited) == (kind == "gpt2")
    assert waited.keys() == beside.keys()
    assert [name for name in waited if waited[name] != beside[name]] == []


def test_it_holds_the_step_at_which_it_was_begun(tmp_path, slow):
    """The thread writes nothing before training has gone on for three steps."""
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    waited = trainer_of(tiny_gpt2(**dropout), tmp_path / "waited", async_save=False)
    waited.train()
    seen = []
    release = At(7, lambda: (seen.extend([*slow.log, *steps(tmp_path / "beside")]), slow.go.set()))
    beside = trainer_of(tiny_gpt2(**dropout), tmp_path / "beside", [release])
    beside.train()
    assert seen == ["checkpoint-4"] and steps(tmp_path / "beside") == [4, 8, 12]
    assert same(weights_of(beside.model), weights_of(waited.model))
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        for step in (4, 8):
            written = (tmp_path / way / f"checkpoint-{step}" / name for way in ("waited", "beside"))
            assert next(written).read_bytes() == next(written).read_bytes(), (name, step)
    for step in (4, 8):
        resumed = trainer_of(tiny_gpt2(seed=9, **dropout), tmp_path / f"from-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "beside" / f"checkpoint-{step}"))
        assert same(weights_of(resumed.model), weights_of(waited.model))
        assert resumed.hash_of_batches() == waited.hash_of_batches()


def test_two_saves_in_a_row_wait_for_each_other(tmp_path, monkeypatch):
    running, most = [], []

    def write(trainer, output_dir, state_dict=None):
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.05)
        SAVE(trainer, output_dir, state_dict=state_dict)
        running.pop()

    monkeypatch.setattr(ContinualTrainer, "_save", write)
    trainer_of(tiny_gpt2(), tmp_path, save_steps=1, keep_last=12).train()
    assert steps(tmp_path) == [*range(1, 13)] and max(most) == 1
    assert all(damage(folder) is None for folder, _ in checkpoints(tmp_path))


@pytest.mark.parametrize("at_end", [False, True])
def test_a_full_disk_is_told_with_the_step_and_nothing_is_lost(at_end, tmp_path, monkeypatch, slow):
    save, whole = torch.save, trainer_of(tiny_gpt2(), tmp_path / "whole")
    slow.go.set()
    whole.train()

    def refuse(data, path, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread() and "checkpoint-8" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(data, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", refuse)
    if at_end:  # nothing looks at it before the last step's save
        monkeypatch.setattr(Writer, "check", lambda self: None)
    trainer = trainer_of(tiny_gpt2(), tmp_path / "cut", keep_last=1)
    with pytest.raises(UserError, match=r"the disk is full[^$]*\nStep 8 was not saved. What was saved before stays"):
        trainer.train()
    assert trainer.state.global_step == 12 if at_end else 9 <= trainer.state.global_step <= 12
    assert steps(tmp_path / "cut") == [4] and damage(tmp_path / "cut" / "checkpoint-4") is None
    assert not list((tmp_path / "cut").glob("*.partial"))
    monkeypatch.setattr(torch, "save", save)
    resumed = trainer_of(tiny_gpt2(seed=9), tmp_path / "cut", keep_last=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert same(weights_of(resumed.model), weights_of(whole.model))
    assert steps(tmp_path / "cut") == [12]


def test_what_ends_training_is_raised_and_a_failed_write_is_said_beside_it(tmp_path, monkeypatch, slow, capsys):
    def fail() -> None:
        slow.go.set()
        raise FloatingPointError("a fault of training")

    monkeypatch.setattr(saving, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(FloatingPointError, match="a fault of training"):
        trainer_of(tiny_gpt2(), tmp_path, [At(5, fail)], title="first").train()
    assert "first: cannot write below" in (said := capsys.readouterr().err) and "Step 4 was not saved" in said


def test_any_other_fault_of_a_write_is_raised_with_its_step(tmp_path, monkeypatch, slow):
    slow.go.set()
    monkeypatch.setattr(saving, "write_manifest", lambda *_: 1 // 0)
    with pytest.raises(RuntimeError, match="step 4 was not saved: ZeroDivisionError") as error:
        trainer_of(tiny_gpt2(), tmp_path).train()
    assert isinstance(error.value.__cause__, ZeroDivisionError) and not steps(tmp_path)


def test_it_is_on_the_disk_when_training_is_ended_by_an_error(tmp_path, slow):
    def fail() -> None:
        slow.go.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(tiny_gpt2(), tmp_path, [At(5, fail)]).train()
    assert steps(tmp_path) == [4] and damage(tmp_path / "checkpoint-4") is None


def test_a_signal_while_one_is_written_ends_with_both(tmp_path, slow):
    def signalled() -> None:
        assert slow.log == ["checkpoint-4"]
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.2, slow.go.set).start()

    with signals_handled(), pytest.raises(Stopped, match="saved at step 6"):
        trainer_of(tiny_gpt2(), tmp_path, [At(5, signalled, "on_step_begin")]).train()
    assert steps(tmp_path) == [4, 6]
    assert all(damage(folder) is None for folder, _ in checkpoints(tmp_path))


def test_pruning_keeps_what_was_best_when_the_save_was_begun(tmp_path, monkeypatch, slow):
    """The best moves on, from step 2 to 6, while step 5 is written: step 2 stays until step 6 is there."""
    nll = iter([1.0, 2.0, 0.5, 3.0, 3.0, 3.0])
    fields = ("perplexity", "bits_per_byte", "tokens", "bytes")
    measured = lambda *_, **__: SimpleNamespace(nll=next(nll), **dict.fromkeys(fields, 1.0))  # noqa: E731
    monkeypatch.setattr(texts, "perplexity", measured)
    found = []

    def look() -> None:
        assert slow.log[-1] == "checkpoint-5" and trainer.state.best_global_step == 6
        slow.go.set()
        trainer.settle()
        found.extend(steps(tmp_path))

    first = At(3, slow.go.set), At(4, slow.go.clear)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 5, "best_corpora": {"c": 1.0}}
    sets = {"c": EvaluationSet(torch.arange(97), 300, 0)}
    callbacks = [*first, At(6, look, "on_evaluate"), At(7, slow.go.set)]
    trainer = trainer_of(tiny_gpt2(), tmp_path, callbacks, sets, keep_best=True, keep_last=1, **options)
    trainer.train()
    assert found == [2, 5] and steps(tmp_path) == [6, 12]


def test_a_write_that_was_killed_is_removed_by_the_next_run(tmp_path, monkeypatch):
    trainer_of(tiny_gpt2(), tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    left = tmp_path / "run" / "checkpoint-8.partial" / "checkpoint-8"
    left.mkdir(parents=True)
    (left / "scheduler.pt").write_bytes(b"half")
    trainer_of(tiny_gpt2(seed=9), tmp_path / "run").train(str(tmp_path / "run" / "checkpoint-4"))
    assert steps(tmp_path / "run") == [4, 8, 12] and not list((tmp_path / "run").glob("*.partial"))
    ours, theirs = (
        json.loads((tmp_path / n / "checkpoint-12" / "manifest.json").read_text()) for n in ("run", "whole")
    )
    assert ours["files"]["model.safetensors"] == theirs["files"]["model.safetensors"]
    assert ours["files"]["optimizer.pt"] == theirs["files"]["optimizer.pt"]


# ---- when it is waited for all the same


@pytest.mark.parametrize("way", ["cpu", "off", "memory"])
def test_what_is_waited_for(way, tmp_path, monkeypatch, begun):
    if way == "memory":
        monkeypatch.setattr(writer, "free_memory", lambda: 1000)
    trainer_of(tiny_gpt2(), tmp_path, async_save={"cpu": None, "off": False, "memory": True}[way]).train()
    assert not begun and steps(tmp_path) == [4, 8, 12]


def test_a_checkpoint_is_not_written_in_the_middle_of_a_pass_that_reads_parameters_in_bf16(tmp_path, begun):
    """transformers would write bf16 as the dtype of weights that are fp32."""
    model = tiny_gpt2()
    with rounded(model, torch.bfloat16):
        model.save_pretrained(tmp_path / "amid", state_dict=tiny_gpt2().state_dict())
    assert json.loads((tmp_path / "amid" / "config.json").read_text())["dtype"] == "bfloat16"
    trainer_of(tiny_gpt2(), tmp_path / "run", bf16=True, bf16_params=True).train()
    assert not begun and steps(tmp_path / "run") == [4, 8, 12]
    for folder, _ in checkpoints(tmp_path / "run"):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_on_an_accelerator_a_callback_that_looks_at_saves_finds_the_folder(tmp_path, monkeypatch):
    class Looks(TrainerCallback):
        def on_save(self, args, state, control, **_):
            pass

    def beside(callbacks) -> bool:
        trainer = trainer_of(tiny_gpt2(), tmp_path, callbacks, async_save=None)
        trainer.state.max_steps = 12
        trainer.args = SimpleNamespace(
            async_save=None,
            bf16_params=False,
            push_to_hub=False,
            enable_jit_checkpoint=False,
            device=torch.device("cuda"),
        )
        return trainer.saver.writes_beside()

    assert beside([]) and not beside([Looks()])
    monkeypatch.delenv("WANDB_LOG_MODEL", raising=False)
    assert beside([TrackioCallback()]) and beside([WandbCallback()])
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    assert not beside([WandbCallback()])
    mlflow = MLflowCallback.__new__(MLflowCallback)  # which may not be installed
    mlflow._auto_end_run = False
    for value, read in (("on", True), ("Yes", True), ("1", True), ("true", True), ("false", False)):
        monkeypatch.setenv("HF_MLFLOW_LOG_ARTIFACTS", value)
        assert reads_checkpoints(mlflow) is read


def test_copies_share_what_the_originals_share():
    whole = torch.arange(6.0).view(2, 3)
    original = {"a": whole, "b": whole.t(), "c": [whole, (1, whole)], "d": torch.tensor(3), "e": {}, "f": (0.9, 0.95)}
    (copied,) = on_host(original)
    assert copied["f"] is original["f"] and copied["c"][0] is copied["a"] and copied["c"][1][1] is copied["a"]
    whole.zero_()
    assert copied["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and copied["b"].stride() == (1, 3)
    copied["a"][0, 0] = 7
    assert copied["b"][0, 0] == 7 and copied["d"] == 3


@pytest.mark.parametrize(
    "value", [torch.arange(6)[2:], torch.arange(6)[::2], {1, 2}, torch.nn.Parameter(torch.ones(2))]
)
def test_what_could_be_written_otherwise_is_not_copied(value):
    assert on_host({"value": value}) is None
