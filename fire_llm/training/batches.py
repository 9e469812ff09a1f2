"""Which samples a phase is trained on: their order, which no resumption changes, and a hash of what was seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class FromStep(torch.utils.data.Sampler[int]):
    """Yield sample indices in order from a start, but count them all: a resumed phase is the rest of a whole one."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


def hash_batch(ids: Tensor, step: int) -> Tensor:
    """Hash token ids, their places and their step; sums of hashes differ where multisets of rows do.

    Args:
        ids: (B, T) int64.
        step: Optimizer step, counted from zero.

    Returns:
        () int64, wrapped around; the same on every device.
    """

    def mix(x: Tensor) -> Tensor:
        # The finaliser of splitmix64; its constants as signed integers. Source: Steele et al., OOPSLA 2014.
        x = (x ^ (x >> 30)) * -4658895280553007687
        x = (x ^ (x >> 27)) * -7723592293110705685
        return x ^ (x >> 31)

    place = torch.arange(1, ids.shape[-1] + 1, device=ids.device) * -7046029254386353131
    when = ((step + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63  # wrapped around, as the tensors' products are
    return mix(mix(ids + place).sum(-1) + when).sum()
