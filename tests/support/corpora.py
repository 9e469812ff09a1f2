"""Texts of random words, in two splits."""

from __future__ import annotations

import random

from fire_llm.data.corpora import Corpus

WORDS = [
    "the",
    "of",
    "and",
    "reset",
    "orthogonal",
    "matrix",
    "größer",
    "naïve",
    "学习",
    "🙂",
    "plasticity",
    ",.;:!",
    "3.14",
]


def prose(words: int, seed: int = 0, end: str = " ") -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", " ", "  ", "\n", ".\n\n", end]) for _ in range(words))


def corpus_of(texts: list[str], name: str = "made", fingerprint: str = "1") -> Corpus:
    """Hold out every tenth document, so that both splits are known."""
    return Corpus(
        name, fingerprint, lambda split: [t for n, t in enumerate(texts) if (n % 10 == 9) == (split == "validation")]
    )


TEXTS = [prose(n % 60 + 1, seed=n) for n in range(400)]
