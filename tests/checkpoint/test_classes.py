"""Folders of image models, encoders, encoder-decoders and classifiers: the class that config.json names is what counts.

The oracle is the model in memory, loaded and saved by its own class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.small_models import build
from support.small_others import OTHERS, build_other, outputs_of
from transformers import ViTImageProcessor

from fire_llm import apply_reset, fire_, reset_checkpoint
from fire_llm.architectures.matrices import parameter_slices
from fire_llm.checkpoint import Stored
from fire_llm.checkpoint.inspection import inspect_checkpoint
from fire_llm.checkpoint.refusals import refuse_config
from fire_llm.core.errors import UserError
from fire_llm.models import fresh_model, load_model

FEW = [
    "CLIPModel", "ConvNextV2ForImageClassification", "DebertaForSequenceClassification",
    "LlamaForSequenceClassification", "ResNetForImageClassification", "SwinForImageClassification",
    "T5ForConditionalGeneration+gated", "ViTForImageClassification",
]  # fmt: skip


def saved(name: str, folder: Path, **options: Any) -> Any:
    model = build_other(name)
    model.save_pretrained(folder, **options)
    return model


def roles_of(model: Any) -> tuple[str, ...]:
    return tuple({"attention", "mlp", "conv"} & {p.role for p in parameter_slices(model)})


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted(OTHERS)])
@pytest.mark.filterwarnings("ignore:fire. the norm of all")  # of kernels of random weights
def test_rewriting_equals_the_reset_in_memory(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "src", max_shard_size="60KB")
    roles = roles_of(model)
    report = reset_checkpoint(tmp_path / "src", tmp_path / "dst", roles=roles, iterations=3, measures=False)
    kind = getattr(transformers, name.partition("+")[0])
    wanted, result = (kind.from_pretrained(tmp_path / n).eval() for n in ("src", "dst"))
    in_memory = fire_(wanted, roles=roles, iterations=3)
    there, here = ([t.name.removeprefix("transformer.") for t in r.touched] for r in (report, in_memory))
    assert there == here and here  # a bare trunk is read as the whole model
    for (key, a), b in zip(wanted.state_dict().items(), result.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    before, after = outputs_of(model), outputs_of(result)
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    if name != "GPT2Model":
        assert json.loads((tmp_path / "dst" / "fire.json").read_text())["source"]["class"] == kind.__name__
        card = (tmp_path / "dst" / "README.md").read_text()
        assert f"{kind.__name__}.from_pretrained(" in card and "pipeline_tag: text-generation" not in card


@pytest.mark.parametrize(
    "named",
    [
        "__init__", "logging", "pipeline", "PreTrainedModel", "ViTPreTrainedModel", "AutoModel", "ViTConfig", "models",
        "GPT2LMHeadModel", "ViTForImageClassification.forward", ["ViTForImageClassification"], "",
    ],
)  # fmt: skip
def test_a_name_of_no_model_of_the_type_is_refused(named: Any) -> None:
    settings = {"model_type": "vit", "architectures": [named]}
    with pytest.raises(UserError, match=r"'src': model_type 'vit' is no causal .*, and .* names no model of that type"):
        refuse_config(Path("src"), settings)
    refuse_config(Path("src"), {**settings, "architectures": [named, "ViTForImageClassification"]})


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("ResNetForImageClassification", {"method": "full_reset"}),
        ("ResNetForImageClassification", {"method": "shrink_perturb", "shrink": 0.3}),
        ("ViTForImageClassification", {"method": "shrink_perturb", "shrink": 0.3}),
    ],
)
def test_initial_weights_are_those_of_the_class(name: str, spec: dict[str, Any], tmp_path: Path) -> None:
    """Statistics of batch norm and their counts go back with the weights, or a part of the way."""
    model = saved(name, tmp_path / "src")
    kind = type(model)
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", spec, seed=7, measures=False)
    initial = fresh_model(model.config, 7, kind)
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(initial.parameters(), kind(model.config).parameters(), strict=True))
    wanted, result = (kind.from_pretrained(tmp_path / n) for n in ("src", "dst"))
    before = {key: tensor.clone() for key, tensor in wanted.state_dict().items()}
    apply_reset(wanted, spec, initial=initial)
    for (key, a), b in zip(wanted.state_dict().items(), result.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
        assert "running" not in key or not torch.equal(b, before[key]), key
    initial.save_pretrained(tmp_path / "step-0")
    reset_checkpoint(tmp_path / "src", tmp_path / "again", spec, init=tmp_path / "step-0", measures=False)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("dst", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_network_of_convolutions_alone_asks_for_their_role(tmp_path: Path) -> None:
    model = saved("ResNetForImageClassification", tmp_path / "src")
    with pytest.raises(UserError, match=r"whose matrices have the roles conv, lm_head .* Add --role conv"):
        reset_checkpoint(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(UserError, match="Name the role conv"):
        fire_(model)
    assert not (tmp_path / "dst").exists()


def test_kernels_are_inspected_position_by_position(tmp_path: Path) -> None:
    """Against singular values in fp64 of each (out, in) matrix of a kernel."""
    model = saved("ConvNextV2ForImageClassification", tmp_path / "src")
    rows = {row["name"]: row for row in inspect_checkpoint(tmp_path / "src", progress=False).rows}
    names = {n: p for n, p in model.named_parameters() if n in rows}
    kernels = {n: p for n, p in names.items() if p.ndim == 4}
    assert kernels and any(p.ndim == 2 for p in names.values())
    for name, p in kernels.items():
        each = p.detach().double().flatten(2).unbind(2)
        sigma = torch.cat([torch.linalg.svdvals(w) for w in each])
        row = rows[name]
        assert row["role"] == "conv" and row["shape"] == list(p.shape)
        torch.testing.assert_close(row["sigma_max"], float(sigma.max()), rtol=1e-4, atol=0)
        torch.testing.assert_close(row["norm"], float(p.detach().double().norm()), rtol=1e-5, atol=0)
        gram = [w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T for w in each]
        deviation = sum(float((g - torch.eye(len(g), dtype=g.dtype)).square().sum()) for g in gram)
        torch.testing.assert_close(row["dfi"], deviation, rtol=1e-4, atol=0)


def test_files_of_processors_go_along(tmp_path: Path) -> None:
    saved("ViTForImageClassification", tmp_path / "src")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "src")
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", measures=False)
    assert (tmp_path / "dst" / "preprocessor_config.json").is_file()
    assert ViTImageProcessor.from_pretrained(tmp_path / "dst").size["height"] == 24


def test_what_is_for_language_models_says_so(tmp_path: Path) -> None:
    saved("ViTForImageClassification", tmp_path / "src")
    text = tmp_path / "text.txt"
    text.write_text("A text.\n\nAnother one.\n")
    with pytest.raises(UserError, match=r"--measure-on .* causal language models, and '.*src' is a ViTForImageClass"):
        reset_checkpoint(tmp_path / "src", tmp_path / "dst", measure_on=[str(text)])
    from fire_llm.evaluation.checkpoints import score_checkpoints

    for call in (lambda: load_model(tmp_path / "src"), lambda: score_checkpoints([str(tmp_path / "src")], [str(text)])):
        with pytest.raises(UserError, match="is no causal language model, but a ViTForImageClassification"):
            call()


def test_pickles_name_the_class_that_reads_them(tmp_path: Path) -> None:
    model = saved("ViTForImageClassification", tmp_path / "src")
    (tmp_path / "src" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "src" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights.*ViTForImageClassification\.from_pretrained\(SRC\)"):
        reset_checkpoint(tmp_path / "src", tmp_path / "dst")


@pytest.mark.parametrize(
    ("architectures", "kind"),
    [(None, None), (["LlamaForCausalLM"], None), (["Made"], None), (["LlamaConfig"], None), (["ViTModel"], None)],
)
def test_a_language_model_is_one_whatever_else_its_config_names(
    architectures: list[str] | None, kind: Any, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    stored = Stored.open(tmp_path / "src")
    assert stored.kind is kind and type(stored.model).__name__ == "LlamaForCausalLM"
