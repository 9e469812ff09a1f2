"""Attention and dense MLPs of mixtures of experts, all nn.Linear; the experts themselves are in experts.py."""

from __future__ import annotations

from fire_llm.architectures.grammar import Part, entries, merge

TYPES = """
afmoe aria_text beam cohere2_moe dbrx dots1 ernie4_5_moe exaone_moe flex_olmo flint gemma4_text glm4_moe gpt_oss
granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 jetmoe kolibri1 laguna llama4 llama4_text mellum
mimo_v2_flash minimax_m2 minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe qwen3_moe sarvam_moe solar_open zaya
"""

TABLE = merge(
    entries(
        "attention",
        "q_proj k_proj v_proj o_proj",
        """
        AfmoeAttention AriaTextAttention BeamAttention Cohere2MoeAttention Dots1Attention Ernie4_5_MoeAttention
        ExaoneMoeAttention FlexOlmoAttention FlintAttention Glm4MoeAttention GptOssAttention GraniteMoeAttention
        GraniteMoeSWAAttention GraniteMoeSharedAttention HYV3Attention HunYuanMoEV1Attention Kolibri1Attention
        LagunaAttention Llama4TextAttention MellumAttention MiMoV2FlashAttention MiniMaxM2Attention
        MiniMaxM3VLAttention MixtralAttention OlmoeAttention PhimoeAttention Qwen2MoeAttention Qwen3MoeAttention
        SolarOpenAttention
        """,
    ),
    # The output gate, as wide as q.
    entries("attention", "gate_proj", "AfmoeAttention BeamAttention"),
    # One number a head; kept whole where config.gating makes it as wide as q, too.
    entries("other", "g_proj", "LagunaAttention"),
    entries(
        "attention",
        "Wqkv",
        "DbrxAttention",
        parts=lambda attention: (
            Part("q", attention.hidden_size),
            Part("k", attention.num_key_value_heads * attention.head_dim),
            Part("v", attention.num_key_value_heads * attention.head_dim),
        ),
    ),
    entries("attention", "out_proj", "DbrxAttention"),
    entries("attention", "kv_proj", "JetMoeAttention", parts=("k", "v")),
    # Half of the value heads read the token before.
    entries("attention", "q_proj k_proj v_proj_current v_proj_delayed", "ZayaCCAProjection"),
    entries("attention", "o_proj", "ZayaAttention"),
    entries("other", "conv_qk_depthwise conv_qk_grouped", "ZayaCCAProjection"),
    entries("other", "q_proj k_proj", "MiniMaxM3VLIndexer"),
    entries(
        "mlp",
        "gate_proj up_proj down_proj",
        """
        AfmoeMLP AriaSharedExpertsMLP BeamMLP Cohere2MoeMLP Dots1MLP Ernie4_5_MoeMLP ExaoneMoeMLP FlexOlmoMLP
        FlintMLP Glm4MoeMLP HYV3MLP HunYuanMoEV1MLP Kolibri1MLP LagunaMLP Llama4TextMLP MellumMLP MiMoV2FlashMLP
        OlmoeMLP Qwen2MoeMLP Qwen3MoeMLP SolarOpenMLP
        """,
    ),
    entries("mlp", "gate_up_proj", "MiniMaxM3VLDenseMLP", parts=("gate", "up")),
    entries("mlp", "down_proj", "MiniMaxM3VLDenseMLP"),
    entries("mlp", "input_linear", "GraniteMoeSWAMLP GraniteMoeSharedMLP", parts=("gate", "up")),
    entries("mlp", "output_linear", "GraniteMoeSWAMLP GraniteMoeSharedMLP"),
)
