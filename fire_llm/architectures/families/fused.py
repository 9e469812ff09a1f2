"""Dense decoders that fuse q, k and v, or gate and up, into one nn.Linear: contiguous, per head or head group."""

from __future__ import annotations

from typing import Any

from fire_llm.architectures.grammar import Part, entries, merge

TYPES = """
bloom codegen falcon fuyu glm glm4 gpt_bigcode gpt_neox gpt_neox_japanese modernbert-decoder moshi mpt persimmon phi3
phi4_multimodal
"""

QKV = ("q", "k", "v")
GATE_UP = ("gate", "up")


def _phi3_parts(attention: Any) -> tuple[Part, ...]:
    """List q, then the k and v of fewer heads."""
    key = attention.num_key_value_heads * attention.head_dim
    return Part("q", attention.config.num_attention_heads * attention.head_dim), Part("k", key), Part("v", key)


def _falcon_groups(attention: Any) -> int:
    """Count the repeats: one a group of heads, one a head, or one in all where all heads share a key (Falcon 7B)."""
    if attention.new_decoder_architecture:
        return int(attention.num_kv_heads)
    return 1 if attention.multi_query else int(attention.num_heads)


def _falcon_parts(attention: Any) -> tuple[Part, ...]:
    """List q for the heads of one repeat, then one k and one v."""
    queries = attention.num_heads // _falcon_groups(attention) * attention.head_dim
    return Part("q", queries), Part("k", attention.head_dim), Part("v", attention.head_dim)


def _bigcode_groups(attention: Any) -> int:
    """Count the repeats: one a head, unless all heads share one key; cross-attention keeps its q elsewhere."""
    return 1 if attention.multi_query or attention.is_cross_attention else attention.num_heads


def _bigcode_parts(attention: Any) -> tuple[Part, ...]:
    """List q, k and v of one repeat."""
    if attention.is_cross_attention:
        return Part("k", attention.embed_dim), Part("v", attention.embed_dim)
    queries = attention.embed_dim if attention.multi_query else attention.head_dim
    return Part("q", queries), Part("k", attention.head_dim), Part("v", attention.head_dim)


TABLE = merge(
    entries("attention", "query_key_value", "BloomAttention PersimmonAttention", parts=QKV, groups="num_heads"),
    entries("attention", "query_key_value", "GPTNeoXAttention", parts=QKV, groups="config.num_attention_heads"),
    entries("attention", "query_key_value", "GPTNeoXJapaneseAttention", parts=QKV, groups="num_attention_heads"),
    entries("attention", "dense", "BloomAttention GPTNeoXAttention GPTNeoXJapaneseAttention PersimmonAttention"),
    entries("mlp", "dense_h_to_4h dense_4h_to_h", "BloomMLP GPTNeoXMLP GPTNeoXJapaneseMLP PersimmonMLP"),
    entries(
        "attention",
        "query_key_value",
        "FalconAttention",
        parts=_falcon_parts,
        groups=_falcon_groups,
        module_class="FalconLinear",
    ),
    entries("attention", "dense", "FalconAttention", module_class="FalconLinear"),
    entries("mlp", "dense_h_to_4h dense_4h_to_h", "FalconMLP", module_class="FalconLinear"),
    # Four blocks, one a TPU core it was trained on (mp_num in the forward pass), and v before k.
    entries("attention", "qkv_proj", "CodeGenAttention", parts=("q", "v", "k"), groups=4),
    entries("attention", "out_proj", "CodeGenAttention"),
    entries("mlp", "fc_in fc_out", "CodeGenMLP"),
    entries("attention", "c_attn", "GPTBigCodeAttention", parts=_bigcode_parts, groups=_bigcode_groups),
    entries("attention", "q_attn c_proj", "GPTBigCodeAttention"),
    entries("mlp", "c_fc c_proj", "GPTBigCodeMLP"),
    entries("attention", "Wqkv", "MptAttention", parts=QKV),
    entries("attention", "out_proj", "MptAttention"),
    entries("mlp", "up_proj down_proj", "MptMLP"),
    entries("attention", "qkv_proj", "Phi3Attention Phi4MultimodalAttention", parts=_phi3_parts),
    entries("attention", "o_proj", "Phi3Attention Phi4MultimodalAttention"),
    entries("attention", "q_proj k_proj v_proj o_proj", "Glm4Attention GlmAttention"),
    entries("mlp", "gate_up_proj", "Glm4MLP GlmMLP Phi3MLP Phi4MultimodalMLP", parts=GATE_UP),
    entries("mlp", "down_proj", "Glm4MLP GlmMLP Phi3MLP Phi4MultimodalMLP"),
    entries("attention", "q_proj k_proj v_proj Wo", "ModernBertDecoderAttention"),
    # The activated half comes first: it is called input there, and the other one gate.
    entries("mlp", "Wi", "ModernBertDecoderMLP", parts=GATE_UP),
    entries("mlp", "Wo", "ModernBertDecoderMLP"),
    entries("lm_head", "dense", "ModernBertDecoderPredictionHead"),
    # Of its attention alone; the depth decoder's stacks (MoshiFlexibleLinear) are no part of the causal LM.
    entries("attention", "linear", "MoshiLinear"),
    entries("mlp", "fc1", "MoshiGatingMLP", parts=GATE_UP),
    entries("mlp", "fc2", "MoshiGatingMLP"),
)
