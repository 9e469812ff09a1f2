"""What one names is what one gets: names behind wrappers, patterns and layers that find nothing, options not read."""

from __future__ import annotations

import copy
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fire_llm import ContinualArguments, ResetCallback, UserError, apply_reset, fire_, register_layout
from fire_llm.architectures.hidden_layers import hidden_layers
from fire_llm.architectures.lookup import REGISTERED
from fire_llm.architectures.matrices import hidden_matrices
from fire_llm.cli import main
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.estimate import plan
from fire_llm.experiment.recipe import load_recipe
from fire_llm.experiment.run import run_recipe
from fire_llm.experiment.stages import expand
from fire_llm.resets import RESETS, ResetSpec
from fire_llm.training import PenaltyCallback, RecyclingCallback
from fire_llm.training.optimizers import muon_adamw

compiled = partial(torch.compile, backend="eager")


def each_block(wrap):
    """Return a function that wraps every layer of a Llama."""

    def change(model):
        layers = model.model.layers
        for i, layer in enumerate(layers):
            layers[i] = wrap(layer)
        return model

    return change


def linears_compiled(model):
    for layer in model.model.layers:
        layer.mlp.up_proj = compiled(layer.mlp.up_proj)
    model.lm_head = compiled(model.lm_head)
    return model


def trunk_replicated(model):
    model.model = nn.DataParallel(model.model)
    return model


WRAPPED = {
    "compiled": compiled,
    "blocks compiled": each_block(compiled),
    "blocks checkpointed": each_block(checkpoint_wrapper),
    "compiled, checkpointed, compiled": lambda m: compiled(each_block(lambda b: compiled(checkpoint_wrapper(b)))(m)),
    "single matrices compiled": linears_compiled,
    "trunk in DataParallel": trunk_replicated,
    "all in DataParallel": lambda m: nn.DataParallel(each_block(compiled)(m)),
}
SELECTED = {
    "exclude": {"exclude": [r"^model\.layers\.0\.(self_attn|mlp\.up)"]},
    "include": {"include": [r"layers\.1\.mlp", "v_proj.weight$"]},
    "layers": {"layers": "1"},
    "all three": {"layers": "0-1", "include": ["mlp"], "exclude": [r"layers\.0.*up"]},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrappers_change_neither_what_is_named_nor_what_is_done(wrapping: str) -> None:
    plain, start = tiny_llama(), tiny_llama(seed=1)
    for selected in SELECTED.values():
        mine, theirs = copy.deepcopy(plain), WRAPPED[wrapping](copy.deepcopy(plain))
        wanted = fire_(mine, **selected)
        report = fire_(theirs, **selected)
        assert [t.name for t in report.touched] == [t.name for t in wanted.touched] != []
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    mine, theirs, initial = copy.deepcopy(plain), WRAPPED[wrapping](copy.deepcopy(plain)), WRAPPED[wrapping](start)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for parameter in theirs.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    apply_reset(mine, "shrink_perturb", initial=tiny_llama(seed=1), shrink=0.25)
    report = apply_reset(theirs, "shrink_perturb", initial=initial, optimizer=optimizer, shrink=0.25)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert report.optimizer_states_cleared == len([*plain.parameters()])
    assert hidden_matrices(theirs) == hidden_matrices(plain)


@pytest.mark.parametrize("wrapping", ["blocks compiled", "blocks checkpointed", "single matrices compiled"])
def test_wrappers_hide_no_hidden_layer_and_no_matrix_of_muons(wrapping: str, tmp_path) -> None:
    plain, wrapped = tiny_llama(), WRAPPED[wrapping](tiny_llama())
    names = [[layer.name for layer in hidden_layers(m, lambda _: True)[0]] for m in (plain, wrapped)]
    assert names[0] == names[1] and len(names[0]) == 2
    arguments = ContinualArguments(str(tmp_path), muon=True)
    sizes = [[len(g["params"]) for g in muon_adamw(m, arguments).param_groups] for m in (plain, wrapped)]
    assert sizes[0] == sizes[1] == [14, 2, 5]


def test_include_and_layers_touch_what_they_name_and_say_why_not_the_rest() -> None:
    report = fire_(tiny_llama(), layers="1", include="q_proj", roles=("attention", "mlp", "lm_head"))
    assert [t.name for t in report.touched] == ["model.layers.1.self_attn.q_proj.weight"]
    why = {t.name: t.reason for t in report.untouched}
    assert why["model.layers.0.self_attn.q_proj.weight"] == "not in layers 1" == why["lm_head.weight"]
    assert why["model.layers.1.mlp.up_proj.weight"] == "found by no pattern of include (q_proj)"
    fused = apply_reset(tiny_gpt2(), "fire", include=[r"\[[qk]\]$"], layers=0)
    assert [t.part for t in fused.touched] == ["q", "k"]
    spec = ResetSpec.parse({"method": "fire", "layers": "0,1"})
    assert "layers 0,1" in spec.label() and spec.selection == {"layers": "0,1"}


UNFOUND = [
    ({"exclude": ["layer.0."]}, "exclude 'layer.0.' finds no name in the model. The nearest are 'model.layers.0."),
    ({"exclude": [r"layers\.7\."]}, r"exclude 'layers\.7\.' finds no name"),
    (
        {"include": ["qproj"]},
        "include 'qproj' finds no name in the model. The nearest are 'model.layers.0.self_attn.q_",
    ),
    ({"include": ["embed"]}, "include 'embed' finds nothing that 'fire' would touch: 'model.embed_tokens.weight'"),
    ({"include": ["mlp"], "exclude": ["mlp"]}, "include 'mlp' finds nothing that 'fire' would touch"),
    ({"layers": "1-2"}, "layers '1-2': the model has no layer 2; its layers are 0 to 1"),
    ({"layers": "0", "include": [r"layers\.1"]}, "finds nothing that 'fire' would touch"),
    ({"layers": "2-1"}, "layers: '2-1' is not allowed: give numbers of layers"),
    ({"layers": "a"}, "layers: 'a' is not allowed"),
    ({"layers": 1.5}, "layers: 1.5 is not allowed"),
    ({"include": ["("]}, "include: '(' is not a regular expression"),
    ({"exclude": ["."]}, "nothing to reset in 'LlamaForCausalLM'"),
    (
        {"roles": ["ssm"]},
        "nothing to reset in 'LlamaForCausalLM', whose matrices have the roles attention, lm_head, mlp",
    ),
]


@pytest.mark.parametrize(("selected", "message"), UNFOUND)
def test_what_finds_nothing_is_refused_and_nothing_is_changed(selected, message: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=re.escape(message)) as error:
        apply_reset(model, {"method": "fire", **selected})
    assert len(str(error.value).splitlines()) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_penalties_and_recycling_refuse_what_finds_nothing_too() -> None:
    model, args = tiny_gpt2(), SimpleNamespace(seed=1, n_gpu=1, torch_compile=False)
    state = SimpleNamespace(global_step=0)
    for callback in (
        PenaltyCallback("parseval", strength=0.1, exclude=["h.9"]),
        RecyclingCallback("redo", seed=1, every=2, exclude=["h.9"]),
    ):
        with pytest.raises(UserError, match=r"exclude 'h\.9' finds no name"):
            callback.on_train_begin(args, state, None, model=model)


UNREAD = [
    ({"solver": "polar", "iterations": 5}, "iterations: it is read with solver newton-schulz alone, not with polar"),
    ({"tolerance": 1e-3}, "tolerance: it is read with solver polar alone, not with newton-schulz: leave it out"),
    ({"solver": "polar", "compute_dtype": "bfloat16"}, "compute_dtype: 'bfloat16' is read with solver newton-schulz"),
]


@pytest.mark.parametrize(("options", "message"), UNREAD)
@pytest.mark.parametrize("method", ["fire", "rescale"])
def test_options_that_are_not_read_are_refused(options, message: str, method: str) -> None:
    for refused in (
        lambda: apply_reset(tiny_gpt2(), {"method": method, **options}),
        lambda: ResetCallback(method, **options),
        lambda: load_recipe(recipe(method=method, **options)),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            refused()
    if method == "fire":
        with pytest.raises(UserError, match=re.escape(message)):
            fire_(tiny_gpt2(), **options)


def test_every_mark_of_an_option_names_an_option_with_that_value() -> None:
    marks = {(method, key): when for method in RESETS for key, when in RESETS[method].reads.items()}
    assert {method for method, _ in marks} == {"fire", "rescale"}
    for (method, _), when in marks.items():
        ResetSpec.parse({"method": method, when.option: when.value})
    assert ResetSpec.parse({"method": "fire", "solver": "polar"}).read.keys() == {
        "solver", "tolerance", "scale", "compute_dtype", "strength",
    }  # fmt: skip
    with pytest.raises(UserError, match="roles: 'none' leaves every weight as it is"):
        ResetSpec.parse({"method": "none", "roles": ["mlp"]})


def test_callbacks_take_options_as_keywords() -> None:
    assert ResetCallback("fire", iterations=3, layers="0-1").resets == [
        ResetSpec.parse({"method": "fire", "iterations": 3, "layers": "0-1"})
    ]
    assert PenaltyCallback("l2_init", strength=0.5).penalties[0].options == {"strength": 0.5}
    assert RecyclingCallback("redo", seed=1, every=7).spec.options["every"] == 7
    with pytest.raises(UserError, match=r"iteratons: unknown option of 'fire'\. Did you mean 'iterations'\?"):
        ResetCallback("fire", iteratons=3)
    for given in ({"method": "fire"}, ["fire", "full_reset"]):
        with pytest.raises(UserError, match="iterations: options stand beside a method's name alone; write them into"):
            ResetCallback(given, iterations=3)
    with pytest.raises(UserError, match=r"at_steps \[2, 9\]: training ends at step 8, before the last of them"):
        ResetCallback(at_steps=[9, 2]).on_train_begin(
            SimpleNamespace(), SimpleNamespace(max_steps=8, global_step=0), None
        )


# ---- recipes and the command line


def recipe(**reset) -> dict:
    return {
        "model": {"preset": "gpt-tiny", "context": 64},
        "tokenizer": {"train": 512},
        "batch": {"tokens_per_step": 1024},
        "phases": [
            {"name": "one", "data": {"python-docs": 1.0}, "steps": 10},
            {"name": "two", "data": {"python-docs": 1.0}, "steps": 10, "arms": {"a": {"method": "fire", **reset}}},
        ],
    }


def test_check_and_run_say_before_training_what_finds_nothing(tmp_path, capsys) -> None:
    plan(load_recipe(recipe(layers="1-3", exclude=[r"h\.2\.mlp"])), tmp_path)
    for selected, message in (
        ({"exclude": [r"layers\.0"]}, r"phase 'two', arm 'a': exclude 'layers\.0' finds no name"),
        ({"layers": 4}, "phase 'two', arm 'a': layers '4': the model has no layer 4; its layers are 0 to 3"),
    ):
        wrong = load_recipe(recipe(**selected))
        for begin in (plan, partial(run_recipe, progress=False)):
            with pytest.raises(UserError, match=re.escape(message)):
                begin(wrong, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_stages_without_a_selection_are_described_as_they_always_were(tmp_path) -> None:
    """What older runs wrote into unit.json has neither key, and they must go on."""
    described = {}
    for name, selected in (("plain", {}), ("chosen", {"layers": "1"})):
        stage = expand(RunContext(load_recipe(recipe(**selected)), tmp_path))[-1]
        described[name] = stage.outline["resets"][0]
    assert described["plain"].keys() == {"method", "options", "roles", "exclude"}
    assert described["chosen"] == {**described["plain"], "layers": "1"}


def test_apply_takes_names_and_layers_and_refuses_what_finds_nothing(tmp_path, capsys) -> None:
    tiny_llama().save_pretrained(tmp_path / "src")
    src, dst = str(tmp_path / "src"), str(tmp_path / "dst")
    for words, message in (
        (["--exclude", "layer.0."], "exclude 'layer.0.' finds no name in the model"),
        (["--layers", "0-2"], "the model has no layer 2"),
        (["--solver", "polar", "--iterations", "5"], "iterations: it is read with solver newton-schulz alone"),
        (["--tolerance", "0.01"], "tolerance: it is read with solver polar alone"),
    ):
        assert main(["apply", src, dst, *words]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "dst").exists()
    assert main(["apply", src, dst, "--layers", "1", "--include", "mlp", "--exclude", "up_proj"]) == 0
    card = (tmp_path / "dst" / "README.md").read_text(encoding="utf-8")
    assert "--layers 1 --include mlp --exclude up_proj" in card
    from fire_llm.models import load_model

    model = tiny_llama()
    fire_(model, layers=1, include=["mlp"], exclude=["up_proj"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model(dst).parameters(), strict=True))


# ---- layouts


class Net(nn.Module):
    def __init__(self, kernel: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, kernel)


def test_a_registered_layout_that_does_not_fit_is_named_in_the_refusal() -> None:
    try:
        register_layout("Net", "conv", role="mlp")
        with pytest.raises(
            UserError, match=r"Net\.conv is for a Linear, and 'conv\.weight' .* held by a Conv2d.*module_"
        ):
            fire_(Net())
        register_layout("Net", "conv", role="mlp", module_class="Conv2d")
        with pytest.raises(UserError, match=r"'conv\.weight' is a convolution's kernel of 2 × 2, .* role='other'"):
            fire_(Net())
        assert [t.name for t in fire_(Net(1), scale="keep-norm").touched] == ["conv.weight"]
        del REGISTERED["Net", "conv"]
        register_layout("Net", "covn", role="mlp")
        with pytest.raises(UserError, match=r"no layout is known for Net\.conv .* Registered for Net: covn\."):
            fire_(Net())
    finally:
        REGISTERED.pop(("Net", "conv"), None)
        REGISTERED.pop(("Net", "covn"), None)
