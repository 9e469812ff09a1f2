"""Which stored tensors hold which rows of which parameter: transformers' own renaming and conversion, followed by hand.

    stored key ─ rename_source_key ─▶ parameter ─ conversion ─▶ a Place: rows, columns, order

transformers stacks, joins and cuts tensors while it loads them (a file an expert, one parameter for all of them).
Here the same conversions say where each row of a parameter lies on the disk, so that it is read and written there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fire_llm.architectures.names import names_by_tensor, plain_buffers
from fire_llm.checkpoint.headers import NUMBERS, StoredTensor
from fire_llm.checkpoint.refusals import names, refuse_adapted
from fire_llm.core.errors import UserError
from fire_llm.core.files import Reader
from fire_llm.models import wrapper_advice


@dataclass(frozen=True)
class Place:
    """Which rows of a parameter a stored tensor holds.

    Args:
        tensor: Where they lie.
        rows: Of the parameter, along its first axis.
        start: The row of the stored tensor that `rows` begins at.
        inner: Where it lies along the second axis of a parameter that stacks such tensors; None: all of that axis.
        stacked: Whether the stored tensor is one item of the first axis and lacks that axis.
        interleaved: Whether two halves take turns along the second axis on the disk.
    """

    tensor: StoredTensor
    rows: range
    start: int = 0
    inner: range | None = None
    stacked: bool = False
    interleaved: bool = False

    def overlap(self, rows: range) -> range:
        """Return the rows of the parameter that lie both here and in `rows`."""
        return range(max(self.rows.start, rows.start), min(self.rows.stop, rows.stop))

    def read(self, rows: range, copy: Reader | None = None) -> Tensor:
        """Read rows of the parameter, all of them held here, in the parameter's own order."""
        if self.stacked:
            return self.tensor.read(copy=copy)[None]
        data = self.tensor.read(self._stored(rows), copy)
        return data.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if self.interleaved else data

    def write(self, rows: range, data: Tensor, file: int) -> None:
        """Write rows of the parameter to a copy of the file."""
        if self.stacked:
            data, stored = data[0], range(data.shape[1])
        else:
            stored = self._stored(rows)
        if self.interleaved:
            data = data.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        self.tensor.write(stored, data, file)

    def slot(self, block: Tensor, first: int, rows: range) -> Tensor:
        """Return the part of a block that some rows fill, as a view.

        Args:
            block: Rows of the parameter.
            first: The first of the block's rows.
            rows: Those to fill, all of them in the block.
        """
        part = block[rows.start - first : rows.stop - first] if block.ndim else block
        return part if self.inner is None else part[:, self.inner.start : self.inner.stop]

    def expects(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that the stored tensor must have for a parameter of this shape; the first axis apart."""
        inside = [len(self.inner), *shape[2:]] if self.inner is not None else [*shape[1:]]
        return tuple(inside) if self.stacked else (*self.tensor.shape[:1], *inside) if shape else ()

    def _stored(self, rows: range) -> range:
        offset = self.start - self.rows.start
        return range(rows.start + offset, rows.stop + offset)


@dataclass
class Places:
    """Where each parameter of a model lies, and what of the checkpoint belongs to none."""

    of: dict[str, list[Place]] = field(default_factory=dict)
    """By the parameter's first name; together they hold every row of it."""
    copies: dict[str, list[Place]] = field(default_factory=dict)
    """Further stored copies of a tied parameter, equal to the first."""
    ignored: list[str] = field(default_factory=list)
    """Keys that the class does not load: kept as they are."""
    unmapped: dict[str, str] = field(default_factory=dict)
    """Parameters whose conversion is not followed here, with its name; they can be kept, but not reset."""

    def over(self, tensors: Mapping[str, StoredTensor]) -> Places:
        """Return the same places in other tensors, which have the same names and shapes."""

        def moved(by_parameter: dict[str, list[Place]]) -> dict[str, list[Place]]:
            return {
                name: [replace(place, tensor=tensors[place.tensor.name]) for place in places]
                for name, places in by_parameter.items()
            }

        return Places(moved(self.of), moved(self.copies))

    def read(self, name: str, rows: range, shape: Sequence[int], copies: Mapping[str, Reader] | None = None) -> Tensor:
        """Read rows of a parameter along its first axis.

        Args:
            name: Of the parameter.
            rows: Which rows; those of a parameter without axes are range(1).
            shape: Of the whole parameter.
            copies: By file name, copies of the files to read instead.
        """

        def read(place: Place, rows: range) -> Tensor:
            return place.read(rows, copies[place.tensor.file.name] if copies is not None else None)

        overlaps = [(place, overlap) for place in self.of[name] if (overlap := place.overlap(rows))]
        if len(overlaps) == 1 and overlaps[0][0].inner is None and overlaps[0][1] == rows:
            return read(overlaps[0][0], rows)
        dtype = reduce(torch.promote_types, {NUMBERS[place.tensor.dtype] for place, _ in overlaps})
        block = torch.empty((len(rows), *shape[1:]), dtype=dtype)
        for place, overlap in overlaps:
            place.slot(block, rows.start, overlap).copy_(read(place, overlap))
        return block

    def write(self, name: str, rows: range, block: Tensor, copies: Mapping[str, Reader]) -> None:
        """Write rows of a parameter to copies of the files, which are named by file name and open for writing too."""
        for place in [*self.of[name], *self.copies.get(name, [])]:
            if overlap := place.overlap(rows):
                place.write(overlap, place.slot(block, rows.start, overlap), copies[place.tensor.file.name].descriptor)


def places_of(
    model: nn.Module, tensors: Mapping[str, StoredTensor], *, untie: bool = True, optional: Collection[str] = ()
) -> Places:
    """Find where each parameter of a model lies among stored tensors.

    Args:
        model: An unwrapped one of transformers, on the meta device if it may be untied.
        tensors: The checkpoint's, by key.
        untie: Whether a tied weight that is stored twice, with two values, is untied in the model, as transformers does
            when it loads such a checkpoint. Otherwise it is refused.
        optional: Parameters that may be missing, beside those that the class lets be missing when it is loaded.

    Raises:
        UserError: A parameter is missing, or a stored tensor has another shape than the config says.
    """
    places = _follow(model, tensors)
    found, places.of = places.of, {}
    missing = []
    for parameter, own_names in names_by_tensor(model.named_parameters(remove_duplicate=False)).items():
        stored = [name for name in own_names if name in found]
        for name in stored:
            _check_shape(name, parameter.shape, found[name])
        if stored:
            places.of[own_names[0]] = found[stored[0]]
        elif not any(name in places.unmapped or name in optional or _may_be_missing(model, name) for name in own_names):
            missing.append(own_names[0])
        for name in stored[1:]:
            if _equal(found[stored[0]], found[name]):
                places.copies.setdefault(own_names[0], []).extend(found[name])
            elif not untie:
                raise UserError(
                    f"the checkpoint holds two values of '{stored[0]}' and '{name}', which are one weight in "
                    f"{type(model).__name__}: they are of different models"
                )
            else:
                _untie(model, name)
                places.of[name] = found[name]
    for name, buffer in plain_buffers(model):
        if name in found:
            _check_shape(name, buffer.shape, found[name])
            places.of[name] = found[name]
    if missing:
        refuse_adapted(tensors, places.ignored, missing)
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the tensors of {type(model).__name__}: {names(missing)}. "
            + (wrapper_advice(tensors) or "It is of another architecture, or incomplete")
        )
    return places


def _follow(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> Places:
    """Rename every key as transformers does when it loads, and undo what it converts; tied names stay apart."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    any_model: Any = model
    conversions = get_model_conversion_mapping(any_model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state: Mapping[str, Tensor] = model.state_dict()
    prefix, places = any_model.base_model_prefix, Places()
    found = places.of
    # By parameter and converter: the stored tensors of each of the converter's patterns.
    converted: dict[tuple[str, int], dict[str, list[StoredTensor]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            places.ignored.append(key)
        elif pattern is None:
            if name in found:
                raise UserError(
                    f"the checkpoint holds '{name}' twice, as '{found[name][0].tensor.name}' and as '{key}', and one "
                    "of them alone is loaded: load the model, and save it again with save_pretrained"
                )
            tensor = tensors[key]
            found[name] = [Place(tensor, range(tensor.n_rows))]
        else:
            number = converters.index(by_pattern[pattern])
            converted.setdefault((name, number), {}).setdefault(pattern, []).append(tensors[key])
    for (name, number), sources in converted.items():
        _convert(converters[number], name, sources, state, places)
    return places


def _convert(
    converter: Any,
    name: str,
    sources: Mapping[str, list[StoredTensor]],
    state: Mapping[str, Tensor],
    places: Places,
) -> None:
    """Record where the parameters lie that one conversion makes of some stored tensors.

    Args:
        converter: Of transformers.
        name: The parameter that it makes, the first where it makes several.
        sources: The stored tensors by the converter's pattern.
        state: The model's parameters by name.
        places: What is recorded in.
    """
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    if len(sources) == 1:  # weights without scales are taken as they are
        steps = [step for step in steps if step[0] != "Inkling2LoopDequantizeExperts"]
    ordered = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
    found, first = places.of, converter.target_patterns[0]
    targets = [name.replace(first, target, 1) for target in converter.target_patterns]
    if not steps or steps == [("Inkling2UnpadVocab", None)]:  # whose further rows are padding
        (tensor,) = ordered[0]
        found[name] = [Place(tensor, range(min(tensor.n_rows, state[name].shape[0])))]
    elif steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        found[name] = list(_stacked(ordered, joined=len(steps) > 1))
    elif steps == [("Concatenate", 0)]:
        start, found[name] = 0, []
        for tensor in chain(*ordered):
            found[name].append(Place(tensor, range(start, start + tensor.n_rows)))
            start += tensor.n_rows
    elif steps in ([("Chunk", 0)], [("Split", 0)]) and all(target in state for target in targets):
        (tensor,), start = ordered[0], 0
        for target in targets:
            rows = state[target].shape[0]
            found[target] = [Place(tensor, range(rows), start)]
            start += rows
        if start != tensor.n_rows:
            raise UserError(f"'{tensor.name}' has {tensor.n_rows} rows, and the config says {start}: they do not fit")
    elif steps == [("Interleave", 1)] and not converter.operations[-1].inverse:
        (tensor,) = ordered[0]
        found[name] = [Place(tensor, range(tensor.n_rows), interleaved=True)]
    else:
        places.unmapped |= dict.fromkeys(targets, " then ".join(step for step, _ in steps))


def _stacked(ordered: Sequence[Sequence[StoredTensor]], *, joined: bool) -> Iterator[Place]:
    """Yield the places of tensors stored one by one that a parameter stacks, and, where joined, several to an item."""
    for index, items in enumerate(zip(*ordered, strict=False)):
        start = 0
        for tensor in items:
            inner = range(start, start + tensor.n_rows) if joined else None
            yield Place(tensor, range(index, index + 1), inner=inner, stacked=True)
            start += tensor.n_rows


def _check_shape(name: str, shape: torch.Size, places: Sequence[Place]) -> None:
    """Refuse stored tensors that do not fill a parameter exactly."""
    n_rows, width = shape[0] if shape else 1, shape[1] if len(shape) > 1 else 1
    entries = sum(len(p.rows) * (len(p.inner) if p.inner is not None else width) for p in places)
    filled = entries == n_rows * width
    for place in places:
        alone = len(places) == 1 and not place.stacked and not filled
        if place.tensor.shape != place.expects(shape) or place.rows.stop > n_rows or alone:
            raise UserError(
                f"'{place.tensor.name}' has shape {place.tensor.shape}, which does not fit '{name}' of shape "
                f"{tuple(shape)} that the config asks for: they are of different models"
            )
    if not filled:
        raise UserError(
            f"'{places[0].tensor.name}' and {len(places) - 1} more that belong with it do not fill '{name}' of shape "
            f"{tuple(shape)} that the config asks for: some are missing, or they are of another model"
        )


def _equal(places: Sequence[Place], others: Sequence[Place]) -> bool:
    pairs = zip(places, others, strict=True)
    return len(places) == len(others) and all(a.tensor.same_bytes(b.tensor) for a, b in pairs)


def _untie(model: nn.Module, name: str) -> None:
    """Set a parameter of its own under a tied parameter's further name."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, attribute, nn.Parameter(torch.empty_like(getattr(module, attribute))))


def _may_be_missing(model: nn.Module, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
