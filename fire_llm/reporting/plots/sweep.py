"""Plots of a sweep: where the loss ends against a swept key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fire_llm.reporting.plots.base import Figure, Style, band, escaped, figure, line, log_axis

LOG_FROM = 10.0
"""Ratio of the largest value to the smallest from which an axis is logarithmic."""


def key_figure(
    lines: Mapping[tuple[str, str], Sequence[tuple[Any, Sequence[float]]]],
    key: str,
    styles: Mapping[str, Style],
    unit: str = "final nats per token",
) -> Figure | None:
    """Draw a loss against a key, swept or of phases: a line for each (arm, other settings), seeds as a band.

    Args:
        lines: (arm, other settings, "" where nothing else is swept) → (the key's value, nats per token of each seed).
        key: The name of the axis.
        styles: By arm.
        unit: The name of the other axis.

    Returns:
        A figure; None where no arm has two values to compare.
    """
    drawn = {who: points for who, points in lines.items() if len(points) > 1}
    values = [value for points in drawn.values() for value, _ in points]
    if not values:
        return None
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    bands, traces = [], []
    for (arm, others), points in drawn.items():
        style, label = styles[arm], escaped(", ".join(filter(None, [arm, others])), 60)
        points = sorted(points, key=lambda point: point[0]) if numbers else points
        x = [value if numbers else _tick(value) for value, _ in points]
        if any(len(seeds) > 1 for _, seeds in points):
            low, high = zip(*((min(seeds), max(seeds)) for _, seeds in points), strict=True)
            bands.append(band(x, low, high, arm, style))
        means = [round(fmean(seeds), 5) for _, seeds in points]
        hover = f"<b>{label}</b><br>%{{y:.4f}} at %{{x}}"
        traces.append(line(zip(x, means, strict=True), arm, style, hover, marker_size=8))
    axis: Figure = {"title": {"text": escaped(key, 60)}, "showgrid": True}
    if not numbers:
        axis |= {"type": "category"}
    elif min(values) > 0 and max(values) >= LOG_FROM * min(values):
        axis |= log_axis(min(values), max(values), (1, 2, 5))
    return figure(bands + traces, height=360, xaxis=axis, yaxis={"title": {"text": unit}})


def _tick(value: Any) -> str:
    """Write a value on the axis: a line for each of its parts."""
    parts = value.split(", ") if isinstance(value, str) else [json.dumps(value)]
    return "<br>".join(escaped(part, 40) for part in parts)
