"""Turn corpora into tokens: a trained tokenizer, memory-mapped token files, and mixtures of them."""

from __future__ import annotations

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
