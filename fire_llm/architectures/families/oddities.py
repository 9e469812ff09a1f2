"""Attention that is like no other: XLNet's 3-D parameters, Inkling's relative logits and short convolutions."""

from __future__ import annotations

from fire_llm.architectures.grammar import entries, merge

TYPES = "inkling2_loop_text inkling2_text inkling_text xlnet"

INKLING = "Inkling2FullAttention Inkling2SlidingAttention InklingAttention"


def _each(classes: str) -> str:
    """Return classes of Inkling 2, and those of the same names of its looped variant."""
    return " ".join(f"{family}{name}" for family in ("Inkling2", "Inkling2Loop") for name in classes.split())


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
    entries("other", "sink_proj", _each("FullAttention SlidingAttention")),
    entries("other", "proj", "Inkling2RelativeLogits InklingRelativeLogits"),
    entries("other", "conv1d", f"InklingShortConvolution {_each('ShortConvolution')}"),
    entries("other", "static_weight weight_proj", _each("DynamicShortConvolution")),
    entries("other", "query", _each("BlockAttentionResidual")),
    entries("norm", "scale", _each("LogScaledL2Clip ScaledL2Clip")),
    # From transformers 5.24 on, a module for each projection: that of relative positions is r_proj above.
    entries("attention", "linear", _each("KeyValueProjection QueryProjection RelativePositionBias")),
    entries("attention", "gate_proj linear", _each("GatedOutputProjection")),
    entries("other", "proj", _each("RelativePositionBias")),
    # What a loop of layers passes on to the next one.
    entries("other", "down_proj forget_gate_proj message_gate_proj", "Inkling2LoopMessageGate"),
    entries("other", "query", "Inkling2LoopMessageAttentionResidual"),
)
