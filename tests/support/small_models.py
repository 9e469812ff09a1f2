"""A small CPU model with real weights for every causal LM type, and for options that change a layout.

Sizes differ wherever a class lets them, so that a shape that fits by chance is rare: hidden 48, 4 heads of 16 on 2 key
and value heads, MLP 40, experts 20. A configuration is the type's default one, shrunk by the names of its attributes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fire_llm.core.compat import left_out

VOCABULARY = 96

# Attribute names of all configurations, and what they become where the default is a larger number.
_SIZES: dict[int, str] = {
    VOCABULARY: """vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input audio_vocab_size""",
    64: """max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_source_positions
        max_target_positions original_max_position_embeddings rel_extent""",
    48: """hidden_size n_embd d_model emb_dim embedding_dim word_embed_proj_dim embedding_size lru_width
        input_embedding_size output_embedding_size hidden_size_global ple_embed_dim""",
    40: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size d_ff mlp_dim
        ffn_hidden_size intermediate_size_mlp dense_intermediate_size""",
    24: """shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size kv_lora_rank
        moe_shared_expert_intermediate_size mamba_d_head mamba_headdim mamba_head_dim linear_head_dim""",
    20: """moe_intermediate_size expert_ffn_hidden_size q_lora_rank qk_head_dim o_lora_rank router_hidden_size""",
    16: """head_dim swa_head_dim dim_head attention_head_size kv_channels d_head index_head_dim sliding_window
        sliding_window_size chunk_size mamba_chunk_size attention_window_size d_kv window_size mem_len
        nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel output_channels""",
    12: """qk_nope_head_dim linear_key_head_dim hidden_size_per_layer_input hc_lowrank laurel_rank""",
    10: """v_head_dim""",
    8: """qk_rope_head_dim rotary_dim mamba_d_state state_size ssm_state_size linear_value_head_dim adapter_rank
        gated_norm_rank d_rel prompt_length prompt_mid_dim query_pre_attn_scalar index_topk""",
    5: """time_step_rank mamba_dt_rank""",
    4: """num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads num_heads attention_heads
        swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts
        num_local_experts moe_num_experts mamba_n_heads mamba_num_heads n_mamba_heads linear_num_value_heads
        linear_num_heads conv_kernel conv_kernel_size""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_hidden_layers decoder_layers
        encoder_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers num_experts_per_tok moe_topk
        num_experts_per_token moe_k n_group n_groups num_expert_group index_n_heads zero_expert_num o_groups num_blocks
        hc_mult hc_count num_codebooks num_kv_shared_layers num_query_groups""",
    1: """topk_group first_k_dense_replace""",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "attn_layers", "indexer_types", "block_types")


def shrink(model_type: str, **options: Any) -> PreTrainedConfig:
    """Build a type's default configuration with small sizes.

    Args:
        model_type: One that `AutoConfig` knows.
        **options: Attributes that replace the shrunken ones.
    """
    sizes = smaller(AutoConfig.for_model(model_type))
    return AutoConfig.for_model(model_type, **{**sizes, **_OPTIONS.get(model_type, {}), **options})


def smaller(config: PreTrainedConfig) -> dict[str, Any]:
    """Give the attributes of a configuration that must change to make it small."""
    old = dict(vars(config))
    new: dict[str, Any] = {}
    for name, value in old.items():
        if isinstance(value, PreTrainedConfig):
            new[name] = type(value)(**{**smaller(value), **_OPTIONS.get(value.model_type, {})})
        elif isinstance(value, int) and not isinstance(value, bool) and value > SIZES.get(name, value):
            new[name] = SIZES[name]
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            new[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
    if "kv_lora_rank" in old:
        new.pop("head_dim", None)
    # One layer of every kind, in the order of the default configuration.
    lists = {name: old[name] for name in KINDS if isinstance(old.get(name), list)}
    if lists:
        columns = list(zip(*lists.values(), strict=False))
        first = sorted({column: columns.index(column) for column in reversed(columns)}.values())
        first += [len(columns) - 1] * (len(first) < 2)
        new.update({name: [values[i] for i in first] for name, values in lists.items()})
        new["num_hidden_layers"] = len(first)
    return new


def _of(model_type: str, **options: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: shrink(model_type, **options)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {**ROPE, "mrope_section": [2, 2, 4]}  # before 5.18 the default ones are those of wider heads
HALF = {**ROPE, "partial_rotary_factor": 0.5}
MLA = """axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa
    kimi_linear minicpm3 sarvam_mla youtu hy_v4 longcat_flash"""
QSA = {f"indexer_{n}": v for n, v in dict(n_heads=2, kv_heads=1, head_dim=16, budget=8, compress_ratio=2).items()}
QWEN4 = dict(
    QSA,
    eos_token_id=2,
    layer_types=["linear_attention", "full_attention"],
    ngram_vocab_size_base=50,
    split_ngram_parts=1,
    make_ngram_vocab_size_divisible_by=2,
    heads_per_ngram=2,
    ple_layer_ids=[1],
)
HYBRID = ["linear_attention", "full_attention"]

# What the sizes alone do not settle, by type or `type+variant`.
_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in MLA.split()},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "apertus1p5_text": {"rope_parameters": ROPE},
    "blt": {"encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 60},
    "blt_global_transformer": {"head_dim": 12},
    "blt_local_decoder": {"head_dim": 12},
    "blt_local_encoder": {"head_dim": 12},
    "blt_patcher": {"head_dim": 12},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": SECTIONS, "sliding_attention": SECTIONS}},
    "deepseek_v2": {"num_key_value_heads": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 40, "hidden_size": 48, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 22,
        "per_layer_config": {"2": {"kv_lora_rank": 28, "qk_nope_head_dim": 14}},
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 48, "adapter_out_dim": 48, "per_layer_config": {}},
    "dots3_note_audio_encoder": {
        "adapter_input_size": 48,
        "adapter_out_dim": 48,
        "downsample_hidden_size": 8,
        "conv_output_size": 128,
        "head_dim": 12,
        "num_key_value_heads": 4,
        "hidden_size": 48,
    },
    "flint": {"mlp_only_layers": [0]},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **{"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    },
    "dots1": {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "intermediate_size": 40,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "helium": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid"],
        **{"num_hidden_layers": 4, "n_layers_per_attn_res_block": 1, "loop_num_passes": 2, "loop_gate_rank": 6},
        **{"loop_layer_index_start": 1, "loop_layer_index_end": 3},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 24},
    "ministral": {"head_dim": 16},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 32], "axial_pos_shape": [8, 8]},
    "roc_bert": {"pronunciation_vocab_size": 30, "shape_vocab_size": 30, "shape_embed_dim": 20},
    "stablelm": {"rope_parameters": HALF},
    "xlnet": {"d_head": 12},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    # Options that bring in further weights, or change how a weight is laid out.
    "bert+cross": {"is_decoder": True, "add_cross_attention": True},
    "big_bird+full": {"attention_type": "original_full"},
    "cohere+qk": {"use_qk_norm": True},
    "cohere2_moe+dense": {"mlp_layer_types": ["dense", "sparse"], "num_shared_experts": 1},
    "deepseek_v2+no_q_lora": {"q_lora_rank": None},
    "deepseek_v3+no_q_lora": {"q_lora_rank": None},
    "doge+moe": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "electra+cross": {"is_decoder": True, "add_cross_attention": True},
    "electra+projected": {"embedding_size": 20},
    "falcon+mha": {"multi_query": False, "alibi": True, "num_kv_heads": 4},
    "falcon+new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma4_text+moe": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 20},
    "git+video": {"num_image_with_embedding": 2},
    "gpt2+cross": {"add_cross_attention": True},
    "gpt2+untied": {"tie_word_embeddings": False},
    "gpt_bigcode+cross": {"multi_query": False, "add_cross_attention": True},
    "gpt_bigcode+mha": {"multi_query": False},
    "granitemoe_swa+shared": {"shared_intermediate_size": 24},
    "granitemoeshared+shared": {"shared_intermediate_size": 24},
    "llama+tied": {"tie_word_embeddings": True},
    "opt+projected": {"word_embed_proj_dim": 20},
    "phi+qk": {"qk_layernorm": True},
    "qwen2_moe+dense": {"mlp_only_layers": [0]},
    "qwen3_moe+dense": {"mlp_only_layers": [0]},
    "roberta+cross": {"is_decoder": True, "add_cross_attention": True},
    "roformer+projected": {"embedding_size": 20},
    "stablelm+qk": {"rope_parameters": HALF, "qk_layernorm": True},
    "xlstm+fused": {"weight_mode": "fused"},
    "xmod+cross": {"default_language": "en_XX", "is_decoder": True, "add_cross_attention": True},
    "zamba2+adapter": {"use_shared_attention_adapter": True, "num_key_value_heads": 4, "num_mem_blocks": 2},
}


def _assistant(text_type: str) -> PreTrainedConfig:
    """Build a Gemma 4 assistant: all of its layers take their keys and values from the main model."""
    options = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}
    text = shrink(text_type, **options)
    sizes = {"backbone_hidden_size": 44, "num_centroids": 8, "centroid_intermediate_top_k": 2}
    return AutoConfig.for_model(text_type.replace("_text", "_assistant"), text_config=text, **sizes)


_MADE: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma4_assistant": lambda: _assistant("gemma4_text"),
    "gemma4_unified_assistant": lambda: _assistant("gemma4_unified_text"),
    # Their auto class is listed under the composite configuration, but takes the decoder's.
    "musicgen": _of("musicgen_decoder"),
    "musicgen_melody": _of("musicgen_melody_decoder"),
}
# Before 5.18 transformers' own forward pass fails with these options.
FAILS = {"doge+moe", "zamba2+adapter"} if int(transformers.__version__.split(".")[1]) < 18 else set()
CANNOT: dict[str, str] = {name: "no layout tells about the installed version's" for name in left_out()}
SMALL: dict[str, Callable[[], PreTrainedConfig]] = {
    name: _MADE.get(name, _of(name.partition("+")[0], **_OPTIONS.get(name, {})))
    for name in [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name for name in _OPTIONS if "+" in name)]
    if name not in {*CANNOT, *FAILS}
    and name.partition("+")[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # an older one lacks some
}


def modeling_classes() -> set[str]:
    """Return the names of all classes in the installed transformers' modeling files."""
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return {name for file in files for name in re.findall(r"^\s*class (\w+)", file.read_text(encoding="utf-8"), re.M)}


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Put in place what three families need while they are built."""
    from transformers.models.gemma3n import modeling_gemma3n as gemma3n
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMPreTrainedModel

    real = gemma3n.AutoModel.from_config
    tower = type("TimmWrapperModel", (nn.Linear,), {"__module__": "transformers.models.timm_wrapper"})

    def from_config(config: Any, **options: Any) -> nn.Module:
        return tower(4, 4) if config.model_type == "gemma3n_vision" else real(config, **options)

    with contextlib.ExitStack() as stack:
        # Its initialisation fails with fused weights; all weights are drawn anew anyway.
        stack.enter_context(mock.patch.object(xLSTMPreTrainedModel, "_init_weights", return_value=None))
        stack.enter_context(mock.patch.object(gemma3n.AutoModel, "from_config", from_config))
        for kind in (Gemma4TextConfig, Gemma4UnifiedTextConfig):
            if not hasattr(kind, "kv_sharing_modes"):  # an older transformers refuses nothing
                continue
            old = kind.kv_sharing_modes.fget
            stack.enter_context(mock.patch.object(kind, "kv_sharing_modes", _sharing(old)))
        yield


def _sharing(old: Callable[[Any], list[Any]]) -> property:
    """Extend a property that refuses the only configuration an assistant allows: every layer shares."""

    def modes(config: Any) -> list[Any]:
        layers = config.num_hidden_layers
        return ["reuse"] * layers if config.num_kv_shared_layers == layers else old(config)

    return property(modes)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Build a small model in eval mode; the same name, dtype and seed give the same weights.

    Args:
        name: A key of `SMALL`.
        dtype: What the weights are cast to.
        seed: Seed of the weights.
    """
    config = SMALL[name]()
    with stand_ins(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("musicgen"):
            model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            # Norm scales and biases keep their level; everything else is drawn anew, because some start at zero.
            parameter.copy_(noise * 0.1 if parameter.ndim > 1 else parameter + noise * 0.05)
    return model.to(dtype).eval()
