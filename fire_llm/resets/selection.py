"""How a reset names what it acts on: patterns of names, and numbers of layers."""

from __future__ import annotations

import re
from typing import Protocol

from fire_llm.architectures.matrices import ParameterSlice

LAYERS = "numbers of layers, counted from 0: 4, 4-11 or 0-3,8"


class Named(Protocol):
    """A slice of a model, or what is reported of it."""

    @property
    def role(self) -> str:
        """Return the one role it is listed under."""

    @property
    def parameter(self) -> str:
        """Return the plain name of the parameter."""


def parse_layers(text: str) -> list[range] | None:
    """Return the ranges that `0-3,8` names; None of a text that names none."""
    matches = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII) for part in text.split(",")]
    ranges = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches if match]
    return ranges if len(ranges) == len(matches) and all(ranges) else None


def layer_of(weight: Named) -> int | None:
    """Return the number of the layer that holds a slice, the first in its name; None outside of layers."""
    return None if weight.role in ("embedding", "lm_head") else _number(weight.parameter)


def layers_of(weight: ParameterSlice) -> set[int]:
    """Return the numbers of the layers that hold a slice: of a tied one several, outside of layers none."""
    if weight.role in ("embedding", "lm_head"):
        return set()
    return {number for name in (weight.parameter, *weight.tied) if (number := _number(name)) is not None}


def _number(name: str) -> int | None:
    return next((int(step) for step in name.split(".") if step.isdecimal()), None)
