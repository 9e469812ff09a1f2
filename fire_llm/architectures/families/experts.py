"""Experts stacked in one parameter, each a matrix of its own, and the routers that choose among them."""

from __future__ import annotations

from typing import Any

from fire_llm.architectures.grammar import Part, entries, merge

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


def _experts(experts: Any) -> int:
    return int(experts.num_experts)


# The sizes are spelt out, so that a class which comes to store the axes the other way round is refused.
def _gate_up(experts: Any) -> tuple[Part, ...]:
    return Part("gate", experts.intermediate_dim), Part("up", experts.intermediate_dim)


def _up(experts: Any) -> tuple[Part, ...]:
    return (Part("", experts.intermediate_dim),)


def _down(experts: Any) -> tuple[Part, ...]:
    return (Part("", experts.hidden_dim),)


def _down_to_hidden_size(experts: Any) -> tuple[Part, ...]:
    return (Part("", experts.hidden_size),)


def _routed(mixture: Any) -> int:
    return int(mixture.router.num_experts)


TABLE = merge(
    entries("mlp", "gate_up_proj", STACKED, parts=_gate_up, stack=_experts),
    entries("mlp", "down_proj", STACKED, parts=_down, stack=_experts),
    # No gate; the latent that the experts read may be narrower than the model.
    entries("mlp", "up_proj", "NemotronHExperts", parts=_up, stack=_experts),
    entries("mlp", "down_proj", "NemotronHExperts", stack=_experts),
    # Stored (in, out).
    entries("mlp", "gate_up_proj", "AriaExperts", parts=_gate_up, stack=_experts, orientation="in_first"),
    entries("mlp", "down_proj", "AriaExperts", parts=_down, stack=_experts, orientation="in_first"),
    entries(
        "mlp",
        "gate_up_proj",
        "Llama4TextExperts",
        parts=lambda experts: (Part("gate", experts.expert_dim), Part("up", experts.expert_dim)),
        stack=_experts,
        orientation="in_first",
    ),
    # Gate and up take turns.
    entries(
        "mlp",
        "gate_up_proj",
        "GptOssExperts",
        parts=(("gate", 1), ("up", 1)),
        groups=lambda experts: experts.intermediate_size,
        stack=_experts,
        orientation="in_first",
    ),
    entries(
        "mlp",
        "down_proj",
        "GptOssExperts Llama4TextExperts",
        parts=_down_to_hidden_size,
        stack=_experts,
        orientation="in_first",
    ),
    entries("bias", "gate_up_proj_bias down_proj_bias", "GptOssExperts"),
    # The first parameter has rows for the experts that do nothing, too; the second has not.
    entries(
        "mlp",
        "gate_up_proj",
        "LongcatFlashExperts",
        parts=lambda experts: (Part("gate", experts.intermediate_size), Part("up", experts.intermediate_size)),
        stack=lambda experts: experts.total_experts,
    ),
    entries(
        "mlp",
        "down_proj",
        "LongcatFlashExperts",
        parts=_down_to_hidden_size,
        stack=lambda experts: experts.num_routed_experts,
    ),
    # Blocks of rows in a 2-D parameter; w2 is used without a transpose.
    entries("mlp", "w1 v1", "DbrxExpertGLU", stack=lambda experts: experts.moe_num_experts),
    entries("mlp", "w2", "DbrxExpertGLU", stack=lambda experts: experts.moe_num_experts, orientation="in_first"),
    entries("mlp", "gate_proj up_proj down_proj", "InklingSharedExperts", stack=lambda shared: shared.n_shared_experts),
    # JetMoE's attention has experts as well: each has its own q (in) and o (out), all share k and v.
    entries(
        "attention", "input_linear output_linear", "JetMoeMoA", stack=_routed, module_class="JetMoeParallelExperts"
    ),
    entries(
        "mlp",
        "input_linear",
        "JetMoeMoE",
        parts=lambda mixture: (Part("gate", mixture.hidden_size), Part("up", mixture.hidden_size)),
        stack=_routed,
        module_class="JetMoeParallelExperts",
    ),
    entries("mlp", "output_linear", "JetMoeMoE", stack=_routed, module_class="JetMoeParallelExperts"),
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
