"""Validate a phase: exact perplexity on each corpus, and the one number that decides which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fire_llm.evaluation.texts import EvaluationSet, score
from fire_llm.training.arguments import ContinualArguments
from fire_llm.training.contract import MEASURED
from fire_llm.training.progress import interactive


def validate(
    model: nn.Module, sets: Mapping[str, EvaluationSet], args: ContinualArguments, prefix: str
) -> dict[str, float]:
    """Measure every evaluation set; collective, its windows shared out among the ranks.

    Args:
        model: As it is trained; measured in fp32 unless `args.eval_precision` says otherwise.
        sets: Corpora by name; "" for one that needs none: its keys are `<prefix>_nll` and so on.
        args: Its `best_corpora` weighs the mean.
        prefix: First word of each key.

    Returns:
        `<prefix>_<corpus>_nll` (nats a token), `…_perplexity`, `…_bits_per_byte`, `…_tokens` and `…_bytes`, without
        those of bytes where only tokens are known; and `<prefix>_nll`, the weighted mean over `best_corpora`, where
        some of these are measured.
    """
    metrics: dict[str, float] = {}
    shown = not args.disable_tqdm and args.process_index == 0 and interactive()
    measured = score(
        model,
        sets,
        context=args.eval_context,
        batch_size=args.per_device_eval_batch_size,
        mixed=args.eval_precision == "training",
        progress="evaluating" if shown else None,
    )
    for name, result in measured.items():
        for key in MEASURED:
            if (value := getattr(result, key)) is not None:
                metrics[f"{prefix}_{name}_{key}" if name else f"{prefix}_{key}"] = value
    weights = {name: weight for name, weight in (args.best_corpora or {}).items() if name in sets}
    if weights:
        total = sum(weight * metrics[f"{prefix}_{name}_nll"] for name, weight in weights.items())
        metrics[f"{prefix}_nll"] = total / sum(weights.values())
    return metrics
