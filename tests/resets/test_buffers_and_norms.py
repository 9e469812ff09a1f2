"""Buffers that training moves go back with the weights; norms that FIRE would change by more than half are told."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.models import tiny_llama
from support.small_models import build
from torch import nn

from fire_llm import apply_reset, fire_, reset_checkpoint
from fire_llm.architectures.matrices import buffer_slices
from fire_llm.cli import main
from fire_llm.models import fresh_model, load_model
from fire_llm.resets.norms import norm_warning


class Normed(nn.Module):
    """A layer of batch normalisation behind a matrix, and a constant that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("constant", torch.ones(2), persistent=False)


def trained(model: nn.Module) -> nn.Module:
    """Move every number of a model's state."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.dtype == torch.bool:
                tensor.logical_not_()
            else:
                tensor.copy_(tensor + torch.arange(tensor.numel()).reshape(tensor.shape).add(len(name)))
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_running_statistics_are_reset_with_the_weights() -> None:
    initial, model = Normed(), trained(Normed())
    before, start = state(model), state(initial)
    report = apply_reset(model, "shrink_perturb", initial=initial, shrink=0.25)
    for name, tensor in model.state_dict().items():
        whole = not tensor.is_floating_point()
        assert torch.allclose(tensor, before[name] if whole else 0.75 * before[name] + 0.25 * start[name]), name
    assert {"norm.running_mean", "norm.running_var"} <= {t.name for t in report.touched}
    assert {left.name: left.reason for left in report.untouched} == {
        "mask": "a buffer of yes and no, which 'shrink_perturb' does not mix",
        "norm.num_batches_tracked": "a buffer of whole numbers, which 'shrink_perturb' does not mix",
    }
    report = apply_reset(model, "full_reset", initial=initial)
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    assert not report.untouched and report.touched[-1].role == "norm"


def test_a_frozen_modules_statistics_are_frozen() -> None:
    model = trained(Normed())
    model.norm.requires_grad_(False)
    report = apply_reset(model, "full_reset", initial=Normed())
    assert {t.name for t in report.untouched} == {f"norm.{n}" for n in (
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    )}  # fmt: skip


BUFFERED = {"deepseek_v3": "e_score_correction_bias", "gemma4_text": "layer_scalar", "deepseek_v4": "tid2eid"}


@pytest.mark.parametrize("kind", BUFFERED)
def test_buffers_are_reset_in_memory_and_on_the_disk(kind: str, tmp_path) -> None:
    start = build(kind, seed=1)
    model = build(kind)
    with torch.no_grad():
        for weight in buffer_slices(model):
            values = torch.arange(weight.tensor.numel()).reshape(weight.shape) % 3
            weight.tensor.copy_(values if not weight.tensor.is_floating_point() else values - 1.5)
    model.save_pretrained(tmp_path / "src")
    start.save_pretrained(tmp_path / "init")
    for method in ("full_reset", "shrink_perturb"):
        wanted = copy.deepcopy(model)
        report = apply_reset(wanted, method, initial=start)
        named = {t.name for t in [*report.touched, *report.untouched]}
        assert any(BUFFERED[kind] in name for name in named)
        reset_checkpoint(tmp_path / "src", tmp_path / method, method, init=tmp_path / "init")
        found = load_model(tmp_path / method).state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.state_dict().items())
        if method == "full_reset":
            assert all(torch.equal(tensor, found[name]) for name, tensor in start.state_dict().items())
    assert {t.reason for t in fire_(build(kind)).untouched if BUFFERED[kind] in t.name} != {None}


def test_buffers_are_drawn_from_the_seed_on_the_disk_too(tmp_path) -> None:
    model = build("deepseek_v3")
    with torch.no_grad():
        for weight in buffer_slices(model):
            weight.tensor.fill_(3.0)
    model.save_pretrained(tmp_path / "src")
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", "full_reset", seed=5)
    found, drawn = load_model(tmp_path / "dst").state_dict(), fresh_model(model.config, 5).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in drawn.items())


# ---- norms


def scaled(by: float, **settings):
    model = tiny_llama(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(by)
    return model


def norm(model) -> float:
    inside = [p.detach().double().square().sum() for n, p in model.named_parameters() if ".mlp." in n or "_attn." in n]
    return float(sum(inside)) ** 0.5


@pytest.mark.parametrize(("by", "word"), [(150.0, "falls"), (0.3, "grows")])
def test_fire_warns_of_norms_that_change_by_more_than_half(by: float, word: str) -> None:
    model = scaled(by)
    before = norm(model)
    with pytest.warns(
        UserWarning, match=f"fire: the norm of all 14 matrices together {word} .*-fold, most in layer"
    ) as seen:
        fire_(model)
    factor = norm(model) / before
    said = str(seen[0].message)
    assert len(seen) == 1 and "keep-norm" in said
    assert f"{max(factor, 1 / factor):.3g}-fold" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fire_(scaled(by), scale="keep-norm")


def test_fire_is_silent_about_newly_drawn_weights_and_where_norms_hardly_change() -> None:
    report = fire_(tiny_llama())  # their norms grow, and they have nothing to lose; warnings are errors here
    assert "grows" in str(norm_warning(report.resets, report.touched))
    model = tiny_llama()
    fire_(model)
    fire_(model, iterations=6)  # what is near that norm already


def test_apply_and_check_tell_of_norms(tmp_path, capsys) -> None:
    scaled(150.0).save_pretrained(tmp_path / "src")
    text = tmp_path / "text.txt"
    text.write_text("word " * 2000)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{checkpoint: {tmp_path / 'src'}, context: 32}}\ntokenizer: {{train: 300}}\n"
        "batch: {tokens_per_step: 64}\n"
        f"phases: [{{name: one, data: {{{text}: 1.0}}, steps: 2, arms: "
        "{fire: fire, kept: {method: fire, scale: keep-norm}}}]\n"
    )
    assert main(["check", str(recipe)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "warning: phase 'one', arm 'fire'" in told and told.count("warning:") == 1 and "falls" in told
    assert main(["apply", str(tmp_path / "src"), str(tmp_path / "a")]) == 0
    assert "warning: fire: the norm of all 14 matrices together falls" in capsys.readouterr().out
    assert main(["apply", str(tmp_path / "src"), str(tmp_path / "b"), "--scale", "keep-norm"]) == 0
    assert "warning" not in capsys.readouterr().out
