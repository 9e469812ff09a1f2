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
    """Samples of that epoch that were trained on, over all ranks."""


class RestOfEpoch(torch.utils.data.Sampler[int]):
    """Sample whole epochs, but of one of them only its first `skipped` samples and those after the `seen` ones.

    Args:
        sampler: Gives a whole epoch.
        place: The shortened epoch, and how many of its samples are not to be trained on again.
        skipped: How many of these are given all the same, because `Trainer` skips them itself, in whole batches.
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

    `Trainer` derives its place in the data from the number of steps, as if all of them had the same size. Where they
    did not, the place is read from the checkpoint, and its epoch is read from the next sample on.

    Args:
        loader: Of the training data, whole epochs.
        accumulation: Micro-batches of a rank in a step.
        samples_a_step: Over all ranks.
        resumed: The `CONTINUAL_STATE` of the checkpoint that training goes on from; empty for none. It holds `step`,
            `samples_a_step` and, under `epochs`, what `state` returned.
        begin_again: Whether the epoch is read from its beginning (`ignore_data_skip`).

    Raises:
        UserError: The checkpoint's place cannot be found in these data.
    """

    def __init__(
        self, loader: Any, accumulation: int, samples_a_step: int, resumed: Mapping[str, Any], begin_again: bool
    ) -> None:
        self.accumulation, self.samples_a_step, self.step = accumulation, samples_a_step, resumed.get("step", 0)
        self._batches = _index_batches(loader)
        sampler = getattr(self._batches, "sampler", None)
        splits = getattr(getattr(loader, "batch_sampler", None), "split_batches", False)
        self.length, self.order = len(loader.dataset), None if splits else _order(sampler)
        self.steps_an_epoch = self._steps(loader)
        usual = self._after(self.step, Place(0, 0), self.steps_an_epoch)
        self.begin = Place(usual.epoch, 0) if begin_again else usual
        self.samples_before = before = resumed.get("samples_a_step", samples_a_step)
        """Samples of a step before this training."""
        saved = resumed.get("epochs") or {}
        # At the same size an epoch may have another number of steps, as `dataloader_drop_last` leaves samples out.
        shifted = saved.get("length") == self.length and Place(saved["epoch"], saved["seen"]) != usual
        if not begin_again and (before != samples_a_step or saved.get("moved") or shifted):
            if fault := self._difference(saved):
                raise UserError(
                    f"the checkpoint's steps had {before} samples and these have {samples_a_step}, and the "
                    f"place in the data where it stopped cannot be found again: {fault}. Keep batch size x "
                    "accumulation x processes and the data, or begin the data again with ignore_data_skip=True"
                )
            self.begin = Place(saved["epoch"], saved["seen"])
        self.moved = self.begin != usual
        """Whether the place is another than `Trainer` would derive."""
        self.skipped = self.begin.seen // samples_a_step * accumulation
        """Batches of a rank that `Trainer` skips in the epoch that training goes on in."""
        self.steps_left = self.steps_an_epoch - self.begin.seen // samples_a_step
        """Steps of that epoch that are still to be taken."""
        if self.moved:
            rest = RestOfEpoch(sampler, self.begin, self.begin.seen // samples_a_step * samples_a_step)
            rest.set_epoch(self.begin.epoch)
            self._batches.sampler = rest
            self.steps_left = self._steps(loader) - self.begin.seen // samples_a_step
            rest.set_epoch(-1)
            if self.steps_left <= 0:  # less than a batch is left, and `dataloader_drop_last` drops it
                self.begin, self.skipped, self.steps_left = Place(self.begin.epoch + 1, 0), 0, self.steps_an_epoch
                rest.place, rest.skipped = self.begin, 0

    def _steps(self, loader: Any) -> int:
        return max(1, -(-len(loader) // self.accumulation))

    def _difference(self, saved: Mapping[str, Any]) -> str:
        """Return why a checkpoint's place is none in these data; an empty string where it is one."""
        if not saved:
            return "an older version wrote it, without its place in samples"
        if saved["length"] != self.length:
            return f"the train_dataset had {saved['length']} samples and has {self.length}"
        if self.order is None or saved["order"] is None:
            return "the order of the samples depends on the batch size or on a generator's state"
        if saved["order"] != self.order:
            then, now = (
                "as they lie" if order[0] == "sequential" else f"shuffled with seed {order[1]}"
                for order in (saved["order"], self.order)
            )
            return f"the order of the samples is another: {then} then, {now} now"
        return ""

    def _after(self, steps: int, place: Place, steps_left: int) -> Place:
        """Return the place some steps after another one, in whose epoch `steps_left` steps are left."""
        if steps < steps_left:
            return Place(place.epoch, min(place.seen + steps * self.samples_a_step, self.length))
        epochs, steps = divmod(steps - steps_left, self.steps_an_epoch)
        return Place(place.epoch + 1 + epochs, min(steps * self.samples_a_step, self.length))

    def state(self, step: int) -> dict[str, Any]:
        """Return the place after a step, and of which data it is one, as a checkpoint keeps it."""
        place = self._after(step - self.step, self.begin, self.steps_left)
        data = {"length": self.length, "order": self.order, "moved": self.moved}
        return {"epoch": place.epoch, "seen": place.seen, **data}

    def until(self, max_steps: int, epochs: float) -> tuple[int, int]:
        """Return the epochs to read and the last step, of a training to `max_steps`, or through `epochs` where it is 0.

        Every sample is read as often as there are epochs, whatever the size of the steps.
        """
        if max_steps > 0:
            more = max(0, max_steps - self.step - self.steps_left)
            return self.begin.epoch + 1 + -(-more // self.steps_an_epoch), max_steps
        more = math.ceil((epochs - self.begin.epoch - 1) * self.steps_an_epoch)
        return math.ceil(epochs), max(self.step, self.step + self.steps_left + more)

    def of(self, epoch: int, loader: Any) -> dict[str, int]:
        """Return the batches of a rank and the steps of an epoch that is about to be read, skipped ones included."""
        sampler: Any = getattr(self._batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)  # accelerate, on several ranks, does not reach it through what skips batches
        return {"steps_in_epoch": len(loader), "num_update_steps_per_epoch": self._steps(loader)}


def _index_batches(loader: Any) -> Any:
    """Return what makes batches of samples' indices, inside of what shares them out among ranks."""
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return batches


def _order(sampler: Any) -> list[Any] | None:
    """Return what the order of each epoch's samples depends on; None where it depends on more than can be compared."""
    if isinstance(sampler, SequentialSampler):
        return ["sequential"]
    if isinstance(sampler, SeedableRandomSampler) and not sampler.replacement:
        return ["random", sampler.initial_seed]
    return None
