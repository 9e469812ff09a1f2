"""Exact, comparable perplexity: of a text, of checkpoints on corpora, with its uncertainty."""

from __future__ import annotations

from pathlib import Path

from fire_llm.evaluation.perplexity import Perplexity, perplexity, summarize
from fire_llm.evaluation.scores import Scores
from fire_llm.evaluation.scoring import exact_nll, token_nll
from fire_llm.evaluation.statistics import paired_difference, standard_errors
from fire_llm.evaluation.windows import windows

__all__ = [
    "METRIC",
    "Perplexity",
    "Scores",
    "exact_nll",
    "paired_difference",
    "perplexity",
    "standard_errors",
    "summarize",
    "token_nll",
    "windows",
]

METRIC = str(Path(__file__).parent / "exact_perplexity.py")
"""What `evaluate.load` takes to give `ExactPerplexity`."""
