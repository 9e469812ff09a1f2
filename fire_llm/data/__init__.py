"""Turn corpora into tokens: a trained tokenizer, memory-mapped token files, and mixtures of them.

Names are loaded when first used: a process that tokenises needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fire_llm.data.mixture import SAMPLINGS, Mixture, permute
    from fire_llm.data.tokenizer import train_tokenizer
    from fire_llm.data.tokens import TokenFile, tokenize_corpus

__all__ = [
    "SAMPLINGS",
    "Mixture",
    "TokenFile",
    "permute",
    "tokenize_corpus",
    "train_tokenizer",
]
_HOMES = {"TokenFile": "tokens", "tokenize_corpus": "tokens", "train_tokenizer": "tokenizer"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fire_llm.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fire_llm.data.{_HOMES.get(name, 'mixture')}"), name)
