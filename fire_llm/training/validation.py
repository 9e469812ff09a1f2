"""Validation of a phase: exact perplexity a corpus, and the one number that decides which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fire_llm.evaluation import perplexity
from fire_llm.training.arguments import ContinualArguments
from fire_llm.training.progress import interactive


@dataclass
class EvaluationSet:
    """Hold one corpus to measure perplexity on."""

    tokens: Any
    """(N,) token ids."""
    n_bytes: int | None = None
    """UTF-8 bytes of the text behind them."""
    prefix: int | None = None
    """Token read before the first, so that the first is scored too."""


def validate(
    model: nn.Module, sets: Mapping[str, EvaluationSet], args: ContinualArguments, prefix: str
) -> dict[str, float]:
    """Measure every evaluation set; collective, its windows shared out among the ranks.

    Args:
        model: As it is trained; measured in fp32 unless `args.eval_precision` says otherwise.
        sets: Corpora by name.
        args: Its `best_corpora` weighs the mean.
        prefix: First word of each key.

    Returns:
        `<prefix>_<corpus>_nll` (nats a token), `…_perplexity`, `…_bits_per_byte`, `…_tokens` and `…_bytes`; and
        `<prefix>_nll`, the weighted mean over `best_corpora`, where some of these are measured.
    """
    metrics: dict[str, float] = {}
    shown = args.title and not args.disable_tqdm and args.process_index == 0 and interactive()
    for name, corpus in sets.items():
        measured = perplexity(
            model,
            corpus.tokens,
            context=args.eval_context,
            batch_size=args.per_device_eval_batch_size,
            prefix=corpus.prefix,
            n_bytes=corpus.n_bytes,
            mixed=args.eval_precision == "training",
            progress=f"evaluating {name}" if shown else None,
            share=True,
        )
        for key in ("nll", "perplexity", "bits_per_byte", "tokens", "bytes"):
            metrics[f"{prefix}_{name}_{key}"] = getattr(measured, key)
    weights = {name: weight for name, weight in (args.best_corpora or {}).items() if name in sets}
    if weights:
        total = sum(weight * metrics[f"{prefix}_{name}_nll"] for name, weight in weights.items())
        metrics[f"{prefix}_nll"] = total / sum(weights.values())
    return metrics
