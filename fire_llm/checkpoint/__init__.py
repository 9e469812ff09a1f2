"""Checkpoints on disk, read and rewritten tensor by tensor.

    SRC ─ headers, refusals ─▶ Source ─ model on meta, mapping ─▶ Stored ─ rows in, reset, rows out ─▶ DST

No model is ever loaded: its config says which matrices there are, the headers where their bytes lie.
"""

from __future__ import annotations

from fire_llm.checkpoint.card import check_repository, push
from fire_llm.checkpoint.consolidate import consolidate
from fire_llm.checkpoint.rewrite import reset_checkpoint
from fire_llm.checkpoint.stored import Stored

__all__ = ["Stored", "check_repository", "consolidate", "push", "reset_checkpoint"]
