"""Latent attention (MLA): keys and values come from one narrow latent, which kv_b_proj expands head by head."""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TYPES = """
axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm4_moe_lite glm_moe_dsa hy_v4
longcat_flash minicpm3 sarvam_mla youtu
"""

CLASSES = """
AXK1Attention AXK2Attention BailingHybridAttention DeepseekV2Attention DeepseekV32Attention DeepseekV3Attention
Dots3NoteTextAttention Glm4MoeLiteAttention GlmMoeDsaAttention HYV4Attention KimiLinearAttention LongcatFlashMLA
MiniCPM3Attention YoutuAttention
"""


LATENT = (("kv_latent", "kv_lora_rank"), ("k_rope", "qk_rope_head_dim"))  # the latent, and a rotary key for all heads
EXPANDED = (("k_nope", "qk_nope_head_dim"), ("v", "v_head_dim"))  # what a head expands the latent to
QUERY_GATE = (("q", "qk_head_dim"), ("gate", "v_head_dim"))  # a head's query and the gate of its output

TABLE = merge(
    # A query latent is optional: q_proj without one, q_a_proj and q_b_proj with one.
    entries("attention", "q_proj q_a_proj q_b_proj o_proj", CLASSES),
    entries(
        "attention",
        "kv_a_proj_with_mqa",
        CLASSES,
        parts=(("kv_latent", "kv_lora_rank"), ("k_rope", "qk_rope_head_dim")),
    ),
    entries(
        "attention",
        "kv_b_proj",
        CLASSES,
        parts=(("k_nope", "qk_nope_head_dim"), ("v", "v_head_dim")),
        groups="num_heads",
    ),
    entries("attention", "q_gate_proj", "AXK2Attention", parts=QUERY_GATE, groups="num_heads"),
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
        stack="o_a_proj.n_groups",
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
