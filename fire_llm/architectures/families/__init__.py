"""The layouts that fire_llm knows, keyed by (block class, child path); one small file a family group."""

from __future__ import annotations

from fire_llm.architectures.families import (
    bart_like,
    bert_like,
    decoders,
    experts,
    fused,
    gpt2,
    mamba,
    mla,
    moe,
    oddities,
    recurrent,
    towers,
)
from fire_llm.architectures.grammar import Table, merge

_FILES = (decoders, bart_like, bert_like, gpt2, fused, moe, experts, mla, mamba, recurrent, oddities, towers)

TABLE: Table = merge(*(file.TABLE for file in _FILES))
TYPES: tuple[str, ...] = tuple(sorted(name for file in _FILES for name in file.TYPES.split()))
