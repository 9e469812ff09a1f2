"""What a script does with Trainer beside training: processing classes, the Hub, signals, collators, its arguments."""

from __future__ import annotations

import copy
import os
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import transformers.trainer
from support.models import tiny_gpt2
from support.ranks import run_ranks
from support.training import Samples, arguments, losses, train
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fire_llm import ContinualTrainer, UserError
from fire_llm.core.atomic import checkpoints
from fire_llm.core.manifest import damage
from fire_llm.core.signals import Stopped, signals_handled
from fire_llm.training import ResetCallback
from fire_llm.training.throughput import MEASURES

KINDS = (Trainer, ContinualTrainer)


def tokenizer():
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(["<pad>", *(f"w{i}" for i in range(96))])}
    made = Tokenizer(models.WordLevel(vocab=words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<pad>")


class Instructions(torch.utils.data.Dataset):
    """Rows of 6 to 12 tokens whose prompts, of 1 to 4, are not scored."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(i)
        ids = torch.randint(1, 97, (6 + i % 7,), generator=draw).tolist()
        prompt = 1 + i % 4
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def plain(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "optim": "adamw_torch",
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def both(folder, **given):
    """Train with `Trainer` and with ours."""
    changes = given.pop("changes", {})
    for kind in KINDS:
        given.setdefault("data_collator", DataCollatorForSeq2Seq(tokenizer()))
        data = given.pop("train_dataset", Instructions())
        trainer = kind(tiny_gpt2(), plain(folder / kind.__name__, **changes), train_dataset=data, **given)
        trainer.train()
        yield trainer


@pytest.mark.parametrize("packed", [False, True])
def test_masked_prompts_count_as_under_trainer(packed, tmp_path):
    collator = DataCollatorWithFlattening() if packed else DataCollatorForSeq2Seq(tokenizer())
    stock, ours = both(tmp_path, data_collator=collator)
    assert losses(ours) == pytest.approx(losses(stock), abs=2e-5)
    for (name, a), b in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name
    found, wanted = (t.predict(Instructions()) for t in (ours, stock))
    assert found.metrics["test_loss"] == pytest.approx(wanted.metrics["test_loss"], abs=1e-5)
    assert found.metrics.keys() == wanted.metrics.keys()
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(a, dict):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["processing_class", "data_collator"])
def test_with_plain_arguments_logs_and_files_are_those_of_trainer(name, tmp_path):
    """The tokenizer beside each checkpoint, the pickled arguments, the keys of each log; and ours in addition."""
    options = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2}
    given = {"processing_class": tokenizer()} if name == "processing_class" else {}  # the collator has one
    stock, ours = both(tmp_path, eval_dataset=Instructions(), changes=options, **given)
    histories = [[(e["step"], sorted(e)) for e in t.state.log_history] for t in (stock, ours)]
    assert histories[0] == histories[1]
    for place in ("checkpoint-2", "checkpoint-6"):
        one, other = ({p.name for p in (tmp_path / kind.__name__ / place).iterdir()} for kind in KINDS)
        assert other - one == {"manifest.json", "continual_state.json"} and one <= other
        assert {"tokenizer.json", "training_args.bin"} <= other
    ours.save_model()
    assert (tmp_path / "ContinualTrainer" / "tokenizer.json").exists()
    own = train(tiny_gpt2(), tmp_path / "own", max_steps=2, logging_steps=2)
    assert set(own.state.log_history[0]) & set(MEASURES)


@pytest.mark.parametrize("quiet", [True, False])
def test_with_plain_arguments_callbacks_are_those_of_trainer(quiet, tmp_path):
    stock, ours = (kind(tiny_gpt2(), plain(tmp_path, disable_tqdm=quiet)) for kind in KINDS)
    assert [type(c) for c in ours.callback_handler.callbacks] == [type(c) for c in stock.callback_handler.callbacks]
    own = ContinualTrainer(tiny_gpt2(), arguments(tmp_path), Samples())
    assert not {"ProgressCallback", "PrinterCallback"} & {type(c).__name__ for c in own.callback_handler.callbacks}


def test_arguments_are_left_as_they_were(tmp_path):
    args = plain(tmp_path, max_steps=2, save_strategy="no", report_to=[])
    before = copy.deepcopy(args.to_dict())
    trainer = ContinualTrainer(tiny_gpt2(), args, Instructions(), data_collator=DataCollatorForSeq2Seq(tokenizer()))
    trainer.train()
    assert args.to_dict() == before and trainer.args is args


class OneArgument(ContinualTrainer):
    """As scripts override it."""

    def log(self, logs):
        super().log({**logs, "mine": 1.0})


def test_a_log_method_of_ones_own_sees_the_logs_that_trainers_would(tmp_path):
    args = plain(tmp_path, eval_strategy="epoch", save_strategy="epoch", logging_steps=100)
    data = {"eval_dataset": Instructions(), "data_collator": DataCollatorForSeq2Seq(tokenizer())}
    trainer = OneArgument(tiny_gpt2(), args, Instructions(), **data)
    trainer.train()
    assert all("mine" in entry for entry in trainer.state.log_history)


class Floats(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"input_ids": torch.full((4,), float(i)), "labels": i % 2}


class Linear(torch.nn.Module):
    """A model that is none of transformers', without a config, whose inputs are no tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4, 2))

    def forward(self, input_ids=None, labels=None):
        logits = input_ids @ self.weight
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_inputs_that_are_no_tokens_are_trained_on_and_gone_on_with(tmp_path):
    def run(kind, folder, resume=None):
        trainer = kind(Linear(), plain(tmp_path / folder, optim="sgd"), train_dataset=Floats())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    stock, ours = run(Trainer, "a"), run(ContinualTrainer, "b")
    assert torch.equal(stock.model.weight, ours.model.weight)
    again = run(ContinualTrainer, "c", str(tmp_path / "b" / "checkpoint-4"))
    assert torch.equal(again.model.weight, ours.model.weight)
    assert [e for e in again.state.log_history if "loss" in e] == [e for e in ours.state.log_history if "loss" in e]


@pytest.mark.parametrize("resume", [True, "nowhere"])
def test_what_trainer_says_of_missing_checkpoints_is_said(resume, tmp_path):
    said = {}
    for kind in KINDS:
        trainer = kind(Linear(), plain(tmp_path / kind.__name__), train_dataset=Floats())
        with pytest.raises(ValueError, match="valid checkpoint") as found:
            trainer.train(resume_from_checkpoint=resume)
        said[kind] = str(found.value).replace(kind.__name__, "x")
    assert said[Trainer] in said[ContinualTrainer]


# ---- signals


class Signalled(TrainerCallback):
    """Send this process SIGTERM in the middle of a step, or at a step's end, and let no time pass."""

    def __init__(self, step, when, monkeypatch):
        self.step, self.when = step, when
        monkeypatch.setattr("threading.Timer", lambda seconds, then: type("Now", (), {"start": lambda _: then()})())

    def send(self, state, when):
        if state.global_step == self.step and when == self.when:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_substep_end(self, args, state, control, **_):
        self.send(state, "substep")

    def on_optimizer_step(self, args, state, control, **_):
        self.send(state, "optimizer")

    def on_step_end(self, args, state, control, **_):
        self.send(state, "end")


@pytest.mark.parametrize("when", ["substep", "end"])
def test_a_just_in_time_checkpoint_is_whole_and_gone_on_from_exactly(when, tmp_path, monkeypatch):
    """`enable_jit_checkpoint`: of a step that was not taken yet, neither the loss nor the batches are in it."""
    common = {"logging_steps": 3, "save_steps": 100}
    whole = train(tiny_gpt2(), tmp_path / "whole", **common)
    handler = signal.getsignal(signal.SIGTERM)
    args = arguments(tmp_path / "cut", enable_jit_checkpoint=True, **common)
    cut = ContinualTrainer(tiny_gpt2(), args, Samples(), None, [Signalled(5, when, monkeypatch)])
    cut.train()
    assert signal.getsignal(signal.SIGTERM) is handler
    [(folder, step)] = checkpoints(tmp_path / "cut")
    assert step == 5 and damage(folder) is None and not list(folder.glob("*incomplete*"))
    again = train(tiny_gpt2(seed=3), tmp_path / "again", resume=str(folder), **common)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert losses(again) == losses(whole) and again.hash_of_batches() == whole.hash_of_batches()


def test_a_just_in_time_checkpoint_holds_what_callbacks_do_at_its_step(tmp_path, monkeypatch):
    """A reset after the step, added to the trainer or given to it, and the average of the weights behind it."""
    common = {"save_steps": 100, "ema_decay": 0.7}

    def run(name, *more, resume=None, **changes):
        args = arguments(tmp_path / name, **common, **changes)
        trainer = ContinualTrainer(tiny_gpt2(), args, Samples(), None, more)
        trainer.add_callback(ResetCallback("fire", at_steps=[5]))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    run("cut", Signalled(4, "optimizer", monkeypatch), enable_jit_checkpoint=True)
    [(folder, step)] = checkpoints(tmp_path / "cut")
    again = run("again", resume=str(folder))
    assert step == 5
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    one, other = (tmp_path / name / "checkpoint-12" / "ema" / "model.safetensors" for name in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()


class One(Samples):
    """An epoch of one step."""

    def __len__(self):
        return 12


class Late(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def on_ranks(rank, world, folder):
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    settings = {"max_steps": -1, "num_train_epochs": 9, "save_steps": 100, "labels_shifted": True}
    with pytest.raises(UserError, match="enable_jit_checkpoint=True: a signal reaches several processes"):
        ContinualTrainer(tiny_gpt2(), arguments(folder, enable_jit_checkpoint=True, **settings), One())
    with signals_handled(), pytest.raises(Stopped):
        train(tiny_gpt2(), folder, data=One(), callbacks=[Late()], **settings)
    return [step for _, step in checkpoints(folder)]


def test_ranks_agree_on_the_step_of_a_signal_however_short_an_epoch_is(tmp_path):
    assert run_ranks(2, on_ranks, tmp_path, tmp_path / "run") == [[4], [4]]


# ---- the Hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub's client: what was asked of it, in order."""
    calls = []

    class Api:
        def create_repo(self, name, *, private=None, **_):
            calls.append(("create", name, private))
            return type("Url", (), {"repo_id": f"me/{Path(name).name}"})()

        def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns=(), run_as_future=False, **_):
            names = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()}
            names = {n for n in names if not any(Path(n.split("/")[0]).match(pattern) for pattern in ignore_patterns)}
            calls.append((commit_message, repo_id, sorted(names)))
            done = Future()
            done.set_result(None)
            return done

    if not hasattr(transformers.trainer, "hf_api"):
        pytest.skip("this version of transformers asks the Hub by other functions")
    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    return calls


# huggingface_hub, where the environment switches its bars off.
@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_the_hub_is_asked_for_what_trainer_asks(hub, tmp_path):
    """At each save, at `save_model` and at the end, the same files under the same messages."""
    asked = []
    pushing = {"push_to_hub": True, "hub_model_id": "me/x", "max_steps": 4}
    for trainer in both(tmp_path, processing_class=tokenizer(), changes=pushing):
        trainer.save_model()
        trainer.push_to_hub(commit_message="done")
        asked.append(list(hub))
        hub.clear()
    assert asked[0] == asked[1]
    assert [call[0] for call in asked[1]] == [
        "create", "Training in progress, step 2", "Training in progress, step 4", "Model save", "done"
    ]  # fmt: skip
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(asked[1][-1][2])
    assert not [name for call in asked[1][1:] for name in call[2] if name.startswith("checkpoint")]
