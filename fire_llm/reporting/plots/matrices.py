"""Plots of weight matrices: heat maps of layer x part and singular-value spectra."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from fire_llm.reporting.plots.base import (
    BAR,
    HEAT_CELLS,
    NEUTRAL,
    Figure,
    Style,
    escaped,
    figure,
    heat_layout,
    log_axis,
    number,
    short,
)
from fire_llm.reporting.schema import InspectedMatrix, ResetEntry, TensorEntry

MATRIX_ROLES = ("attention", "mlp", "ssm", "conv", "lm_head")
LEAVES = {"out": "o", "c_fc": "fc"}  # after "_proj" is dropped


def parse_name(name: str, role: str = "") -> tuple[int | None, str]:
    """Split a matrix's name into its layer and the part of a layer it is.

    The layer is the first whole-number component of the dotted path (None outside the blocks); later numbers, such as
    an expert's, are dropped, so that all experts of a layer share a part.

    >>> parse_name("transformer.h.3.attn.c_attn.weight[q]")
    (3, 'q')
    """
    path, _, bracket = name.partition("[")
    parts = [p for p in path.split(".") if p != "weight"]
    layer = next((i for i, p in enumerate(parts) if p.isdigit()), None)
    inside = [p for p in re.split(r"[\s,.:\[\]]+", bracket) if p and not p.isdigit()]
    inner = [p for p in parts[(layer + 1) if layer is not None else 0 :] if not p.isdigit()]
    leaf = ".".join(inside) or (inner[-1] if inner else name)
    if leaf == "c_proj":
        leaf = "o" if role == "attention" or any("attn" in p for p in inner) else "proj"
    leaf = leaf.removesuffix("_proj")
    expert = any("expert" in p for p in inner) and "shared" not in "".join(inner)
    return (int(parts[layer]) if layer is not None else None), ("expert " if expert else "") + LEAVES.get(leaf, leaf)


def matrices(report: ResetEntry) -> dict[str, TensorEntry]:
    """Return the weight matrices of a reset report by name.

    Those left alone carry their own values as "after", an SFE of 0, and no spectrum after.
    """
    left_alone = [
        entry.model_copy(
            update={"sfe": 0.0, "dfi_after": entry.dfi_before, "norm_after": entry.norm_before, "sigma_after": None}
        )
        for entry in report.untouched
    ]
    return {entry.name: entry for entry in [*report.touched, *left_alone] if is_matrix(entry)}


def is_matrix(entry: TensorEntry) -> bool:
    """Check whether an entry is a weight matrix: by its role, or because its DfI was measured."""
    return len(entry.shape) == 2 and (entry.role in MATRIX_ROLES or entry.dfi_before is not None)


DECADES = 1.5
"""Reach of a logarithmic colour scale on either side of the median, in powers of ten."""

Grid = list[list[tuple[int | None, str]]]


class Reading(NamedTuple):
    """A number of one matrix."""

    name: str
    role: str
    value: float | None


def values(readings: Mapping[str, Sequence[Reading]]) -> list[float | None]:
    """Return the numbers alone."""
    return [reading.value for table in readings.values() for reading in table]


def heat_figure(
    readings: Mapping[str, Sequence[Reading]], *, log: bool, unit: str, same_scale: Iterable[float | None] = ()
) -> Figure | None:
    """Draw layer x part as a heat map with one variant for each label of the readings.

    Matrices outside the layers (a head) stand below as rows of their own. One colour scale holds for all variants, and
    for the `same_scale` values of other figures. Matrices that share a cell (the experts of a layer) are averaged; a
    cell without a positive value on a log scale is blank.
    """
    from plotly import graph_objects as go

    cells: dict[tuple[str, int | None, str], list[tuple[str, float | None]]] = {}
    for label, table in readings.items():
        for name, role, value in table:
            cells.setdefault((label, *parse_name(name, role)), []).append((name, value))
    layers = sorted({layer for _, layer, _ in cells if layer is not None})
    parts = list(dict.fromkeys(part for _, layer, part in cells if layer is not None)) or [""]
    outside = list(dict.fromkeys(part for _, layer, part in cells if layer is None))

    def drawable(numbers: Iterable[float | None]) -> list[float]:
        return [x for x in numbers if x is not None and (x > 0 or not log)]

    averages = {key: fmean(numbers) for key, cell in cells.items() if (numbers := drawable(x for _, x in cell))}
    if not averages:
        return None
    scale = math.log10 if log else float
    low, high = _colour_range([scale(x) for x in drawable([*averages.values(), *same_scale])], log)

    def patch(label: str, grid: Grid) -> Figure:
        keys = [[(label, *cell) for cell in line] for line in grid]
        return {
            "z": [short(scale(averages[k]) if k in averages else None for k in line) for line in keys],
            "text": [[number(averages[k]) if k in averages else "" for k in line] for line in keys],
            "customdata": [[_tip(cells.get(k, []), averages.get(k), unit) for k in line] for line in keys],
        }

    # A row below the layers has one cell as wide as the map, so plotly gets the edges of these cells, not the centres.
    width, below = len(parts), [len(layers) - 0.5 + 0.2 + i for i in range(len(outside) + 1)]
    few = len(layers) <= 16 and width <= 8
    look = {**HEAT_CELLS, "texttemplate": "%{text}" if few else None}
    traces = [go.Heatmap(x=list(range(width)), y=list(range(len(layers))), **look)] if layers else []
    traces += [go.Heatmap(x=[-0.5, width - 0.5], y=below, **look)] if outside else []
    grids: list[Grid] = [[[(layer, part) for part in parts] for layer in layers]] if layers else []
    grids += [[[(None, part)] for part in outside]] if outside else []
    variants = [{"label": label, "group": "", "data": [patch(label, grid) for grid in grids]} for label in readings]
    height = max(14, min(30, 560 // (len(layers) + len(outside))))
    named = layers[:: max(1, round(16 / height))]  # every layer, or every other one where rows are thin
    rows: dict[float, str] = {layers.index(layer): str(layer) for layer in named}
    rows |= {
        (top + bottom) / 2: escaped(part, 14) for (top, bottom), part in zip(pairwise(below), outside, strict=True)
    }
    bottom_edge = below[-1] if outside else len(layers) - 0.5
    layout = heat_layout([escaped(p, 14) for p in parts], rows, bottom_edge, (low, high), _bar(low, high, log))
    return figure(traces, variants, height=100 + height * (len(layers) + len(outside)), **layout)


def _colour_range(numbers: Sequence[float], log: bool) -> tuple[float, float]:
    """Return the ends of a colour scale for numbers, which are logarithms if `log`."""
    low, high = min(numbers), max(numbers) + 1e-9
    if log:  # a polar factor's DfI of 1e-12 or a head's of 1e9 would leave one colour for all the rest
        middle = median(numbers)
        low, high = max(low, middle - DECADES), min(high, middle + DECADES)
    return low, high


def _bar(low: float, high: float, log: bool) -> Figure:
    """Return a flat colour bar for below the map; its ticks are plain numbers also where colours are logarithmic."""
    bar: Figure = dict(BAR)
    if log:
        ticks = [*range(math.ceil(low), math.floor(high) + 1, max(1, math.ceil((high - low) / 5)))]
        values = [float(t) for t in ticks] if len(ticks) > 1 else [low, (low + high) / 2, high]
        bar |= {"tickvals": values, "ticktext": [number(10**t) for t in values]}
    return bar


def _tip(cell: Sequence[tuple[str, float | None]], average: float | None, unit: str) -> str:
    """Return the hover text of a cell: the names of its matrices and its number in full."""
    if not cell:
        return "no such matrix"
    name = escaped(cell[0][0], 60) if len(cell) == 1 else f"mean of {len(cell)}, {escaped(cell[0][0], 50)} …"
    return f"{name}<br>" + ("unchanged or not measured" if average is None else f"{unit} {average:.5g}")


def spectra_figure(tables: Mapping[str, Mapping[str, TensorEntry]], styles: Mapping[str, Style]) -> Figure | None:
    """Draw a matrix's singular values, every arm's after its reset over the grey ones before; one variant a matrix."""
    from plotly import graph_objects as go

    names = list(dict.fromkeys(n for table in tables.values() for n, entry in table.items() if entry.sigma_before))
    names.sort(key=lambda name: parse_name(name)[0] is None)  # open on a layer's matrix, not on the embedding
    entries = {name: [table[name] for table in tables.values() if name in table] for name in names}
    befores = {
        n: list(dict.fromkeys(tuple(short(e.sigma_before)) for e in entries[n] if e.sigma_before)) for n in names
    }
    most = max((len(b) for b in befores.values()), default=0)
    arms = [arm for arm, table in tables.items() if any(entry.sigma_after for entry in table.values())]
    if not names:
        return None
    grey = {"color": NEUTRAL, "width": 3, "dash": "dot"}
    traces = [
        go.Scatter(mode="lines", line=grey, hovertemplate="<b>before</b><br>σ %{y:.4g}<extra></extra>")
        for _ in range(most)
    ]
    for arm in arms:
        hover = f"<b>{escaped(arm)}</b><br>σ %{{y:.4g}}<extra></extra>"
        line = {"color": styles[arm].colour, "width": 2, "dash": styles[arm].dash}
        traces.append(go.Scatter(mode="lines", legendgroup=arm, line=line, hovertemplate=hover))
    variants: list[Figure] = []
    for name in names:
        ys: list[Sequence[float | None]] = [befores[name][i] if i < len(befores[name]) else () for i in range(most)]
        ys += [short(tables[arm][name].sigma_after or ()) if name in tables[arm] else () for arm in arms]
        variants.append(
            {"label": name, "group": _group(name), "data": [{"y": list(y), "x": ranks(len(y))} for y in ys]}
        )
    return figure(traces, variants, height=400, **_spectrum_axes(p["y"] for v in variants for p in v["data"]))


def _spectrum_axes(spectra: Iterable[Iterable[float | None]]) -> Figure:
    """Return the axes of spectra: rank from 0 to 1, singular values logarithmic."""
    positive = [s for spectrum in spectra for s in spectrum if s] or [1.0]
    title = {"title": {"text": "singular value"}}
    rank = {"title": {"text": "rank, from the largest"}, "tickformat": ".0%", "range": [0, 1]}
    return {"xaxis": rank, "yaxis": {**title, **log_axis(min(positive), max(positive))}}


def ranks(count: int) -> list[float]:
    """Return where `count` descending quantiles lie between the largest (0) and the smallest (1)."""
    return [round(i / max(count - 1, 1), 4) for i in range(count)]


def _group(name: str) -> str:
    """Name the heading a matrix is listed under."""
    layer, _ = parse_name(name)
    return "outside the layers" if layer is None else f"layer {layer}"


METRICS = {
    "dfi": "DfI",
    "sfe": "SFE",
    "cosine": "cosine with the other checkpoint",
    "norm": "Frobenius norm",
    "sigma_max": "largest singular value",
    "sigma_median": "median singular value",
    "sigma_min": "smallest singular value",
    "effective_rank": "effective rank",
}


def metric_figure(rows: Sequence[InspectedMatrix]) -> Figure | None:
    """Draw one heat map with a variant for each metric the rows carry; colours are logarithmic over a span of 20."""
    combined: Figure | None = None
    for key, label in METRICS.items():
        readings = [Reading(row.name, row.role or "", getattr(row, key)) for row in rows]
        numbers = [reading.value for reading in readings if reading.value is not None]
        log = bool(numbers) and min(numbers) > 0 and max(numbers) > 20 * min(numbers)
        heat = heat_figure({label: readings}, log=log, unit=label)
        if heat:
            variant = {**heat["variants"][0], "layout": {"coloraxis": heat["layout"]["coloraxis"]}}
            combined = combined or {**heat, "variants": []}
            combined["variants"].append(variant)
    return combined


def layer_spectra_figure(rows: Sequence[InspectedMatrix]) -> Figure | None:
    """Draw the spectra of one part over all layers, from dark (first layer) to light (last); one variant a part."""
    from plotly import colors
    from plotly import graph_objects as go

    parts: dict[str, list[tuple[str, list[float | None]]]] = {}
    for row in rows:
        if row.sigma:
            parts.setdefault(parse_name(row.name, row.role or "")[1], []).append((row.name, short(row.sigma)))
    if not parts:
        return None
    most = max(len(spectra) for spectra in parts.values())
    # Cividis' lightest third disappears on white, its darkest on black: the middle serves both.
    shades = colors.sample_colorscale("Plasma", [0.12 + 0.66 * i / max(most - 1, 1) for i in range(most)])
    traces = [
        go.Scatter(mode="lines", line={"color": c, "width": 2}, hovertemplate="%{text}<br>σ %{y:.4g}<extra></extra>")
        for c in shades
    ]
    variants: list[Figure] = []
    for part, spectra in parts.items():
        patches: list[Figure] = [{"x": [], "y": [], "text": ""}] * most
        for place, (name, sigma) in enumerate(spectra):
            # A part with few spectra (q: one a layer) is spread over the shades of the part with most (experts).
            shade = place * (most - 1) // max(len(spectra) - 1, 1)
            patches[shade] = {"x": ranks(len(sigma)), "y": sigma, "text": escaped(name, 60)}
        variants.append({"label": part, "group": "", "data": patches})
    return figure(traces, variants, height=420, **_spectrum_axes(p["y"] for v in variants for p in v["data"]))
