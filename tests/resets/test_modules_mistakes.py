"""Mistakes with any torch module that would otherwise be done in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fire_llm import UserError, apply_reset, fire_


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
        with pytest.raises(UserError, match="holds the very weights of the model"):
            apply_reset(model, method, layout="modules", initial=initial)


class NormedLinear(nn.Linear):
    pass


def test_a_linear_called_norm_is_a_linear():
    report = fire_(nn.Sequential(NormedLinear(4, 8), NormedLinear(8, 1)), layout="modules")
    assert [weight.name for weight in report.touched] == ["0.weight", "1.weight"]
    assert {weight.role for weight in report.untouched} == {"linear_bias"}
    assert torch.isfinite(torch.tensor([weight.norm_after for weight in report.touched])).all()


def test_injection_seeds_no_accelerator(monkeypatch):
    from fire_llm import inject_plasticity_

    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the generators of CUDA were seeded"))
    inject_plasticity_(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "1", seed=4)
