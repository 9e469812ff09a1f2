"""Mistakes with any torch module that would otherwise be done in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fire_llm import Penalties, Recycling, UserError, apply_reset, fire_, inject_plasticity_


def test_parts_of_one_name_are_refused():
    model = nn.Linear(4, 12)
    with pytest.raises(UserError, match=r"split: 'weight': \('q', 'q', 'q'\) is not allowed"):
        fire_(model, layout="modules", split={"weight": ("q", "q", "q")})


@pytest.mark.parametrize("split", [[("q", 3)], "qkv", 5])
def test_a_split_that_is_no_mapping_is_refused(split):
    with pytest.raises(UserError, match="give patterns with their parts"):
        fire_(nn.Linear(4, 12), layout="modules", split=split)


@pytest.mark.parametrize("method", ["full_reset", "shrink_perturb"])
def test_initial_weights_that_are_the_model_itself_are_refused(method):
    model = nn.Linear(3, 3)
    for initial in (model, copy.copy(model)):
        with pytest.raises(UserError, match="`initial` holds the model's very own 'weight'"):
            apply_reset(model, method, layout="modules", initial=initial)


def test_a_state_dict_is_no_initial_model():
    model = nn.Linear(3, 3)
    with pytest.raises(UserError, match="initial: a OrderedDict is given: give a module"):
        apply_reset(model, "full_reset", layout="modules", initial=model.state_dict())


@pytest.mark.parametrize("model", [None, "folder", {}, [nn.Linear(2, 2)], nn.Linear, torch.zeros(2)])
@pytest.mark.parametrize("layout", ["modules", "transformers"])
def test_what_is_no_module_is_no_model(model, layout):
    for act in (
        lambda: fire_(model, layout=layout),
        lambda: apply_reset(model, "none", layout=layout),
        lambda: Penalties(model, "parseval", layout=layout),
        lambda: Recycling(model, "redo", hidden=[("0", "1")]),
        lambda: inject_plasticity_(model, "head"),
    ):
        with pytest.raises(UserError, match=r"model: .* is given, and a torch module is wanted: load it first"):
            act()


@pytest.mark.parametrize("resets", [None, 5, [None], [["fire"]], ["fire", 5], object()])
def test_what_is_no_reset_is_refused(resets):
    with pytest.raises(UserError, match=r"resets: .* is not allowed: give a method's name, such as 'fire'"):
        apply_reset(nn.Linear(3, 3), resets, layout="modules")


def test_a_name_in_capitals_is_known():
    with pytest.raises(UserError, match=r"unknown reset 'FIRE'. Did you mean 'fire'"):
        apply_reset(nn.Linear(3, 3), "FIRE", layout="modules")


def test_an_optimizer_of_another_model_is_refused_before_anything_is_done():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = copy.deepcopy(model.state_dict())
    recycling = Recycling(model, "redo", hidden=[("0", "1")], every=1)
    for optimizer, says in (
        (5, "optimizer: a int is given"),
        (torch.optim.SGD(copy.deepcopy(model).parameters()), "it trains none of the weights .* such as '0.weight'"),
    ):
        with pytest.raises(UserError, match=says):
            fire_(model, layout="modules", optimizer=optimizer)
        with pytest.raises(UserError, match=says):
            recycling.step(optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("change", ["assign", "double", "parametrise"])
def test_what_acts_on_weights_that_the_model_no_longer_holds_says_so(change):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    penalties = Penalties(model, "parseval", layout="modules")
    recycling = Recycling(model, "redo", hidden=[("0", "1", "2")], every=1)
    if change == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    elif change == "double":
        model.double()  # which gives the norm other statistics
    else:
        nn.utils.parametrizations.orthogonal(model[2])
    said = r"is another tensor now, by load_state_dict\(assign=True\)"
    with pytest.raises(UserError, match=said):
        recycling.step(torch.optim.SGD(model.parameters()))
    if change == "double":
        penalties.add_()
    else:
        with pytest.raises(UserError, match=said):
            penalties.add_()


def test_patterns_of_split_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match=r"'qkv\.weight' is found by 'q' and 'qkv', with different parts"):
        fire_(nn.ModuleDict({"qkv": nn.Linear(4, 12)}), layout="modules", split={"q": 1, "qkv": ("q", "k", "v")})


def test_queries_and_keys_that_a_fused_weight_holds_are_not_left_in_silence():
    parts = {"q": nn.Linear(4, 4), "k": nn.Linear(4, 4), "kv": nn.Linear(4, 8)}
    model = nn.ModuleDict({"attn": nn.ModuleDict(parts)})
    with pytest.raises(UserError, match=r"by its name 'attn\.kv\.weight' holds several matrices: name its parts"):
        apply_reset(model, "paper-vit", layout="modules")
    report = apply_reset(model, "paper-vit", layout="modules", split={"kv": ("k", "v")})
    assert [weight.name for weight in report.touched] == ["attn.q.weight", "attn.k.weight", "attn.kv.weight[k]"]


def test_roles_that_are_no_list_are_refused():
    with pytest.raises(UserError, match="roles: 5 is not allowed"):
        fire_(nn.Linear(3, 3), layout="modules", roles=5)


def test_a_normed_weight_of_an_lstm_is_refused_as_recurrent():
    model = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    with pytest.raises(UserError, match="a reset of it would be lost"):
        fire_(model, layout="modules", roles=["recurrent"])


class NormedLinear(nn.Linear):
    pass


def test_a_linear_called_norm_is_a_linear():
    report = fire_(nn.Sequential(NormedLinear(4, 8), NormedLinear(8, 1)), layout="modules")
    assert [weight.name for weight in report.touched] == ["0.weight", "1.weight"]
    assert {weight.role for weight in report.untouched} == {"linear_bias"}
    assert torch.isfinite(torch.tensor([weight.norm_after for weight in report.touched])).all()


def test_injection_seeds_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the generators of CUDA were seeded"))
    inject_plasticity_(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "1", seed=4)
