"""The layouts that fire_llm knows, keyed by (block class, child path); one small file a family group."""

from __future__ import annotations

from fire_llm.architectures.families import (
    bart_like,
    bert_like,
    decoders,
    dual,
    encoders,
    experts,
    fused,
    gpt2,
    heads,
    mamba,
    mla,
    moe,
    oddities,
    recurrent,
    t5_like,
    towers,
    vision,
)
from fire_llm.architectures.grammar import Table, merge

_FILES = (decoders, bart_like, bert_like, gpt2, fused, moe, experts, mla, mamba, recurrent, oddities, towers)
_OTHERS = (encoders, heads, t5_like, vision, dual)

TABLE: Table = merge(*(file.TABLE for file in (*_FILES, *_OTHERS)))
TYPES: tuple[str, ...] = tuple(sorted(name for file in _FILES for name in file.TYPES.split()))
"""Types of causal LMs; what else the table holds is found by building it (docs/layouts.md)."""
