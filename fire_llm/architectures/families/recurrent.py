"""Linear attention, short convolutions and other recurrence, and the attention beside it; the role `ssm` is opt-in."""

from __future__ import annotations

from typing import Any

from fire_llm.architectures.grammar import Part, entries, merge

TYPES = """
bailing_hybrid kimi_linear lara_mini lfm2 lfm2_moe lfm3 minimax olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text
qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm
"""

GATED_DELTA = "LaraMiniGatedDeltaNet Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet"
GATED_QUERY = "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention Qwen4ExpTextAttention"
SHORT_CONV = "Lfm2MoeShortConv Lfm2ShortConv Lfm3ShortConv"


# A head's query and the gate of its output; q, k and v, each for all heads; q, k, v and the output gate.
QUERY_GATE = (("q", "head_dim"), ("gate", "head_dim"))
DELTA = (("q", "key_dim"), ("k", "key_dim"), ("v", "value_dim"))
XLSTM = (("q", "qk_dim"), ("k", "qk_dim"), ("v", "v_dim"), ("ogate", "v_dim"))


def _delta_parts_of_a_head(mixer: Any) -> tuple[Part, ...]:
    """List q and k of one key head, then v and the output gate z of the value heads that share it."""
    values = mixer.num_v_heads // mixer.num_k_heads * mixer.head_v_dim
    return Part("q", mixer.head_k_dim), Part("k", mixer.head_k_dim), Part("v", values), Part("z", values)


TABLE = merge(
    # Gated delta nets, from Qwen.
    entries("ssm", "in_proj_qkv", GATED_DELTA, parts=DELTA),
    entries("ssm", "in_proj_z out_proj", GATED_DELTA),
    entries("ssm", "in_proj_qkvz", "Qwen3NextGatedDeltaNet", parts=_delta_parts_of_a_head, groups="num_k_heads"),
    entries("ssm", "out_proj", "Qwen3NextGatedDeltaNet"),
    # One number a head, and a depthwise convolution.
    entries("other", "in_proj_a in_proj_b conv1d", GATED_DELTA),
    entries("other", "in_proj_ba conv1d", "Qwen3NextGatedDeltaNet"),
    entries("attention", "q_proj", GATED_QUERY, parts=QUERY_GATE, groups="config.num_attention_heads"),
    entries("attention", "k_proj v_proj o_proj", GATED_QUERY),
    entries("other", "index_qk_proj", "Qwen4ExpTextQSAIndexer"),
    entries("other", "input_mix_weight_down input_mix_weight_up block_inject_weight", "Qwen4ExpTextGatedResidual"),
    entries("other", "key_proj value_proj conv1d", "Qwen4ExpTextPLELayer"),
    # … and from others.
    entries("ssm", "q_proj k_proj v_proj g_proj o_proj", "BailingHybridDeltaAttention OlmoHybridGatedDeltaNet"),
    entries("other", "a_proj b_proj conv1d", "OlmoHybridGatedDeltaNet"),
    entries("other", "b_proj conv1d", "BailingHybridDeltaAttention KimiLinearDeltaAttention"),
    entries("other", "f_proj", "BailingHybridForgetGate"),
    entries("ssm", "q_proj k_proj v_proj g_a_proj g_b_proj o_proj", "KimiLinearDeltaAttention"),
    entries("other", "f_a_proj f_b_proj A_log", "KimiLinearForgetGate"),
    entries("ssm", "qkv_proj", "MiniMaxLightningAttention", parts=("q", "k", "v"), groups="num_attention_heads"),
    entries("ssm", "output_gate out_proj", "MiniMaxLightningAttention"),
    entries("ssm", "in_proj", SHORT_CONV, parts=("B", "C", "x")),
    entries("ssm", "out_proj", SHORT_CONV),
    entries("other", "conv", SHORT_CONV),
    # Each head has its own block of the block-diagonal gates, stored (in, out).
    entries(
        "ssm",
        "input_gate_weight recurrent_gate_weight",
        "RecurrentGemmaRglru",
        stack="num_attention_heads",
        orientation="in_first",
    ),
    entries("bias", "input_gate_bias recurrent_gate_bias", "RecurrentGemmaRglru"),
    entries("ssm", "linear_x linear_y linear_out", "RecurrentGemmaRecurrentBlock"),
    entries("other", "conv_1d", "RecurrentGemmaRecurrentBlock"),
    entries(
        "mlp",
        "gate_proj up_proj down_proj",
        """
        BailingHybridMLP KimiLinearMLP LaraMiniMLP Qwen3NextMLP Qwen3_5MLP Qwen3_5MoeMLP Qwen4ExpTextMLP
        RecurrentGemmaMlp
        """,
    ),
    entries("mlp", "w1 w2 w3", "Lfm2MLP Lfm2MoeMLP Lfm3MLP"),
    entries(
        "attention",
        "q_proj k_proj v_proj o_proj",
        "LaraMiniAttention Lfm3Attention MiniMaxAttention RecurrentGemmaAttention",
    ),
    entries("attention", "q_proj k_proj v_proj out_proj", "Lfm2Attention Lfm2MoeAttention"),
    # One number a head.
    entries("other", "g_proj", "Lfm3Attention"),
    entries("ssm", "key value receptance output", "RwkvSelfAttention"),
    entries("other", "time_mix_key time_mix_value time_mix_receptance", "RwkvSelfAttention"),
    entries("mlp", "key value receptance", "RwkvFeedForward"),
    entries("other", "time_mix_key time_mix_receptance", "RwkvFeedForward"),
    # weight_mode "single", then "fused".
    entries("ssm", "q k v ogate_preact out_proj", "xLSTMLayer"),
    entries("ssm", "qkv_opreact", "xLSTMLayer", parts=XLSTM),
    entries("other", "igate_preact fgate_preact ifgate_preact", "xLSTMLayer"),
    entries("mlp", "proj_up_gate proj_up proj_down", "xLSTMFeedForward"),
    entries("mlp", "proj_up_gate_z", "xLSTMFeedForward", parts=("gate", "up")),
)
