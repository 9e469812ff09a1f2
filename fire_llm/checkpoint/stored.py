"""A model whose weights stay on the disk: the slices that its config tells of, and the rows they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fire_llm.architectures.matrices import ParameterSlice, parameter_slices
from fire_llm.checkpoint.headers import WRITABLE
from fire_llm.checkpoint.mapping import Places, places_of
from fire_llm.checkpoint.source import Source
from fire_llm.core.errors import UserError
from fire_llm.models import model_on_meta


@dataclass(frozen=True)
class Stored:
    """Hold a checkpoint on the disk, its model on the meta device, and where each parameter lies."""

    source: Source
    model: Any
    places: Places
    _last: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None, *, native: bool = False) -> Stored:
        """Find and check a checkpoint; no weight is read.

        Args:
            name: A folder or a Hub id.
            revision: Branch, tag or commit on the Hub.
            native: See `Source.open`.

        Raises:
            UserError: It is missing, damaged, quantised, of an unknown architecture, or does not fit its config.
        """
        source = Source.open(name, revision, native=native)
        model = model_on_meta(source.config)
        return cls(source, model, places_of(model, source.tensors))

    def check_readable(self, slice_: ParameterSlice) -> None:
        """Refuse a slice that is converted in a way not followed here, or whose numbers are no floating-point ones.

        Raises:
            UserError: Naming the stored tensor.
        """
        if step := self.places.unmapped.get(slice_.parameter):
            raise UserError(
                f"'{slice_.parameter}' is stored in another form ({step} when transformers loads it), which is not "
                "followed here: load the model, call fire_(model), save it; or leave the tensor out with --exclude"
            )
        if slice_.parameter not in self.places.of:
            raise UserError(f"'{self.source.name}' does not store '{slice_.parameter}': leave it out with --exclude")
        for place in self.places.of[slice_.parameter]:
            if place.tensor.dtype not in WRITABLE:
                stored = f"'{place.tensor.name}' in '{place.tensor.file.name}' is {place.tensor.dtype}"
                raise UserError(
                    f"{stored}; a reset needs one of {', '.join(WRITABLE)}. Quantised? Take the checkpoint it was made "
                    "from"
                )

    def rows(self, slice_: ParameterSlice) -> Tensor:
        """Read the rows of a parameter that hold a slice and what is fused with it, in the parameter's own order."""
        return self.places.read(slice_.parameter, slice_.rows, slice_.tensor.shape)

    def loaded(self, slice_: ParameterSlice) -> ParameterSlice:
        """Return a slice with its weights in memory; slices of the same rows are read from the disk once."""
        key = f"{slice_.parameter}{slice_.rows}"
        if key not in self._last:
            self._last.clear()
            self._last[key] = self.rows(slice_)
        return slice_.within(self._last[key])

    def write(self, slice_: ParameterSlice, rows: Tensor, files: Mapping[str, int]) -> None:
        """Write what `rows` would read to copies of the files, given by name and open for writing."""
        self.places.write(slice_.parameter, slice_.rows, rows, files)


class StoredSlices(Mapping[str, ParameterSlice]):
    """The slices of a checkpoint by name, each read when it is asked for."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    @cached_property
    def _all(self) -> dict[str, ParameterSlice]:
        return {slice_.name: slice_ for slice_ in parameter_slices(self.stored.model, strict=False)}

    def __getitem__(self, name: str) -> ParameterSlice:
        """Return a slice with its weights in memory."""
        return self.stored.loaded(self._all[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._all)

    def __len__(self) -> int:
        """Count the slices."""
        return len(self._all)


def finite(slice_: ParameterSlice) -> bool:
    """Tell whether a slice in memory holds neither NaN nor infinity."""
    return bool(torch.isfinite(slice_.read()).all())
