"""A phase's own optimizer, and its state: cleared, or kept as a loop in plain PyTorch keeps it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from jsonschema import ValidationError
from support.models import tiny_gpt2
from support.ranks import run_ranks
from support.recipes import GOOD, changed, validator
from support.runs import recipe_data, run_rank, weights
from support.training import FSDP2, Samples, arguments
from transformers import Trainer

from fire_llm import ContinualTrainer, ResetCallback, UserError, load_recipe, run_recipe
from fire_llm.architectures.matrices import hidden_matrices
from fire_llm.core.atomic import checkpoints
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.recipe import optimizer_of
from fire_llm.experiment.recipe.sections import LATER
from fire_llm.experiment.stages import expand
from fire_llm.experiment.train import _arguments
from fire_llm.models import load_model
from fire_llm.training import KeptOptimizer


def phase_of(optimizer, common=None):
    recipe = load_recipe({**changed("phases/1/optimizer", optimizer), "optimizer": common or {}})
    return recipe, optimizer_of(recipe, recipe.phases[1])


def test_a_phase_changes_the_keys_it_gives_and_no_others():
    recipe, second = phase_of({"lr": 1.0e-3, "warmup": 0.5}, {"lr": 2.0e-3, "clip": 0.3})
    assert (second.lr, second.warmup, second.clip, second.min_lr) == (1e-3, 0.5, 0.3, 6e-5)
    assert optimizer_of(recipe, recipe.phases[0]) is not second
    assert optimizer_of(recipe, recipe.phases[0]) == recipe.optimizer
    # What the recipe gives for another schedule goes: it would be refused, and the phase could not take it back.
    _, constant = phase_of({"schedule": "constant"}, {"schedule": "wsd", "min_lr": 1.0e-6, "decay": 0.4})
    assert (constant.schedule, constant.min_lr, constant.decay) == ("constant", 6e-5, 0.1)
    _, sgd = phase_of({"name": "sgd"}, {"betas": [0.8, 0.9]})
    assert sgd.betas == [0.9, 0.95]


def test_arguments_and_specs_are_those_of_the_phase(tmp_path):
    recipe, _ = phase_of({"lr": 1.0e-3, "warmup": 0.5, "min_lr": 6.0e-5})
    run = RunContext(recipe, tmp_path)
    first, *later = expand(run)
    for stage, lr, warmup in [(first, 6e-4, 1), *((stage, 1e-3, 5) for stage in later)]:
        made = _arguments(stage, run, tmp_path, 10)
        assert (made.learning_rate, made.warmup_steps) == (lr, warmup)
        assert (stage.spec["optimizer"]["lr"], stage.spec["optimizer"]["warmup"]) == (lr, warmup / 10)
    assert load_recipe(recipe.model_dump(mode="json")) == recipe
    assert recipe.model_dump(mode="json")["phases"][0]["optimizer"] == {}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer/lrr", 1.0, "phases[1].optimizer.lrr: unknown key. Did you mean 'lr'? Known: name, lr, min_lr, "),
        ("optimizer/lr", "1e-3", "phases[1].optimizer.lr: '1e-3' is text to YAML, and a number is wanted"),
        ("optimizer/lr", -1.0, "phases[1].optimizer.lr: -1.0 is not allowed"),
        ("optimizer/lr", 1.0e-6, "phases[1].optimizer.min_lr: 6e-05 is above lr, 1e-06"),
        ("optimizer/decay", 0.5, "phases[1].optimizer.decay: schedule 'cosine' has no such key"),
        ("optimizer/name", "moun", "phases[1].optimizer.name: unknown optimizer 'moun'. Did you mean 'muon'?"),
        ("optimiser", {}, "phases[1].optimiser: unknown key. Did you mean 'optimizer'?"),
        ("optimizer_state", "keep", "optimizer_state: 'keep' is not allowed. Did you mean 'kept'? Allowed: cleared, k"),
    ],
)
def test_one_fault_one_message(path, value, message):
    with pytest.raises(UserError) as error:
        load_recipe(changed(f"phases/1/{path}", value))
    assert message in str(error.value) and str(error.value).startswith("one fault in the recipe:")


def test_editors_know_the_keys_of_a_phase():
    validator().validate(changed("phases/1/optimizer", {"lr": 1.0e-3}))
    validator().validate(changed("phases/1/optimizer_state", "kept"))
    for path, value in [("optimizer", {"lrr": 1.0}), ("optimizer", {"lr": "1e-3"}), ("optimizer_state", "keep")]:
        with pytest.raises(ValidationError):
            validator().validate(changed(f"phases/1/{path}", value))
    # A default would be completed, and would then stand where the recipe's own value was meant.
    assert "default" not in validator().schema["$defs"]["PhaseOptimizerSection"]["properties"]["lr"]


def test_a_fault_of_the_recipes_own_optimizer_is_told_once():
    data = {**changed("phases/1/optimizer", {"clip": 0.5}), "optimizer": {"min_lr": 1.0}}
    with pytest.raises(UserError, match=r"^one fault in the recipe:\n  optimizer.min_lr: 1.0 is above lr, 0.0006$"):
        load_recipe(data)


def test_a_state_that_cannot_be_kept_is_refused():
    with pytest.raises(UserError, match=r"phases\[0\].optimizer_state: 'kept' wants a checkpoint of an earlier phase"):
        load_recipe(changed("phases/0/optimizer_state", "kept"))
    data = changed("phases/1/optimizer_state", "kept")
    data["phases"][1]["optimizer"] = {"name": "muon"}
    with pytest.raises(UserError, match=r"'one' is trained with adamw, this phase with muon. Write cleared, or"):
        load_recipe(data)
    data["phases"][0]["optimizer"] = {"name": "muon"}
    load_recipe(data)
    third = {"name": "three", "data": {"python-docs": 1.0}, "steps": 5, "optimizer_state": "kept"}
    data["phases"].append({**third, "start_from": {"two/fire": "final"}})
    with pytest.raises(UserError, match=r"phases\[2\].optimizer_state: .* 'two/fire' is trained with muon, this phase"):
        load_recipe(data)


# ---- what a unit's folder tells


def test_a_unit_tells_of_every_key_that_its_weights_or_measurements_depend_on():
    apart = {"arms", "keep", "start_from", "optimizer"}  # the resets, other folders, the parent, and a part of its own
    for stage in expand(RunContext(load_recipe(GOOD))):
        for place in ("batch", "optimizer", "evaluate"):
            known = set(type(getattr(load_recipe(GOOD), place)).model_fields)
            assert set(stage.spec[place]) == known - LATER  # which are told of where they are given
        assert set(stage.spec["phase"]) == set(type(stage.phase).model_fields) - apart - {"ema", "stop"}


def short(folder, **second):
    """Give the tiny recipe of 3 and 4 steps."""
    data = recipe_data(folder)
    data["phases"][0].update(steps=3, keep=[])
    data["phases"][1].update(steps=4, **second)
    return data


def test_a_unit_that_was_begun_before_a_key_was_known_is_refused(texts, tmp_path):
    data = short(texts)
    run_recipe(load_recipe(data), tmp_path, arms=["base"], progress=False)
    path = tmp_path / "first" / "seed-1" / "unit.json"
    told = json.loads(path.read_text())
    del told["evaluate"]["diagnostics_every_steps"]  # null by default
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"another recipe:\n  evaluate.diagnostics_every_steps: absent then, null now"):
        run_recipe(load_recipe(data), tmp_path, arms=["base"], progress=False)


# ---- the state kept

MUON = {"muon": True, "optim": "adamw_torch"}
RATES = (1e-2, 3e-3)


def in_plain_pytorch(model, muon, steps=4):
    """Train two phases of constant rates with one optimizer (or two, for Muon) that nothing ever touches."""
    hidden = hidden_matrices(model) if muon else set()
    rest = {name: p for name, p in model.named_parameters() if name not in hidden}
    groups = [
        {"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)]
    if muon:
        matrices = [p for name, p in model.named_parameters() if name in hidden]
        optimizers.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for rate in RATES:
        for step in range(steps):
            batch = [Samples()[step * 6 + j] for j in range(6)]
            ids, labels = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "labels"))
            loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / labels.numel()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
    return dict(model.named_parameters())


def two_phases(folder, again=KeptOptimizer, **changes):
    """Train two phases, the second from the first one's checkpoint; return both trainers."""
    constant = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0, "max_steps": 4}
    whole = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, **constant, **changes}
    trainers, model, callbacks = [], tiny_gpt2(), []
    for phase, rate in zip(("one", "two"), RATES, strict=True):
        settings = arguments(folder / phase, learning_rate=rate, **whole)
        trainer = ContinualTrainer(model, settings, Samples(), None, callbacks)
        trainer.train()
        trainers.append(trainer)
        last = checkpoints(folder / phase)[-1][0]
        model, callbacks = load_model(last, torch.float32), [again(last)] if again else []
    return trainers


@pytest.mark.parametrize("options", [{}, MUON], ids=["adamw", "muon"])
def test_kept_moments_are_those_of_a_loop_that_never_lets_go_of_its_optimizer(options, tmp_path):
    model = two_phases(tmp_path, **options)[1].model
    for name, p in in_plain_pytorch(tiny_gpt2(), bool(options)).items():
        assert torch.equal(p, model.get_parameter(name)), name
    cleared = two_phases(tmp_path / "cleared", again=None, **options)[1].model
    assert not torch.equal(cleared.transformer.wte.weight, model.transformer.wte.weight)


def test_a_reset_still_clears_what_it_touches(texts, tmp_path):
    """3 steps, then 4: a moment that was kept has seen 7."""
    data = short(texts, optimizer_state="kept")
    results = run_recipe(load_recipe(data), tmp_path, arms=["base", "fire"], progress=False)
    seen = {}
    for arm in ("base", "fire"):
        last = checkpoints(tmp_path / "second" / arm / "seed-1")[-1][0]
        model = load_model(last, torch.float32)
        # AdamW's order in `Trainer`: what is decayed first.
        names = sorted((n for n, _ in model.named_parameters()), key=lambda n: model.get_parameter(n).ndim < 2)
        state = torch.load(last / "optimizer.pt", weights_only=True)
        steps = {name: int(state["state"][i]["step"]) for i, name in enumerate(names)}
        seen[arm] = {name for name, count in steps.items() if count == 7}
        assert {steps[name] for name in set(names) - seen[arm]} <= {4}
    assert seen["base"] == set(names)
    assert seen["base"] - seen["fire"] == set(hidden_matrices(model))
    assert results["arms"]["base"]["final"] != results["arms"]["fire"]["final"]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(("name", "rounding"), [("adamw", 1e-5), ("muon", 1e-3)])  # Muon multiplies in bf16
def test_two_processes_keep_the_state_of_one(name, rounding, environment, texts, tmp_path):
    data = recipe_data(texts)
    data["optimizer"]["name"] = name
    data["phases"][1]["optimizer_state"] = "kept"
    alone = run_recipe(load_recipe(data), tmp_path / "one", arms=["fire"], progress=False)
    (tmp_path / "ranks").mkdir()
    told = run_ranks(2, run_rank, tmp_path / "ranks", data, tmp_path / "two", environment, ["fire"], seconds=250)
    data["phases"][1]["optimizer_state"] = "cleared"
    cleared = run_recipe(load_recipe(data), tmp_path / "cleared", arms=["fire"], progress=False)
    kept, two, other = (r["arms"]["fire"]["runs"][0]["final"]["b"]["nll"] for r in (alone, told[0][0], cleared))
    assert two == pytest.approx(kept, abs=rounding) and abs(other - kept) > 5 * rounding


def test_a_resumed_phase_has_its_own_state(texts, tmp_path):
    data = short(texts, optimizer_state="kept", keep=[2])
    run_recipe(load_recipe(data), tmp_path, arms=["base"], progress=False)
    folder = tmp_path / "second" / "base" / "seed-1"
    (before, _), (last, step) = checkpoints(folder)
    whole, last = weights(last), last.rename(tmp_path / "gone")
    assert step == 4 and before.name == "checkpoint-2"
    run_recipe(load_recipe(data), tmp_path, arms=["base"], progress=False)
    again = weights(folder / "checkpoint-4")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_callback_stands_before_a_reset(tmp_path):
    """In a program of one's own: the state of what FIRE touched is gone, the rest is there."""
    two_phases(tmp_path)
    last = checkpoints(tmp_path / "one")[-1][0]
    reset = ResetCallback("fire")
    settings = arguments(tmp_path / "three", max_steps=1)
    trainer = ContinualTrainer(load_model(last, torch.float32), settings, Samples(), None, [KeptOptimizer(last), reset])
    trainer.train()
    names = {p: name for name, p in trainer.model.named_parameters()}
    steps = {names[p]: int(state["step"]) for p, state in trainer.optimizer.state.items()}
    touched = hidden_matrices(trainer.model)
    assert steps == {name: 1 if name in touched else 5 for name in names.values()}
    assert reset.reports[0].optimizer_states_cleared == len(touched)


@pytest.mark.parametrize("kind", [ContinualTrainer, Trainer])
def test_the_optimizer_of_a_head_has_nothing_to_clear_where_the_body_is_reset(kind, tmp_path):
    """The body is not frozen, and yet not trained: what is reset has no moments."""
    model, reset = tiny_gpt2(), ResetCallback("fire", at_steps=[1])
    head = torch.optim.AdamW([model.transformer.ln_f.weight], lr=1e-3)
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    settings = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "keep_steps": []}
    data = [{**Samples()[i], "labels": Samples()[i]["input_ids"]} for i in range(40)]
    trainer = kind(
        model, arguments(tmp_path, **settings), train_dataset=data, callbacks=[reset], optimizers=(head, None)
    )
    trainer.train()
    assert reset.reports[0].optimizer_states_cleared == 0 and len(reset.reports[0].touched) == 12
    assert not torch.equal(before, model.transformer.h[0].mlp.c_fc.weight)
    assert int(head.state[model.transformer.ln_f.weight]["step"]) == 2


def test_the_optimizer_of_a_copy_is_refused(tmp_path):
    copy = torch.optim.AdamW(tiny_gpt2().parameters(), lr=1e-3)
    trainer = ContinualTrainer(
        tiny_gpt2(), arguments(tmp_path, max_steps=1), Samples(), callbacks=[ResetCallback()], optimizers=(copy, None)
    )
    with pytest.raises(UserError, match=r"trains no parameter of the trainer's model.* model.parameters\(\)"):
        trainer.train()
