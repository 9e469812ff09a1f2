"""Shared by all plots: the look of arms, escaped labels, figures checked against plotly's schema.

A figure is `{"data": [...], "layout": {...}, "variants": [{"label", "group", "data": [patch per trace], "layout"?}]}`.
The page lays the patches of the chosen variant over the figure, so that a variant needs only its numbers. The page
also sets the colours of text and rules, because it knows whether it is light or dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Figure = dict[str, Any]
"""A plotly figure, or a part of one, as plotly writes it to JSON."""

# Okabe & Ito's colour-blind-safe set without its yellow; orange and sky darkened to 3:1 against white and near-black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C98500", "#3A9BDC")
NEUTRAL = "#7f7f7f"
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✖", "cross": "✚", "star": "★"}
BAR = {"orientation": "h", "y": -0.04, "yanchor": "top", "thickness": 8, "outlinewidth": 0, "tickfont": {"size": 11}}
"""A flat colour bar, for below a map."""
DASHES = ("solid", "dash", "dot", "dashdot")


class Style(NamedTuple):
    """How one arm looks in every plot."""

    colour: str
    symbol: str
    dash: str

    @property
    def glyph(self) -> str:
        """Return the text character that looks like the marker."""
        return SYMBOLS[self.symbol]

    @property
    def shade(self) -> str:
        """Return the colour of a band around the line."""
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.18)"


def palette(arms: Sequence[str], neutral: Iterable[str] = ()) -> dict[str, Style]:
    """Give each arm one look; the arms in `neutral` (those that reset nothing) are grey."""
    plain, symbols = set(neutral), list(SYMBOLS)
    styles: dict[str, Style] = {}
    for arm in arms:
        greys = sum(other in plain for other in styles)
        index = greys if arm in plain else len(styles) - greys
        period = 1 if arm in plain else len(COLOURS)
        colour = NEUTRAL if arm in plain else COLOURS[index % period]
        styles[arm] = Style(colour, symbols[len(styles) % len(symbols)], DASHES[index // period % len(DASHES)])
    return styles


def escaped(value: str, width: int = 28) -> str:
    """Escape text for plotly, which reads labels as a small HTML and `%{…}` as a field; the rest is cut off."""
    return html.escape(value if len(value) <= width else value[: width - 1] + "…", quote=False).replace("%", "&#37;")


def short(values: Iterable[float | None]) -> list[float | None]:
    """Round to four significant digits, which is enough for a screen and takes a third of the bytes."""
    return [None if v is None else float(f"{v:.4g}") for v in values]


def number(value: float) -> str:
    """Write a number in at most six characters."""
    if value == 0 or 0.01 <= abs(value) < 10000:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def line(points: Iterable[tuple[Any, float | None]], arm: str, style: Style, hover: str, **look: Any) -> Any:
    """Return the trace of an arm's line, with a marker at each point.

    Args:
        points: (x, y) of each point.
        arm: Its button on the page hides the line.
        style: How the arm looks.
        hover: Template of a point's hover text, as plotly reads it.
        **look: Attributes of plotly's `Scatter` that differ or are added, such as `line_width`.
    """
    from plotly import graph_objects as go

    x, y = zip(*points, strict=True)
    attributes = {
        "mode": "lines+markers",
        "line_color": style.colour,
        "line_dash": style.dash,
        "line_width": 2,
        "marker_symbol": style.symbol,
        "marker_size": 7,
    }
    return go.Scatter(x=x, y=y, legendgroup=arm, hovertemplate=f"{hover}<extra></extra>", **(attributes | look))


def band(x: Sequence[Any], low: Sequence[float], high: Sequence[float], arm: str, style: Style) -> Any:
    """Return the trace of a shaded band between two lines over the same x."""
    from plotly import graph_objects as go

    return go.Scatter(
        x=[*x, *reversed(x)],
        y=short([*low, *reversed(high)]),
        fill="toself",
        fillcolor=style.shade,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=arm,
    )


def log_axis(low: float, high: float, steps: Sequence[int] = (1,)) -> Figure:
    """Return a logarithmic axis with plain numbers at `steps` of every power of ten between two positive ends."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [number(t) for t in ticks]}


HEAT_CELLS: Figure = {
    "coloraxis": "coloraxis", "xgap": 2, "ygap": 2, "textfont": {"size": 12}, "z": [],
    "hovertemplate": "%{customdata}<extra></extra>",
}  # fmt: skip
"""How the cells of every heat map look; a variant adds their numbers, texts and hover texts (`customdata`)."""


def heat_layout(
    columns: Sequence[str], rows: Mapping[float, str], bottom: float, scale: tuple[float, float], bar: Figure = BAR
) -> Figure:
    """Return the axes and the colour scale of a heat map.

    Args:
        columns: Headings of the columns, which are at x = 0, 1, …
        rows: Names of the rows by their y; y grows downwards.
        bottom: y of the lower edge; the upper edge is at -0.5.
        scale: Lowest and highest number of the colour scale.
        bar: The colour bar.
    """
    axis = {"showgrid": False, "showline": False, "ticks": ""}
    return {
        "coloraxis": {"cmin": scale[0], "cmax": scale[1], "colorscale": "Cividis", "colorbar": bar},
        "xaxis": {**axis, "side": "top", "tickvals": list(range(len(columns))), "ticktext": list(columns)},
        "yaxis": {**axis, "range": [bottom, -0.5], "tickvals": list(rows), "ticktext": list(rows.values())},
    }


def figure(traces: list[Any], variants: list[Figure] | None = None, *, height: int = 340, **layout: Any) -> Figure:
    """Check traces and layout against plotly's schema; return them as JSON-ready dicts, without its template."""
    from plotly import graph_objects as go

    axes: Figure = {
        "automargin": True,
        "zeroline": False,
        "title": {"standoff": 8, "font": {"size": 13}},
        "tickfont": {"size": 12},
    }
    base = go.Layout(
        xaxis=axes,
        yaxis=axes,
        height=height,
        margin={"l": 12, "r": 12, "t": 16, "b": 12},
        hovermode="closest",
        showlegend=False,
    )
    figure = go.Figure(traces, base)
    figure.update_layout(template=None, **layout)
    return {**figure.to_plotly_json(), "variants": variants or []}
