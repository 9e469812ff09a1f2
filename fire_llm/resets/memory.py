"""Refuse weights whose memory a reset would write twice, cannot write, or would write in vain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fire_llm.core.errors import UserError
from fire_llm.distributed import is_dtensor, local_part, trains_any

_OWN = "p.data = p.data.clone()"


class TensorPart(Protocol):
    """A slice of a model, or another part of one of its tensors."""

    @property
    def parameter(self) -> str:
        """Return the name of the tensor."""

    @property
    def tensor(self) -> Tensor:
        """Return the tensor."""


def refuse_memory(parts: Iterable[TensorPart], written: Sequence[TensorPart]) -> None:
    """Refuse what would be written twice or cannot be written, of what lies in this machine's memory.

    Two parameters in one memory would be reset one after the other, and one that is to stay would be reset with the
    other. A tied weight, one parameter under several names, is one.

    Args:
        parts: All that a model holds.
        written: What of it is to be written to.

    Raises:
        UserError: Naming the tensor, or both.
    """
    for part in written:
        tensor = local_part(part.tensor)
        if tensor.layout != torch.strided:
            kind = tensor.layout
            raise UserError(f"'{part.parameter}' is stored as {kind}: make it dense, p.to_dense(), or exclude it")
        if _is_here(tensor):
            _refuse_unwritable(part.parameter, tensor)
    targets, names, tensors = {id(part.tensor) for part in written}, {}, {}
    for part in parts:
        names[id(part.tensor)] = part.parameter
        if _is_here(tensor := local_part(part.tensor)):
            tensors[id(part.tensor)] = tensor
    # In the order of addresses, each tensor is compared with those before it that reach beyond its beginning.
    reaching: list[int] = []
    for key in sorted(tensors, key=lambda key: _span(tensors[key])[0]):
        reaching = [other for other in reaching if _span(tensors[other])[1] > _span(tensors[key])[0]]
        for other in reaching:
            if {key, other} & targets and _overlap(tensors[key], tensors[other]):
                raise UserError(
                    f"'{names[other]}' and '{names[key]}' are two tensors in one memory, where a reset of one changes "
                    f"the other too: make them one parameter under two names, or give one a copy, {_OWN}"
                )
        reaching.append(key)


def same_memory(part: TensorPart, other: TensorPart) -> bool:
    """Return whether two tensors begin at one place of this machine's memory."""
    a, b = local_part(part.tensor), local_part(other.tensor)
    return _is_here(a) and _is_here(b) and a.data_ptr() == b.data_ptr()


def refuse_replaced(modules: Mapping[str, nn.Module], parts: Iterable[TensorPart]) -> None:
    """Refuse tensors that a model no longer holds: what is done to them would have no effect.

    Args:
        modules: Of the model, by name.
        parts: Of the tensors that it held.

    Raises:
        UserError: Naming the first.
    """
    for part in parts:
        path, _, attribute = part.parameter.rpartition(".")
        if not is_dtensor(part.tensor) and getattr(modules[path], attribute, None) is not part.tensor:
            raise UserError(
                f"'{part.parameter}' is another tensor now, by load_state_dict(assign=True), a conversion of the model "
                "or the like: make this again, after it"
            )


def refuse_other_optimizer(optimizer: Any, parts: Sequence[TensorPart]) -> None:
    """Refuse what is no optimizer, or trains nothing of these parts, so that its moments elsewhere would stay.

    Args:
        optimizer: One, or a list of several that share the weights.
        parts: Weights that are to be changed.

    Raises:
        UserError: Naming a parameter that none of them trains.
    """
    several = isinstance(optimizer, list | tuple)
    for one in optimizer if several else [optimizer]:
        if not hasattr(one, "param_groups"):
            raise UserError(f"optimizer: a {type(one).__name__} is given: give the one that trains the model")
    if parts and not trains_any(optimizer, (part.tensor for part in parts)):
        raise UserError(
            f"optimizer: {'they train' if several else 'it trains'} none of the weights that are to be reset, such as "
            f"'{parts[0].parameter}': give the one that trains this model, several as a list, or make a new one from "
            "model.parameters(); where nothing trains these weights, leave it out"
        )


def _is_here(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one that holds numbers."""
    return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel() > 0


def _refuse_unwritable(name: str, tensor: Tensor) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise UserError(
            f"'{name}' was made under torch.inference_mode and cannot be changed outside of it: make the model "
            "outside, or under torch.no_grad"
        )
    repeated = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    if repeated or _extent(tensor) < tensor.numel():
        raise UserError(
            f"'{name}' is expanded: several of its numbers are one in memory, and cannot be changed apart: give it "
            f"memory of its own, {_OWN}"
        )


def _extent(tensor: Tensor) -> int:
    """Return how many elements lie between the first and the last, both counted."""
    return 1 + sum(step * (size - 1) for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte, and of the one behind the last."""
    return tensor.data_ptr(), tensor.data_ptr() + _extent(tensor) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors, of which one begins inside the other, have a number in common."""
    size, low = a.element_size(), min(a.data_ptr(), b.data_ptr())
    if b.element_size() != size or (a.data_ptr() - b.data_ptr()) % size:
        return True
    marks = torch.zeros((max(_span(a)[1], _span(b)[1]) - low) // size, dtype=torch.bool)
    first, second = (marks.as_strided(t.shape, t.stride(), (t.data_ptr() - low) // size) for t in (a, b))
    first.fill_(True)
    return bool(second.any())
