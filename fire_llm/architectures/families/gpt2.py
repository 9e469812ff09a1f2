"""GPT-2 and GPT-1: transformers' Conv1D stores (in, out) and c_attn fuses q, k and v on the out axis."""

from __future__ import annotations

from typing import Any

from fire_llm.architectures.grammar import Part, entries, merge

TYPES = "gpt2 gpt-sw3 openai-gpt"

CONV1D = {"orientation": "in_first", "module_class": "Conv1D"}


def _gpt2_parts(attention: Any) -> tuple[Part, ...]:
    """List c_attn's parts; cross-attention reads only k and v from the encoder and keeps q in q_attn."""
    names = ("k", "v") if attention.is_cross_attention else ("q", "k", "v")
    return tuple(Part(name, attention.embed_dim) for name in names)


TABLE = merge(
    entries("attention", "c_attn", "GPT2Attention", parts=_gpt2_parts, **CONV1D),
    entries("attention", "q_attn c_proj", "GPT2Attention", **CONV1D),
    entries("mlp", "c_fc c_proj", "GPT2MLP", **CONV1D),
    # GPT-1 calls its classes plainly Attention and MLP.
    entries("attention", "c_attn", "Attention", parts=("q", "k", "v"), **CONV1D),
    entries("attention", "c_proj", "Attention", **CONV1D),
    entries("mlp", "c_fc c_proj", "MLP", **CONV1D),
)
