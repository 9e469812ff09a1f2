"""Turn corpora into tokens: a trained tokenizer, memory-mapped token files, and mixtures of them."""

from __future__ import annotations

from fire_llm.data.mixture import SAMPLINGS, Mixture, permute
from fire_llm.data.tokenizer import train_tokenizer
from fire_llm.data.tokens import TokenFile, cache_folder, tokenize_corpus

__all__ = [
    "SAMPLINGS",
    "Mixture",
    "TokenFile",
    "cache_folder",
    "permute",
    "tokenize_corpus",
    "train_tokenizer",
]
