"""Train one phase: transformers' `Trainer` with exact losses, arithmetic data order and checkpoints that are whole."""

from __future__ import annotations

from fire_llm.evaluation.texts import EvaluationSet
from fire_llm.training.arguments import ContinualArguments
from fire_llm.training.batches import hash_batch
from fire_llm.training.callbacks import KeptOptimizer, ResetCallback
from fire_llm.training.diagnosing import DiagnosticsCallback
from fire_llm.training.early_stop import EarlyStopCallback
from fire_llm.training.generating import GenerationCallback
from fire_llm.training.loss_jump import LossJumpCallback
from fire_llm.training.optimizers import MuonAdamW
from fire_llm.training.penalties import PenaltyCallback
from fire_llm.training.recycling import RecyclingCallback
from fire_llm.training.schedules import multiplier
from fire_llm.training.trainer import ContinualTrainer

__all__ = [
    "ContinualArguments",
    "ContinualTrainer",
    "DiagnosticsCallback",
    "EarlyStopCallback",
    "EvaluationSet",
    "GenerationCallback",
    "KeptOptimizer",
    "LossJumpCallback",
    "MuonAdamW",
    "PenaltyCallback",
    "RecyclingCallback",
    "ResetCallback",
    "hash_batch",
    "multiplier",
]
