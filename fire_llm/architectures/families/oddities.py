"""Attention that is like no other: XLNet's 3-D parameters, Inkling's relative logits and short convolutions."""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TYPES = "inkling2_loop_text inkling2_text inkling_text xlnet"

INKLING = "Inkling2FullAttention Inkling2SlidingAttention InklingAttention"

TABLE = merge(
    # (model width, heads, head width): the width is the input of q, k, v and r, but the output of o.
    entries("attention", "q k v r", "XLNetRelativeAttention", orientation="in_first"),
    entries("attention", "o", "XLNetRelativeAttention"),
    entries("bias", "r_r_bias r_s_bias r_w_bias", "XLNetRelativeAttention"),
    entries("other", "seg_embed", "XLNetRelativeAttention"),
    entries("other", "mask_emb", "XLNetModel"),
    entries("mlp", "layer_1 layer_2", "XLNetFeedForward"),
    # r makes queries for relative positions, whose keys are the table `proj`; gate_proj is as wide as q.
    entries("attention", "q_proj k_proj v_proj r_proj o_proj", INKLING),
    entries("attention", "gate_proj", "Inkling2FullAttention Inkling2SlidingAttention"),
    entries("mlp", "gate_proj up_proj down_proj", "InklingMLP"),
    entries("other", "sink_proj", "Inkling2FullAttention Inkling2SlidingAttention"),
    entries("other", "proj", "Inkling2RelativeLogits InklingRelativeLogits"),
    entries("other", "conv1d", "Inkling2LoopShortConvolution Inkling2ShortConvolution InklingShortConvolution"),
    entries(
        "other", "static_weight weight_proj", "Inkling2DynamicShortConvolution Inkling2LoopDynamicShortConvolution"
    ),
    entries("other", "query", "Inkling2BlockAttentionResidual Inkling2LoopBlockAttentionResidual"),
    entries("norm", "scale", "Inkling2LoopLogScaledL2Clip Inkling2LoopScaledL2Clip Inkling2ScaledL2Clip"),
    # A module for each projection: the one of relative positions is r_proj above.
    entries(
        "attention",
        "linear",
        "Inkling2LoopKeyValueProjection Inkling2LoopQueryProjection Inkling2LoopRelativePositionBias",
    ),
    entries("attention", "gate_proj linear", "Inkling2LoopGatedOutputProjection"),
    entries("other", "sink_proj", "Inkling2LoopFullAttention Inkling2LoopSlidingAttention"),
    entries("other", "proj", "Inkling2LoopRelativePositionBias"),
    # What a loop of layers passes on to the next one.
    entries("other", "down_proj forget_gate_proj message_gate_proj", "Inkling2LoopMessageGate"),
    entries("other", "query", "Inkling2LoopMessageAttentionResidual"),
)
