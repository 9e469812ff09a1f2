"""Plots of plasticity over the steps of a phase, a line an arm."""

from __future__ import annotations

from collections.abc import Mapping

from fire_llm.reporting.plots.base import Figure, Style, escaped, figure, short
from fire_llm.reporting.schema import Arm

MEASURES = {
    "Features and units": {
        "srank": "srank of the last hidden states",
        "dormant_share": "share of MLP units that are dormant",
    },
    "Curvature": {
        "hessian_eigenvalue": "Hessian eigenvalue of the largest magnitude",
        "gradient_norm": "norm of the gradient",
    },
}
"""Captions of the measures that are drawn, by heading."""


def measure_figure(arms: Mapping[str, Arm], key: str, styles: Mapping[str, Style]) -> Figure | None:
    """Draw one measure against optimizer steps; None where no arm has it.

    Args:
        arms: By name; the measures are in the entries of their curves.
        key: One of the measures.
        styles: Look of every arm.
    """
    from plotly import graph_objects as go

    traces = []
    for arm, entry in arms.items():
        found = [(e.step, getattr(e.diagnostics, key)) for e in entry.curve if e.diagnostics]
        points = [(step, value) for step, value in found if value is not None]
        if not points:
            continue
        style, label = styles[arm], escaped(arm)
        traces.append(
            go.Scatter(
                x=[step for step, _ in points],
                y=short(value for _, value in points),
                legendgroup=arm,
                mode="lines+markers",
                line={"color": style.colour, "dash": style.dash, "width": 2},
                marker={"symbol": style.symbol, "size": 7},
                hovertemplate=f"<b>{label}</b><br>%{{y:.4g}} after %{{x}} steps<extra></extra>",
            )
        )
    if not traces:
        return None
    shares = {"tickformat": ".1%", "rangemode": "tozero"} if key.endswith("_share") else {}
    return figure(traces, height=300, xaxis={"title": {"text": "optimizer steps in this phase"}}, yaxis=shares)
