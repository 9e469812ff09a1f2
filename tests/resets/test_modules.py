"""Resets of any torch module: which matrices it holds, kernels position by position, what is refused, the presets.

The oracle is the paper's loop in fp64, one kernel position at a time, in the file's first function.
"""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from support.models import tiny_gpt2
from support.ranks import run_ranks
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from fire_llm import ResetCallback, UserError, apply_reset, fire_, module_matrices, register_layout, register_reset
from fire_llm.architectures.lookup import REGISTERED
from fire_llm.architectures.modules import ModuleLayout, module_slices
from fire_llm.resets import RESETS, ResetSpec
from fire_llm.resets.presets import QUERY_OR_KEY
from fire_llm.resets.report import TensorReport

modules = partial(fire_, layout="modules", iterations=10)


def paper(w: torch.Tensor, steps: int = 10, scale: bool = True) -> torch.Tensor:
    """Return what the paper's loop makes of a stored weight (out, in) or (out, in, k, …)."""
    new = torch.empty_like(w, dtype=torch.float64)
    for at in (
        torch.cartesian_prod(*(torch.arange(k) for k in w.shape[2:])).view(-1, w.ndim - 2) if w.ndim > 2 else [()]
    ):
        where = (slice(None), slice(None), *map(int, at))
        x = w[where].double()
        x = x.T if x.shape[0] < x.shape[1] else x
        x = x / x.norm()
        for _ in range(steps):
            x = 1.5 * x - 0.5 * x @ (x.T @ x)
        new[where] = x.T if w.shape[0] < w.shape[1] else x
    return new * ((w.shape[0] / w.shape[1]) ** 0.5 / w[0, 0].numel() if scale else 1.0)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance)


class Residual(nn.Module):
    """A block of a ResNet: kernels of 3 × 3, a shortcut of 1 × 1, batch normalisation."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Two of these, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 8, 5), nn.Sequential(Residual(8, 12), Residual(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class Convolutions(nn.Module):
    """Of every dimension, grouped, depthwise, and with strides of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv1d(4, 6, 3), nn.Conv3d(4, 3, (2, 1, 3))
        self.square, self.cube = nn.Conv2d(6, 4, (3, 5)), nn.Conv1d(3, 3, 3)  # of the last, all three sizes agree
        self.grouped, self.depthwise = nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(6, 6, 3, groups=6)
        self.permuted = nn.Conv2d(5, 7, 3)
        self.permuted.weight = nn.Parameter(torch.randn(3, 5, 3, 7).permute(3, 1, 0, 2))


def seeded(build, **options):
    torch.manual_seed(0)
    return build(**options).double()


# ---- which matrices


@pytest.mark.parametrize("build", [ResNet, Convolutions])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_kernels_are_reset_as_in_the_paper_whatever_their_strides(build, form) -> None:
    model = seeded(build)
    if build is ResNet:
        model = model.to(memory_format=form)
    before = {name: (p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    report = modules(model)
    weights = {name for name, (p, _) in before.items() if p.ndim > 1}
    assert {t.name for t in report.touched} == weights
    for name, p in model.named_parameters():
        assert same(p, paper(before[name][0]) if name in weights else before[name][0]), name
        assert p.stride() == before[name][1], name


def test_of_single_precision_the_result_is_the_papers_but_for_rounding() -> None:
    """Rounding grows by 1.5 a step where a singular value begins near 0: 6e-8 to 3.4e-6 in ten."""
    torch.manual_seed(0)
    model = ResNet()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modules(model)
    for name, p in model.named_parameters():
        assert p.ndim < 2 or same(p, paper(before[name]), 4e-6), name


def test_a_flattened_kernel_is_one_matrix() -> None:
    model = seeded(ResNet).to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = modules(model, kernels="flattened")
    for name, p in model.named_parameters():
        if p.ndim > 1:
            assert same(p.flatten(1), paper(before[name].flatten(1))), name
    assert next(t.shape for t in report.touched) == [8, 75]


def test_groups_of_a_convolution_are_apart_where_split_says_so() -> None:
    model = seeded(Convolutions)
    before = model.grouped.weight.detach().clone()
    report = modules(model, split={r"^grouped\.": 4}, include=["grouped"])
    assert [t.name for t in report.touched] == [f"grouped.weight[{n}]" for n in range(4)]
    assert same(model.grouped.weight, torch.cat([paper(group) for group in before.chunk(4)]))


@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 7}])
def test_attention_of_torch_holds_q_k_and_v_apart(widths) -> None:
    model = seeded(nn.MultiheadAttention, embed_dim=12, num_heads=3, **widths)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = modules(model)
    assert {t.role for t in report.touched} == {"attention"} and len(report.touched) == 4
    assert {t.role for t in report.untouched} == {"bias"}
    if not widths:
        fused = torch.cat([paper(part) for part in before.pop("in_proj_weight").chunk(3)])
        assert same(model.in_proj_weight, fused)
    for name, w in before.items():
        assert same(model.get_parameter(name), paper(w) if w.ndim > 1 else w), name


@pytest.mark.parametrize(
    ("build", "gates"),
    [
        (partial(nn.LSTM, 5, 6, 2, bidirectional=True, proj_size=4), 4),
        (partial(nn.GRU, 5, 6), 3),
        (partial(nn.RNN, 5, 6), 1),
        (partial(nn.LSTMCell, 5, 6), 4),
        (partial(nn.GRUCell, 5, 6), 3),
    ],
)
def test_gates_of_recurrent_layers_are_apart(build, gates) -> None:
    model = seeded(build)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {t.role for t in modules(model).touched} == {"recurrent"}
    for name, w in before.items():
        parts = 1 if "_hr" in name else gates
        expected = torch.cat([paper(part) for part in w.chunk(parts)]) if w.ndim > 1 else w
        assert same(model.get_parameter(name), expected), name


class Tokens(nn.Module):
    """What is kept whole: tokens, embeddings, norms, tables of its own; a linear layer tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 6), nn.LayerNorm((2, 6))
        self.token, self.qkv = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 18)
        self.head, self.fc1 = nn.Linear(6, 7, bias=False), nn.Linear(6, 6)
        self.head.weight = self.words.weight


def test_what_is_no_matrix_is_kept_whole_and_a_tied_weight_is_one() -> None:
    model = seeded(Tokens)
    tied = model.words.weight.detach().clone()
    report = modules(model, split={"qkv": ("q", "k", "v")})
    assert [t.name for t in report.touched] == [
        "words.weight", "qkv.weight[q]", "qkv.weight[k]", "qkv.weight[v]", "fc1.weight",
    ]  # fmt: skip
    assert report.touched[0].role == "linear" and same(model.words.weight, paper(tied))
    assert {t.name: t.role for t in report.untouched} == {
        "norm.weight": "norm", "norm.bias": "norm", "token": "other", "qkv.bias": "linear_bias",
        "fc1.bias": "linear_bias",
    }  # fmt: skip


@pytest.mark.parametrize("parts", [3, ("q", "k", "v"), [("q", 6), ("kv", 12)]])
def test_split_cuts_rows(parts) -> None:
    model = seeded(Tokens)
    before = model.qkv.weight.detach().clone()
    modules(model, split={r"\bqkv\.": parts}, include=["qkv"])
    sizes = [6, 12] if isinstance(parts, list) else [6, 6, 6]
    assert same(model.qkv.weight, torch.cat([paper(part) for part in before.split(sizes)]))


def test_a_name_that_says_several_matrices_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"qkv\.weight: taken as one matrix each.*split={'qkv'"):
        modules(seeded(Tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modules(seeded(Tokens), include=["fc1"])
        modules(seeded(Tokens), split={"qkv": 1})


def test_a_matrix_of_ones_own_is_named_by_split_or_registered() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.weight = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(2, 5, 4))

    model = nn.Sequential(seeded(Mixer))
    before = model[0].w.detach().clone()
    with pytest.raises(UserError, match=r"'0\.weight', of shape \(2, 5, 4\), belongs to a Mixer, .* not known: leave"):
        modules(model)
    assert [t.name for t in modules(model, split={r"\.w$": 1}, exclude=[r"0\.weight"]).touched] == ["0.w"]
    assert same(model[0].w, paper(before))
    try:
        register_layout("Mixer", "w", role="mlp", parts=("a", "b"))
        assert [t.name for t in modules(model, exclude=["weight"]).touched] == ["0.w[a]", "0.w[b]"]
    finally:
        del REGISTERED["Mixer", "w"]


def test_gpt2s_own_class_is_read_the_right_way_round() -> None:
    model = tiny_gpt2().double()
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    modules(model, split={"c_attn": 3})
    assert same(model.transformer.h[0].mlp.c_fc.weight, paper(before.T).T)


def test_matrices_can_be_listed() -> None:
    slices = module_slices(seeded(ResNet), ModuleLayout())
    assert [(s.name, tuple(s.shape), s.kernel) for s in slices if s.matrix][:2] == [
        ("stem.weight", (25, 8, 3), (5, 5)), ("layers.0.conv1.weight", (9, 12, 8), (3, 3)),
    ]  # fmt: skip
    stem = slices[0]
    assert torch.equal(stem.read()[7], stem.tensor[:, :, 1, 2])
    with pytest.raises(UserError, match="25 matrices, one at each position of a kernel"):
        _ = stem.view
    names = [w.name for w in module_matrices(seeded(ResNet))]
    assert len(names) == 8 and names[-1] == "head.weight"
    assert [w.name for w in module_matrices(seeded(ResNet), "linear")] == ["head.weight"]
    with pytest.raises(UserError, match="unknown role 'mlp'"):
        module_matrices(seeded(ResNet), ["mlp"])
    with pytest.raises(UserError, match="belongs to a Bilinear"):
        module_matrices(nn.Bilinear(2, 3, 4))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_networks_of_libraries(library) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip(library, exc_type=ImportError)
        torch.manual_seed(0)
        if library == "torchvision":
            model, split = found.models.mobilenet_v3_small(num_classes=4), None
        else:
            model, split = found.create_model("vit_tiny_patch16_224", num_classes=4, depth=1), {"qkv": tuple("qkv")}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = [name for name, p in before.items() if p.ndim in (2, 4)]  # a ViT's tokens and positions have three axes
    report = modules(model, split=split)
    assert list(dict.fromkeys(t.parameter for t in report.touched)) == weights
    for name in weights:
        parts = before[name].chunk(3 if "qkv" in name else 1)
        assert same(model.get_parameter(name), torch.cat([paper(part) for part in parts]), 4e-6), name


# ---- what is measured


def test_a_kernel_is_one_row_of_the_report_and_measured_over_its_positions() -> None:
    model = seeded(nn.Conv2d, in_channels=6, out_channels=9, kernel_size=(2, 3))
    before = model.weight.detach().clone()
    for spectra in (False, True, "range"):
        model.weight.data.copy_(before)
        report = apply_reset(model, "fire", layout="modules", iterations=3, spectra=spectra)
        [row] = report.touched
        assert (row.name, row.shape, row.role) == ("weight", [9, 6, 2, 3], "conv")
        for w, when in ((before, "before"), (model.weight.detach(), "after")):
            each = [torch.linalg.svdvals(w[:, :, i, j]) for i in range(2) for j in range(3)]
            sigma = torch.cat(each).sort(descending=True).values
            assert getattr(row, f"norm_{when}") == pytest.approx(float(w.norm()))
            assert getattr(row, f"dfi_{when}") == pytest.approx(float(((sigma**2 - 1) ** 2).sum()))
            if spectra:
                expected = sigma if spectra is True else sigma[[0, -1]]
                assert getattr(row, f"sigma_{when}") == pytest.approx(expected.tolist(), rel=1e-5)
        assert row.sfe == pytest.approx(float((model.weight - before).square().sum().detach()))
        squares = sigma**2
        assert row.residual == pytest.approx(float(squares.std(correction=0) / squares.mean()), rel=1e-5)
    assert "conv" in str(report) and report.to_dict()["touched"][0]["shape"] == [9, 6, 2, 3]


def test_the_reports_of_language_models_name_no_patterns() -> None:
    plain = fire_(tiny_gpt2(), scale="keep-norm").to_dict()
    assert "patterns" not in plain["resets"][0]
    own = modules(seeded(ResNet), roles={"first": "^stem"}).to_dict()
    assert own["resets"][0]["patterns"] == (("first", "^stem"),) and own["touched"][0]["role"] == "first"


# ---- every method on kernels


def each_position(w: torch.Tensor, map_, *beside: torch.Tensor) -> torch.Tensor:
    """Map the matrix at each position of (out, in, k, k)."""
    new = torch.empty_like(w)
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            new[:, :, i, j] = map_(w[:, :, i, j], *(b[:, :, i, j] for b in beside))
    return new


def scaled(w: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return w * (norm / w.norm())


def project(w: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    return u @ vh


def flattened_spectrum(w: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u @ torch.diag((s * s.mean()).sqrt()) @ vh


METHODS = {
    "fire, none": ({"scale": "none", "iterations": 4}, lambda w, w0: paper(w, 4, scale=False)),
    "fire, keep-norm": (
        {"scale": "keep-norm"},
        lambda w, w0: each_position(w, lambda x: scaled(paper(x, 5), x.norm())),
    ),
    "fire, strength": ({"strength": 0.25}, lambda w, w0: 0.75 * w + 0.25 * paper(w, 5)),
    "fire, polar": (
        {"solver": "polar", "tolerance": 1e-6},
        lambda w, w0: each_position(w, project) * (w.shape[0] / w.shape[1]) ** 0.5 / 6,
    ),
    "rescale": ({}, lambda w, w0: each_position(w, lambda x, y: scaled(x, y.norm()), paper(w, 5))),
    "flatten_spectrum": ({}, lambda w, w0: each_position(w, flattened_spectrum)),
    "initial_norm": ({"times": 2.0}, lambda w, w0: each_position(w, lambda x, y: scaled(x, 2 * y.norm()), w0)),
    "full_reset": ({}, lambda w, w0: w0),
    "shrink_perturb": ({"shrink": 0.3}, lambda w, w0: 0.7 * w + 0.3 * w0),
    "none": ({}, lambda w, w0: w),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_on_a_kernel(name) -> None:
    options, expected = METHODS[name]
    model, initial = seeded(nn.Conv2d, in_channels=4, out_channels=5, kernel_size=(2, 3)), nn.Conv2d(4, 5, (2, 3))
    before, start = model.weight.detach().clone(), initial.double().weight.detach().clone()
    apply_reset(model, {"method": name.partition(",")[0], **options}, layout="modules", initial=initial)
    assert same(model.weight, expected(before, start), 1e-5 if "polar" in name else 1e-9)


def test_dash_takes_a_filter_where_a_linear_layer_has_a_row() -> None:
    """As the authors' code does, for a kernel of 1 × 1 too, where a filter is a single number."""
    for kernel in ((2, 3), (1, 1)):
        model = seeded(nn.Conv2d, in_channels=4, out_channels=5, kernel_size=kernel)
        w, g = model.weight.detach().clone(), torch.randn_like(model.weight)
        model.weight.grad = g.clone()
        apply_reset(model, "dash", layout="modules", floor=0.2)
        cosine = -torch.cosine_similarity(w.flatten(2), g.flatten(2), dim=-1)
        assert same(model.weight, w * cosine.clamp(0.2, 1)[..., None, None])


def test_a_method_that_takes_one_matrix_gets_each_position() -> None:
    seen = []
    try:

        @register_reset("halve_matrices", roles=("mlp",))
        def halve(w: torch.Tensor) -> torch.Tensor:
            seen.append(w.shape)
            return w / 2

        model = seeded(ResNet)
        before = model.stem.weight.detach().clone()
        apply_reset(model, "halve_matrices", layout="modules", roles=["conv"], include=["^stem"])
        assert same(model.stem.weight, before / 2) and seen == [(8, 3)] * 25
    finally:
        RESETS.pop("halve_matrices", None)


def test_parseval_takes_a_kernel_as_one_matrix() -> None:
    w = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    flat = w.flatten(1)
    (flat @ flat.T - 2 * torch.eye(3)).square().sum().backward()
    stack = w.detach().movedim((0, 1), (-2, -1)).reshape(4, 3, 4)
    found = RESETS["parseval"].act(stack, options={"strength": 1.0, "scale": 2.0}, kernel=(2, 2))
    assert same(found.view(2, 2, 3, 4).movedim((-2, -1), (0, 1)), w.grad)


# ---- roles and presets


def test_roles_are_kinds_of_modules_or_patterns_of_ones_own() -> None:
    def touched(**options) -> list[str]:
        return [t.name for t in modules(seeded(ResNet), **options).touched]

    convs = ["stem.weight", *(f"layers.{n}.{c}.weight" for n in (0, 1) for c in ("conv1", "conv2", "shortcut"))]
    assert touched(roles="conv") == touched(roles=["conv"]) == convs
    assert touched(roles=["linear"]) == ["head.weight"]
    assert touched(roles={"deep": r"conv\d"}) == [name for name in convs if ".conv" in name]
    assert touched(roles={"deep": r"conv\d", "last": "^head"})[-1] == "head.weight"
    assert touched(include=["layers.0"], exclude=["conv1"]) == ["layers.0.conv2.weight", "layers.0.shortcut.weight"]


def test_a_frozen_weight_is_left() -> None:
    model = seeded(ResNet)
    model.layers.requires_grad_(False)
    report = modules(model)
    assert [t.name for t in report.touched] == ["stem.weight", "head.weight"]
    model.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        modules(model)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.out = nn.Linear(6, 6)


def test_the_paper_resets_queries_and_keys_of_a_vit() -> None:
    model = seeded(Heads)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert [t.name for t in apply_reset(model, "paper-vit", layout="modules").touched] == ["to_q.weight", "to_k.weight"]
    assert same(model.to_q.weight, paper(before["to_q.weight"]))
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    names = [t.name for t in apply_reset(encoder, ["paper-vit"], layout="modules").touched]
    assert names == ["self_attn.in_proj_weight[q]", "self_attn.in_proj_weight[k]"]
    with pytest.raises(UserError, match=r"query_key .*finds no name.*If 'qkv\.weight' holds it, .* split"):
        apply_reset(seeded(Tokens), "paper-vit", layout="modules")
    names = [
        t.name for t in apply_reset(seeded(Tokens), "paper-vit", layout="modules", split={"qkv": tuple("qkv")}).touched
    ]
    assert names == ["qkv.weight[q]", "qkv.weight[k]"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("blocks.0.attn.to_q.weight", True), ("h.1.attention.query.weight", True), ("q_proj.weight", True),
        ("attn.k_proj_weight", True), ("attn.wk.weight", True), ("layer.0.attention.q_lin.weight", True),
        ("blocks.0.qkv.weight[k]", True), ("blocks.0.qkv.weight[v]", False), ("to_v.weight", False),
        ("to_q.bias", False), ("q_norm.weight", False), ("blocks.0.mlp.fc1.weight", False), ("monkey.weight", False),
    ],
)  # fmt: skip
def test_names_of_queries_and_keys(name, wanted) -> None:
    assert bool(re.search(QUERY_OR_KEY, name)) == wanted


def test_the_paper_projects_the_convolutions_of_a_dqn_and_resets_its_linear_layers() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 8, 4), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 9))

    model, initial = seeded(network), network().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_reset(model, "paper-dqn", layout="modules", initial=initial)
    for name in ("0.weight", "2.weight"):
        assert same(model.get_parameter(name), paper(before[name]))
    for name in ("0.bias", "2.bias"):
        assert torch.equal(model.get_parameter(name), before[name])
    assert torch.equal(model[4].weight, initial[4].weight) and torch.equal(model[4].bias, initial[4].bias)
    model.load_state_dict(before)
    apply_reset(model, "paper-dqn-shrink-perturb", layout="modules", initial=initial)
    for name in ("0.weight", "0.bias"):
        assert same(model.get_parameter(name), 0.2 * before[name] + 0.8 * initial.get_parameter(name))
    assert torch.equal(model[4].bias, initial[4].bias)


def test_other_presets_take_every_matrix() -> None:
    for name in ("paper-resnet", "paper-vgg"):
        model, other = seeded(ResNet), seeded(ResNet)
        apply_reset(model, {"method": name}, layout="modules")
        modules(other)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    mlp = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    assert [t.name for t in apply_reset(mlp, "paper-simba", layout="modules").touched] == ["0.weight", "2.weight"]


def test_running_statistics_go_back_in_a_full_reset_alone() -> None:
    initial, model = ResNet(), ResNet()
    model(torch.randn(4, 3, 9, 9))
    before = {name: b.clone() for name, b in model.named_buffers()}
    shrunk = apply_reset(model, "shrink_perturb", layout="modules", initial=initial)
    assert not any(t.name in before for t in shrunk.touched)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert not any(t.name in before for t in modules(model).touched)
    mixed = apply_reset(model, "shrink_perturb", layout="modules", initial=initial, roles=["buffer"])
    assert len(mixed.touched) == 8  # but for the counts of batches
    apply_reset(model, "full_reset", layout="modules", initial=initial)
    assert all(torch.equal(a, initial.state_dict()[name]) for name, a in model.state_dict().items())


# ---- what is refused


class NormalisedConv(nn.Conv2d):
    pass


class ScaleNorm(nn.Module):
    def __init__(self, channels: int, width: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, width))


def recomputed(wrap, at):
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 3))
    wrap(model[at])
    return model


def lora():
    model = nn.Sequential(nn.Module())
    model[0].lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
    return model


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.OFTConfig(oft_block_size=2, target_modules=["0"]))


def complex_linear():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))


def quarters():
    return nn.ParameterList([nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)])


HIDDEN = {
    "weight norm": (parametrizations.weight_norm, 0, r"parametrizations\.weight\.original0' .*remove_parametrizations"),
    "spectral norm": (parametrizations.spectral_norm, 1, r"parametrizations\.weight\.original'"),
    "orthogonal": (parametrizations.orthogonal, 0, r"parametrizations\.weight\.original'"),
    "old weight norm": (weight_norm, 0, r"weight_g' .*remove_weight_norm"),
    "old spectral norm": (spectral_norm, 1, r"weight_orig' .*remove_spectral_norm"),
    "pruned": (partial(prune.l1_unstructured, name="weight", amount=0.5), 0, r"weight_orig' .*prune\.remove"),
}
HIDDEN = {
    name: (partial(recomputed, wrap, at), {}, rf"'{at}\.weight' is computed from '{at}\.{message}")
    for name, (wrap, at, message) in HIDDEN.items()
}
MODELS = {
    "bilinear": (
        lambda: nn.Sequential(nn.Bilinear(2, 3, 4)),
        r"'0\.weight', of shape \(4, 2, 3\), belongs to a Bilinear, which multiplies two inputs: leave it out with "
        r"exclude=.*, or, for one matrix \(out, in1 · in2\) that maps their products, give: split=",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3)),
        r"'0\.weight' belongs to a ConvTranspose2d, .*exclude=\[r'0\\\.weight'\]",
    ),
    "adapter": (lora, r"'0\.lora_A\.default\.weight' belongs to an adapter"),
    "adapter of PEFT": (adapted, r"'base_model\.model\.0\.\S+' belongs to an adapter"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"'0\.weight' is not initialised yet .*forward pass"),
    "complex": (complex_linear, r"'1\.weight' is complex \(torch\.complex64\)"),
    "integer": (quarters, r"'0' is int8, quantised"),
    "no parameters": (nn.ReLU, "ReLU has no parameters"),
}
OPTIONS = {
    "layers": ({"layers": 0}, "layers: counts the blocks of a language model: name modules with include"),
    "role": ({"roles": ["convs"]}, r"roles: unknown role 'convs'\. Did you mean 'conv'\?"),
    "role of a language model": ({"roles": ["mlp"]}, "unknown role 'mlp'.*linear, conv, attention, recurrent"),
    "no matrix role": ({"roles": ["norm"]}, r"'fire' acts on matrices .* norm are not"),
    "no roles": ({"roles": []}, "roles: give one role at least"),
    "bad pattern": ({"roles": {"a": "("}}, r"roles: 'a': '\(' is not allowed"),
    "pattern unfound": ({"roles": {"a": "convv"}}, "roles: a 'convv' finds no name.* nearest are .*conv"),
    "pattern of biases": ({"roles": {"a": "head.bias"}}, r"the role a, 'head\.bias', finds nothing .*no matrix"),
    "no such kind": ({"roles": ["attention"]}, "'fire, .*roles attention' finds nothing to reset"),
    "include unfound": ({"include": ["stemm"]}, "include 'stemm' finds no name"),
    "split unfound": ({"split": {"qkv": 3}}, r"split: 'qkv' finds no weight .*stem\.weight"),
    "split of a bias": ({"split": {r"head\.bias": 3}}, "finds no weight that can be split"),
    "split uneven": ({"split": {"head": 3}}, r"split: 'head\.weight' has 5 rows, which the parts .* do not fill"),
    "split too large": ({"split": {"head": [("a", 4), ("b", 4)]}}, r"split: 'head\.weight' has 5 rows"),
    "split of nothing": ({"split": {"head": 0}}, "split: 'head': 0 is not allowed: give a regular"),
    "split of text": ({"split": {"head": "qkv"}}, "split: 'head': 'qkv' is not allowed"),
    "split pattern": ({"split": {"(": 2}}, r"split: '\(': 2 is not allowed"),
    "kernels": ({"kernels": "flat"}, r"kernels: 'flat' is not allowed\. Did you mean 'flattened'\? Give"),
    "layout": ({"layout": "module"}, r"layout: 'module' is not allowed\. Did you mean 'modules'\?"),
    "split elsewhere": ({"layout": "transformers", "split": {"a": 1}}, "split: read with layout='modules' alone"),
    "kernels elsewhere": ({"layout": "transformers", "kernels": "flattened"}, "kernels: read with layout"),
    "patterns elsewhere": ({"layout": "transformers", "roles": {"a": "b"}}, "patterns of roles .*layout='modules'"),
    "no layout": ({"layout": "transformers"}, r"no layout is known for .*fire_\(model, layout='modules'\)"),
}
REFUSED = {
    **HIDDEN,
    **{name: (build, {}, message) for name, (build, message) in MODELS.items()},
    **{name: (ResNet, options, message) for name, (options, message) in OPTIONS.items()},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_and_nothing_is_changed(name) -> None:
    build, options, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
    lazy = name == "lazy"
    before = {} if lazy else {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        fire_(model, **{"layout": "modules", **options})
    assert lazy or all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_refused_does_not_matter_where_it_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 3, 4), parametrizations.weight_norm(nn.Conv1d(2, 2, 3)))
    assert [t.name for t in modules(model, exclude=[r"^[12]\."]).touched] == ["0.weight"]
    assert [t.name for t in modules(model, roles={"mine": "^0"}).touched] == ["0.weight"]
    with pytest.raises(UserError, match=r"'2\.weight' is computed from"):
        modules(model, roles=["conv"])
    start = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    apply_reset(model, "full_reset", layout="modules", initial=start)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_a_module_called_base_layer_is_no_adapter() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(4, 4), "top": nn.Linear(4, 4)})
    assert [t.name for t in modules(model).touched] == ["base_layer.weight", "top.weight"]


def test_quantised_modules_are_refused() -> None:
    coded = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    with pytest.raises(UserError, match=r"'1' is a Linear, quantised"):
        modules(nn.Sequential(nn.Linear(2, 2), coded()))


def test_classes_that_extend_torchs_are_taken_whatever_their_names() -> None:
    model = nn.Sequential(NormalisedConv(2, 3, 3), ScaleNorm(3))
    assert [t.name for t in modules(model).touched] == ["0.weight"]
    with pytest.raises(UserError, match=r"'0\.weight', of shape \(2, 3\), belongs to a ScaleNorm"):
        modules(nn.Sequential(ScaleNorm(2, 3)))


@pytest.mark.parametrize("layout", ["modules", "transformers"])
@pytest.mark.parametrize(("given", "meant"), [("paper-resnt", "paper-resnet"), ("fier", "fire")])
def test_the_name_that_was_meant_is_told(layout, given, meant) -> None:
    with pytest.raises(UserError, match=f"unknown reset '{given}'. Did you mean '{meant}'"):
        apply_reset(seeded(ResNet), given, layout=layout)


@pytest.mark.parametrize(
    ("resets", "options", "message"),
    [
        ("paper-dqn", {}, r"'paper-dqn' is a preset for any torch module.*layout='modules'"),
        ("paper-dqn", {"layout": "modules"}, r"needs the run's initial weights"),
        ("paper-dqn", {"layout": "modules", "shrink": 0.1}, r"'paper-dqn' is a preset .*give its name alone"),
        (
            ResetSpec.parse("full_reset"),
            {"layout": "modules"},
            r"was read for any torch module|was read for a language",
        ),
        (ResetSpec.parse("fire", modules=True), {}, r"'fire' was read for"),
    ],
)
def test_presets_and_specs_belong_to_a_layout(resets, options, message) -> None:
    with pytest.raises(UserError, match=message):
        apply_reset(seeded(ResNet), resets, **options)


def test_kernels_can_be_registered_for_the_tables() -> None:
    try:
        for child in ("conv1", "conv2", "shortcut"):
            register_layout("Residual", child, role="mlp", module_class="Conv2d", kernel=True)
        model = seeded(Residual, into=3, out=4)
        before = model.conv1.weight.detach().clone()
        report = apply_reset(model, "fire", iterations=10)
        assert len(report.touched) == 3 and same(model.conv1.weight, paper(before))
    finally:
        for child in ("conv1", "conv2", "shortcut"):
            REGISTERED.pop(("Residual", child), None)


# ---- many ranks


def on_ranks(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import fire_llm.distributed.redistribute as exchange
    import fire_llm.resets.execute as work

    work.worthwhile = lambda cost, size, ranks, device: ranks > 1
    exchange.Redistribution.__init__.__defaults__ = (6000,)
    results = []
    for how in ("replicas", "shards"):
        model = seeded(ResNet)
        if how == "shards":
            for layer in model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        target = nn.parallel.DistributedDataParallel(model) if how == "replicas" else model
        report = fire_(target, layout="modules", iterations=10)
        rows = [(t.name, t.shape, round(t.norm_after, 9)) for t in report.touched]
        whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
        results.append(({n: p.detach().clone() for n, p in whole.items()}, rows, report.shared_by))
    return results


def test_replicas_and_shards_end_as_one_process(tmp_path) -> None:
    model = seeded(ResNet)
    report = modules(model)
    for results in run_ranks(2, on_ranks, tmp_path):
        for weights, rows, shared in results:
            assert all(same(weights[name], p) for name, p in model.named_parameters()) and shared == 2
            assert rows == [(t.name, t.shape, round(t.norm_after, 9)) for t in report.touched]


def test_one_row_a_kernel_keeps_a_report_small() -> None:
    rows = [TensorReport.of(s) for s in module_slices(seeded(ResNet), ModuleLayout(), buffers=False) if s.kernel]
    assert len(rows) == 7


class Classifier(nn.Module):
    """A network that is none of transformers', with a loss as `Trainer` wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(24, 3)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.norm(self.conv(pixels)).relu().flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


_WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
TINY = {
    "ViTForImageClassification": {**_WIDTHS, "image_size": 8, "patch_size": 4},
    "BertForSequenceClassification": {**_WIDTHS, "vocab_size": 32},
    "GPT2Model": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 8},
}


def trained(network: nn.Module, folder: Path, callback: ResetCallback, **options) -> Trainer:
    images = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    rows = [{"pixels": image, "labels": i % 3} for i, image in enumerate(images)]
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=8, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, logging_strategy="no", dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Trainer(network, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def test_any_network_is_reset_inside_of_a_trainer(tmp_path):
    """At the start and after a step: what `apply_reset` would do by itself, moments cleared, training going on."""
    initial = Classifier()
    network = copy.deepcopy(initial)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    alone = copy.deepcopy(network)
    apply_reset(alone, "paper-dqn", layout="modules", initial=initial)
    callback = ResetCallback("paper-dqn", layout="modules", initial=initial)
    trained(network, tmp_path, callback, learning_rate=0.0)
    assert all(same(a, b, 0) for a, b in zip(alone.parameters(), network.parameters(), strict=True))
    assert {t.parameter for t in callback.reports[0].touched} == {"conv.weight", "head.weight", "head.bias"}

    seen = []

    class Watch(ResetCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            super().on_step_end(args, state, control, model=model, optimizer=optimizer, **kwargs)
            kept = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
            seen.append((state.global_step, kept))

    trained(Classifier(), tmp_path, Watch("fire", layout="modules", at_steps=[2], iterations=10))
    every = {name for name, _ in network.named_parameters()}
    assert seen == [(1, every), (2, every - {"conv.weight", "head.weight"}), (3, every), (4, every)]


def test_a_callback_says_what_it_needs_for_a_network_of_its_own(tmp_path):
    with pytest.raises(UserError, match=r"split: read with layout='modules' alone"):
        ResetCallback("fire", split={"qkv": 3})
    with pytest.raises(UserError, match="this model has no config to draw them from: give initial="):
        trained(Classifier(), tmp_path, ResetCallback("full_reset", layout="modules"))


@pytest.mark.parametrize("layout", ["modules", "transformers"])
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "BertForSequenceClassification", "GPT2Model"])
def test_a_callback_draws_the_initial_weights_of_the_models_own_class(kind, layout, tmp_path):
    own = getattr(transformers, kind)
    config = own.config_class(**TINY[kind])
    model = own(config).to(torch.bfloat16)
    config.dtype = torch.bfloat16
    callback, state = ResetCallback("full_reset", layout=layout, seed=5), TrainerState(max_steps=1)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callback.on_train_begin(arguments, state, TrainerControl(), model=model, optimizer=None)
    torch.manual_seed(5)
    drawn = own(config).to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), drawn.parameters(), strict=True))
    assert model.config.dtype == torch.bfloat16
