"""Which samples a phase is trained on: their order, the same after a resumption, their labels, and a hash of them.

Shapes: B = sequences a batch, T = tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from fire_llm.core.errors import UserError
from fire_llm.evaluation.scoring import IGNORE
from fire_llm.evaluation.texts import EvaluationSet

Order = Literal["numbered", "sized", "stream"]


def order_of(dataset: Any) -> Order | None:
    """Return how a training set gives its samples; None for no set.

    - `numbered`: by index, without a length: sample i for any i ≥ 0, read once each in that order.
    - `sized`: by index below a length, in epochs, as `Trainer` samples them.
    - `stream`: an `IterableDataset`, as `Trainer` reads it.
    """
    if dataset is None:
        return None
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return "stream"
    if not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"train_dataset: a {type(dataset).__name__} has neither samples by index (__getitem__) nor is it a torch "
            "IterableDataset. Give such a dataset; data_collator and others are given by name (data_collator=…)"
        )
    return "sized" if has_length(dataset) else "numbered"


class FromStep(torch.utils.data.Sampler[int]):
    """Yield sample indices in order, from where a phase is resumed, and have the length of the whole phase."""

    def __init__(self, start: int, stop: int, total: int) -> None:
        self.start, self.stop, self.total = start, stop, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.total


def hash_batch(ids: Tensor, step: int) -> Tensor:
    """Hash token ids with their positions and their step; the hash of a batch is the sum over its rows.

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

    positions = torch.arange(1, ids.shape[-1] + 1, device=ids.device) * -7046029254386353131
    mixed_step = ((step + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63  # wrapped around, as products of tensors are
    return mix(mix(ids + positions).sum(-1) + mixed_step).sum()


# ---- labels


def labels_are_shifted(inputs: Mapping[str, Tensor]) -> bool | None:
    """Return whether the labels of a batch are the tokens after the positions (True) or at them (False).

    Every label that counts is compared with the ids; the last position of a row has no token after it.

    Args:
        inputs: `input_ids` and `labels`, (B, T).

    Returns:
        None where both hold (a text of one repeated token) or neither does.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    if ids.shape != labels.shape:
        return None
    ignored = labels == IGNORE
    unshifted = bool(((labels == ids) | ignored).all())
    shifted = bool(((labels[..., :-1] == ids[..., 1:]) | ignored[..., :-1]).all())
    return None if unshifted == shifted else shifted


def targets_of(inputs: Mapping[str, Tensor], shifted: bool) -> Tensor:
    """Return the token that follows each position, (B, T); `IGNORE` where none is scored.

    Args:
        inputs: `labels` (B, T); or `shift_labels`, which collators without padding give and which are these tokens.
        shifted: Whether `labels` are these tokens.
    """
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    labels = inputs["labels"]
    return labels if shifted else torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE)


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The windows of an evaluation set as samples of `Trainer`, labelled with their own ids.

    Neighbouring windows share one token, so that every token after the first is scored once.

    Args:
        text: Its documents are read as one text.
        context: Tokens a window.
    """

    def __init__(self, text: EvaluationSet, context: int) -> None:
        tokens = torch.as_tensor(text.tokens, dtype=torch.long)
        self.tokens = tokens if text.prefix is None else torch.cat([torch.tensor([text.prefix]), tokens])
        self.context = context

    def __len__(self) -> int:
        return max(1, -(-(len(self.tokens) - 1) // (self.context - 1)))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels`, (context,), padded with zeros that are not scored."""
        first = i * (self.context - 1)
        ids = self.tokens[first : first + self.context]
        rest = (0, self.context - len(ids))
        return {name: torch.nn.functional.pad(ids, rest, value=v) for name, v in (("input_ids", 0), ("labels", IGNORE))}
