"""Experts stacked in one parameter, each a matrix of its own, and the routers that choose among them."""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TYPES = ""

# (experts, gate + up, hidden) and (experts, hidden, gate), held by the experts module itself.
STACKED = """
AXK1Experts AXK2Experts AfmoeExperts BailingHybridExperts BeamExperts Cohere2MoeExperts DeepseekV2Experts
DeepseekV32Experts DeepseekV3Experts DeepseekV4Experts Dots1Experts Dots3NoteExperts Ernie4_5_MoeExperts
ExaoneMoeExperts FlexOlmoExperts FlintExperts Gemma4TextExperts Glm4MoeExperts Glm4MoeLiteExperts GlmMoeDsaExperts
GraniteMoeExperts GraniteMoeHybridExperts GraniteMoeSWAExperts GraniteMoeSharedExperts HYV3Experts HYV4Experts
HunYuanMoEV1Experts Inkling2Experts Inkling2LoopExperts InklingExperts JambaExperts KimiLinearExperts Kolibri1Experts
LagunaExperts LaraMiniExperts Lfm2MoeExperts MellumExperts MiMoV2FlashExperts MiniMaxExperts MiniMaxM2Experts
MiniMaxM3VLExperts MixtralExperts OlmoeExperts PhimoeExperts Qwen2MoeExperts Qwen3MoeExperts Qwen3NextExperts
Qwen3_5MoeExperts Qwen4ExpTextExperts SolarOpenExperts ZayaExperts
"""


# The sizes are spelt out, so that a class which comes to store the axes the other way round is refused.
GATE_UP = (("gate", "intermediate_dim"), ("up", "intermediate_dim"))
DOWN = (("", "hidden_dim"),)
DOWN_TO_HIDDEN_SIZE = (("", "hidden_size"),)
JET_MOE = {"stack": "router.num_experts", "module_class": "JetMoeParallelExperts"}


TABLE = merge(
    entries("mlp", "gate_up_proj", STACKED, parts=GATE_UP, stack="num_experts"),
    entries("mlp", "down_proj", STACKED, parts=DOWN, stack="num_experts"),
    # No gate; the latent that the experts read may be narrower than the model.
    entries("mlp", "up_proj", "NemotronHExperts", parts=(("", "intermediate_dim"),), stack="num_experts"),
    entries("mlp", "down_proj", "NemotronHExperts", stack="num_experts"),
    # Stored (in, out).
    entries("mlp", "gate_up_proj", "AriaExperts", parts=GATE_UP, stack="num_experts", orientation="in_first"),
    entries("mlp", "down_proj", "AriaExperts", parts=DOWN, stack="num_experts", orientation="in_first"),
    entries(
        "mlp",
        "gate_up_proj",
        "Llama4TextExperts",
        parts=(("gate", "expert_dim"), ("up", "expert_dim")),
        stack="num_experts",
        orientation="in_first",
    ),
    # Gate and up take turns.
    entries(
        "mlp",
        "gate_up_proj",
        "GptOssExperts",
        parts=(("gate", 1), ("up", 1)),
        groups="intermediate_size",
        stack="num_experts",
        orientation="in_first",
    ),
    entries(
        "mlp",
        "down_proj",
        "GptOssExperts Llama4TextExperts",
        parts=DOWN_TO_HIDDEN_SIZE,
        stack="num_experts",
        orientation="in_first",
    ),
    entries("bias", "gate_up_proj_bias down_proj_bias", "GptOssExperts"),
    # The first parameter has rows for the experts that do nothing, too; the second has not.
    entries(
        "mlp",
        "gate_up_proj",
        "LongcatFlashExperts",
        parts=(("gate", "intermediate_size"), ("up", "intermediate_size")),
        stack="total_experts",
    ),
    entries("mlp", "down_proj", "LongcatFlashExperts", parts=DOWN_TO_HIDDEN_SIZE, stack="num_routed_experts"),
    # Blocks of rows in a 2-D parameter; w2 is used without a transpose.
    entries("mlp", "w1 v1", "DbrxExpertGLU", stack="moe_num_experts"),
    entries("mlp", "w2", "DbrxExpertGLU", stack="moe_num_experts", orientation="in_first"),
    entries("mlp", "gate_proj up_proj down_proj", "InklingSharedExperts", stack="n_shared_experts"),
    # JetMoE's attention has experts as well: each has its own q (in) and o (out), all share k and v.
    entries(
        "attention",
        "input_linear output_linear",
        "JetMoeMoA",
        **JET_MOE,
    ),
    entries(
        "mlp",
        "input_linear",
        "JetMoeMoE",
        parts=(("gate", "hidden_size"), ("up", "hidden_size")),
        **JET_MOE,
    ),
    entries("mlp", "output_linear", "JetMoeMoE", **JET_MOE),
    entries(
        "router",
        "gate",
        """
        AXK1MoE AXK2MoE AfmoeTokenChoiceRouter BailingHybridMoE BeamMoE Cohere2MoeSparseMoeBlock DeepseekV2Moe
        DeepseekV32MoE DeepseekV3MoE DeepseekV4SparseMoeBlock Dots1MoE Dots3NoteTextMoE Ernie4_5_MoeSparseMoeBlock
        ExaoneMoeSparseMoEBlock FlexOlmoSparseMoeBlock FlintSparseMoeBlock Glm4MoeLiteMoE Glm4MoeMoE GlmMoeDsaMoE
        HYV3MoE HYV4MoE Inkling2LoopSparseMoeBlock Inkling2SparseMoeBlock InklingMoE KimiLinearMoE
        Kolibri1SparseMoeBlock LagunaSparseMoeBlock LaraMiniSparseMoeBlock Lfm2MoeSparseMoeBlock MellumSparseMoeBlock
        MiMoV2FlashMoE MiniMaxM2SparseMoeBlock MiniMaxM3VLSparseMoeBlock MiniMaxSparseMoeBlock MixtralSparseMoeBlock
        NemotronHMoE OlmoeSparseMoeBlock Qwen2MoeSparseMoeBlock Qwen3MoeSparseMoeBlock Qwen3NextSparseMoeBlock
        Qwen3_5MoeSparseMoeBlock Qwen4ExpTextSparseMoeBlock SolarOpenMoE
        """,
    ),
    entries(
        "router",
        "router",
        """
        AriaTextMoELayer GptOssMLP GraniteMoeHybridMoE GraniteMoeMoE GraniteMoeSWAMoE GraniteMoeSharedMoE
        JambaSparseMoeBlock Llama4TextMoe PhimoeSparseMoeBlock
        """,
    ),
    entries(
        "router",
        "shared_expert_gate",
        "Qwen2MoeSparseMoeBlock Qwen3NextSparseMoeBlock Qwen3_5MoeSparseMoeBlock Qwen4ExpTextSparseMoeBlock",
    ),
    entries("router", "layer", "DbrxRouter JetMoeTopKGating"),
    entries("router", "proj", "Gemma4TextRouter"),
    entries("router", "wg", "HunYuanMoEV1Gate"),
    entries("router", "classifier", "LongcatFlashTopkRouter"),
    entries("router", "e_score_correction_bias", "Ernie4_5_MoeStatics"),
    entries("router", "down_proj", "ZayaRouter"),
    entries("router", "fc1 fc2 out_proj", "ZayaRouterMLP"),
    # Between the model's width and that of the latent which the experts read.
    entries("other", "fc1_latent_proj fc2_latent_proj", "NemotronHMoE"),
)
