"""Train one phase: transformers' `Trainer` with exact losses, arithmetic data order and checkpoints that are whole."""

from __future__ import annotations

from fire_llm.trainer.callbacks import KeptOptimizer, ResetCallback
from fire_llm.trainer.diagnosing import DiagnosticsCallback
from fire_llm.trainer.optimizers import MuonAdamW
from fire_llm.trainer.penalties import PenaltyCallback
from fire_llm.trainer.recycling import RecyclingCallback
from fire_llm.trainer.schedules import multiplier
from fire_llm.trainer.spike import SpikeCallback
from fire_llm.trainer.stepping import hash_batch
from fire_llm.trainer.training import ContinualArguments, ContinualTrainer, EvaluationSet

__all__ = [
    "ContinualArguments",
    "ContinualTrainer",
    "DiagnosticsCallback",
    "EvaluationSet",
    "KeptOptimizer",
    "MuonAdamW",
    "PenaltyCallback",
    "RecyclingCallback",
    "ResetCallback",
    "SpikeCallback",
    "hash_batch",
    "multiplier",
]
