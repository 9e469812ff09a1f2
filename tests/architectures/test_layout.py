"""The layout room, against loops over indices, forward passes, and the table of every causal LM in shared/docs."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_models import modeling_classes
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from fire_llm.architectures import lookup
from fire_llm.architectures.families import TABLE, TYPES
from fire_llm.architectures.matrices import (
    MATRIX_ROLES,
    ROLES,
    Layout,
    ParameterSlice,
    Part,
    logical_matrices,
    parameter_slices,
    register_layout,
    supported_types,
    unwrap,
)
from fire_llm.core.compat import left_out
from fire_llm.core.errors import UserError

transformers.logging.set_verbosity_error()
TABLE_OF_ALL = Path(__file__).resolve().parents[3] / "shared" / "docs" / "layouts.jsonl"


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Forget what a test registers."""
    before = dict(lookup.REGISTERED)
    yield
    lookup.REGISTERED.clear()
    lookup.REGISTERED.update(before)


# ---------------------------------------------------------------------------------------------------------------------
# Models. Default configurations on the meta device cost 0.1 s each and have the sizes the table of all layouts lists.


def _assistant(text_type: str, **sizes: int) -> Any:
    """Build the config of a Gemma 4 assistant: all layers share their keys and values with the main model."""
    text = AutoConfig.for_model(text_type, **sizes)
    for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
        setattr(text, key, 0)
    text.num_kv_shared_layers = text.num_hidden_layers
    return AutoConfig.for_model(text_type.replace("_text", "_assistant"), text_config=text)


def _for(model_type: str, **options: Any) -> Callable[[], Any]:
    return lambda: AutoConfig.for_model(model_type, **options)


QWEN4 = {
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 2000,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 256,
    "indexer_compress_ratio": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "cohere_compass_text": _for(
        "cohere_compass_text", rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}
    ),
    "hunyuan_v1_dense": _for("hunyuan_v1_dense", head_dim=128),
    "ministral": _for("ministral", head_dim=128),
    "nemotron": _for("nemotron", num_key_value_heads=8),
    "dbrx": _for("dbrx", attn_config={"kv_n_heads": 8, "rope_theta": 10000.0}),
    "dots1": _for(
        "dots1",
        num_hidden_layers=3,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "hunyuan_v1_moe": _for("hunyuan_v1_moe", head_dim=128, num_experts=4),
    "lfm2_moe": _for("lfm2_moe", num_hidden_layers=4, num_dense_layers=1, layer_types=["conv", "full_attention"] * 2),
    "qwen4_exp": _for("qwen4_exp_text", **QWEN4),
    "qwen4_exp_text": _for("qwen4_exp_text", **QWEN4),
    "reformer": _for("reformer", is_decoder=True),
    "gemma4_assistant": lambda: _assistant("gemma4_text"),
    "gemma4_unified_assistant": lambda: _assistant("gemma4_unified_text"),
    # Variants of the table beside the default ones, and options that bring in further weights.
    "bert+cross": _for("bert", is_decoder=True, add_cross_attention=True),
    "gpt2+cross": _for("gpt2", add_cross_attention=True),
    "doge+moe": _for("doge", is_moe=True),
    "opt+350m": _for("opt", word_embed_proj_dim=512, hidden_size=1024, num_attention_heads=16),
    "cohere+qk": _for("cohere", use_qk_norm=True),
    "stablelm+qk": _for("stablelm", qk_layernorm=True),
    "phi+qk": _for("phi", qk_layernorm=True),
    "roberta+cross": _for("roberta", is_decoder=True, add_cross_attention=True),
    "electra+cross": _for("electra", is_decoder=True, add_cross_attention=True),
    "xmod+cross": _for("xmod", is_decoder=True, add_cross_attention=True),
    "big_bird+full": _for("big_bird", attention_type="original_full"),
    "roformer+project": _for("roformer", embedding_size=128),
    "git+video": _for("git", num_image_with_embedding=2),
    "qwen2+bias": _for("qwen2", tie_word_embeddings=True),
    "bamba+attn": _for("bamba", num_hidden_layers=4, attn_layer_indices=[1, 3]),
    "cohere2_moe+moe": _for("cohere2_moe", num_hidden_layers=4, num_experts=4, num_shared_experts=1),
    "deepseek_v2+lite_no_q_lora": _for("deepseek_v2", q_lora_rank=None),
    "deepseek_v3+no_q_lora": _for("deepseek_v3", q_lora_rank=None),
    "falcon+7b_multi_query": _for("falcon", multi_query=True),
    "falcon+new_decoder": _for(
        "falcon", new_decoder_architecture=True, hidden_size=4096, num_attention_heads=64, num_kv_heads=8
    ),
    "falcon+rw_mha": _for("falcon", multi_query=False),
    "gemma4_text+moe": _for(
        "gemma4_text", enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64
    ),
    "granitemoe_swa+shared": _for("granitemoe_swa", shared_intermediate_size=64),
    "granitemoehybrid+hybrid": _for(
        "granitemoehybrid", num_local_experts=4, layer_types=["mamba", "attention"] * 2, num_hidden_layers=4
    ),
    "granitemoeshared+shared": _for("granitemoeshared", shared_intermediate_size=64),
    "lfm2+conv": _for("lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    "mpt+gqa": _for("mpt", attn_config={"kv_n_heads": 4}),
    "nemotron_h+full": _for("nemotron_h", layers_block_type=["mamba", "attention", "moe", "mlp"]),
    "phi3+gqa": _for("phi3", num_key_value_heads=8),
    "qwen2_moe+dense_mix": _for("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[0]),
    "xlstm+fused": _for("xlstm", weight_mode="fused"),
    "gpt_bigcode+mha": _for("gpt_bigcode", multi_query=False),
    "gpt_bigcode+cross": _for("gpt_bigcode", multi_query=False, add_cross_attention=True),
    "laguna+gate": _for("laguna", gating="per-element"),
    "minicpm3+no_q_lora": _for("minicpm3", q_lora_rank=None),
    "mvp+prompt": _for("mvp", use_prompt=True),
    "nemotron_h+latent": _for("nemotron_h", moe_latent_size=1024),
    "persimmon+qk": _for("persimmon", qk_layernorm=True),
    "zamba2+adapters": _for("zamba2", use_shared_attention_adapter=True),
}
# The table has other sizes, and keys and values in layers that share them here.
SIZES_DIFFER = {"nemotron", "gemma4_assistant", "gemma4_unified_assistant"}
# One block serves several layers; the table counts it at each of them.
SHARED_BLOCKS = {"zamba2", "zamba2+adapters"}


def build(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Build a model type, or `type+variant`, on the meta device."""
    model_type = name.partition("+")[0]
    if "_assistant" in name:
        module = getattr(transformers.models, model_type.removesuffix("_assistant"))
        text = next(getattr(module, n) for n in dir(module) if n.endswith("TextConfig"))
        # The default property refuses the only configuration that the assistant's own config allows.
        sharing = property(lambda config: ["reuse"] * config.num_hidden_layers)
        monkeypatch.setattr(text, "kv_sharing_modes", sharing, raising=False)
    if model_type == "gemma3n":
        _stub_vision(monkeypatch)
    with torch.device("meta"):
        if model_type.startswith("musicgen"):
            # Its auto class is listed under the composite config, but takes the decoder's.
            family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
            return getattr(transformers, family)(AutoConfig.for_model(f"{model_type}_decoder"))
        config = CONFIGS.get(name, _for(model_type))()
        return AutoModelForCausalLM.from_config(config)


def _stub_vision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in where gemma3n would import timm."""
    from transformers.models.gemma3n import modeling_gemma3n

    real = modeling_gemma3n.AutoModel.from_config
    tower = type("TimmWrapperModel", (nn.Linear,), {"__module__": "transformers.models.timm_wrapper"})

    def from_config(config: Any, **options: Any) -> nn.Module:
        return tower(4, 4) if "vision" in config.model_type else real(config, **options)

    monkeypatch.setattr(modeling_gemma3n.AutoModel, "from_config", from_config)


def tiny_gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **options)).eval()


def tiny_llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads, **options)).eval()


def glob(name: str) -> str:
    return ".".join("*" if step.isdigit() else step for step in name.split("."))


# ---------------------------------------------------------------------------------------------------------------------
# Coverage


@cache
def expected(name: str) -> Counter[tuple[Any, ...]] | None:
    """Count the (parameter, role, part, logical shape) that the table of all layouts gives a type's blocks."""
    model_type, _, variant = name.partition("+")
    lines = [json.loads(line) for line in TABLE_OF_ALL.read_text().splitlines()]
    rows = [r for r in lines if r["model_type"] == model_type and r["variant"] == (variant or "default")]
    if not rows:
        return None
    counts: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        if row["role"] not in ("attention", "mlp", "ssm"):
            continue
        split, shape = row["split"], row["shape"]
        if row["orientation"].startswith("stack"):
            shape = shape[1:]
        width = shape[0] if row["orientation"].endswith("in,out") else math.prod(shape[1:])
        for part, size in split["parts"]:
            key = row["param"], row["role"], "" if part == "w" else part, size * split["groups"], width
            counts[key] += row["count"] * split["stack"]
    return counts


def check_cover(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Check that nothing is refused, every parameter is cut without rest, and roles are told apart."""
    model = build(name, monkeypatch)
    cut = parameter_slices(model)
    assert Counter(p.parameter for p in cut).keys() == dict(model.named_parameters()).keys()
    assert len({p.name for p in cut}) == len(cut)
    assert sum(math.prod(p.shape) for p in cut) == sum(p.numel() for p in model.parameters())
    assert {p.role for p in cut if p.matrix} <= set(MATRIX_ROLES)
    assert any("lm_head" in p.roles and p.matrix for p in cut), "no output head"
    assert any("embedding" in p.roles for p in cut)
    return model


GONE = {"Inkling2RelativeLogits"}
"""Classes that transformers has had, until 5.24."""


def check_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the set of (parameter, role, part, shape) of a type's blocks against the table of all layouts."""
    if (want := expected(name)) is None:
        return
    if name == "inkling2_text" and not modeling_classes() >= GONE:
        pytest.skip("the table has the layout that it had until 5.24")
    matrices = logical_matrices(build(name, monkeypatch), ("attention", "mlp", "ssm"))
    got = Counter((glob(m.parameter), m.role, m.part, *m.shape) for m in matrices)
    if name in SIZES_DIFFER:
        assert {k[:3] for k in got} <= {k[:3] for k in want}
    elif name in SHARED_BLOCKS:
        assert got.keys() == want.keys()
    else:
        assert got == want


FEW = ["llama", "qwen3", "gemma2", "opt", "gptj", "phi", "bert", "gpt2", "gpt2+cross", "rwkv", "gemma3", "cohere+qk"]
REST = sorted(n for n in {*supported_types(), *CONFIGS} - set(FEW) if n.partition("+")[0] in supported_types())
needs_table = pytest.mark.skipif(not TABLE_OF_ALL.exists(), reason="the table of all layouts is not here")


@pytest.mark.parametrize("name", FEW)
def test_every_parameter_is_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cover(name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_every_parameter_is_known_in_all_types(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cover(name, monkeypatch)


@pytest.mark.shared_data
@needs_table
@pytest.mark.parametrize("name", FEW)
def test_agrees_with_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_table(name, monkeypatch)


@pytest.mark.slow
@pytest.mark.shared_data
@needs_table
@pytest.mark.parametrize("name", REST)
def test_agrees_with_the_table_in_all_types(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_table(name, monkeypatch)


def test_every_causal_language_model_is_supported_or_refused_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = left_out()
    assert set(supported_types()) | refused == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(supported_types()) & refused
    for name in refused:
        with pytest.raises(UserError, match="register_layout"):
            parameter_slices(build(name, monkeypatch))


def test_supported_types_are_causal_language_models() -> None:
    assert set(supported_types()) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {"gpt2", "llama", "qwen3", "gemma3", "opt", "gptj", "mistral"} <= set(supported_types())
    assert len(supported_types()) == len(set(supported_types()))


def test_no_layout_is_listed_twice() -> None:
    from fire_llm.architectures.grammar import entries, merge

    with pytest.raises(ValueError, match=r"A\.x is listed twice"):
        merge(entries("mlp", "x y", "A B"), entries("attention", "x", "A"))


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2: what q, k and v are is shown by what the attention does, not by where the table says they lie.


def set_part(model: nn.Module, part: str, value: float, inside: str = "attn.c_attn") -> None:
    found = [m for m in logical_matrices(model) if m.part == part and inside in m.parameter]
    assert found
    for m in found:
        m.write_(torch.full(m.shape, value))


def first_attention(model: Any, x: torch.Tensor, **inputs: Any) -> torch.Tensor:
    block = model.transformer.h[0]
    return (block.crossattention if inputs else block.attn)(x, **inputs)[0].detach()


@pytest.mark.parametrize("model_type", ["gpt2", "gpt-sw3", "openai-gpt"])
def test_gpt2_value_zero_makes_attention_zero(model_type: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=64, n_positions=16, n_embd=12, n_layer=2, n_head=3)
    model = AutoModelForCausalLM.from_config(config).eval()
    x = torch.randn(2, 5, 12)
    before = first_attention(model, x)
    set_part(model, "v", 0.0)
    assert before.abs().max() > 1e-4
    torch.testing.assert_close(first_attention(model, x), torch.zeros(2, 5, 12))


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
@pytest.mark.parametrize(("zeroed", "free"), [("k", "q"), ("q", "k")])
def test_gpt2_key_zero_makes_attention_independent_of_query(model_type: str, zeroed: str, free: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=64, n_positions=16, n_embd=12, n_layer=2, n_head=3)
    model = AutoModelForCausalLM.from_config(config).eval()
    x = torch.randn(2, 5, 12)
    set_part(model, free, 3.0)
    different = first_attention(model, x)
    set_part(model, zeroed, 0.0)
    one = first_attention(model, x)
    set_part(model, free, -7.0)
    assert (one - different).abs().max() > 1e-6
    torch.testing.assert_close(first_attention(model, x), one, rtol=0, atol=0)


def test_gpt2_cross_attention_reads_keys_and_values_from_the_encoder() -> None:
    model = tiny_gpt2(add_cross_attention=True)
    names = {m.name for m in logical_matrices(model) if "h.0.crossattention" in m.parameter}
    stem = "transformer.h.0.crossattention"
    assert names == {f"{stem}.{c}" for c in ("c_attn.weight[k]", "c_attn.weight[v]", "q_attn.weight", "c_proj.weight")}
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    assert first_attention(model, x, encoder_hidden_states=memory).abs().max() > 1e-4
    set_part(model, "k", 0.0, "crossattention.c_attn")
    one = first_attention(model, x, encoder_hidden_states=memory)
    # With no keys every position attends evenly, whatever asks.
    torch.testing.assert_close(first_attention(model, -x, encoder_hidden_states=memory), one, rtol=0, atol=0)
    set_part(model, "v", 0.0, "crossattention.c_attn")
    torch.testing.assert_close(first_attention(model, x, encoder_hidden_states=memory), torch.zeros(2, 5, 12))


def test_orientation_is_that_of_the_forward_pass() -> None:
    for model in (tiny_gpt2(), tiny_llama()):
        modules = dict(model.named_modules())
        groups: dict[str, list[torch.Tensor]] = {}
        for m in logical_matrices(model, ("attention", "mlp", "lm_head")):
            groups.setdefault(m.parameter, []).append(m.view)
        for parameter, matrices in groups.items():
            owner = modules["lm_head" if "embed" in parameter or "wte" in parameter else parameter[: -len(".weight")]]
            x = torch.randn(3, matrices[0].shape[1])
            bias = getattr(owner, "bias", None)
            want = owner(x) if bias is None else owner(x) - bias
            torch.testing.assert_close(torch.cat([x @ w.T for w in matrices], dim=1), want)


def test_gpt2_matrices_have_the_shapes_and_names_of_the_paper() -> None:
    shapes = {m.name: tuple(m.shape) for m in logical_matrices(tiny_gpt2()) if ".h.0." in m.name}
    stem = "transformer.h.0."
    assert shapes == {
        f"{stem}attn.c_attn.weight[q]": (12, 12),
        f"{stem}attn.c_attn.weight[k]": (12, 12),
        f"{stem}attn.c_attn.weight[v]": (12, 12),
        f"{stem}attn.c_proj.weight": (12, 12),
        f"{stem}mlp.c_fc.weight": (48, 12),
        f"{stem}mlp.c_proj.weight": (12, 48),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing through


@pytest.mark.parametrize(("part", "first"), [("q", 0), ("k", 12), ("v", 24)])
def test_write_changes_exactly_its_columns_of_c_attn(part: str, first: int) -> None:
    model = tiny_gpt2()
    before = copy.deepcopy(model.state_dict())
    target = next(
        m for m in logical_matrices(model) if m.parameter.endswith("h.1.attn.c_attn.weight") and m.part == part
    )
    new = torch.randn(12, 12, dtype=torch.float64)
    target.write_(new)
    after = model.state_dict()
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert changed == {"transformer.h.1.attn.c_attn.weight"}
    stored, old = after[changed.pop()], before["transformer.h.1.attn.c_attn.weight"]
    torch.testing.assert_close(stored[:, first : first + 12], new.T.float())
    keep = [c for c in range(36) if not first <= c < first + 12]
    assert torch.equal(stored[:, keep], old[:, keep])


def test_view_shares_storage_and_read_matches_it() -> None:
    model = tiny_gpt2()
    for m in logical_matrices(model, MATRIX_ROLES):
        assert m.view.untyped_storage().data_ptr() == m.tensor.untyped_storage().data_ptr()
        assert not m.view.requires_grad and not m.read().requires_grad
        assert torch.equal(m.view, m.read()) and m.view.shape == m.shape
        m.view.zero_()
        assert not m.read().any()


def test_write_casts_and_checks_the_shape() -> None:
    model = tiny_llama().to(torch.bfloat16)
    m = next(logical_matrices(model))
    m.write_(torch.full(m.shape, 1.0 / 3.0))
    assert m.tensor.dtype == torch.bfloat16 and m.tensor[0, 0] == torch.tensor(1.0 / 3.0).bfloat16()
    with pytest.raises(ValueError, match=r"q_proj.weight' is \(16, 16\), got \(16, 15\)"):
        m.write_(torch.zeros(16, 15))


def test_write_through_is_seen_by_autograd_as_a_change() -> None:
    model = tiny_llama()
    m = next(logical_matrices(model))
    loss = (m.tensor**2).sum()
    m.write_(torch.zeros(m.shape))
    assert m.tensor.requires_grad and m.tensor.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def matrix_of(parameter: torch.Tensor, layout: Layout, block: Any = None) -> list[ParameterSlice]:
    p = nn.Parameter(parameter)
    specs = layout.specs(block, p.shape, "w")
    return [ParameterSlice("w", p, frozenset({layout.role}), "Block", cut) for cut in specs]


def test_interleaved_heads_are_gathered_row_by_row() -> None:
    heads, width, columns = 3, 2, 5
    w = torch.randn(heads * 3 * width, columns)
    found = matrix_of(w, Layout("attention", (("q", 2), ("k", 2), ("v", 2)), groups=heads))
    for place, m in enumerate(found):
        rows = [h * 3 * width + place * width + r for h in range(heads) for r in range(width)]
        assert m.part == "qkv"[place] and m.name == f"w[{m.part}]"
        assert torch.equal(m.read(), torch.stack([w[r] for r in rows]))
        with pytest.raises(UserError, match=r"lies interleaved .* use read\(\) and write_\(\)"):
            m.view  # noqa: B018


def test_grouped_queries_have_parts_of_unequal_size() -> None:
    kv, per_kv, d = 2, 3, 2
    w = torch.randn(kv * (per_kv + 2) * d, 4)
    q, k, v = matrix_of(w, Layout("attention", (Part("q", per_kv * d), Part("k", d), Part("v", d)), groups=kv))
    blocks = w.reshape(kv, per_kv + 2, d, 4)
    assert torch.equal(q.read(), blocks[:, :per_kv].reshape(-1, 4))
    assert torch.equal(k.read(), blocks[:, per_kv].reshape(-1, 4))
    assert torch.equal(v.read(), blocks[:, per_kv + 1].reshape(-1, 4))


def test_experts_alternate_gate_and_up_on_the_last_axis() -> None:
    experts, columns, rows = 2, 3, 4
    w = torch.randn(experts, columns, 2 * rows)
    layout = Layout("mlp", ("gate", "up"), orientation="in_first", groups=rows, stack=lambda block: block["experts"])
    found = matrix_of(w, layout, {"experts": experts})
    assert [m.name for m in found] == ["w[0.gate]", "w[0.up]", "w[1.gate]", "w[1.up]"]
    for m in found:
        assert m.spec is not None and m.spec.index is not None
        want = w[m.spec.index][:, (0 if m.part == "gate" else 1) :: 2].T
        assert m.shape == (rows, columns) and torch.equal(m.read(), want)
        # One row a group: a strided 2-D view does exist.
        assert m.view.data_ptr() == m.read().data_ptr() or torch.equal(m.view, want)


def test_three_axes_without_a_stack_count_as_two() -> None:
    w = torch.randn(6, 2, 4)  # (in, heads, head width), as XLNet stores q
    (m,) = matrix_of(w, Layout("attention", orientation="in_first"))
    assert m.shape == (8, 6) and m.name == "w"
    x = torch.randn(3, 6)
    torch.testing.assert_close(x @ m.view.T, torch.einsum("bi,ihd->bhd", x, w).flatten(1))


def test_block_rows_of_a_2d_weight_are_a_stack() -> None:
    w = torch.randn(6, 5)
    found = matrix_of(w, Layout("attention", stack=3))
    assert [m.name for m in found] == ["w[0]", "w[1]", "w[2]"]
    assert torch.equal(torch.cat([m.view for m in found]), w)


def test_a_single_expert_is_still_a_stack() -> None:
    (m,) = matrix_of(torch.randn(1, 6, 5), Layout("mlp", stack=1))
    assert m.shape == (6, 5) and m.name == "w[0]"


@settings(max_examples=60, deadline=None)
@given(
    stack=st.none() | st.integers(1, 3),
    groups=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    columns=st.integers(1, 4),
    in_first=st.booleans(),
)
def test_parts_tile_the_tensor(stack: int | None, groups: int, sizes: list[int], columns: int, in_first: bool) -> None:
    rows = groups * sum(sizes)
    shape = (columns, rows) if in_first else (rows, columns)
    w = torch.arange(math.prod(shape) * (stack or 1), dtype=torch.float64).reshape(*([stack] if stack else []), *shape)
    parts = [Part(f"p{i}", n) for i, n in enumerate(sizes)]
    layout = Layout("mlp", parts, "in_first" if in_first else "out_first", groups, stack)
    found = matrix_of(w.clone(), layout)
    assert sorted(torch.cat([m.read().flatten() for m in found]).tolist()) == w.flatten().tolist()
    for m in found:
        others = {o.name: o.read().clone() for o in found if o is not m}
        m.write_(-m.read() - 1)
        assert all(torch.equal(o.read(), others[o.name]) for o in found if o is not m)
    assert torch.equal(found[0].tensor, -w - 1)


@pytest.mark.parametrize(
    ("layout", "shape", "says"),
    [
        (Layout("mlp", (("gate", 4), ("up", 4))), (9, 3), r"1 × \[gate: 4 \+ up: 4\].*\(9, 3\) has 9 rows"),
        (Layout("mlp", ("gate", "up")), (9, 3), r"equal share"),
        (Layout("mlp", groups=2), (9, 3), r"2 × \[whole: equal share\]"),
        (Layout("mlp", (("q", 9), "k")), (9, 3), r"q: 9 \+ k: equal share"),
        (Layout("mlp", stack=4), (3, 2, 2), r"a stack of 4"),
        (Layout("mlp", stack=4), (6, 2), r"a stack of 4"),
        (Layout("mlp"), (6,), r"leaves no matrix"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: Layout, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        layout.specs(None, shape, "w")


# ---------------------------------------------------------------------------------------------------------------------
# A family from outside


class FancyAttention(nn.Module):
    """Per-head fused q, k, v, as in GPT-NeoX, in an unknown class."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 2, 3
        self.query_key_value = nn.Linear(6, 18)
        self.dense = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, 3 * self.width)).chunk(3, dim=-1)
        heads = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.dense(heads.transpose(1, 2).flatten(2))


class FancyExperts(nn.Module):
    """Experts that hold their own 3-D parameters, as in gpt-oss."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        both = x @ self.gate_up_proj[expert]
        return (nn.functional.silu(both[..., ::2]) * both[..., 1::2]) @ self.down_proj[expert]


class FancyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"attn": FancyAttention(), "moe": FancyExperts()}) for _ in range(2)]
        )
        self.norm = nn.LayerNorm(6)


def register_fancy() -> None:
    register_layout(
        "FancyAttention",
        "query_key_value",
        role="attention",
        parts=lambda block: tuple((name, block.width) for name in "qkv"),
        groups=lambda block: block.heads,
    )
    register_layout("FancyAttention", "dense", role="attention")
    stack: Any = {"role": "mlp", "orientation": "in_first", "stack": lambda block: block.num_experts}
    register_layout("FancyExperts", "gate_up_proj", parts=("gate", "up"), groups=4, **stack)
    register_layout("FancyExperts", "down_proj", **stack)


def test_a_size_is_read_off_the_block_by_a_function_or_by_the_name_of_an_attribute() -> None:
    register_fancy()
    model = FancyModel()
    expected = [(m.name, m.spec) for m in logical_matrices(model)]
    parts = tuple((name, "width") for name in "qkv")
    register_layout("FancyAttention", "query_key_value", role="attention", parts=parts, groups="heads")
    register_layout(
        "FancyExperts",
        "gate_up_proj",
        role="mlp",
        parts=("gate", "up"),
        groups="down_proj.ndim",  # 3, and so a mistake
        orientation="in_first",
        stack="num_experts",
    )
    with pytest.raises(UserError, match=r"its layout says 3 × \[gate: equal share \+ up: equal share\]"):
        list(logical_matrices(model))
    register_layout(
        "FancyExperts",
        "gate_up_proj",
        role="mlp",
        parts=("gate", "up"),
        groups=4,
        orientation="in_first",
        stack="num_experts",
    )
    assert [(m.name, m.spec) for m in logical_matrices(model)] == expected


def test_a_registered_family_is_cut_as_its_forward_pass_says() -> None:
    torch.manual_seed(0)
    model = FancyModel()
    register_fancy()
    by_name = {m.name: m for m in logical_matrices(model)}
    assert len(by_name) == 2 * (3 + 1 + 3 * 2 + 3)
    x = torch.randn(2, 5, 6)
    experts = model.layers[1]["moe"]
    for e in range(3):
        stem = "layers.1.moe."
        gate, up = by_name[f"{stem}gate_up_proj[{e}.gate]"].read(), by_name[f"{stem}gate_up_proj[{e}.up]"].read()
        down = by_name[f"{stem}down_proj[{e}]"].read()
        torch.testing.assert_close((nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T, experts(x, e))
    attention = model.layers[0]["attn"]
    attention.query_key_value.bias.data.zero_()
    attention.dense.bias.data.zero_()
    assert attention(x).abs().max() > 1e-3
    v = by_name["layers.0.attn.query_key_value.weight[v]"]
    v.write_(torch.zeros(v.shape))
    torch.testing.assert_close(attention(x), torch.zeros(2, 5, 6))


def test_an_unknown_family_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError) as refusal:
        parameter_slices(FancyModel())
    message = str(refusal.value)
    assert "FancyAttention.query_key_value ('layers.0.attn.query_key_value.weight', shape (18, 6)" in message
    assert "Also unknown: FancyAttention.dense, FancyExperts.gate_up_proj, FancyExperts.down_proj." in message
    assert (
        "fire_llm/architectures/families/" in message
        and "register_layout('FancyAttention', 'query_key_value', role=...)" in message
    )


def test_unknown_weights_become_other_when_not_strict() -> None:
    cut = {p.name: p for p in parameter_slices(FancyModel(), strict=False)}
    assert cut["layers.0.moe.gate_up_proj"].roles == {"other"} and not cut["layers.0.moe.gate_up_proj"].matrix
    assert cut["embed.weight"].roles == {"embedding"} and cut["norm.weight"].roles == {"norm"}
    assert len(cut) == len(list(FancyModel().parameters()))


@pytest.mark.parametrize("key", ["module_class", "leaf"])
@pytest.mark.parametrize("kind", ["Conv1D", "Linear", None])
def test_the_former_name_of_module_class_is_still_read(key: str, kind: str | None) -> None:
    register_layout("A", "x", role="mlp", **{key: kind})
    assert lookup.REGISTERED["A", "x"] == Layout("mlp", module_class=kind)


def parameter_roles(model: nn.Module) -> dict[str, frozenset[str]]:
    return {p.parameter: p.roles for p in parameter_slices(model)}


def test_register_layout_checks_role_and_orientation() -> None:
    with pytest.raises(UserError, match=r"unknown 'atention'. Did you mean 'attention'\?"):
        register_layout("A", "x", role="atention")
    with pytest.raises(UserError, match=r"layout orientation: unknown 'out'"):
        register_layout("A", "x", role="mlp", orientation="out")


# ---------------------------------------------------------------------------------------------------------------------
# What must not be guessed


def llama_with(change: Callable[[Any], None]) -> Any:
    model = tiny_llama()
    change(model)
    return model


def subclass_attention(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("MyAttention", (type(attention),), {})


def foreign_attention(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("LlamaAttention", (type(attention),), {"__module__": "transformers_modules.remote"})


def stand_in_linear(model: Any) -> None:
    proj = model.model.layers[0].self_attn.q_proj
    proj.__class__ = type("Linear4bit", (nn.Linear,), {})


def conv1d_projection(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj = Conv1D(24, 16)


def adapter(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    wrapped = nn.Module()
    wrapped.base_layer, wrapped.lora_A = attention.q_proj, nn.ModuleDict({"default": nn.Linear(16, 2)})
    attention.q_proj = wrapped


def extra_projection(model: Any) -> None:
    model.model.layers[1].mlp.gate = nn.Linear(16, 4)


def odd_head(model: Any) -> None:
    model.lm_head.__class__ = type("NormHead", (nn.Linear,), {})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (subclass_attention, r"MyAttention\.q_proj"),
        (foreign_attention, r"LlamaAttention\.q_proj.*this LlamaAttention is defined in transformers_modules\.remote"),
        (stand_in_linear, r"LlamaAttention\.q_proj.*held by Linear4bit.*child of class Linear"),
        (conv1d_projection, r"LlamaMLP\.gate_proj.*held by Conv1D"),
        (adapter, r"belongs to an adapter.*fire_\(model\), then get_peft_model.*merge_and_unload"),
        (extra_projection, r"LlamaMLP\.gate \('model\.layers\.1\.mlp\.gate\.weight', shape \(4, 16\)"),
        (odd_head, r"LlamaForCausalLM\.lm_head.*held by NormHead"),
    ],
)
def test_what_only_resembles_a_known_weight_is_refused(change: Callable[[Any], None], says: str) -> None:
    model = llama_with(change)
    with pytest.raises(UserError, match=says):
        list(logical_matrices(model))
    assert parameter_slices(model, strict=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    for strict in (True, False):
        with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight' is (u?int8|float8_e4m3fn), quantised"):
            parameter_slices(model, strict=strict)


def test_a_model_marked_quantised_is_refused() -> None:
    model = tiny_llama()
    model.is_quantized = True
    with pytest.raises(UserError, match="LlamaForCausalLM is quantised"):
        parameter_slices(model)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Identity has no parameters"):
        parameter_slices(nn.Identity())
    with pytest.raises(UserError, match="Sequential holds no attention, MLP or SSM matrix"):
        parameter_slices(nn.Sequential(nn.Embedding(4, 2), nn.LayerNorm(2)))


def test_unknown_roles_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"unknown role 'atention'. Did you mean 'attention'\? Allowed: attention, mlp"):
        logical_matrices(tiny_llama(), ("mlp", "atention"))
    assert {m.role for m in logical_matrices(tiny_llama(), "mlp")} == {"mlp"}


# ---------------------------------------------------------------------------------------------------------------------
# Roles


def test_tied_head_and_embedding_are_one_piece_with_two_roles() -> None:
    model = tiny_gpt2()
    roles = parameter_roles(model)
    assert roles["transformer.wte.weight"] == {"embedding", "lm_head"} and "lm_head.weight" not in roles
    assert list(roles) == [name for name, _ in model.named_parameters()]
    (head,) = logical_matrices(model, ("lm_head",))
    assert head.shape == (64, 12) and head.role == "lm_head" and head.tensor is model.lm_head.weight
    assert roles["transformer.wpe.weight"] == {"embedding"}


def test_untied_head_and_embedding_are_apart() -> None:
    roles = parameter_roles(tiny_llama())
    assert roles["lm_head.weight"] == {"lm_head"} and roles["model.embed_tokens.weight"] == {"embedding"}
    assert [m.parameter for m in logical_matrices(tiny_llama(), ("lm_head",))] == ["lm_head.weight"]


def test_every_parameter_of_gpt2_has_its_role() -> None:
    block = {glob(k): v for k, v in parameter_roles(tiny_gpt2()).items() if ".h." in k}
    stem = "transformer.h.*."
    assert block == {
        **{f"{stem}{norm}.{p}": {"norm"} for norm in ("ln_1", "ln_2") for p in ("weight", "bias")},
        **{f"{stem}attn.{c}.weight": {"attention"} for c in ("c_attn", "c_proj")},
        **{f"{stem}mlp.{c}.weight": {"mlp"} for c in ("c_fc", "c_proj")},
        **{f"{stem}{c}.bias": {"bias"} for c in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    }
    assert {r for roles in parameter_roles(tiny_gpt2()).values() for r in roles} <= set(ROLES)


def test_names_that_lie_do_not_make_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = parameter_roles(build("roberta-prelayernorm", monkeypatch))
    stem = "roberta_prelayernorm.encoder.layer.0.attention."
    assert roles[f"{stem}self.query.weight"] == {"attention"} and roles[f"{stem}self.query.bias"] == {"bias"}
    assert roles[f"{stem}LayerNorm.weight"] == {"norm"} and roles[f"{stem}LayerNorm.bias"] == {"norm"}


def test_towers_and_patchers_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, prefix in (("gemma3", "model.vision_tower."), ("blt", "model.patcher.")):
        beside = [p for p in parameter_slices(build(name, monkeypatch)) if p.parameter.startswith(prefix)]
        assert beside and all(p.roles == {"other"} and not p.matrix for p in beside)


# ---------------------------------------------------------------------------------------------------------------------
# Wrappers


def test_a_model_on_the_meta_device_can_be_walked() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2"))
    found = list(logical_matrices(model))
    assert len(found) == 12 * 6 and found[0].view.device.type == "meta"
    assert found[0].shape == (768, 768) and found[-1].shape == (768, 3072)


def test_compiled_and_data_parallel_models_are_unwrapped() -> None:
    model = tiny_llama()
    assert unwrap(nn.DataParallel(model)) is model and unwrap(model) is model
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert [m.name for m in logical_matrices(compiled)] == [m.name for m in logical_matrices(model)]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_is_unwrapped(process_group: None) -> None:
    model = tiny_gpt2()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert unwrap(torch.compile(wrapped, backend="eager")) is model
    assert [m.name for m in logical_matrices(wrapped)] == [m.name for m in logical_matrices(model)]


def test_fsdp2_classes_are_known_by_their_original_name(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    want = [(m.name, m.block, tuple(m.shape)) for m in logical_matrices(model)]
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer.self_attn, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert type(model.model.layers[0].self_attn).__name__ == "FSDPLlamaAttention"
    assert [(m.name, m.block, tuple(m.shape)) for m in logical_matrices(model)] == want


def test_the_table_speaks_of_classes_that_exist() -> None:
    newer = set(TYPES) - set(supported_types())  # types that an older transformers does not have
    assert {block for block, _ in TABLE} <= modeling_classes() | GONE or newer
