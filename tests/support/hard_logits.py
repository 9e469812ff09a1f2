"""Logits that are hard to take a softmax of, and what it should give."""

from __future__ import annotations

import torch
from torch import Tensor


def hard_rows(dtype: torch.dtype, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return logits (12, V) of models that are sure, unsure, and far below zero, and targets (12,)."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(12, vocabulary, generator=generator) * torch.logspace(-2, 1.3, 12)[:, None]
    logits[3:6] -= 120
    return logits.to(dtype), torch.randint(0, vocabulary, (12,), generator=generator)


def softmax_in_fp64(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood (S,) of each target."""
    return -torch.log_softmax(logits.double(), -1).gather(-1, targets[:, None])[:, 0]
