"""Optimizers and schedules by name, against PyTorch's own optimizers and rates worked out by hand."""

from __future__ import annotations

import math
import os

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama
from support.ranks import Raised, run_ranks
from support.recipes import GOOD
from support.small_models import build as small
from support.training import FSDP2, STEPS, Samples, arguments, losses, optimizer_state, train
from torch import nn
from transformers import TrainerCallback

from fire_llm import ResetCallback, UserError, load_recipe
from fire_llm.architectures.matrices import hidden_matrices
from fire_llm.experiment.estimate import plan
from fire_llm.experiment.recipe.sections import OptimizerSection
from fire_llm.training import ContinualTrainer, EvaluationSet, MuonAdamW, multiplier

# ---- schedules

WSD = {"steps": 20, "warmup": 4, "decay": 8, "floor": 0.1}
INFINITE = {"steps": 100, "warmup": 10, "cooldown": 20, "constant": 0.4, "decay": 10, "floor": 0.1}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({**WSD, "shape": "linear"}, {0: 0, 1: 0.25, 4: 1, 11: 1, 12: 1, 14: 0.775, 16: 0.55, 20: 0.1}),
        ({**WSD, "shape": "1-sqrt"}, {0: 0, 12: 1, 14: 0.55, 20: 0.1}),
        ({**WSD, "shape": "exponential"}, {12: 1, 16: math.sqrt(0.1), 20: 0.1}),
        ({**WSD, "warmup": 0, "decay": 0, "shape": "linear"}, {0: 1, 19: 1, 20: 1}),
        (
            {**INFINITE, "shape": "exponential"},
            {0: 0, 5: 0.5, 10: 1, 15: 0.4 + 0.3 * (1 + math.sqrt(0.5)), 20: 0.7, 30: 0.4, 90: 0.4, 95: 0.2, 100: 0.1},
        ),
        ({**INFINITE, "shape": "linear"}, {95: 0.25, 100: 0.1}),
        ({**INFINITE, "cooldown": 0, "shape": "linear"}, {9: 0.9, 10: 0.4, 89: 0.4}),
    ],
)
def test_multipliers_by_hand(settings, wanted):
    assert {step: multiplier(step, **settings) for step in wanted} == pytest.approx(wanted, abs=1e-12)


class Rates(TrainerCallback):
    """Record the learning rates that every step is taken with."""

    def __init__(self):
        self.taken = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.taken.append([group["lr"] for group in optimizer.param_groups])


def cosine(step):
    return step / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 8))


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({}, [cosine(step) for step in range(10)]),
        ({"schedule": "constant"}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "wsd", "decay": 0.4, "decay_shape": "linear"}, [0, 0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325]),
        (
            {"schedule": "wsd", "decay": 0.4},
            [0, 0.5, 1, 1, 1, 1, 1, 0.55, 1 - 0.9 * math.sqrt(0.5), 0.1 + 0.9 * 0.1339746],
        ),
        (
            {"schedule": "infinite", "cooldown": 0.2, "constant_lr": 4e-3, "decay": 0.2},
            [0, 0.5, 1, 0.7, 0.4, 0.4, 0.4, 0.4, 0.4, 0.2],
        ),
    ],
    ids=["cosine", "constant", "wsd", "wsd-1-sqrt", "infinite"],
)
def test_the_rates_of_a_run_are_those_worked_out_by_hand_for_every_group(section, wanted, tmp_path):
    given = {"lr": 1e-2, "min_lr": 1e-3, "warmup": 0.2, "name": "muon", "muon_lr": 3e-2, **section}
    rates = Rates()
    named = OptimizerSection(**given).arguments(10)
    train(tiny_gpt2(), tmp_path, callbacks=[rates], **{**named, "max_steps": 10, "save_strategy": "no"})
    assert [row[0] for row in rates.taken] == pytest.approx([3e-2 * w for w in wanted], abs=1e-8)
    assert all(row[1] == row[2] == pytest.approx(row[0] / 3) for row in rates.taken)


def test_a_trainer_that_trains_twice_begins_its_schedule_anew(tmp_path):
    rates = Rates()
    named = OptimizerSection(schedule="wsd", warmup=0.5).arguments(4)
    trainer = train(tiny_gpt2(), tmp_path, callbacks=[rates], **{**named, "max_steps": 4, "save_strategy": "no"})
    trainer.train()
    assert [row[0] == 0 for row in rates.taken] == [True, False, False, False] * 2


def test_warmup_is_bounded_in_steps():
    assert OptimizerSection(max_warmup_steps=7).arguments(1000)["warmup_steps"] == 7
    assert OptimizerSection(max_warmup_steps=200).arguments(1000)["warmup_steps"] == 100


# ---- Muon


def test_muon_gets_the_matrices_of_blocks_and_nothing_else():
    gpt2 = {
        f"transformer.h.{i}.{w}.weight"
        for i in (0, 1)
        for w in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(hidden_matrices(tiny_gpt2())) == gpt2
    model = small("mixtral")
    rest = {name for name, p in model.named_parameters() if p.ndim > 1} - set(hidden_matrices(model))
    stacks = {f"model.layers.{i}.mlp.{w}" for i in (0, 1) for w in ("experts.gate_up_proj", "experts.down_proj")}
    routers = {f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)}
    assert rest == {"model.embed_tokens.weight", "lm_head.weight"} | stacks | routers
    mamba = hidden_matrices(small("mamba"))
    assert {name.split("mixer.")[1] for name in mamba} == {"in_proj.weight", "x_proj.weight", "out_proj.weight"}


def batches():
    for step in range(5):
        yield torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(step))


def test_steps_are_those_of_pytorchs_two_optimizers_bit_for_bit():
    """Two models, one stepped by us, one by `torch.optim.Muon` and `torch.optim.AdamW`; all else is the same."""
    ours, theirs = tiny_llama(), tiny_llama()
    hidden = hidden_matrices(ours)

    def parts(model):
        named = dict(model.named_parameters())
        rest = {n: p for n, p in named.items() if n not in hidden}
        wide, thin = ([p for p in rest.values() if (p.ndim >= 2) == big] for big in (True, False))
        return [named[n] for n in hidden], [
            {"params": wide, "weight_decay": 0.1},
            {"params": thin, "weight_decay": 0.0},
        ]

    optimizers = [MuonAdamW(*parts(ours), lr=1e-2, muon_lr=2e-2, momentum=0.9, weight_decay=0.1)]
    matrices, others = parts(theirs)
    apart = [
        torch.optim.Muon(matrices, lr=2e-2, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95)),
    ]
    for ids in batches():
        for model, steppers in ((ours, optimizers), (theirs, apart)):
            model(input_ids=ids, labels=ids).loss.backward()
            for optimizer in steppers:
                optimizer.step()
                optimizer.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    moments = {name: set(optimizers[0].state[p]) for name, p in ours.named_parameters()}
    assert all(
        keys == ({"momentum_buffer"} if n in hidden else {"step", "exp_avg", "exp_avg_sq"})
        for n, keys in moments.items()
    )


def test_a_closure_is_called_with_gradients():
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = MuonAdamW([p], [{"params": [nn.Parameter(torch.ones(2))]}], lr=0.1)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6 and not torch.equal(p, torch.ones(2, 3))


MUON = {"muon": True, "optim": "adamw_torch_fused", "schedule": {"decay": 4, "floor": 0.1, "shape": "1-sqrt"}}


def test_a_resumed_muon_run_ends_bitwise_where_the_uninterrupted_one_does(tmp_path):
    again = {"callbacks": [ResetCallback("fire", at_steps=[6])], **MUON}
    whole = train(tiny_gpt2(), tmp_path / "whole", keep_steps=[4, 8], **again)
    assert losses(whole)[-1] < losses(whole)[0]
    for step in (4, 8):
        resume = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = train(tiny_gpt2(seed=9), tmp_path / str(step), resume=resume, **again)
        for (name, a), b in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
            assert torch.equal(a, b[1]), name
        states = [trainer.optimizer.state_dict() for trainer in (whole, resumed)]
        assert states[0]["param_groups"] == states[1]["param_groups"] and len(states[0]["param_groups"]) == 3
        for number, state in states[0]["state"].items():
            assert all(torch.equal(value, states[1]["state"][number][key]) for key, value in state.items())


def test_a_reset_clears_the_state_of_what_it_touched_in_both_optimizers(tmp_path):
    class Watch(ResetCallback):
        def _apply(self, args, model=None, optimizer=None, **rest):
            super()._apply(args, model=model, optimizer=optimizer, **rest)
            self.stateless = {n for n, p in model.named_parameters() if p not in optimizer.state}

    resets = [{"method": "fire", "roles": ["attention"]}, {"method": "shrink_perturb", "roles": ["embedding"]}]
    callback = Watch(resets, at_steps=[3])
    trainer = train(tiny_gpt2(), tmp_path, callbacks=[callback], max_steps=4, **MUON)
    touched = {t.parameter for t in callback.reports[0].touched}
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert callback.stateless == touched == embeddings | {n for n in hidden_matrices(trainer.model) if ".attn." in n}
    assert callback.reports[0].optimizer_states_cleared == len(touched)
    assert all(p in trainer.optimizer.state for p in trainer.model.parameters())  # made anew by step 4


def test_nothing_for_muon_to_train_is_refused(tmp_path):
    model = tiny_gpt2()
    model.transformer.h.requires_grad_(False)
    with pytest.raises(UserError, match="none of the model's is trainable: take another optimizer"):
        train(model, tmp_path, **MUON)


# ---- several processes

SHAPES = [(7, 5), (5, 12), (16, 16), (3, 9)]


def normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def in_shards(rank, world, mesh_shape):
    """Step on matrices in shards of rows, of fewer than ranks too, then of columns; then try one that has no plan."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", mesh_shape)

    def placed(tensor, dim=0):
        return distribute_tensor(tensor, mesh, [Replicate()] * (len(mesh_shape) - 1) + [Shard(dim)])

    vector, stepped = nn.Parameter(placed(torch.ones(4))), []
    for dim in (0, 1):
        matrices = [nn.Parameter(placed(m, dim)) for m in normal(99)]
        optimizer = MuonAdamW(matrices, [{"params": [vector], "weight_decay": 0.0}], lr=0.02, fused=True)
        for step in range(4):
            for p, gradient in zip(matrices, normal(step), strict=True):
                p.grad = placed(gradient, dim)
            vector.grad = placed(torch.ones(4))
            optimizer.step()
        stepped += [m.full_tensor() for m in matrices]
    told = ""
    summed, gradient = (DTensor.from_local(torch.ones(4, 4), mesh, [Partial()] * len(mesh_shape)) for _ in range(2))
    summed = nn.Parameter(summed)
    summed.grad = gradient
    try:
        MuonAdamW([summed], [{"params": [vector]}], lr=0.02).step()
    except UserError as error:
        told = str(error)
    return stepped, told


@pytest.mark.parametrize(("world", "mesh"), [(2, (2,)), (4, (2, 2))], ids=["fsdp2", "hsdp"])
def test_shards_are_stepped_as_whole_matrices_are(world, mesh, tmp_path):
    matrices = [nn.Parameter(m) for m in normal(99)]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for p, gradient in zip(matrices, normal(step), strict=True):
            p.grad = gradient
        muon.step()
    for ours, told in run_ranks(world, in_shards, tmp_path, mesh):
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(ours, matrices * 2, strict=True))
        assert "shape (4, 4) that is placed neither whole nor in shards along one axis" in told


def trained(rank, world, folder, environment, resume):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    per_device = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6 // world}
    callbacks = [ResetCallback("fire", at_steps=[6])]
    trainer = train(tiny_llama(), folder, resume=resume, callbacks=callbacks, keep_steps=[4], **per_device, **MUON)
    return losses(trainer)


def alone(folder, resume=None):
    callbacks = [ResetCallback("fire", at_steps=[6])]
    return train(tiny_llama(), folder, resume=resume, callbacks=callbacks, keep_steps=[4], **MUON)


def test_shards_train_as_one_process_does_which_goes_on_from_their_checkpoints(tmp_path):
    one = alone(tmp_path / "one")
    for told in run_ranks(2, trained, tmp_path, tmp_path / "two", FSDP2, None):
        assert told == pytest.approx(losses(one), abs=2e-3)
    a, b = (optimizer_state(tmp_path / folder / "checkpoint-12") for folder in ("two", "one"))
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    assert all(a["state"][i][key].shape == value.shape for i in b["state"] for key, value in b["state"][i].items())
    again = alone(tmp_path / "again", str(tmp_path / "two" / "checkpoint-4"))
    assert losses(again) == pytest.approx(losses(one), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_go_on_from_a_checkpoint_of_one(environment, tmp_path):
    one = alone(tmp_path / "one")
    for told in run_ranks(2, trained, tmp_path, tmp_path / "two", environment, str(tmp_path / "one" / "checkpoint-4")):
        assert not isinstance(told, Raised) and told == pytest.approx(losses(one), abs=2e-3)


# ---- names


@pytest.mark.parametrize("name", ["adafactor", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sgd", "adagrad"))])
def test_optimizers_of_transformers_train_and_resume(name, tmp_path):
    section = OptimizerSection(name=name, lr=1e-2, min_lr=1e-3).arguments(STEPS)
    whole = train(tiny_gpt2(), tmp_path / "a", keep_steps=[4], **section)
    resumed = train(tiny_gpt2(3), tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-4"), **section)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_what_transformers_cannot_make_is_told_in_one_message(tmp_path):
    trainer = ContinualTrainer(tiny_gpt2(), arguments(tmp_path, optim="grokadamw"), Samples())
    with pytest.raises(UserError, match="the optimizer 'grokadamw' cannot be made: "):
        trainer.train()


def with_optimizer(**section):
    return {**GOOD, "optimizer": section}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "moun"}, "optimizer.name: unknown optimizer 'moun'. Did you mean 'muon'? Known: adamw, muon, "),
        ({"name": "adamw_8bit"}, "optimizer.name: 'adamw_8bit' needs the library bitsandbytes, which is not installed"),
        ({"name": "adamw_torch_4bit"}, "needs the library torchao"),
        ({"name": "adalomoo"}, "unknown optimizer 'adalomoo'. Did you mean 'adamw'?"),
        ({"name": "adalomo"}, "optimizer.name: 'adalomo' steps inside the backward pass"),
        ({"name": "galore_adamw_layerwise"}, "'galore_adamw_layerwise' steps inside the backward pass"),
        ({"name": "apollo_adamw"}, "'apollo_adamw' needs a list of modules"),
        ({"name": "schedule_free_adamw"}, "'schedule_free_adamw' keeps other weights"),
        ({"name": "sgd", "betas": [0.9, 0.99]}, "optimizer.betas: 'sgd' has none; remove the key"),
        ({"muon_lr": 0.02}, "optimizer.muon_lr: name 'adamw' has no such key; it belongs to muon"),
        ({"muon_momentum": 0.9}, "optimizer.muon_momentum: name 'adamw' has no such key; it belongs to muon"),
        ({"schedule": "wds"}, "optimizer.schedule: 'wds' is not allowed. Did you mean 'wsd'? Allowed: cosine, wsd"),
        ({"decay": 0.2}, "optimizer.decay: schedule 'cosine' has no such key; it belongs to wsd, infinite"),
        ({"schedule": "wsd", "cooldown": 0.2}, "optimizer.cooldown: schedule 'wsd' has no such key; it belongs to inf"),
        ({"schedule": "constant", "min_lr": 1e-5}, "optimizer.min_lr: schedule 'constant' has no such key"),
        ({"schedule": "wsd", "decay": 0.95}, "decay: warmup 0.1 + decay 0.95 is more than the whole phase, 1; shorten"),
        (
            {"schedule": "infinite", "constant_lr": 1e-4, "cooldown": 0.9},
            "optimizer.decay: warmup 0.1 + decay 0.1 + cooldown 0.9 is more than the whole phase, 1",
        ),
        ({"schedule": "infinite"}, "optimizer.constant_lr: missing; the schedule 'infinite' needs it"),
        ({"schedule": "infinite", "constant_lr": 1e-2}, "optimizer.constant_lr: 0.01 should lie between min_lr, 6e-05"),
        ({"schedule": "infinite", "constant_lr": 1e-4, "min_lr": 0.0}, "optimizer.min_lr: an exponential decay never"),
        ({"schedule": "wsd", "min_lr": 1.0}, "optimizer.min_lr: 1.0 is above lr, 0.0006"),
    ],
)  # fmt: skip
def test_faults_name_the_key_and_what_is_allowed(section, message):
    with pytest.raises(UserError) as error:
        load_recipe(with_optimizer(**section))
    assert message in str(error.value) and str(error.value).startswith("one fault")


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"schedule": "constant", "lr": 1e-5},
        {"name": "sgd", "schedule": "wsd", "min_lr": 0.0},
        {"name": "muon", "schedule": "infinite", "constant_lr": 1e-4, "warmup": 0.33, "decay": 0.56, "cooldown": 0.11},
    ],
)
def test_what_a_run_writes_down_is_a_recipe_again(section):
    recipe = load_recipe(with_optimizer(**section))
    assert load_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.fixture(params=[True, False], ids=["bf16", "emulated"])
def native(request, monkeypatch):
    """Stand for a CPU that multiplies bf16 natively, and for one that does not."""
    monkeypatch.setattr("fire_llm.core.hardware.cpu_has_bf16", lambda: request.param)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return request.param


def test_the_plan_says_what_trains_what_and_where_that_is_slow(native, tmp_path):
    assert plan(load_recipe(GOOD), tmp_path)["optimizer"] == "adamw"
    infinite = {"schedule": "infinite", "constant_lr": 3e-4, "decay": 0.2}
    planned = plan(load_recipe(with_optimizer(name="muon", **infinite)), tmp_path)
    # gpt-tiny: 4 blocks of 12·128² in matrices; 512 tokens and 64 positions, and 13 + 2 vectors of 128 a block and 2.
    rest = 576 * 128 + 4 * 13 * 128 + 2 * 128
    slow = "" if native else "; Muon multiplies in bf16, which this CPU emulates: its steps will be slow"
    assert planned["optimizer"] == f"muon for 16 matrices (786,432 parameters), adamw for the rest ({rest:,}){slow}"
    assert planned["schedule"] == (
        "infinite: up to 0.0006 in 10% of the steps (at most 2000), 15% a cosine down to 0.0003, constant, "
        "the last 20% exponential to 6e-05"
    )
    assert "a cosine down to 6e-05" in plan(load_recipe(GOOD), tmp_path)["schedule"]


def test_the_plan_says_that_stacks_of_experts_are_not_muons(tmp_path):
    small("mixtral").save_pretrained(tmp_path / "experts")
    data = {**with_optimizer(name="muon"), "model": {"checkpoint": str(tmp_path / "experts"), "context": 64}}
    assert ", 4 stacks of experts among them)" in plan(load_recipe(data), tmp_path)["optimizer"]


# ---- optimizers with two modes


class TwoModes(torch.optim.SGD):
    """Train some weights and measure others, as schedule-free optimizers do: here zeros."""

    kept = None

    def eval(self):
        if self.kept is None:
            self.kept = [p.detach().clone() for p in self.param_groups[0]["params"]]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.zero_()

    def train(self):
        if self.kept is not None:
            with torch.no_grad():
                for p, before in zip(self.param_groups[0]["params"], self.kept, strict=True):
                    p.copy_(before)
            self.kept = None


def test_evaluation_sets_are_measured_with_the_weights_that_an_optimizer_evaluates(tmp_path):
    sets = {"a": EvaluationSet(torch.arange(60) % 97)}
    ran = {}
    for name, kind in (("plain", torch.optim.SGD), ("two", TwoModes)):
        model = tiny_gpt2()
        settings = arguments(tmp_path / name, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="no")
        optimizer = kind(model.parameters(), lr=1e-2)
        trainer = ContinualTrainer(model, settings, Samples(), sets, optimizers=(optimizer, None))
        trainer.train()
        ran[name] = losses(trainer), [e["eval_a_nll"] for e in trainer.state.log_history if "eval_a_nll" in e]
    assert ran["two"][0] == ran["plain"][0]
    assert ran["two"][1] == pytest.approx([math.log(97)] * 3) and ran["plain"][1] != ran["two"][1]
