"""How a reset names layers: ranges of numbers, and which of the layers hold a parameter."""

from __future__ import annotations

import re

LAYERS = "numbers of layers, counted from 0: 4, 4-11 or 0-3,8"


def parse_layers(text: str) -> list[range] | None:
    """Return the ranges that `0-3,8` names; None of a text that names none."""
    matches = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII) for part in text.split(",")]
    ranges = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches if match]
    return ranges if len(ranges) == len(matches) and all(ranges) else None


def layers_of(role: str, *names: str) -> set[int]:
    """Return the numbers of the layers that hold a parameter: of a tied one several, outside of layers none.

    Args:
        role: Of the parameter.
        *names: All of its names. In each, the first number is that of the layer.
    """
    if role in ("embedding", "lm_head"):
        return set()
    numbers = [[int(step) for step in name.split(".") if step.isdecimal()] for name in names]
    return {first for first, *_ in filter(None, numbers)}
