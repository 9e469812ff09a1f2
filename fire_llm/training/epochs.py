"""Where a training stands in data that are read in epochs, counted in samples, so that another batch size can go on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import SequentialSampler

from fire_llm.core.errors import UserError


@dataclass(frozen=True)
class Place:
    """A place in data with a length."""

    epoch: int
    """Counted from zero."""
    seen: int
    """Samples of it that were trained on, over all ranks."""


class Rest(torch.utils.data.Sampler[int]):
    """The samples of a sampler, of which one epoch leaves out those between its `skipped` first and the `seen` ones.

    Args:
        sampler: Gives a whole epoch.
        place: The epoch, and how many of its samples are not to be trained on again.
        skipped: How many of these are given all the same: `Trainer` skips them, as it skips whole batches.
    """

    def __init__(self, sampler: Any, place: Place, skipped: int) -> None:
        self.sampler, self.place, self.skipped = sampler, place, skipped
        self._epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self._epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        samples = iter(self.sampler)
        if self._left_out:
            yield from islice(samples, self.skipped)
            next(islice(samples, self._left_out, self._left_out), None)
        yield from samples

    def __len__(self) -> int:
        return len(self.sampler) - self._left_out

    @property
    def _left_out(self) -> int:
        return self.place.seen - self.skipped if self._epoch == self.place.epoch else 0


class Epochs:
    """Count a training's samples in epochs.

    `Trainer` derives its place in the data from the number of steps, as if all of them had been of the same size. Where
    they were not, the place is the checkpoint's, and the epoch that it lies in is read from its next sample on.

    Args:
        loader: Of the training data, whole epochs.
        accumulation: Micro-batches of a rank in a step.
        samples_a_step: Over all ranks.
        step: Optimizer steps before this training.
        found: What `state` returned when the checkpoint of that step was written; None for none.
        samples_before: `samples_a_step` of that checkpoint.
        begin_again: Whether the epoch is read from its beginning (`ignore_data_skip`).

    Raises:
        UserError: The checkpoint's place is no place in this data.
    """

    def __init__(
        self,
        loader: Any,
        accumulation: int,
        samples_a_step: int,
        step: int,
        found: Mapping[str, Any] | None,
        samples_before: int,
        begin_again: bool,
    ) -> None:
        self.accumulation, self.samples_a_step, self.step = accumulation, samples_a_step, step
        self._batches = _innermost(loader)
        sampler = getattr(self._batches, "sampler", None)
        self.length, self.order = len(loader.dataset), None if _splits(loader) else _order(sampler)
        self.steps_an_epoch = self._steps(loader)
        usual = self._after(step, Place(0, 0), self.steps_an_epoch)
        self.begin = Place(usual.epoch, 0) if begin_again else usual
        kept = found or {}
        # At the same size an epoch may have another number of steps, as `dataloader_drop_last` leaves rows out.
        fewer = kept.get("length") == self.length and Place(kept["epoch"], kept["seen"]) != usual
        if not begin_again and (samples_before != samples_a_step or kept.get("moved") or fewer):
            wrong = self._other(found)
            if wrong:
                raise UserError(
                    f"the checkpoint's steps had {samples_before} samples and these have {samples_a_step}, and the "
                    f"place in the data where it stopped cannot be found again: {wrong}. Keep batch size x "
                    "accumulation x processes and the data, or begin the data again with ignore_data_skip=True"
                )
            assert found is not None
            self.begin = Place(found["epoch"], found["seen"])
        self.moved = self.begin != usual
        """Whether the place is another than `Trainer` would derive."""
        self.skipped = self.begin.seen // samples_a_step * accumulation
        """Batches of a rank that `Trainer` skips in the epoch that training goes on in."""
        self.left = self.steps_an_epoch - self.begin.seen // samples_a_step
        """Steps of that epoch that are still to be taken."""
        if self.moved:
            rest = Rest(sampler, self.begin, self.begin.seen // samples_a_step * samples_a_step)
            rest.set_epoch(self.begin.epoch)
            self._batches.sampler = rest
            self.left = self._steps(loader) - self.begin.seen // samples_a_step
            rest.set_epoch(-1)
            if self.left <= 0:  # fewer than a batch, of which there are to be none
                self.begin, self.skipped, self.left = Place(self.begin.epoch + 1, 0), 0, self.steps_an_epoch
                rest.place, rest.skipped = self.begin, 0

    def _steps(self, loader: Any) -> int:
        return max(1, -(-len(loader) // self.accumulation))

    def _other(self, found: Mapping[str, Any] | None) -> str:
        """Return why a checkpoint's place is none in this data, empty where it is one."""
        if found is None:
            return "an older version wrote it, without its place in samples"
        if found["length"] != self.length:
            return f"the train_dataset had {found['length']} samples and has {self.length}"
        if self.order is None or found["order"] is None:
            return "the order of the samples depends on the batch size or on a generator's state"
        if found["order"] != self.order:
            return f"the order of the samples is another: {_said(found['order'])} then, {_said(self.order)} now"
        return ""

    def _after(self, steps: int, place: Place, left: int) -> Place:
        """Return the place some steps after another one, in whose epoch so many steps are left."""
        if steps < left:
            return Place(place.epoch, min(place.seen + steps * self.samples_a_step, self.length))
        epochs, steps = divmod(steps - left, self.steps_an_epoch)
        return Place(place.epoch + 1 + epochs, min(steps * self.samples_a_step, self.length))

    def state(self, step: int) -> dict[str, Any]:
        """Return the place after a step, and what it holds for, as a checkpoint keeps it."""
        place = self._after(step - self.step, self.begin, self.left)
        known = {"length": self.length, "order": self.order, "moved": self.moved}
        return {"epoch": place.epoch, "seen": place.seen, **known}

    def until(self, max_steps: int, epochs: float) -> tuple[int, int]:
        """Return the epochs to read and the last step, of a training to `max_steps`, or through `epochs` where it is 0.

        Every sample is then read as often as there are epochs, whatever the steps' sizes.
        """
        if max_steps > 0:
            more = max(0, max_steps - self.step - self.left)
            return self.begin.epoch + 1 + -(-more // self.steps_an_epoch), max_steps
        more = math.ceil((epochs - self.begin.epoch - 1) * self.steps_an_epoch)
        return math.ceil(epochs), max(self.step, self.step + self.left + more)

    def of(self, epoch: int, loader: Any) -> dict[str, int]:
        """Return the batches of a rank and the steps of an epoch that is about to be read, skipped ones included."""
        sampler: Any = getattr(self._batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)  # accelerate does not reach it through what skips batches on several ranks
        return {"steps_in_epoch": len(loader), "num_update_steps_per_epoch": self._steps(loader)}


def _innermost(loader: Any) -> Any:
    """Return what makes batches of samples' indices, under what shares them out among ranks."""
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return batches


def _splits(loader: Any) -> bool:
    return bool(getattr(getattr(loader, "batch_sampler", None), "split_batches", False))


def _order(sampler: Any) -> list[Any] | None:
    """Return what the order of each epoch's samples depends on; None where it depends on more than can be compared."""
    if isinstance(sampler, SequentialSampler):
        return ["sequential"]
    if isinstance(sampler, SeedableRandomSampler) and not sampler.replacement:
        return ["random", sampler.initial_seed]
    return None


def _said(order: list[Any]) -> str:
    return "as they lie" if order[0] == "sequential" else f"shuffled with seed {order[1]}"
