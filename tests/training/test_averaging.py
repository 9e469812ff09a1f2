"""The moving average of the weights: against torch's own and the sum written out, resumed, saved, on two ranks."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_gpt2
from support.ranks import Raised, run_ranks
from support.training import FSDP2, STEPS, Samples, arguments, losses, train
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, TrainerCallback

from fire_llm import ContinualTrainer, UserError
from fire_llm.evaluation import perplexity
from fire_llm.models import load_model
from fire_llm.training import EvaluationSet, ResetCallback

DECAY = 0.7
EMA = Path("ema") / "model.safetensors"


class Torchs(TrainerCallback):
    """Average with torch's class, from the weights behind the reset on, and keep the weights of each step."""

    def on_train_begin(self, args, state, control, model=None, **_):
        self.average = AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        self.average.update_parameters(model)
        self.weights = [[p.detach().double().clone() for p in model.parameters()]]

    def on_step_end(self, args, state, control, model=None, **_):
        self.average.update_parameters(model)
        self.weights.append([p.detach().double().clone() for p in model.parameters()])


def texts() -> dict[str, EvaluationSet]:
    tokens = torch.randint(0, 97, (201,), generator=torch.Generator().manual_seed(5))
    return {"c": EvaluationSet(tokens, 800, 0)}


EVALUATED = {"save_steps": 100, "eval_strategy": "steps", "eval_steps": 4, "eval_context": 16, "eval_on_start": True}


def test_it_is_torchs_average_from_behind_the_reset_and_training_is_as_without_it(tmp_path):
    torchs, kept = Torchs(), {"keep_steps": [4], "sets": texts(), **EVALUATED}
    with_it = train(tiny_gpt2(), tmp_path / "a", callbacks=[ResetCallback("fire"), torchs], ema_decay=DECAY, **kept)
    without = train(tiny_gpt2(), tmp_path / "b", callbacks=[ResetCallback("fire")], **kept)
    assert all(map(torch.equal, with_it.model.parameters(), without.model.parameters()))
    clean = [e for e in with_it.state.log_history if not any(key.startswith("ema_") for key in e)]
    timed = ("tokens_per_second", "peak_memory_bytes", "data_wait_share", "train_runtime")

    def timeless(log):
        return [{k: v for k, v in e.items() if not k.startswith("train_") and k not in timed} for e in log]

    assert timeless(clean) == timeless(without.state.log_history)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-12" / "ema")
    by_hand = torchs.weights[0]
    for weights in torchs.weights[1:]:
        by_hand = [DECAY * average + (1 - DECAY) * w for average, w in zip(by_hand, weights, strict=True)]
    for ours, theirs, exact in zip(saved.parameters(), torchs.average.module.parameters(), by_hand, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-7)
    measured = {e["step"]: e["ema_c_nll"] for e in with_it.state.log_history if "ema_c_nll" in e}
    assert set(measured) == {4, 8, 12}
    assert measured[12] == pytest.approx(perplexity(saved, texts()["c"].tokens, context=16, prefix=0).nll, rel=1e-9)
    assert not list(tmp_path.rglob("training_args.bin"))

    again = train(
        tiny_gpt2(seed=9), tmp_path / "c", str(tmp_path / "a" / "checkpoint-4"),
        callbacks=[ResetCallback("fire")], ema_decay=DECAY, **kept,
    )  # fmt: skip
    assert all(map(torch.equal, with_it.model.parameters(), again.model.parameters()))
    one, other = (tmp_path / run / "checkpoint-12" / EMA for run in "ac")
    assert one.read_bytes() == other.read_bytes()


def test_it_begins_behind_a_reset_that_is_added_later_and_goes_on_in_fp64(tmp_path):
    def average(name, given=(), added=(), resume=None):
        args = arguments(tmp_path / name, ema_decay=DECAY, save_steps=2, max_steps=4, keep_last=2)
        trainer = ContinualTrainer(tiny_gpt2().double(), args, Samples(), None, given)
        for callback in added:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return (tmp_path / name / "checkpoint-4" / EMA).read_bytes()

    given = average("given", [ResetCallback("fire")])
    assert average("added", added=[ResetCallback("fire")]) == given
    assert average("again", resume=str(tmp_path / "given" / "checkpoint-2")) == given


def test_a_thread_writes_the_same_files(tmp_path):
    for name, beside in (("waited", False), ("beside", True)):
        train(tiny_gpt2(), tmp_path / name, ema_decay=DECAY, async_save=beside, max_steps=2, save_steps=1, keep_last=9)
    for step in (1, 2):
        waited, beside = (tmp_path / name / f"checkpoint-{step}" for name in ("waited", "beside"))
        names = sorted(str(p.relative_to(waited)) for p in waited.rglob("*") if p.is_file())
        assert names == sorted(str(p.relative_to(beside)) for p in beside.rglob("*") if p.is_file())
        for name in (EMA, Path("model.safetensors"), Path("ema") / "config.json", Path("ema") / "manifest.json"):
            assert (waited / name).read_bytes() == (beside / name).read_bytes()


def test_what_cannot_be_averaged_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"ema_decay 1.0: it must lie between 0 and 1"):
        arguments(tmp_path, ema_decay=1.0)
    with pytest.raises(UserError, match=r"'transformer.wte.weight' is in 16 bits"):
        train(tiny_gpt2().to(torch.bfloat16), tmp_path / "coarse", ema_decay=DECAY)
    train(tiny_gpt2(), tmp_path / "run", max_steps=2, save_steps=1)
    with pytest.raises(UserError, match=r"checkpoint-2' holds no average"):
        train(tiny_gpt2(), tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"), ema_decay=DECAY)
    assert not list((tmp_path / "coarse").glob("checkpoint-*"))


def averaged(rank, world, folder, environment, resume):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6 // world}
    trainer = train(
        tiny_gpt2(), folder, resume, sets=texts(), ema_decay=DECAY, save_every_minutes=1e-9, keep_last=99,
        **split, **EVALUATED,
    )  # fmt: skip
    return losses(trainer), [e["ema_c_nll"] for e in trainer.state.log_history if "ema_c_nll" in e]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["replicas", "shards"])
def test_two_ranks_average_as_one_process_does_and_go_on_exactly(environment, tmp_path):
    one = train(tiny_gpt2(), tmp_path / "one", sets=texts(), ema_decay=DECAY, **EVALUATED)
    alone = [e["ema_c_nll"] for e in one.state.log_history if "ema_c_nll" in e]
    two, whole = tmp_path / "two", load_model(tmp_path / "one" / "checkpoint-12" / "ema", torch.float32)
    for told in run_ranks(2, averaged, tmp_path, two, environment, None, seconds=240):
        assert not isinstance(told, Raised), told
        assert told[0] == pytest.approx(losses(one), abs=1e-4) and told[1] == pytest.approx(alone, abs=1e-4)
    theirs = load_model(two / "checkpoint-12" / "ema", torch.float32)
    for ours, other in zip(whole.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=1e-4)
    # By the clock a checkpoint stands at every step that the ranks could agree on, and changes nothing.
    timed = sorted(int(p.name.partition("-")[2]) for p in two.glob("checkpoint-*"))
    assert timed == list(range(2, STEPS + 1, 2))  # what is asked at a step is answered at the next
    (tmp_path / "ranks").mkdir()
    resume = str(two / f"checkpoint-{timed[len(timed) // 2]}")
    for told in run_ranks(2, averaged, tmp_path / "ranks", tmp_path / "again", environment, resume, seconds=240):
        assert not isinstance(told, Raised), told
    for name in (EMA, "model.safetensors"):
        first, again = (load_file(folder / "checkpoint-12" / name) for folder in (two, tmp_path / "again"))
        assert all(torch.equal(first[key], again[key]) for key in first)
