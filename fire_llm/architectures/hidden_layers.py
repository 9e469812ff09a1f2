"""Where the hidden units of a model's MLPs are read: the modules whose input they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from fire_llm.architectures.lookup import Lookup
from fire_llm.architectures.matrices import ParameterSlice, logical_matrices


def down_projections(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """Find the modules that read an MLP's hidden units, by the layout: (width, inner) beside an (inner, ...) matrix.

    Args:
        model: Unwrapped causal LM of a known layout.

    Returns:
        Modules by the name of their parameter, and for the MLPs where none was found: their parameters by reason.
    """
    config: Any = model.config
    width = config.get_text_config().hidden_size
    lookup = Lookup(model)
    blocks: dict[int, list[ParameterSlice]] = {}
    for matrix in logical_matrices(model, ["mlp"]):
        blocks.setdefault(id(lookup.location(matrix.parameter).block), []).append(matrix)
    found: dict[str, nn.Module] = {}
    missing: dict[str, list[str]] = {}
    for matrices in blocks.values():
        down = {m.parameter: m for m in matrices if _is_down(m, matrices, width)}
        stacked = any(m.spec is not None and m.spec.index is not None for m in matrices)
        if stacked or len(down) != 1:
            reason = (
                "experts stacked in one parameter, whose units no module reads"
                if stacked
                else f"no single matrix of {matrices[0].block} leads from the inner width back to {width}"
            )
            missing.setdefault(reason, []).append(matrices[-1].parameter)
        else:
            name = next(iter(down))
            found[name] = lookup.location(name).owner
    return found, missing


def _is_down(matrix: ParameterSlice, block: list[ParameterSlice], width: int) -> bool:
    out, inner = matrix.shape
    return out == width != inner and any(other.shape[0] == inner for other in block)
