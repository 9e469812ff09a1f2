"""The matrix of a run: its checkpoints × its corpora, what was forgotten and what helped before it was trained on."""

from __future__ import annotations

from fire_llm.matrix.evaluating import evaluate_run
from fire_llm.matrix.transfer import Stage, transfer

__all__ = ["Stage", "evaluate_run", "transfer"]
