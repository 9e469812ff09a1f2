"""DASH, L2-init and Parseval against their definitions, written out here, and against loops without the trainer."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_gpt2, tiny_llama
from support.ranks import run_ranks
from support.training import ACCUMULATION, FSDP2, MICRO, STEPS, Samples, arguments, losses, train
from transformers import Trainer, TrainerCallback, TrainingArguments

from fire_llm import (
    PenaltyCallback,
    ResetCallback,
    UserError,
    apply_reset,
    load_recipe,
    register_training,
    reset_checkpoint,
    run_recipe,
)
from fire_llm.resets import RESETS, ResetSpec
from fire_llm.training import ContinualTrainer


def attention_and_mlp(model):
    """Name the stored matrices of attention and MLPs, and say which axis runs over their outputs."""
    found = {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and (".attn." in name or ".mlp." in name or ".self_attn." in name):
            found[name] = 1 if name.startswith("transformer") else 0  # GPT-2 stores (in, out)
    return found


def matrices(model):
    """Return the (out, in) matrices of attention and MLPs, q, k and v apart, in autograd."""
    found = []
    for name, p in model.named_parameters():
        if name in attention_and_mlp(model):
            out_first = p.T if name.startswith("transformer") else p
            found += out_first.chunk(3) if "c_attn" in name else [out_first]
    return found


def loss_of(model, first=0, count=MICRO * ACCUMULATION):
    batch = [Samples()[i] for i in range(first, first + count)]
    ids, labels = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "labels"))
    return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())


def dashed(w, g, out_axis, floor):
    """Shrink every vector of weights that leads into one unit, in plain loops."""
    w, g = (w.detach().double().clone(), g.detach().double())
    for unit in range(w.shape[out_axis]):
        row, slope = (w[unit], g[unit]) if out_axis == 0 else (w[:, unit], g[:, unit])
        product = sum(float(a) * -float(b) for a, b in zip(row, slope, strict=True))
        norms = math.sqrt(sum(float(a) ** 2 for a in row)) * math.sqrt(sum(float(b) ** 2 for b in slope))
        row *= max(floor, product / norms if norms else 0.0)
    return w.float()


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- DASH


def test_dash_of_four_rows_by_hand():
    w = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [3.0, 4.0]])
    g = torch.tensor([[-7.0, 0.0], [0.0, 1e-30], [-1e-12, 0.0], [0.0, 0.0]])  # along, against, cosine 0.6, none
    kept = torch.tensor([[1.0], [0.3], [0.6], [0.3]])
    assert torch.allclose(RESETS["dash"].function(w, g), w * kept)
    assert torch.equal(RESETS["dash"].function(w, g, floor=1.0), w)
    stacked = RESETS["dash"].function(torch.stack([w, w]), torch.stack([g, -g]))
    assert torch.allclose(stacked[0], w * kept)
    assert torch.allclose(stacked[1], w * torch.tensor([[0.3], [1.0], [0.3], [0.3]]))


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_dash_is_its_definition_row_by_row(build):
    model = build()
    loss_of(model).backward()
    before, slopes, axes = snapshot(model), {n: p.grad for n, p in model.named_parameters()}, attention_and_mlp(model)
    report = apply_reset(model, {"method": "dash", "floor": 0.02})
    assert {t.parameter for t in report.touched} == set(axes)
    for name, p in model.named_parameters():
        wanted = dashed(before[name], slopes[name], axes[name], 0.02) if name in axes else before[name]
        assert torch.allclose(p, wanted, rtol=1e-5, atol=1e-8), name


def test_dash_reads_the_gradient_of_each_part_of_a_fused_matrix():
    model = tiny_gpt2()
    loss_of(model).backward()
    name = "transformer.h.0.attn.c_attn.weight"
    before, g = snapshot(model)[name], dict(model.named_parameters())[name].grad
    apply_reset(model, {"method": "dash", "exclude": [r"\[[qv]\]$"]})
    after = dict(model.named_parameters())[name]
    assert torch.equal(after[:, :32], before[:, :32]) and torch.equal(after[:, 64:], before[:, 64:])
    assert torch.allclose(after[:, 32:64], dashed(before, g, 1, 0.3)[:, 32:64], rtol=1e-5)


class Watched(ResetCallback):
    """Keep the weights right before and right after the reset."""

    def _apply(self, args, model=None, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        super()._apply(args, model=model, **kwargs)
        self.after = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.left = [name for name, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("at_steps", [(), (3,)])
def test_a_trainer_gathers_the_gradient_of_the_steps_to_come(at_steps, tmp_path):
    """Three steps, each of the whole accumulated batch, the newest weighing α = 0.4."""
    spec = {"method": "dash", "alpha": 0.4, "batches": 3, "floor": 0.02}
    callback = Watched(spec, at_steps=at_steps)
    train(tiny_gpt2(), tmp_path, callbacks=[callback], max_steps=4)
    model, axes = tiny_gpt2(), attention_and_mlp(tiny_gpt2())
    model.load_state_dict(callback.before, strict=False)
    average = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(3):
        model.zero_grad()
        loss_of(model, first=(len(at_steps) * 3 + step) * MICRO * ACCUMULATION).backward()
        average = {name: 0.6 * average[name] + 0.4 * p.grad for name, p in model.named_parameters()}
    for name, w in callback.before.items():
        wanted = dashed(w, average[name], axes[name], 0.02) if name in axes else w
        assert torch.allclose(callback.after[name], wanted, rtol=1e-4, atol=1e-7), name
    assert callback.left == []


def test_gathering_a_gradient_changes_nothing_else(tmp_path):
    """With λ = 1 nothing shrinks: dropout, the order of the data and every logged loss are those without it."""
    dropping = {"resid_pdrop": 0.2, "embd_pdrop": 0.2}
    plain = train(tiny_gpt2(**dropping), tmp_path / "a", callbacks=[ResetCallback("full_reset", initial=tiny_gpt2())])
    arm = ["full_reset", {"method": "dash", "floor": 1.0}]
    gathered = train(tiny_gpt2(**dropping), tmp_path / "b", callbacks=[ResetCallback(arm, initial=tiny_gpt2())])
    assert same(plain.model, gathered.model) and losses(plain) == losses(gathered)
    assert plain.hash_of_batches() == gathered.hash_of_batches()


# ---- the penalties


def written_out(model, initial, strengths):
    """Return λ‖θ − θ₀‖² + λ‖W Wᵀ − 1.5·I‖² of a model, in autograd, as the papers write them."""
    starts = dict(initial.named_parameters())
    total = sum(strengths[0] * (p - starts[n].to(p)).square().sum() for n, p in model.named_parameters())
    for w in matrices(model):
        total = total + strengths[1] * (w @ w.T - 1.5 * torch.eye(len(w), dtype=w.dtype)).square().sum()
    return total


def both(strengths=(3e-3, 2e-3)):
    return [
        {"method": "l2_init", "strength": strengths[0]},
        {"method": "parseval", "strength": strengths[1], "scale": 1.5},
    ]


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_penalties_add_the_gradient_of_their_definition(build):
    model, initial = build().double(), build(seed=1)
    wanted = torch.autograd.grad(written_out(model, initial, (3e-3, 2e-3)), list(model.parameters()))
    callback = PenaltyCallback(both(), initial=initial)
    callback.on_train_begin(SimpleNamespace(seed=0), None, None, model=model)
    for p in list(model.parameters())[1:]:  # the first one has no gradient yet
        p.grad = torch.full_like(p, 0.5)
    callback.add(8.0)
    for n, (p, gradient) in enumerate(zip(model.parameters(), wanted, strict=True)):
        assert torch.allclose(p.grad, (0.5 if n else 0.0) + 8.0 * gradient, rtol=1e-12, atol=1e-12)


def test_parts_roles_and_excluded_names_are_penalised_apart():
    model = tiny_gpt2()
    callback = PenaltyCallback({"method": "parseval", "roles": ["attention"], "exclude": [r"\[[qv]\]$", "c_proj"]})
    callback.on_train_begin(SimpleNamespace(seed=0), None, None, model=model)
    callback.add(1.0)
    touched = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert list(touched) == [f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)]
    for gradient in touched.values():
        assert gradient[:, 32:64].ne(0).all() and not gradient[:, :32].any() and not gradient[:, 64:].any()


def test_labels_and_defaults_are_the_papers():
    assert ResetSpec.parse("l2_init").label() == "l2_init, strength 0.001"
    assert ResetSpec.parse("parseval").options == {"strength": 1e-3, "scale": 2.0}
    assert ResetSpec.parse("dash").label() == "dash, floor 0.3, roles attention mlp"
    assert ResetSpec.parse("dash").options == {"floor": 0.3, "alpha": 0.3, "batches": 10}


def by_hand(model, initial, clip, strengths):
    """Train with the penalties in the loss, in plain PyTorch; return each step's NLL."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    told = []
    for step in range(STEPS):
        falling = 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * step / 3 if step < 3 else falling
        nll = loss_of(model, step * MICRO * ACCUMULATION)
        (nll + written_out(model, initial, strengths)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        told.append(float(nll.detach()))
    return told


@pytest.mark.parametrize(("build", "clip"), [(tiny_gpt2, 1.0), (tiny_llama, 1.0), (tiny_gpt2, 0.0)])
def test_training_equals_a_loop_with_the_penalties_in_the_loss(build, clip, tmp_path):
    """Clipping counts them, the logged loss does not."""
    callback = PenaltyCallback(both((0.3, 0.02)), initial=build(seed=1))
    trainer = train(build(), tmp_path, callbacks=[callback], max_grad_norm=clip)
    told = by_hand(model := build(), build(seed=1), clip, (0.3, 0.02))
    assert losses(trainer) == pytest.approx(told, abs=2e-5)
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert losses(trainer) != pytest.approx(losses(train(build(), tmp_path / "without", max_grad_norm=clip)), abs=1e-3)


def test_a_strength_of_zero_is_the_arm_without(tmp_path):
    plain = train(tiny_gpt2(), tmp_path / "a")
    zero = train(tiny_gpt2(), tmp_path / "b", callbacks=[PenaltyCallback(both((0.0, 0.0)))])
    assert same(plain.model, zero.model) and losses(plain) == losses(zero)


def test_resumed_arms_end_bitwise_where_the_uninterrupted_ones_do(tmp_path):
    """The initial weights are drawn again from the config and the trainer's seed; DASH does not happen twice."""

    def arm():
        return [ResetCallback("dash", seed=7), PenaltyCallback(both((0.3, 0.02)), seed=7)]

    whole = train(tiny_gpt2(), tmp_path / "a", callbacks=arm(), keep_steps=[4])
    resumed = train(tiny_gpt2(3), tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"), arm())
    assert same(whole.model, resumed.model) and losses(whole) == losses(resumed)


def test_initial_weights_are_kept_where_the_model_itself_is_given():
    model = tiny_gpt2()
    callback = PenaltyCallback({"method": "l2_init", "strength": 0.5}, initial=model)
    callback.on_train_begin(SimpleNamespace(seed=0), None, None, model=model)
    with torch.no_grad():
        model.transformer.wpe.weight += 1
    callback.add(1.0)
    assert torch.allclose(model.transformer.wpe.weight.grad, torch.ones(()))


def test_gradients_that_fp16_has_scaled_get_scaled_penalties(tmp_path):
    class Told(PenaltyCallback):
        def add(self, scale):
            self.scale = scale

    trainer = ContinualTrainer(tiny_gpt2(), arguments(tmp_path), Samples(), None, [callback := Told("parseval")])
    trainer._clip_grad_norm(trainer.model)
    assert callback.scale == 1.0
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: 4096.0)
    trainer._clip_grad_norm(trainer.model)
    assert callback.scale == 4096.0


def test_frozen_parameters_get_no_penalty():
    model = tiny_gpt2()
    model.transformer.wte.requires_grad_(False)
    callback = PenaltyCallback("l2_init", initial=tiny_gpt2(1))
    callback.on_train_begin(SimpleNamespace(seed=0), None, None, model=model)
    callback.add(1.0)
    assert model.transformer.wte.weight.grad is None and model.transformer.wpe.weight.grad is not None


def test_a_step_that_is_skipped_takes_no_penalty_either(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            self.before = [p.detach().clone() for p in model.parameters()]
            if state.global_step == 1:
                model.transformer.wpe.weight.register_hook(lambda g: g * math.nan)

    callbacks = [PenaltyCallback(both()), spoil := Spoil()]
    trainer = ContinualTrainer(
        model := tiny_gpt2(), arguments(tmp_path, nonfinite="skip", max_steps=2), Samples(), None, callbacks
    )
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), spoil.before, strict=True))


def on_ranks(rank, world, folder, environment, arm):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    callbacks = [PenaltyCallback(p) for p in arm if p["method"] != "dash"]
    callbacks += [ResetCallback(p) for p in arm if p["method"] == "dash"]
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6 // world}
    trainer = train(tiny_llama(), folder, callbacks=callbacks, **split)
    return losses(trainer), [getattr(p, "full_tensor", p.detach)() for p in trainer.model.parameters()]


DASH, (L2_INIT, PARSEVAL) = {"method": "dash"}, both((0.3, 0.02))


@pytest.mark.parametrize(
    ("environment", "arm"),
    [({}, [DASH, L2_INIT, PARSEVAL]), pytest.param(FSDP2, [L2_INIT], marks=pytest.mark.slow)],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_do_as_one(environment, arm, tmp_path):
    told = run_ranks(2, on_ranks, tmp_path, tmp_path / "two", environment, arm)
    one = on_ranks(0, 1, tmp_path / "one", {}, arm)
    assert told[0][0] == pytest.approx(one[0], abs=1e-4)
    for a, b, alone in zip(told[0][1], told[1][1], one[1], strict=True):
        assert torch.equal(a, b) and torch.allclose(a, alone, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [DASH, PARSEVAL])
def test_shards_of_what_has_to_be_whole_are_refused(penalty, tmp_path):
    for told in run_ranks(2, on_ranks, tmp_path, tmp_path / "two", FSDP2, [penalty]):
        assert "FSDP2 shards them: train replicas" in told


# ---- recipes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Give a recipe of two phases on random words, with an arm of each baseline."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["fire", "resets", "the", "weights", "so", "that", "they", "may", "learn", "again"]
    for name, seed in (("a", 1), ("b", 2)):
        picks = torch.randint(len(words), (6000,), generator=torch.Generator().manual_seed(seed))
        lines = [" ".join(words[i] for i in chunk) for chunk in picks.split(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arms = {
        "base": "keep",
        "dash": {"method": "dash", "batches": 2},
        "l2": {"method": "l2_init", "strength": 0.1},
        "fire+parseval": ["fire", {"method": "parseval", "roles": ["mlp"]}],
        "nothing": [{"method": "l2_init", "strength": 0.0}, {"method": "dash", "floor": 1.0, "batches": 1}],
    }
    data = {
        "name": "baselines", "data_root": str(folder), "tokenizer": {"train": 300}, "precision": "fp32",
        "model": {"preset": "gpt-tiny", "context": 32, "config": {"n_embd": 32, "n_layer": 2, "n_head": 2}},
        "corpora": {name: {"files": f"{name}.jsonl", "holdout": 0.1} for name in "ab"},
        "optimizer": {"lr": 3.0e-3, "min_lr": 3.0e-4},
        "batch": {"tokens_per_step": 128, "sequences_per_device": 2},
        "phases": [
            {"name": "first", "data": {"a": 1.0}, "steps": 4},
            {"name": "second", "data": {"b": 1.0}, "steps": 4, "arms": arms},
        ],
        "evaluate": {"data": ["b"], "max_tokens": 256},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(data))
    return load_recipe(folder / "recipe.json")


def test_an_arm_of_each_runs_and_is_told_of(recipe, tmp_path):
    results = run_recipe(recipe, tmp_path, progress=False)
    final = {name: arm["runs"][0]["final"]["b"]["nll"] for name, arm in results["arms"].items()}
    assert final["nothing"] == final["base"] and len(set(final.values())) == 4
    assert results["arms"]["fire+parseval"]["label"].endswith("parseval, strength 0.001, roles mlp")
    told = json.loads((tmp_path / "second/fire+parseval/seed-1/reset.json").read_text())
    assert [r["method"] for r in told["resets"]] == ["fire"] and [r["method"] for r in told["training"]] == ["parseval"]
    told = json.loads((tmp_path / "second/l2/seed-1/reset.json").read_text())
    assert [r["method"] for r in told["resets"]] == ["none"] and told["touched"] == []


# ---- the registry, and messages


def test_registering_what_acts_in_training_makes_its_arguments_the_schema():
    @register_training("spare", roles=("mlp",), kind="recycling")
    class Spare:
        """Do nothing."""

        def __init__(self, *, every: int = 10) -> None:
            self.every = every

    try:
        spec = ResetSpec.parse({"method": "spare", "every": 3})
        assert (spec.kind, spec.options, spec.roles) == ("recycling", {"every": 3}, ("mlp",))
        assert (RESETS["spare"].when, RESETS["fire"].when, RESETS["l2_init"].when) == (
            "training", "transition", "training",
        )  # fmt: skip
        assert RESETS["spare"].function(**spec.options).every == 3
        with pytest.raises(UserError, match=r"every: 'x' is not allowed"):
            ResetSpec.parse({"method": "spare", "every": "x"})
        with pytest.raises(UserError, match=r"'spare' acts during training.*give it to RecyclingCallback"):
            PenaltyCallback("spare")
    finally:
        del RESETS["spare"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda path: apply_reset(tiny_gpt2(), "l2_init"), "'l2_init' acts during training, not on weights"),
        (lambda path: ResetCallback(["fire", "parseval"]), "in a script give it to PenaltyCallback"),
        (lambda path: PenaltyCallback("fire"), "'fire' acts on weights, once: make it an arm"),
        (
            lambda path: apply_reset(tiny_gpt2(), "dash"),
            "'dash' needs the gradient of the loss, and 'transformer.h.0.at",
        ),
        (lambda path: reset_checkpoint(path, path.parent / "dst", "dash"), "make it an arm of a recipe"),
        (lambda path: reset_checkpoint(path, path.parent / "dst", "l2_init"), "'l2_init' acts during training"),
        (lambda path: PenaltyCallback({"method": "l2_init", "strength": -1.0}), "strength: -1.0 is not allowed"),
        (lambda path: PenaltyCallback({"method": "parseval", "roles": ["norm"]}), "norm are not. Remove them"),
        (
            lambda path: PenaltyCallback("l2_init", initial=tiny_llama()).on_train_begin(
                SimpleNamespace(seed=1), None, None, model=tiny_gpt2()
            ),
            "another architecture",
        ),
    ],
)
def test_a_method_in_the_wrong_place_is_refused(act, message, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "src")
    with pytest.raises(UserError) as error:
        act(tmp_path / "src")
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "dst").exists()


def test_a_gradient_that_is_not_finite_is_refused():
    model = tiny_gpt2()
    loss_of(model).backward()
    model.transformer.h[1].mlp.c_fc.weight.grad[0, 0] = math.inf
    before = snapshot(model)
    with pytest.raises(UserError, match=r"the gradient of 'transformer.h.1.mlp.c_fc.weight' is NaN or infinite"):
        apply_reset(model, "dash")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_resets_of_one_arm_share_a_gradient(tmp_path):
    arm = [{"method": "dash", "batches": 1}, {"method": "dash", "batches": 2}]
    with pytest.raises(UserError, match="give them the same batches and alpha"):
        train(tiny_gpt2(), tmp_path, callbacks=[ResetCallback(arm)])


def test_a_penalty_in_another_trainer_is_refused(tmp_path):
    settings = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False
    )
    samples = [{"input_ids": s["input_ids"], "labels": s["input_ids"]} for s in (Samples()[i] for i in range(8))]
    trainer = Trainer(tiny_gpt2(), settings, train_dataset=samples, callbacks=[PenaltyCallback("parseval")])
    with pytest.raises(UserError, match="ContinualTrainer"):
        trainer.train()
