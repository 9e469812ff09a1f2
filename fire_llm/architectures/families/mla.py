"""Latent attention (MLA): keys and values come from one narrow latent, which kv_b_proj expands head by head."""

from __future__ import annotations

from typing import Any

from fire_llm.architectures.grammar import Part, entries, merge

TYPES = """
axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm4_moe_lite glm_moe_dsa hy_v4
longcat_flash minicpm3 sarvam_mla youtu
"""

CLASSES = """
AXK1Attention AXK2Attention BailingHybridAttention DeepseekV2Attention DeepseekV32Attention DeepseekV3Attention
Dots3NoteTextAttention Glm4MoeLiteAttention GlmMoeDsaAttention HYV4Attention KimiLinearAttention LongcatFlashMLA
MiniCPM3Attention YoutuAttention
"""


def _latent(attention: Any) -> tuple[Part, ...]:
    """List the latent, and beside it the one rotary key that all heads share."""
    return Part("kv_latent", attention.kv_lora_rank), Part("k_rope", attention.qk_rope_head_dim)


def _expanded(attention: Any) -> tuple[Part, ...]:
    """List what a head expands the latent to."""
    return Part("k_nope", attention.qk_nope_head_dim), Part("v", attention.v_head_dim)


def _query_gate(attention: Any) -> tuple[Part, ...]:
    """List a head's query and the gate of its output."""
    return Part("q", attention.qk_head_dim), Part("gate", attention.v_head_dim)


def _heads(attention: Any) -> int:
    return int(attention.num_heads)


TABLE = merge(
    # A query latent is optional: q_proj without one, q_a_proj and q_b_proj with one.
    entries("attention", "q_proj q_a_proj q_b_proj o_proj", CLASSES),
    entries("attention", "kv_a_proj_with_mqa", CLASSES, parts=_latent),
    entries("attention", "kv_b_proj", CLASSES, parts=_expanded, groups=_heads),
    entries("attention", "q_gate_proj", "AXK2Attention", parts=_query_gate, groups=_heads),
    # As wide as the values: the output gate.
    entries("attention", "gate_proj", "HYV4Attention"),
    # One number a head.
    entries("other", "g_proj", "BailingHybridAttention Dots3NoteTextAttention"),
    # DeepSeek V4 has one latent that is key and value at once, and puts out through groups of heads.
    entries("attention", "q_a_proj q_b_proj kv_proj o_b_proj", "DeepseekV4Attention"),
    entries(
        "attention",
        "o_a_proj",
        "DeepseekV4Attention",
        stack=lambda attention: attention.o_a_proj.n_groups,
        module_class="DeepseekV4GroupedLinear",
    ),
    entries(
        "mlp",
        "gate_proj up_proj down_proj",
        """
        AXK1MLP AXK2MLP DeepseekV2MLP DeepseekV32MLP DeepseekV3MLP DeepseekV4MLP Dots3NoteTextMLP Glm4MoeLiteMLP
        GlmMoeDsaMLP HYV4MLP LongcatFlashMLP MiniCPM3MLP YoutuMLP
        """,
    ),
    # What picks or compresses the keys to look at.
    entries(
        "other",
        "wq_b wk weights_proj",
        "AXK2Indexer DeepseekV32Indexer Dots3NoteTextIndexer GlmMoeDsaIndexer HYV4Indexer",
    ),
    entries(
        "other",
        "gate_proj kv_proj position_bias q_b_proj",
        "DeepseekV4CSACompressor DeepseekV4HCACompressor DeepseekV4Indexer",
    ),
    entries("other", "weights_proj", "DeepseekV4IndexerScorer"),
    # Hyper-connections mix parallel residual streams.
    entries("other", "fn", "DeepseekV4HyperConnection HYV4HyperConnection"),
    entries("other", "hc_fn", "DeepseekV4HyperHead HYV4HyperHead"),
    # A gate on a norm's output, not an MLP.
    entries("other", "fc1 fc2", "AXK2GateMLP"),
)
