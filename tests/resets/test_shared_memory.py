"""Weights that share memory, have several names, are not there yet or cannot be written: one reset, or a refusal."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama
from torch import nn

from fire_llm import Penalties, Recycling, UserError, apply_reset, fire_, inject_plasticity_


def pair(one: torch.Tensor, other: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(one), nn.Parameter(other)
    return model


def of_one(cut) -> nn.Module:
    return pair(*cut(torch.randn(6, 8, generator=torch.Generator().manual_seed(0))))


SHARED = {
    "the same numbers": lambda t: (t[:4, :4], t[:4, :4]),
    "a row": lambda t: (t[:4], t[2:]),
    "a column": lambda t: (t[:, :4], t[:, 3:]),
    "one transposed": lambda t: (t[:4, :4], t[:4, :4].T),
    "every other row": lambda t: (t[::2], t[2:5]),
    "another type": lambda t: (t[:2], t.view(torch.bfloat16)[1:4, :8]),
}
APART = {
    "rows": lambda t: (t[:3], t[3:]),
    "columns": lambda t: (t[:, :4], t[:, 4:]),
    "every other row": lambda t: (t[::2], t[1::2]),
}


@pytest.mark.parametrize("how", SHARED)
def test_parameters_in_one_memory_are_refused_with_both_names(how) -> None:
    model = of_one(SHARED[how])
    before = copy.deepcopy(model.state_dict())
    both = r"'[01]\.weight' and '[01]\.weight' are two tensors in one memory"
    for act in (
        lambda: fire_(model, layout="modules"),
        lambda: fire_(model, layout="modules", exclude=["^0"]),  # which would be reset with the other
        lambda: apply_reset(model, "full_reset", layout="modules", initial=copy.deepcopy(model)),
        lambda: Penalties(model, "parseval", layout="modules"),
    ):
        with pytest.raises(UserError, match=both):
            act()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.append(nn.Linear(3, 3))
    assert [t.name for t in fire_(model, layout="modules", include=["^2"]).touched] == ["2.weight"]


@pytest.mark.parametrize("how", APART)
def test_parts_of_one_tensor_that_do_not_meet_are_reset_apart(how) -> None:
    model = of_one(APART[how])
    alone = pair(*(p.detach().clone() for p in model.parameters()))
    fire_(model, layout="modules")
    fire_(alone, layout="modules")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_the_same_of_a_language_model_and_of_buffers() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(model.model.layers[0].mlp.up_proj.weight.data)
    with pytest.raises(UserError, match=r"'model\.layers\.[01]\.mlp\S* and 'model\.layers\.[01]\.mlp\S* are"):
        fire_(model)
    watched = nn.Linear(3, 3)
    watched.register_buffer("copy", watched.weight.data)
    with pytest.raises(UserError, match=r"'(copy|weight)' and '(copy|weight)' are two tensors in one memory"):
        fire_(watched, layout="modules")


def test_initial_weights_in_the_models_memory_are_the_models_own() -> None:
    model, initial = nn.Linear(3, 3), nn.Linear(3, 3)
    initial.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(UserError, match="`initial` holds the model's very own 'weight'"):
        apply_reset(model, "full_reset", layout="modules", initial=initial)


UNWRITABLE = {
    "sparse": (lambda: torch.eye(4).to_sparse(), r"'0.weight' is stored as torch.sparse_coo: make it dense"),
    "expanded": (lambda: torch.randn(4, 1).expand(4, 4), r"'0\.weight' is expanded: several of its numbers are one"),
    "windows": (lambda: torch.randn(7).unfold(0, 4, 1), r"'0\.weight' is expanded"),
}


@pytest.mark.parametrize("how", UNWRITABLE)
def test_weights_that_cannot_be_written_are_refused_by_name(how) -> None:
    make, message = UNWRITABLE[how]
    model = pair(make(), torch.randn(4, 4))
    with pytest.raises(UserError, match=message):
        fire_(model, layout="modules")
    with pytest.raises(UserError, match=message):
        Recycling(model, "redo", hidden=[("0", "1")])
    assert [t.name for t in fire_(model, layout="modules", exclude=["^0"]).touched] == ["1.weight"]


def test_a_sparse_buffer_is_read_and_left() -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("graph", torch.eye(3).to_sparse())
    assert {t.name: t.norm_after for t in fire_(model, layout="modules").untouched}["graph"] == pytest.approx(3**0.5)
    with pytest.raises(UserError, match=r"'graph' is stored as torch\.sparse_coo"):
        apply_reset(model, "full_reset", layout="modules", initial=copy.deepcopy(model))


def test_weights_of_inference_mode_are_refused_outside_of_it_alone() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
        fire_(model, layout="modules")
    with pytest.raises(UserError, match=r"'weight' was made under torch\.inference_mode"):
        fire_(model, layout="modules")


@pytest.mark.parametrize(
    "build", [nn.LazyBatchNorm1d, partial(nn.LazyBatchNorm1d, affine=False), partial(nn.LazyLinear, 4)]
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_not_initialised_is_refused_by_name(build) -> None:
    for act in (
        lambda m: fire_(m, layout="modules"),
        lambda m: apply_reset(m, "full_reset", layout="modules", initial=nn.Linear(2, 2)),
        lambda m: apply_reset(m, "none"),
        lambda m: Recycling(m, "redo", hidden=[("0", "1", "2")]),
        lambda m: inject_plasticity_(m, "1"),
    ):
        with pytest.raises(UserError, match=r"'1\.\w+' is not initialised yet \(a lazy module\): run one forward pass"):
            act(nn.Sequential(nn.Linear(4, 4), build(), nn.Linear(4, 4)))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_without_numbers_are_left_alone_and_listed(shape) -> None:
    model = nn.Sequential(nn.Linear(*shape), nn.Linear(3, 3))
    report = fire_(model, layout="modules")
    assert [t.name for t in report.touched] == ["1.weight"]
    left = {t.name: t.reason for t in report.untouched}
    assert left["0.weight"] == f"it holds no numbers, its shape is {shape[::-1]}"
    apply_reset(model, "full_reset", layout="modules", initial=copy.deepcopy(model))


# ---- several names


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.words.weight


def test_every_name_of_a_tied_weight_counts() -> None:
    def touched(**options) -> list[str]:
        return [t.name for t in fire_(Tied(), layout="modules", **options).touched]

    assert touched() == ["words.weight", "fc.weight"]
    for name in ("words", "head"):
        assert touched(exclude=[name]) == ["fc.weight"]
        assert touched(include=[name]) == touched(roles={"own": name}) == ["words.weight"]
        assert touched(split={name: 5})[0] == "words.weight[0]"
    with pytest.raises(UserError, match=r"'words\.weight' is found by 'words' and 'head', with different parts"):
        touched(split={"words": 1, "head": 5})
    with pytest.raises(UserError, match=r"include 'haed' finds no name .* are 'head\.weight'"):
        touched(include=["haed"])


def test_every_name_counts_in_a_language_model_and_for_its_layers() -> None:
    tied = tiny_gpt2()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    kept = fire_(tied, roles=["mlp", "lm_head"], exclude=[r"^lm_head"])
    assert "transformer.wte.weight" not in {t.parameter for t in kept.touched}
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    names = {t.parameter for t in fire_(model, layers=1, roles=["mlp"]).touched}
    assert names == {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_a_buffer_under_two_names_is_left_by_either() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].running_mean = model[0].running_mean
    initial = copy.deepcopy(model)
    model[0].running_mean.add_(1)
    report = apply_reset(model, "full_reset", layout="modules", initial=initial, exclude=[r"1\.running_mean"])
    assert "0.running_mean" not in {t.name for t in report.touched} and model[0].running_mean.all()


# ---- initial weights


@pytest.mark.parametrize(
    ("given", "initial", "kernels"),
    [
        (nn.Conv2d(2, 3, (2, 3)), nn.Conv2d(2, 3, (3, 2)), "positions"),
        (nn.Conv2d(2, 3, (1, 4)), nn.Conv2d(2, 3, (2, 2)), "positions"),
        (nn.Conv2d(2, 3, 3), nn.Conv2d(18, 3, 1), "flattened"),
        (nn.Conv1d(2, 3, 4), nn.Conv2d(2, 3, 2), "positions"),
    ],
)
@pytest.mark.parametrize("method", ["full_reset", "shrink_perturb", "initial_norm"])
def test_initial_kernels_of_another_shape_are_another_architecture(given, initial, kernels, method) -> None:
    shape = re.escape(str(tuple(given.weight.shape)))
    with pytest.raises(UserError, match=rf"the initial weights hold no 'weight' of shape {shape}: another arch"):
        apply_reset(given, method, layout="modules", initial=initial, kernels=kernels)


@pytest.mark.parametrize("method", ["full_reset", "shrink_perturb"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: m[1].weight.data.fill_(float("nan")), r"the initial '1\.weight' holds NaN or infinity"),
        (lambda m: m[1].to("meta"), r"the initial '1\.weight' is on the meta device: load the weights"),
    ],
)
def test_initial_weights_that_are_no_numbers_are_refused_before_anything_is_done(spoil, says, method) -> None:
    model, initial = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    before = copy.deepcopy(model.state_dict())
    spoil(initial)
    with pytest.raises(UserError, match=says):
        apply_reset(model, method, layout="modules", initial=initial)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("spoil", [lambda m: m.weight.data.fill_(float("nan")), lambda m: m.to("meta")])
def test_initial_weights_that_no_reset_reads_may_be_anything(spoil) -> None:
    """FIRE reads none, and the other acts on the second layer alone."""
    model, initial = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    spoil(initial[0])
    apply_reset(model, ["fire", {"method": "full_reset", "include": ["^1"]}], layout="modules", initial=initial)
    assert torch.equal(model[1].weight, initial[1].weight)


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.complex64):
            self.register_buffer(str(dtype).removeprefix("torch."), torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("layout", ["modules", "transformers"])
def test_full_reset_puts_back_buffers_of_every_kind(layout) -> None:
    initial, model = Flags(), Flags()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(1)
    report = apply_reset(model, "full_reset", initial=initial, layout=layout)
    assert all(torch.equal(value, initial.state_dict()[key]) for key, value in model.state_dict().items())
    moved = {t.name: t.sfe for t in report.touched if not t.name.startswith("linear")}
    assert moved == dict.fromkeys(("bool", "uint8", "int64", "complex64"), 3.0)
