"""Train one phase: transformers' `Trainer` with exact losses, arithmetic data order and checkpoints that are whole."""

from __future__ import annotations

from fire_llm.trainer.callbacks import ResetCallback
from fire_llm.trainer.diagnosing import DiagnosticsCallback
from fire_llm.trainer.training import ContinualArguments, ContinualTrainer, EvaluationSet, hash_batch

__all__ = [
    "ContinualArguments",
    "ContinualTrainer",
    "DiagnosticsCallback",
    "EvaluationSet",
    "ResetCallback",
    "hash_batch",
]
