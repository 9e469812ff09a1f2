"""Find the hidden layers of a model's MLPs: which rows and columns belong to each unit, and which module reads it.

Shapes: width of the residual stream, units of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fire_llm.architectures.lookup import Lookup
from fire_llm.architectures.matrices import ParameterSlice, logical_matrices
from fire_llm.architectures.names import plain_parameters


@dataclass(frozen=True)
class HiddenLayer:
    """Locate the units of one MLP: unit j is row j of each incoming slice and column j of the outgoing one."""

    name: str
    """Of the outgoing parameter."""
    readers: tuple[nn.Module, ...]
    """Modules whose input is the units' activations: several where blocks share their weights, as Zamba's do."""
    incoming: tuple[ParameterSlice, ...]
    """(units, width) matrices, and their biases as (units, 1)."""
    outgoing: ParameterSlice
    """(width, units)."""

    @property
    def reader(self) -> nn.Module:
        """Return the first of the modules whose input is the units' activations."""
        return self.readers[0]

    @property
    def units(self) -> int:
        """Return how many units there are."""
        return self.outgoing.shape[1]

    def rows(self, inputs: Tensor) -> Tensor:
        """Return (..., units) activations, given what the reader reads."""
        return inputs


def hidden_layers(
    model: nn.Module, wanted: Callable[[ParameterSlice], bool]
) -> tuple[list[HiddenLayer], dict[str, str]]:
    """Find the hidden layers of dense MLPs.

    Args:
        model: Unwrapped causal LM of a known layout, on any device, `meta` included.
        wanted: Whether a matrix may be acted on; an MLP with one that may not is passed over.

    Returns:
        The layers, and for MLPs whose units lie elsewhere than in rows and columns of matrices: why, by the name of
        their last parameter.
    """
    parameters, lookup = dict(plain_parameters(model)), Lookup(model)
    layers, unreached = [], {}
    for matrices, outgoing, why_not in _mlps(model, lookup):
        if not all(wanted(matrix) for matrix in matrices):
            continue
        last, incoming = matrices[-1], [m for m in matrices if m is not outgoing]
        if outgoing is None:
            unreached[last.parameter] = why_not
        elif any(m.shape != outgoing.shape[::-1] for m in incoming):
            unreached[last.parameter] = f"{last.block} has matrices of several shapes"
        elif _shared_in_part(matrices, parameters, lookup):
            unreached[last.parameter] = f"{last.block} shares a part of its weights with another block"
        else:
            biases = [bias for m in incoming if (bias := _bias(m, parameters)) is not None]
            readers = _readers(outgoing, lookup)
            layers.append(HiddenLayer(outgoing.parameter, readers, (*incoming, *biases), outgoing))
    return layers, unreached


def _readers(outgoing: ParameterSlice, lookup: Lookup) -> tuple[nn.Module, ...]:
    """Return the modules that hold a down projection: several where blocks share it (Zamba)."""
    return tuple({lookup.location(name).owner: None for name in (outgoing.parameter, *outgoing.tied)})


def _shared_in_part(matrices: Sequence[ParameterSlice], parameters: dict[str, nn.Parameter], lookup: Lookup) -> bool:
    """Return whether other blocks share some weights of an MLP but not all: their units are then no units of this."""
    blocks = {frozenset(id(lookup.location(name).block) for name in (m.parameter, *m.tied)) for m in matrices}
    biases = [[parameters.get(_bias_name(name)) for name in (m.parameter, *m.tied)] for m in matrices]
    return len(blocks) > 1 or any(bias is not shared[0] for shared in biases for bias in shared)


def down_projections(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, ...]], dict[str, list[str]]]:
    """Find the modules that read an MLP's hidden units.

    Args:
        model: Unwrapped causal LM of a known layout.

    Returns:
        Modules by the name of their parameter, and for the MLPs where none was found: their parameters by reason.
    """
    lookup = Lookup(model)
    readers: dict[str, tuple[nn.Module, ...]] = {}
    missing: dict[str, list[str]] = {}
    for matrices, outgoing, why_not in _mlps(model, lookup):
        if outgoing is None:
            missing.setdefault(why_not, []).append(matrices[-1].parameter)
        else:
            readers[outgoing.parameter] = _readers(outgoing, lookup)
    return readers, missing


def _mlps(model: nn.Module, lookup: Lookup) -> Iterator[tuple[list[ParameterSlice], ParameterSlice | None, str]]:
    """Yield of each MLP its matrices, and the one that leads back, (width, units); where no single one does, None.

    The text says why there is none, and is empty where there is one.
    """
    config: Any = model.config
    width = config.get_text_config().hidden_size
    blocks: dict[int, list[ParameterSlice]] = {}
    for matrix in logical_matrices(model, ["mlp"]):
        blocks.setdefault(id(lookup.location(matrix.parameter).block), []).append(matrix)
    for matrices in blocks.values():
        down = [m for m in matrices if _is_down(m, matrices, width)]
        if any(m.spec is not None and m.spec.index is not None for m in matrices):
            yield matrices, None, "experts stacked in one parameter, whose units no module reads"
        elif len(down) != 1:
            yield matrices, None, f"no single matrix of {matrices[0].block} leads from the inner width back to {width}"
        else:
            yield matrices, down[0], ""


def _is_down(matrix: ParameterSlice, block: list[ParameterSlice], width: int) -> bool:
    out, inner = matrix.shape
    return out == width != inner and any(other.shape[0] == inner for other in block)


def _bias(matrix: ParameterSlice, parameters: dict[str, nn.Parameter]) -> ParameterSlice | None:
    """Return the bias beside a matrix as a (units, 1) slice, cut as its rows are; None where none is trained."""
    name = _bias_name(matrix.parameter)
    bias = parameters.get(name)
    if bias is None or matrix.spec is None or not bias.requires_grad:
        return None
    return replace(matrix, parameter=name, tensor=bias, spec=replace(matrix.spec, in_first=False, columns=1))


def _bias_name(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"
