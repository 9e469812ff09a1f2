"""A model whose weights stay on the disk: the slices that follow from its config, and the rows they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fire_llm.architectures.classes import model_classes
from fire_llm.architectures.matrices import ParameterSlice, slices_by_name
from fire_llm.checkpoint.headers import NUMBERS, WRITABLE
from fire_llm.checkpoint.mapping import Places, places_of
from fire_llm.checkpoint.refusals import names
from fire_llm.checkpoint.source import Source
from fire_llm.core.errors import UserError
from fire_llm.core.files import Reader
from fire_llm.models import model_on_meta


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk, its model on the meta device, and where each parameter lies."""

    source: Source
    model: Any
    places: Places
    kind: Any = None
    """The class of the model; None: the one that AutoModelForCausalLM takes."""
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
        *others, last = model_classes(source.config)
        for kind in others:
            with suppress(UserError):
                return cls._of(source, kind)
        try:
            return cls._of(source, last)
        except UserError as error:
            if not source.unheld:
                raise
            raise UserError(f"{error}; '{source.index}' lists {names(source.unheld)}, which no shard holds") from error

    @classmethod
    def _of(cls, source: Source, kind: Any) -> Stored:
        model = model_on_meta(source.config, kind)
        return cls(source, model, places_of(model, source.tensors), kind)

    def check_readable(self, weight: ParameterSlice) -> None:
        """Refuse a slice that is converted in a way not followed here, or whose numbers are no floating-point ones.

        Raises:
            UserError: Naming the stored tensor.
        """
        if step := self.places.unmapped.get(weight.parameter):
            raise UserError(
                f"'{weight.parameter}' is stored in another form ({step} when transformers loads it), which is not "
                "followed here: load the model, call fire_(model), save it; or leave the tensor out with --exclude"
            )
        if weight.parameter not in self.places.of:
            raise UserError(f"'{self.source.name}' does not store '{weight.parameter}': leave it out with --exclude")
        for place in self.places.of[weight.parameter]:
            if place.tensor.dtype not in (NUMBERS if weight.buffer else WRITABLE):
                stored = f"'{place.tensor.name}' in '{place.tensor.file.name}' is {place.tensor.dtype}"
                raise UserError(
                    f"{stored}; a reset needs one of {', '.join(WRITABLE)}. Quantised? Take the checkpoint it was made "
                    "from"
                )

    def rows(self, weight: ParameterSlice, copies: Mapping[str, Reader] | None = None) -> Tensor:
        """Read the rows of a parameter that hold a slice and what is fused with it, in the parameter's own order.

        Args:
            weight: The slice.
            copies: By file name, copies of the files to read instead.
        """
        return self.places.read(weight.parameter, weight.rows, weight.tensor.shape, copies)

    def loaded(self, weight: ParameterSlice) -> ParameterSlice:
        """Return a slice with its weights in memory; slices of the same rows are read from the disk once."""
        key = f"{weight.parameter}{weight.rows}"
        if key not in self._last:
            self._last.clear()
            self._last[key] = self.rows(weight)
        return weight.within(self._last[key])

    def write(self, weight: ParameterSlice, rows: Tensor, copies: Mapping[str, Reader]) -> None:
        """Write what `rows` would read to copies of the files, given by name and open for writing too."""
        self.places.write(weight.parameter, weight.rows, rows, copies)


class Slices(Mapping[str, ParameterSlice]):
    """The slices of a model by name, each brought into memory when it is asked for.

    Args:
        model: On the meta device, in part or as a whole.
        load: Returns a slice with its weights in memory.
    """

    def __init__(self, model: nn.Module, load: Callable[[ParameterSlice], ParameterSlice]) -> None:
        self._load = load
        self._all = slices_by_name(model)

    def __getitem__(self, name: str) -> ParameterSlice:
        return self._load(self._all[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
