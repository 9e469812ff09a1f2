"""The loss taken in slices against the loss of whole logits, in fp64 and in training; and what is not finite."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_gpt2, tiny_llama
from support.ranks import run_ranks
from support.small_models import build
from support.training import ACCUMULATION, CONTEXT, MICRO, Samples, arguments, by_hand, losses, train
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainingArguments

from fire_llm import ContinualTrainer, UserError, load_recipe, run_recipe
from fire_llm.architectures.matrices import supported_types
from fire_llm.core.flops import flops_per_token, peak_flops
from fire_llm.experiment.memory import sizes
from fire_llm.training import EvaluationSet, nonfinite
from fire_llm.training import loss as sliced
from fire_llm.training.loss import SummedLoss
from fire_llm.training.loss_jump import loss_jump, sentence
from fire_llm.training.nonfinite import propagate_nonfinite
from fire_llm.training.throughput import Throughput

# transformers calls it so from one of its later versions on.
NEW = any(field.name == "activation_checkpointing" for field in dataclasses.fields(TrainingArguments))
CHECKPOINTING = "activation_checkpointing" if NEW else "gradient_checkpointing"


@pytest.fixture
def slices(monkeypatch):
    """Make a slice of 7 positions, and a cached block of 2, out of any micro-batch of the tiny models."""
    monkeypatch.setattr(sliced, "SLICE", 97 * 7)
    monkeypatch.setattr(sliced, "WHOLE", 97 * 7)
    monkeypatch.setattr(sliced, "CACHED", 97 * 2)


def tiny(kind, **settings):
    """Build a model of 2 layers whose head has something of its own to it."""
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTJConfig, MambaConfig

    common = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    if kind == "gemma2":  # a soft cap after a tied head
        heads = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.5}
        return AutoModelForCausalLM.from_config(Gemma2Config(**common, **wide, **heads))
    if kind == "cohere":  # logits scaled
        return AutoModelForCausalLM.from_config(CohereConfig(**common, **wide, num_key_value_heads=2, logit_scale=0.3))
    if kind == "gptj":  # a head with a bias
        return AutoModelForCausalLM.from_config(
            GPTJConfig(**common, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
        )
    if kind == "mamba":
        return AutoModelForCausalLM.from_config(
            MambaConfig(**common, hidden_size=32, num_hidden_layers=2, state_size=4, expand=2)
        )
    return {"gpt2": tiny_gpt2, "llama": tiny_llama}[kind](**settings)


def batch(rows=3, seed=0):
    tokens = torch.randint(0, 97, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:].clone()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "compiling", "whole"),
    [
        *itertools.product(["gpt2", "llama"], [None], [True, False]),
        *itertools.product(["gpt2", "llama"], [{"backend": "aot_eager"}], [True]),
        ("gpt2", {"backend": "aot_eager"}, False),
        pytest.param("llama", {"backend": "aot_eager"}, False, marks=pytest.mark.slow),
    ],
)
def test_parameters_read_in_bf16_give_what_a_model_in_bf16_gives(kind, compiling, whole, slices, monkeypatch):
    """Against the model converted to bf16, without autocast; gradients arrive in fp32, tied weights and all."""
    if whole:
        monkeypatch.setattr(sliced, "WHOLE", 2**30)
    model, half = tiny(kind), tiny(kind).to(torch.bfloat16)
    ids, labels = batch()
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    loss = SummedLoss(model, autocast, params=torch.bfloat16, compiling=compiling)(model, labels, input_ids=ids)
    loss.backward()
    logits = half(input_ids=ids).logits
    wanted = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-4)
    assert all(type(p) is torch.nn.Parameter and p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    for (name, a), b in zip(model.named_parameters(), half.parameters(), strict=True):
        assert float((a.grad - b.grad).norm()) < 0.02 * float(b.grad.norm()) + 1e-4, name


def test_training_with_parameters_read_in_bf16(tmp_path):
    plain, read = (
        losses(train(tiny_gpt2(), tmp_path / str(params), bf16=True, bf16_params=params)) for params in (False, True)
    )
    assert read == pytest.approx(plain, rel=5e-3) and read != plain
    with pytest.raises(UserError, match="bf16_params goes with bf16=True"):
        arguments(tmp_path, bf16_params=True)
    with pytest.raises(UserError, match="leave one of them out"):
        arguments(tmp_path, bf16=True, bf16_params=True, **{CHECKPOINTING: True})


class Rounding(torch.nn.Linear):
    """Give a slice of the positions logits that are off by a share of themselves, as another kernel might."""

    share = 2.0**-23

    def forward(self, hidden):
        logits = super().forward(hidden)
        return logits if hidden.shape[-2] == CONTEXT else logits * (1 + self.share)


@pytest.mark.parametrize("share", [2.0**-23, 1e-3])
def test_rounding_of_the_head_keeps_the_slices_and_more_than_that_is_told(share, slices, monkeypatch):
    """A trunk is looked for in fp32, under bf16 autocast too, where one digit of a logit is 500 times the tolerance."""
    model, told = tiny("gptj"), []
    head = Rounding(32, 97)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    monkeypatch.setattr(Rounding, "share", share)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    summed = SummedLoss(model, autocast, report=told.append)
    ids, labels = batch()
    summed(model, labels, input_ids=ids)
    summed(model, labels, input_ids=ids)
    assert summed.sliced(model, labels) == (not told) == (share < 1e-6)
    assert told == [] or ("GPTJForCausalLM" in told[0] and "held whole: 1.9e-05 GB" in told[0] and len(told) == 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_form_for_torch_compile_gives_the_same_loss_and_gradient(dtype):
    logits = (torch.randn(9, 97, dtype=torch.float64) * 4).to(dtype)
    targets = torch.arange(9) * 10
    targets[4] = -100
    gradients = [torch.full_like(logits, torch.nan) for _ in range(2)]
    forms = sliced._differentiate, sliced._differentiate_at_once
    taken = [form(logits, targets, to) for form, to in zip(forms, gradients, strict=True)]
    assert torch.equal(*taken) and torch.equal(*gradients)


def test_slices_are_cut_evenly():
    rows = {(16_384, 2668): 2048, (3044, 2668): 1522, (48, 7): 6, (7, 7): 7, (1, 7): 1, (13, 5): 5, (5, 1): 1}
    assert {of: sliced.even_rows(*of) for of in rows} == rows


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "cohere", "gptj", "mamba"])
def test_loss_and_gradients_equal_those_of_whole_logits(kind, slices):
    """fp64, one label ignored: what torch's cross_entropy of the model's logits gives, to rounding."""
    model = tiny(kind).double()
    ids, labels = batch()
    labels[1, 5] = -100
    wanted = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (wanted / 10).backward()
    expected = gradients(model)
    model.zero_grad()
    summed = SummedLoss(model, contextlib.nullcontext)
    assert summed.sliced(model, labels)
    loss = summed(model, labels, input_ids=ids)
    (loss / 10).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)  # the sum is in fp32
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-6 * gradient.norm() + 1e-9, name  # norms of Llama's kind are fp32


def test_the_model_is_left_as_it_was(slices):
    model = tiny_gpt2(resid_pdrop=0.1)
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    ids, labels = batch()
    summed = SummedLoss(model, contextlib.nullcontext)
    summed(model, labels, input_ids=ids).backward()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert "forward" not in model.__dict__ and "forward" not in model.transformer.__dict__
    model.__dict__["forward"] = kept = model.forward  # as accelerate puts its own there
    summed(model, labels, input_ids=ids).backward()
    assert model.__dict__["forward"] is kept


def test_dropout_draws_what_it_does_with_whole_logits(slices):
    model = tiny_gpt2(resid_pdrop=0.3, embd_pdrop=0.3).train()
    ids, labels = batch()
    summed = SummedLoss(model, contextlib.nullcontext)
    summed(model, labels, input_ids=ids)  # looks for the trunk
    torch.manual_seed(1)
    wanted = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.manual_seed(1)
    assert summed(model, labels, input_ids=ids).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_frozen_parameters_stay_without_gradients(slices):
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    ids, labels = batch()
    SummedLoss(model, contextlib.nullcontext)(model, labels, input_ids=ids).backward()
    assert model.lm_head.weight.grad is None and model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_no_logits_of_the_whole_micro_batch_are_held(slices, monkeypatch):
    model = tiny_llama()
    ids, labels = batch()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    summed = SummedLoss(model, contextlib.nullcontext)
    summed.sliced(model, labels)
    seen.clear()
    summed(model, labels, input_ids=ids)
    assert sum(seen) == 1 + labels.numel() and max(seen) == 6  # of at most 7, cut evenly


def test_bf16_is_as_near_to_fp32_as_whole_logits_are(slices):
    model = tiny_llama()
    ids, labels = batch(8)
    wanted = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    wanted.backward()
    exact = gradients(model)
    errors = []
    for whole in (True, False):
        model.zero_grad()
        with contextlib.ExitStack() as stack:
            if whole:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                logits = model(input_ids=ids).logits.float()
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
            else:
                summed = SummedLoss(model, lambda: torch.autocast("cpu", torch.bfloat16))
                summed(model, labels, input_ids=ids).backward()
        found = gradients(model)
        errors.append({n: float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact})
    assert all(errors[1][name] < 1.2 * errors[0][name] + 1e-3 for name in exact), errors


def test_what_cannot_be_sliced_is_taken_whole(slices):
    from transformers import BertConfig, BertLMHeadModel

    ids, labels = batch()
    model = tiny_gpt2()
    assert not SummedLoss(model, contextlib.nullcontext, fp16=True).sliced(model, labels)
    assert not SummedLoss(model, contextlib.nullcontext).sliced(torch.nn.DataParallel(model), labels)
    assert not SummedLoss(model, contextlib.nullcontext).sliced(model, labels[:1, :7])  # few enough
    sees = BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=False,
    )  # it looks ahead
    model = BertLMHeadModel(sees)
    summed = SummedLoss(model, contextlib.nullcontext)
    assert not summed.sliced(model, labels)
    wanted = F.cross_entropy(model.eval()(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert summed(model, labels, input_ids=ids).item() == pytest.approx(wanted.item(), rel=1e-5)


# ---- in the trainer


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_trajectory_in_slices_equals_a_hand_written_loop(build, slices, tmp_path):
    assert losses(train(build(), tmp_path)) == pytest.approx(by_hand(build()), abs=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize(
    "settings",
    [
        {CHECKPOINTING: True},
        {"bf16": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=["checkpointing", "bf16", "compiled"],
)
def test_a_trajectory_in_slices_is_that_of_whole_logits(settings, tmp_path, monkeypatch):
    """What Trainer is told in other ways works in slices too, and gives what it gave before."""
    whole = train(tiny_llama(), tmp_path / "whole", **settings)
    monkeypatch.setattr(sliced, "SLICE", 97 * 7)
    monkeypatch.setattr(sliced, "WHOLE", 97 * 7)
    parts = train(tiny_llama(), tmp_path / "parts", **settings)
    near = 2e-2 if "bf16" in settings else 2e-6
    assert losses(parts) == pytest.approx(losses(whole), abs=near)
    assert parts._summed_loss._trunk is parts.model.model


def agree():
    """Say where the ranks met: accelerate asks, though they have met."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _replicas(rank, world, folder):
    agree()
    sliced.SLICE = sliced.WHOLE = 97 * 7
    trainer = train(
        tiny_gpt2(), folder / "ddp", gradient_accumulation_steps=ACCUMULATION, per_device_train_batch_size=1
    )
    assert trainer._summed_loss._trunk is not None
    return losses(trainer), {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def test_two_replicas_in_slices_train_as_one_process_does(tmp_path):
    """DistributedDataParallel averages gradients that were there before its backward pass, the tied head's too."""
    found = run_ranks(2, _replicas, tmp_path, tmp_path)
    assert found[0][0] == pytest.approx(by_hand(tiny_gpt2()), abs=1e-5)
    for name, parameter in found[0][1].items():
        assert torch.equal(parameter, found[1][1][name]), name


# ---- what is not finite


class Poisoned(Samples):
    """Ask, in one sample, for the token that the model rules out."""

    def __init__(self, sample):
        self.sample = sample

    def __getitem__(self, i):
        found = {name: value % 96 for name, value in super().__getitem__(i).items()}
        if i == self.sample:
            found["labels"][3] = 96
        return found


def ruling_out(**settings):
    """Build a model whose bias gives token 96 no probability: an infinite loss, of which every gradient is finite."""
    model = tiny("gptj", **settings)
    with torch.no_grad():
        model.lm_head.bias[96] = -torch.inf
    return model


def test_an_infinite_loss_makes_gradients_that_are_not_finite():
    weight = torch.tensor(2.0, requires_grad=True)
    propagate_nonfinite(weight * 3).backward()
    assert float(weight.grad) == 3.0
    weight.grad = None
    propagate_nonfinite(weight * 3 + torch.inf).backward()
    assert math.isnan(float(weight.grad))


def poisoned(folder, sample, **settings):
    return ContinualTrainer(ruling_out(), arguments(folder, **settings), Poisoned(sample))


def test_training_halts_before_the_step_and_names_the_samples(tmp_path):
    sample = 5 * MICRO * ACCUMULATION + 3  # in step 6, second micro-batch
    whole = poisoned(tmp_path / "whole", -1, max_steps=5, lr_scheduler_type="constant", lr_scheduler_kwargs={})
    whole.train()
    trainer = poisoned(tmp_path / "cut", sample, lr_scheduler_type="constant", lr_scheduler_kwargs={})
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 6\. .*checkpoint-4.*nonfinite\.json"):
        trainer.train()
    found = json.loads((tmp_path / "cut" / "nonfinite.json").read_text())
    assert found["step"] == 6 and found["not_finite"] == "loss"
    batches = found["ranks"][0]["batches"]
    assert [b["finite"] for b in batches] == [True, False, True] and batches[1]["loss"] is None
    assert [s["index"] for b in batches for s in b["samples"]] == list(range(30, 36))
    for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)  # the weights are those of step 5
    assert json.loads((tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_a_step_that_is_skipped_changes_no_weight_and_is_counted(tmp_path):
    sample = 5 * MICRO * ACCUMULATION
    settings = {"nonfinite": "skip", "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "logging_steps": 3}
    seen = {}
    trainer = poisoned(tmp_path / "a", sample, **settings)
    guard = trainer.guard.passes

    def watched(model, norm):
        before = copy.deepcopy(trainer.optimizer.state_dict()["state"]), copy.deepcopy(model.state_dict())
        if not guard(model, norm):
            seen["step"], seen["before"] = trainer.state.global_step + 1, before
            return False
        if "before" in seen and "after" not in seen:
            seen["after"] = before
        return True

    trainer.guard.passes = watched
    trainer.train()
    assert seen["step"] == 6 and trainer.guard.skipped == 1
    for name, tensor in seen["before"][1].items():
        assert torch.equal(tensor, seen["after"][1][name]), name
    history = {e["step"]: e for e in trainer.state.log_history if "loss" in e}
    assert set(history) == {3, 4, 6, 8, 9, 12} and "skipped_steps" not in history[4]
    assert [history[step].get("skipped_steps", 0) for step in (4, 6, 9)] == [0, 1, 1]
    clean = poisoned(tmp_path / "b", -1, **{**settings, "logging_steps": 1, "max_steps": 5})
    clean.train()
    by_step = losses(clean)
    assert history[6]["loss"] == pytest.approx(by_step[4], abs=1e-5)  # the mean of step 5 alone
    resumed = poisoned(tmp_path / "c", sample, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-12"))
    assert resumed.guard.skipped == 1


@pytest.mark.parametrize("sample", [-1, 5 * MICRO * ACCUMULATION + 3, 11 * MICRO * ACCUMULATION])
def test_a_step_left_out_on_the_device_is_one_that_is_left_out_by_the_host(sample, tmp_path, monkeypatch):
    """As on an accelerator, with nothing waited for but what is logged: weights, moments and logs are the same."""
    settings = {"nonfinite": "skip", "optim": "adamw_torch_fused", "logging_steps": 4, "save_steps": 5}
    waited = poisoned(tmp_path / "waited", sample, **settings)
    waited.train()
    monkeypatch.setattr(nonfinite, "_device_guarded", lambda trainer, _: nonfinite.takes_found_inf(trainer.optimizer))
    told = poisoned(tmp_path / "told", sample, **settings)
    heard = []
    settle = told.guard.settle
    told.guard.settle = lambda: heard.append(told.guard._unread is not None) or settle()
    told.train()
    assert sum(heard) == 12 and told.guard.skipped == waited.guard.skipped == (0 if sample < 0 else 1)
    for a, b in zip(told.model.parameters(), waited.model.parameters(), strict=True):
        assert torch.equal(a, b)
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (told, waited)]
    for a, b in zip(moments[0].values(), moments[1].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    logs = [
        [{k: e.get(k) for k in ("step", "loss", "grad_norm", "skipped_steps")} for e in trainer.state.log_history]
        for trainer in (told, waited)
    ]
    assert logs[0] == logs[1]


def test_a_step_left_out_on_the_device_halts_training_before_anything_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "_device_guarded", lambda trainer, _: nonfinite.takes_found_inf(trainer.optimizer))
    sample = 5 * MICRO * ACCUMULATION + 3
    options = {"optim": "adamw_torch_fused", "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}
    whole = poisoned(tmp_path / "whole", -1, max_steps=5, **options)
    whole.train()
    for every, name in ((100, "later"), (6, "saving")):
        settings = {**options, "logging_steps": 100, "save_steps": every}
        trainer = poisoned(tmp_path / name, sample, **settings)
        with pytest.raises(FloatingPointError, match=r"loss is not finite at step 6\. "):
            trainer.train()
        found = json.loads((tmp_path / name / "nonfinite.json").read_text())["ranks"][0]["batches"]
        assert [s["index"] for b in found for s in b["samples"]] == list(range(30, 36))
        assert [b["finite"] for b in found] == [True, False, True]
        for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)  # the weights are those of step 5
        assert not [*(tmp_path / name).glob("checkpoint-*")]


@pytest.mark.parametrize("action", ["halt", "skip"])
def test_a_step_left_out_on_the_device_is_told_where_a_callback_ends_training_at_it(action, tmp_path, monkeypatch):
    """Nothing is logged, measured or saved then, so that nothing asks for it."""
    monkeypatch.setattr(nonfinite, "_device_guarded", lambda trainer, _: nonfinite.takes_found_inf(trainer.optimizer))

    class Ending(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == 6

    settings = {"optim": "adamw_torch_fused", "logging_steps": 100, "save_steps": 100, "nonfinite": action}
    trainer = poisoned(tmp_path, 5 * MICRO * ACCUMULATION + 3, **settings)
    trainer.add_callback(Ending())
    if action == "halt":
        with pytest.raises(FloatingPointError, match=r"loss is not finite at step 6\. "):
            trainer.train()
    else:
        trainer.train()
        assert trainer.guard.skipped == 1
    assert trainer.optimizer.optimizer.found_inf is None  # or whoever goes on with it would take no step


def test_an_error_leaves_nothing_of_its_step_to_the_next_training(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "_device_guarded", lambda trainer, _: nonfinite.takes_found_inf(trainer.optimizer))

    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise OSError("once")

    settings = {"optim": "adamw_torch_fused", "logging_steps": 100, "save_steps": 100}
    trainer = poisoned(tmp_path, 3, **settings)
    trainer.add_callback(failing := Failing())
    with pytest.raises(OSError, match="once"):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.train_dataset = Poisoned(-1)
    trainer.train()
    assert trainer.state.global_step == 12 and not (tmp_path / "nonfinite.json").exists()


def test_only_fused_steps_of_torch_are_told_on_the_device():
    class Own(torch.optim.AdamW):
        def step(self, closure=None):
            return None

    weights = [torch.nn.Parameter(torch.ones(2))]
    fused, plain = (torch.optim.AdamW(weights, fused=way) for way in (True, False))
    assert nonfinite.takes_found_inf(fused) is fused and nonfinite.takes_found_inf(plain) is None
    assert nonfinite.takes_found_inf(Own(weights, fused=True)) is None
    fused.load_state_dict(plain.state_dict())  # of a run whose optimizer was not fused
    assert nonfinite.takes_found_inf(fused) is None


def _one_of_two(rank, world, folder, action):
    agree()
    trainer = poisoned(folder / action, 2 * 2 * MICRO + 3, nonfinite=action, gradient_accumulation_steps=1, max_steps=4)
    try:
        trainer.train()
    except FloatingPointError as error:
        return str(error), trainer.state.global_step
    return trainer.guard.skipped, next(trainer.model.parameters()).detach().clone()


@pytest.mark.parametrize("action", ["halt", "skip"])
def test_all_ranks_do_the_same_where_one_sees_it(action, tmp_path):
    found = run_ranks(2, _one_of_two, tmp_path, tmp_path, action)
    if action == "skip":
        assert found[0][0] == found[1][0] == 1 and torch.equal(found[0][1], found[1][1])
        return
    for told, step in found:
        assert step == 2 and "the training loss is not finite at step 3" in told
    dumped = json.loads((tmp_path / action / "nonfinite.json").read_text())["ranks"]
    assert [rank["batches"][0]["finite"] for rank in dumped] == [True, False]
    assert [s["index"] for s in dumped[1]["batches"][0]["samples"]] == [10, 11]  # where Trainer's loader put them


# ---- after a reset


def test_a_spike_is_told_against_a_uniform_guess():
    found = loss_jump(before=3.0, after=math.log(97) - 0.25 * (math.log(97) - 3.0), vocabulary=97)
    assert found["undone"] == pytest.approx(0.75) and found["uniform"] == pytest.approx(4.574711)
    assert sentence("c", found).endswith("it undid 75% of what sets the checkpoint apart from a uniform guess (4.575)")
    assert "worse than knowing nothing" in sentence("c", loss_jump(3.0, 6.0, 97))
    assert loss_jump(5.0, 5.0, 97)["undone"] is None
    assert "already worse than a uniform guess, 4.575" in sentence("c", loss_jump(5.0, 5.0, 97))


@pytest.mark.filterwarnings("ignore")
def test_a_run_reports_loss_jump_throughput_and_skipped_steps(tmp_path, capsys):
    """An arm that touches nothing undoes nothing, a full reset all of it; every logged loss has a throughput."""
    words = ["fire", "resets", "the", "weights", "of", "a", "model", "so", "that", "it", "may", "learn", "again"]
    picks = torch.randint(0, len(words), (400, 30), generator=torch.Generator().manual_seed(1)).tolist()
    lines = [json.dumps({"text": " ".join(words[i] for i in line)}) for line in picks]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    recipe = {
        "data_root": str(tmp_path),
        "model": {"preset": "gpt-tiny", "context": 32, "config": {"n_embd": 32, "n_layer": 1, "n_head": 2}},
        "tokenizer": {"train": 300},
        "corpora": {"a": {"files": "a.jsonl", "holdout": 0.1}},
        "optimizer": {"lr": 1.0e-2, "warmup": 0.0},
        "batch": {"tokens_per_step": 256},
        "phases": [
            {"name": "first", "data": {"a": 1.0}, "steps": 20},
            {"name": "second", "data": {"a": 1.0}, "steps": 4, "arms": {"base": "keep", "anew": "full_reset"}},
        ],
        "evaluate": {"every_steps": 2},
        "log_every_steps": 2,
    }
    results = run_recipe(load_recipe(recipe), tmp_path / "run", progress=True)
    first, base, anew = results["phases"][0], results["arms"]["base"]["runs"][0], results["arms"]["anew"]["runs"][0]
    assert first["loss_jump"] == {} and first["skipped_steps"] == 0
    assert base["loss_jump"]["a"]["undone"] == pytest.approx(0, abs=1e-6)
    assert base["loss_jump"]["a"]["before"] == first["final"]["a"]["nll"]
    assert anew["loss_jump"]["a"]["undone"] == pytest.approx(1, abs=0.05)
    assert anew["loss_jump"]["a"]["uniform"] == pytest.approx(math.log(320))  # 300 tokens, padded
    assert anew["loss_jump"]["a"]["regained_at_step"] is None
    assert [entry["step"] for entry in first["throughput"]] == list(range(2, 21, 2))
    for entry in first["throughput"]:
        assert entry["tokens_per_second"] > 0 and 0 < entry["data_wait_share"] < 1 and entry["mfu"] is None
        assert entry["peak_memory_bytes"] > 2**27  # torch alone takes more
    told = capsys.readouterr().err
    assert "second / anew: NLL on a 5." in told and "apart from a uniform guess (5.768)" in told


# ---- speed


def test_flops_of_a_token_are_those_counted_by_hand():
    attention = 12 * 2 * 32 * 64  # layers, width, context
    block = 4 * 32 * 32 + 4 * 32 + 8 * 32 * 32 + 5 * 32 + 4 * 32  # attention, MLP, their biases, two norms
    assert flops_per_token(tiny_gpt2(), 64) == 6 * (97 * 32 + 2 * block + 2 * 32) + attention  # no positions; one head
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 80 + 2 * 32
    assert flops_per_token(tiny_llama(), 64) == 6 * (97 * 32 + 2 * block + 32) + attention  # no input embedding
    assert flops_per_token(tiny("mamba"), 64) is None  # its scan is no matrix product
    assert flops_per_token(build("blt"), 64) is None  # its config has no layers, its parts have


def test_a_layer_in_a_loop_counts_as_often_as_it_runs():
    """By hand, and against what torch counts, which takes the whole context where a window is shorter."""
    if "dory" not in supported_types():
        pytest.skip("transformers 5.24 is the first with Dory")
    model = build("dory")  # 48 wide, 3 layers: one before the loop, one in it, which runs twice, one behind it
    attention, mlp = 2 * 48 * 64 + 2 * 48 * 32 + 48 * 64, 3 * 48 * 40
    scales = 2 * 64 + 2 * 40 + 2 * 48  # of a layer; the head has 96
    products = 6 * (4 * (attention + mlp) + 48 * 96) + 12 * 64 * (16 + 2 * 64 + 16)
    assert flops_per_token(model, 64) == products + 6 * (4 * scales + 96)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=torch.zeros(1, 64, dtype=torch.long))
    assert products == 3 * counted.get_total_flops() / 64 - 12 * 64 * 2 * (64 - 16)
    assert sizes(model).kept_a_token() == 4 * (sizes(model).kept + 8 * 48)


def test_experts_have_no_flops_known():
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=97, num_key_value_heads=2, num_local_experts=4, **sizes)
    assert flops_per_token(AutoModelForCausalLM.from_config(config), 64) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_is_that_of_the_device(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), half=True) == peak
    assert peak_flops(torch.device("cuda"), half=False) is None
    assert peak_flops(torch.device("cpu"), half=True) is None


def test_a_speed_is_tokens_over_the_time_between_logs(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fire_llm.training.throughput.time.perf_counter", lambda: now[0])
    speed = Throughput(6e6, 1e12, torch.device("cpu"))
    assert speed.read() == {}
    for _ in range(2):
        with speed.waiting():
            now[0] += 1
        speed.count(5000)
        now[0] += 4
    measured = speed.read()
    assert measured["tokens_per_second"] == 1000 and measured["data_wait_share"] == pytest.approx(0.2)
    assert measured["mfu"] == pytest.approx(0.006)  # 1000 · 6e6 of 1e12
    speed.stop()
    now[0] += 1000  # an evaluation
    with speed.waiting():
        now[0] += 1
    speed.count(2000)
    assert speed.read()["tokens_per_second"] == 2000


def test_evaluations_and_checkpoints_do_not_slow_the_measured_speed(tmp_path, monkeypatch):
    measure, seconds = ContinualTrainer.evaluate, itertools.count()
    paused = []

    def evaluate(self, *args, **kwargs):
        paused.append(1000.0)
        return measure(self, *args, **kwargs)

    # A clock that moves a second each time it is read, and a thousand in an evaluation.
    clock = SimpleNamespace(perf_counter=lambda: next(seconds) + sum(paused))
    monkeypatch.setattr("fire_llm.training.throughput.time", clock)
    monkeypatch.setattr(ContinualTrainer, "evaluate", evaluate)
    sets = {"c": EvaluationSet(torch.arange(97), 300, 0)}
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_context": 16, "max_steps": 6, "eval_on_start": True}
    trainer = train(tiny_gpt2(), tmp_path, sets=sets, logging_steps=2, **settings)
    speeds = [e["tokens_per_second"] for e in trainer.state.log_history if "loss" in e]
    tokens = 2 * MICRO * ACCUMULATION * CONTEXT
    assert len(paused) == 4 and len(speeds) == 3 and min(speeds) > tokens / 1000


def test_wrong_settings_are_named(tmp_path):
    model = {"model": {"preset": "gpt-tiny"}, "tokenizer": "gpt2", "phases": [{"name": "a", "data": {"web": 1.0}}]}
    for key, value, wanted in [
        ("nonfinite", "skp", "nonfinite: 'skp' is not allowed. Did you mean 'skip'? Allowed: halt, skip"),
        ("compile", "sometimes", "compile: 'sometimes' is not allowed. Allowed: auto, True, False"),
    ]:
        with pytest.raises(UserError, match=wanted.replace("?", r"\?")):
            load_recipe({**model, key: value})
