"""Recycling of hidden units: decisions worked out by hand, weights and moments touched exactly, runs that go on."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama
from support.ranks import run_ranks
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from fire_llm import ContinualTrainer, UserError
from fire_llm.core.manifest import damage
from fire_llm.experiment.estimate import plan
from fire_llm.experiment.recipe import load_recipe
from fire_llm.linalg.activations import dormant_scores
from fire_llm.resets import RESETS, ContinualBackprop, ReDo, ResetSpec, SelfNormalizedResets
from fire_llm.training import ContinualArguments, EvaluationSet, loss
from fire_llm.training.recycling import RecyclingCallback, recycled_layers
from fire_llm.training.throughput import MEASURES

METHODS = {
    "redo": {"every": 3, "threshold": 0.8},
    "continual_backprop": {"rate": 0.02, "decay": 0.9, "maturity": 2},
    "snr": {"eta": 0.6},
}
"""Options so eager that a few steps recycle some units and leave others."""

ARGUMENTS = SimpleNamespace(n_gpu=0, torch_compile=False)


def tiny_phi3():
    """Build a Phi-3, whose gate and up are fused, of 2 layers."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    return Phi3ForCausalLM(
        Phi3Config(
            hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=97, max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def biased_llama():
    return tiny_llama(mlp_bias=True)


BUILDS = [tiny_gpt2, tiny_llama, biased_llama, tiny_phi3]

# ---- decisions


def test_redo_takes_the_units_whose_share_of_the_mean_is_at_most_the_threshold():
    """Means of |h| over 4 tokens are 1, 0.5, 0.025, 2.475; their mean is 1."""
    recycler = ReDo(4, every=5, threshold=0.025)
    recycler.observe(torch.tensor([[1.0, -0.5, 0.1, 2.475], [-1.0, 0.5, 0.0, -2.475]]))
    recycler.observe(torch.tensor([[[1.0, 0.5, 0.0, 2.475], [1.0, -0.5, 0.0, 2.475]]]))
    assert recycler.pop_stale(torch.ones(4)).tolist() == [False, False, True, False]
    assert [step for step in range(1, 16) if recycler.wants(step)] == [5, 10, 15]


def test_redo_scores_as_the_diagnostics_do_and_forgets_the_last_time():
    for seed in range(3):
        h = torch.randn(50, 40, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0, 1, 40)
        recycler = ReDo(40, threshold=0.3)
        recycler.observe(torch.ones(9, 40))
        recycler.pop_stale(torch.ones(40))
        recycler.observe(h)
        assert torch.equal(recycler.pop_stale(torch.ones(40)), dormant_scores(h) <= 0.3)


def test_continual_backprop_replaces_what_its_pseudo_code_does():
    """12 steps of 4 units, the definition written out in plain numbers beside it."""
    rate, decay, maturity = 0.15, 0.8, 3
    recycler = ContinualBackprop(4, rate=rate, decay=decay, maturity=maturity)
    utility, age, due, replaced = [0.0] * 4, [0] * 4, 0.0, []
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        h, outgoing = torch.randn(6, 4, generator=generator), torch.rand(4, generator=generator)
        recycler.observe(h[:2])
        recycler.observe(h[2:])
        for unit in range(4):
            age[unit] += 1
            mean = sum(abs(float(x)) for x in h[:, unit]) / 6
            utility[unit] = decay * utility[unit] + (1 - decay) * mean * float(outgoing[unit])
        mature = [unit for unit in range(4) if age[unit] > maturity]
        due += rate * len(mature)
        mature.sort(key=lambda unit: utility[unit] / (1 - decay ** age[unit]))
        expected = sorted(mature[: int(due)])
        due -= len(expected)
        for unit in expected:
            utility[unit], age[unit] = 0.0, 0
        assert recycler.pop_stale(outgoing).nonzero().flatten().tolist() == expected
        assert recycler.utility.tolist() == pytest.approx(utility, rel=1e-5)
        replaced += [(step, unit) for unit in expected]
    assert len(replaced) > 2 and len({unit for _, unit in replaced}) > 1
    assert float(recycler.due) == pytest.approx(due, rel=1e-5)


def test_continual_backprop_replaces_no_more_than_are_mature_and_outlives_a_step_that_overflowed():
    recycler = ContinualBackprop(3, rate=1.0, maturity=0)
    recycler.observe(torch.ones(2, 3))
    assert recycler.pop_stale(torch.ones(3)).all() and float(recycler.due) == 0
    recycler = ContinualBackprop(3, rate=0.0, decay=0.5)
    for h in (1.0, math.inf, 1.0):
        recycler.observe(torch.full((2, 3), h))
        recycler.pop_stale(torch.ones(3))
    assert recycler.utility.tolist() == [0.75] * 3  # of two steps


def test_snr_resets_what_has_been_silent_for_longer_than_its_own_past_explains():
    """At eta = 0.1 the threshold is 2.303 times the mean of a unit's times between firings, a first one of 1 included.

    Unit 0 fires at every step up to 5: a mean of 1, reset at its 3rd silent step, 8, and new at 11 and 14 for it is
    still silent. Unit 1 fires at 2, 4, 6 and 8: a mean of 9/5, threshold 4.1, reset 5 steps on, at 13. Unit 2 always
    fires, for one token of many. Unit 3 never fires: reset at 3, 6, 9, 12 and 15.
    """
    recycler = SelfNormalizedResets(4, eta=0.1)
    reset = {unit: [] for unit in range(4)}
    for step in range(1, 16):
        h = -torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(step))
        h[0, 1, 0] = 1.0 if step <= 5 else 0.0
        h[1, 2, 1] = 1.0 if step in (2, 4, 6, 8) else -1.0
        h[0, 0, 2] = 1e-6
        for micro in h:
            recycler.observe(micro)
        for unit in recycler.pop_stale(torch.ones(4)).nonzero().flatten().tolist():
            reset[unit].append(step)
    assert reset == {0: [8, 11, 14], 1: [13], 2: [], 3: [3, 6, 9, 12, 15]}


def test_options_are_those_of_the_classes():
    for name, options in METHODS.items():
        assert RESETS[name].when == "training" and ResetSpec.parse({"method": name, **options}).roles == ("mlp",)
    for name, option in (("redo", "every"), ("continual_backprop", "decay"), ("snr", "eta")):
        with pytest.raises(UserError, match=f"{option}: .* not allowed"):
            ResetSpec.parse({"method": name, option: -1})
    with pytest.raises(UserError, match="'fire' acts on weights, once"):
        RecyclingCallback("fire", seed=0)


# ---- the model


def ids(seed=0, rows=3):
    return torch.randint(0, 97, (rows, 12), generator=torch.Generator().manual_seed(seed))


def activations(model, layer, tokens, silence=()):
    """Return what a layer's reader reads, and the logits, with some units put to zero before they are read."""
    seen = []

    def listen(_, inputs):
        h = inputs[0].clone()
        h[..., list(silence)] = 0
        seen.append(h)
        return (h,)

    hook = layer.reader.register_forward_pre_hook(listen)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    hook.remove()
    return seen[0], logits


@pytest.mark.parametrize("build", BUILDS)
def test_a_unit_is_its_rows_and_its_column(build):
    """Changed rows of a unit change its activation alone; with a zero column it no longer matters."""
    model = build().eval()
    layers = recycled_layers(model, ResetSpec.parse("redo"))
    assert len(layers) == 2 and {layer.units for layer in layers} <= {80, 128}
    biases = {tiny_gpt2: 1, biased_llama: 2}.get(build, 0)
    matrices = 1 if build is tiny_gpt2 else 2
    for layer in layers:
        assert len(layer.incoming) == matrices + biases
        before, _ = activations(model, layer, ids())
        callback = prepared(model, "redo")
        number = [one.name for one in callback.work.layers].index(layer.name)
        callback.work.renew({number: torch.tensor([5, 17])}, 1, torch.optim.SGD(model.parameters()))
        after, _ = activations(model, layer, ids())
        assert (before != after).any(0).any(0).nonzero().flatten().tolist() == [5, 17]


@pytest.mark.parametrize("build", BUILDS)
def test_the_model_changes_by_what_the_units_put_out_and_by_nothing_else(build):
    model = build().eval()
    layer = recycled_layers(model, ResetSpec.parse("redo"))[1]
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1)  # biases that the initialisation has at zero
    old = copy.deepcopy(dict(model.named_parameters()))
    _, silenced = activations(model, layer, ids(), silence=[0, 31, 79])
    callback = prepared(model, "snr")
    state = torch.get_rng_state()
    callback.work.renew({1: torch.tensor([0, 31, 79])}, 4, torch.optim.SGD(model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    _, renewed = activations(model, layer, ids())
    torch.testing.assert_close(renewed, silenced, rtol=0, atol=1e-6)
    touched = {piece.parameter for piece in (*layer.incoming, layer.outgoing)}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert changed == touched
    width = 32
    for name in touched:
        count = int((dict(model.named_parameters())[name] != old[name]).sum())
        fused = 2 if "gate_up" in name else 1
        assert count == 3 * fused * (1 if name.endswith("bias") else width)


def test_new_rows_are_drawn_as_the_model_draws_them_by_seed_step_and_layer():
    def draw(seed, step, number=0):
        model = tiny_gpt2(n_inner=512, initializer_range=0.05)
        callback = prepared(model, "redo", seed=seed)
        callback.work.renew({number: torch.arange(500)}, step, torch.optim.SGD(model.parameters()))
        mlp = model.transformer.h[number].mlp
        assert not mlp.c_fc.bias.any() and not mlp.c_proj.weight[:500].any() and mlp.c_proj.weight[500:].all()
        return mlp.c_fc.weight.detach()[:, :500]

    rows = draw(1, 7)
    assert float(rows.std()) == pytest.approx(0.05, rel=0.03) and abs(float(rows.mean())) < 0.002
    assert torch.equal(rows, draw(1, 7))
    for other in (draw(2, 7), draw(1, 8), draw(1, 7, 1)):
        assert not torch.isclose(rows, other, rtol=0.05).all(0).any()


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("build", BUILDS)
def test_moments_of_exactly_the_touched_weights_are_cleared(build, muon, tmp_path):
    trainer = train(build(), tmp_path, max_steps=2, muon=muon)
    model, optimizer = trainer.model, trainer.optimizer
    callback = prepared(model, "redo")
    layer = callback.work.layers[0]
    named = dict(model.named_parameters())
    names = {p: name for name, p in named.items()}
    before = {names[p]: {k: copy.deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    callback.work.renew({0: torch.tensor([3, 40])}, 2, optimizer)
    moved = set()
    for p, state in optimizer.state.items():
        for key, value in state.items():
            old = before[names[p]][key]
            differs = value != old
            if differs.any():
                moved.add(names[p])
                assert not value[differs].any()
                width = 1 if p.ndim == 1 else 32
                assert int((value == 0).sum() - (old == 0).sum()) == 2 * width * (2 if "gate_up" in names[p] else 1)
    assert moved == {piece.parameter for piece in (*layer.incoming, layer.outgoing)}


def prepared(model, method, seed=0, **options):
    """Return a callback that has found a model's units."""
    callback = RecyclingCallback({"method": method, **options}, seed=seed)
    callback.on_train_begin(ARGUMENTS, SimpleNamespace(global_step=0), None, model=model)
    return callback


def test_training_that_broke_off_leaves_no_second_listener():
    callback = prepared(tiny_gpt2(), "snr")
    model = tiny_gpt2()
    for _ in range(2):
        callback.on_train_begin(ARGUMENTS, SimpleNamespace(global_step=0), None, model=model)
    assert [len(layer.reader._forward_pre_hooks) for layer in callback.work.layers] == [1, 1]


def test_what_cannot_be_recycled_is_refused():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 97}
    moe = MixtralForCausalLM(MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=2, **sizes))
    with pytest.raises(UserError, match=r"dense MLPs.*cannot reach .*experts stacked"):
        prepared(moe, "redo")
    model = tiny_llama()
    with pytest.raises(UserError, match="every MLP: excluded or frozen"):
        prepared(model, "snr", exclude=("down_proj",))
    model.model.layers[0].mlp.up_proj.weight.requires_grad = False
    assert [layer.name for layer in recycled_layers(model, ResetSpec.parse("redo"))] == [
        "model.layers.1.mlp.down_proj.weight"
    ]
    half = biased_llama()
    half.model.layers[0].mlp.up_proj.bias.requires_grad = False
    assert [len(layer.incoming) for layer in recycled_layers(half, ResetSpec.parse("redo"))] == [3, 4]
    with pytest.raises(UserError, match="DataParallel copies"):
        RecyclingCallback("redo", seed=0).on_train_begin(SimpleNamespace(n_gpu=2), None, None, model=model)
    model.model.embed_tokens.weight.placements = ()
    with pytest.raises(UserError, match="FSDP2 shards"):
        prepared(model, "redo")


def test_a_recipe_whose_model_cannot_be_recycled_is_refused_before_it_runs(tmp_path):
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
    MixtralConfig(**config, num_local_experts=2).save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(f"""
        name: experts
        model: {{checkpoint: {tmp_path / "model"}, context: 32}}
        tokenizer: {{train: 300}}
        batch: {{tokens_per_step: 64}}
        phases:
          - {{name: a, data: {{python-docs: 1.0}}, steps: 1, arms: {{base: {{method: keep}}, redo: {{method: redo}}}}}}
        """)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="dense MLPs"):
        plan(recipe)
    plan(recipe, arms=["base"])


# ---- training


class Samples(torch.utils.data.Dataset):
    """Give sample i of 17 tokens as a function of i."""

    def __getitem__(self, i):
        tokens = torch.randint(0, 97, (17,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def train(model, folder, resume=None, callbacks=(), sets=None, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "weight_decay": 0.1, "optim": "adamw_torch", "logging_steps": 2, "save_steps": 4,
        "save_strategy": "steps", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = ContinualArguments(**{**settings, **changes})
    trainer = ContinualTrainer(model, arguments, Samples(), sets, callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("method", ["redo", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "redo")])
def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(method, tmp_path):
    def callback():
        return RecyclingCallback({"method": method, **METHODS[method]}, seed=3)

    watched = callback()
    whole = train(tiny_gpt2(), tmp_path / "whole", callbacks=[watched], keep_steps=[4])
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert "recycling.safetensors" in manifest["files"] and damage(checkpoint) is None
    counts = {e["step"]: e["recycled"] for e in whole.state.log_history if "loss" in e}
    assert 0 < counts[4] < counts[8] == watched.recycled < 4 * 256
    resumed = train(tiny_gpt2(seed=9), tmp_path / "resumed", str(checkpoint), [callback()])
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert timeless(whole) == timeless(resumed)
    files = [tmp_path / run / "checkpoint-8" / "recycling.safetensors" for run in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = train(tiny_gpt2(), tmp_path / "again", callbacks=[watched])
    assert timeless(whole) == timeless(again)  # a callback that was used begins anew


def timeless(trainer):
    return [
        {k: v for k, v in entry.items() if "runtime" not in k and k not in MEASURES}
        for entry in trainer.state.log_history[:-1]
    ]


def test_two_methods_keep_and_count_apart(tmp_path):
    def both():
        return [RecyclingCallback({"method": m, **METHODS[m]}, seed=3) for m in ("redo", "continual_backprop")]

    callbacks = both()
    whole = train(tiny_gpt2(), tmp_path / "a", callbacks=callbacks, keep_steps=[4])
    resumed = train(tiny_gpt2(seed=9), tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"), both())
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    last = [entry["recycled"] for entry in whole.state.log_history if "loss" in entry][-1]
    assert last == sum(callback.recycled for callback in callbacks)


def test_a_checkpoint_without_the_method_is_no_place_to_go_on_from(tmp_path):
    train(tiny_gpt2(), tmp_path / "plain", keep_steps=[4])
    assert not (tmp_path / "plain" / "checkpoint-4" / "recycling.safetensors").exists()
    with pytest.raises(UserError, match="no state of 'snr'"):
        train(tiny_gpt2(), tmp_path / "b", str(tmp_path / "plain" / "checkpoint-4"), [RecyclingCallback("snr", seed=0)])


@pytest.mark.parametrize("whole", [loss.WHOLE, 0])
def test_a_step_is_judged_by_all_of_its_tokens_and_by_no_others(whole, tmp_path, monkeypatch):
    """Against one pass over a step's samples with the weights of before; evaluation goes on in between.

    With logits in slices the model is also run in evaluation mode once, in the middle of the first step.
    """
    monkeypatch.setattr(loss, "WHOLE", whole)
    seen = []

    class Watching(RecyclingCallback):
        def on_step_end(self, *args, **kwargs):
            if self.work.listening:
                seen.append([r.sums.clone() for r in self.work.recyclers])
            super().on_step_end(*args, **kwargs)

    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_context": 16, "eval_on_start": True, "max_steps": 3}
    start = tiny_gpt2()
    watching = Watching({"method": "redo", "every": 1, "threshold": 0.0}, seed=0)
    sets = {"c": EvaluationSet(torch.arange(97), 300, 0)}
    trainer = train(copy.deepcopy(start), tmp_path, callbacks=[watching], sets=sets, learning_rate=0.0, **options)
    assert len(seen) == 3 and not any(layer.reader._forward_pre_hooks for layer in watching.work.layers)
    assert all(entry["recycled"] == 0 for entry in trainer.state.log_history if "loss" in entry)
    for step, sums in enumerate(seen):
        tokens = torch.stack([Samples()[4 * step + i]["input_ids"] for i in range(4)])
        for layer, one in zip(recycled_layers(start, ResetSpec.parse("redo")), sums, strict=True):
            h, _ = activations(start.eval(), layer, tokens)
            torch.testing.assert_close(one[:-1], h.abs().sum((0, 1)), rtol=1e-5, atol=1e-6)
            assert int(one[-1]) == 4 * 16


def test_training_stops_where_it_would_not_do_what_was_asked(tmp_path):
    model = tiny_gpt2()
    model.transformer.h[1].mlp.forward = nn.Identity().forward
    with pytest.raises(UserError, match=r"no token passed the module of 'transformer.h.1.mlp.c_proj.weight': exclude"):
        train(model, tmp_path / "a", callbacks=[RecyclingCallback("snr", seed=0)])
    model = tiny_gpt2()
    codes = torch.zeros_like(model.transformer.h[0].mlp.c_fc.weight, dtype=torch.uint8)
    state = {model.transformer.h[0].mlp.c_fc.weight: {"state1": codes}}
    optimizer = SimpleNamespace(state=state, param_groups=[])
    with pytest.raises(UserError, match=r"'state1' of .* not one number a weight"):
        prepared(model, "redo").on_step_end(None, SimpleNamespace(global_step=1), None, optimizer=optimizer)
    weight = model.transformer.h[0].mlp.c_fc.weight  # schedule-free's `z` is a weight, which 0 would not clear
    optimizer = SimpleNamespace(state={weight: {"z": weight.detach().clone()}}, param_groups=[])
    with pytest.raises(UserError, match=r"'z' of .* not a moment that is known"):
        prepared(model, "redo").on_step_end(None, SimpleNamespace(global_step=1), None, optimizer=optimizer)
    with pytest.raises(UserError, match=r"'exp_avg_sq_row' .* not one number a weight"):
        train(tiny_gpt2(), tmp_path / "b", callbacks=[RecyclingCallback("redo", seed=0)], optim="adafactor")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_training_recycles_the_same_units(method, tmp_path):
    counts = []
    for compiled in (False, True):
        torch._dynamo.reset()
        callback = RecyclingCallback({"method": method, **METHODS[method]}, seed=3)
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = train(tiny_gpt2(), tmp_path / str(compiled), callbacks=[callback], max_steps=6, **options)
        counts.append([e["recycled"] for e in trainer.state.log_history if "loss" in e])
    assert counts[0] == counts[1] and counts[0][-1] > 0


@pytest.fixture
def dynamo():
    """Give torch.compile's settings as a new process has them, and take what it compiled away afterwards."""
    import torch._dynamo.config as settings

    torch._dynamo.reset()
    with settings.patch(skip_nnmodule_hook_guards=True):
        yield settings
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [pytest.param(loss.WHOLE, marks=pytest.mark.slow), 0])
def test_arms_that_are_compiled_in_turn_recycle_what_each_does_alone(whole, tmp_path, monkeypatch, dynamo):
    """The graphs of one training are there when the next one of the same class begins, in a run's order of arms."""
    monkeypatch.setattr(loss, "WHOLE", whole)

    def ended(method, name, **options):
        callbacks = [RecyclingCallback({"method": method, **METHODS[method]}, seed=3)] if method else []
        trainer = train(tiny_gpt2(n_layer=1), tmp_path / name, callbacks=callbacks, max_steps=6, **options)
        return [callback.recycled for callback in callbacks], [p.detach().clone() for p in trainer.model.parameters()]

    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    turns = [None, "redo", "snr", "continual_backprop", None]
    alone = {method: ended(method, f"alone-{method}") for method in dict.fromkeys(turns)}
    assert all(count > 0 for method in METHODS for count in alone[method][0])
    for i, method in enumerate(turns):
        counts, weights = ended(method, f"{i}", **compiled)
        assert counts == alone[method][0]
        for a, b in zip(weights, alone[method][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_hooks_are_looked_at_only_where_a_compiled_run_recycles(tmp_path, dynamo):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    train(tiny_gpt2(n_layer=1), tmp_path / "a", max_steps=1, **compiled)
    train(tiny_gpt2(n_layer=1), tmp_path / "b", max_steps=1, callbacks=[RecyclingCallback("snr", seed=0)])
    assert dynamo.skip_nnmodule_hook_guards
    callback = RecyclingCallback("snr", seed=0)
    train(tiny_gpt2(n_layer=1), tmp_path / "c", max_steps=1, callbacks=[callback], **compiled)
    assert not dynamo.skip_nnmodule_hook_guards


def _share(rank, world):
    """Train on a share of every step's samples by hand; return the weights that recycling left."""
    torch.manual_seed(rank)  # what a rank draws must not matter
    model = tiny_llama()
    results = {}
    for method, options in METHODS.items():
        callback = prepared(model, method, **{**options, **({"every": 1} if method == "redo" else {})})
        optimizer = torch.optim.SGD(model.parameters())
        model.train()
        for step in range(6):
            state = SimpleNamespace(global_step=step)
            callback.on_step_begin(None, state, None)
            with torch.no_grad():
                model(input_ids=ids(step, rows=4)[rank::world, :1])
            state.global_step += 1
            callback.on_step_end(None, state, None, optimizer=optimizer)
        callback.on_train_end(None, None, None)
        results[method] = callback.recycled
    return results, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_ranks_that_see_parts_of_a_step_decide_as_one_that_sees_it_whole(tmp_path):
    counts, weights = _share(0, 1)
    assert all(counts.values())
    for other, theirs in run_ranks(2, _share, tmp_path):
        assert other == counts
        assert all(torch.equal(weights[name], theirs[name]) for name in weights)
