"""Draw the plots of docs/results.md as SVG; the same numbers give the same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean
from typing import Any

from fire_llm.core.errors import UserError
from fire_llm.reporting.comparison import BASE, Comparison, evaluations, paired_interval
from fire_llm.reporting.plots.base import Style, palette

WIDTH, HEIGHT = 340, 250
"""Pixels of the inside of a panel."""
LEFT, TOP, RIGHT, BOTTOM = 62, 34, 14, 44
DASHES = {"solid": "", "dash": ' stroke-dasharray="7 4"', "dot": ' stroke-dasharray="2 3"'}
DASHES["dashdot"] = ' stroke-dasharray="8 3 2 3"'
LETTER = 6.6
"""About how many pixels wide a letter of the legend is."""


@dataclass
class Line:
    """One arm, or one family of arms."""

    name: str
    points: list[tuple[float, float]]
    labels: Sequence[str] = ()
    bars: Sequence[tuple[float, float]] = ()
    """Half intervals of each point, along x and along y."""


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: list[Line]
    within: tuple[float, float, float, float]
    """The limits of the axes: lowest and highest x, lowest and highest y."""
    log: bool = False
    zeros: tuple[bool, bool] = field(default=(False, False))
    """Whether a line is drawn at x = 0, and at y = 0."""
    rows: Sequence[str] = ()
    """Names for y = 0, 1, … instead of numbers."""


def ticks(low: float, high: float) -> list[float]:
    """Return at most seven round numbers between two."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of every power of ten between two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [s * 10.0**p for p in powers for s in (1, 2, 5) if low <= s * 10.0**p <= high]


def written(value: float) -> str:
    """Return a number of an axis: 500 k, 2 M, −0.05."""
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{round(value, 10):g}".replace("-", "−")


def svg(rows: list[list[Panel]], styles: dict[str, Style]) -> str:
    """Return panels in rows, with a legend below.

    Raises:
        UserError: There are no panels.
    """
    if not any(rows):
        raise UserError("there is nothing to draw: no arm has what this plot shows")
    across, down = max(map(len, rows)), len(rows)
    wide, high = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    shown = {line.name for row in rows for panel in row for line in panel.lines}
    legend, x, y = [], 12.0, down * high + 18
    for name, style in styles.items():
        if name not in shown:
            continue
        length = 44 + LETTER * len(name)
        if x + length > across * wide:
            x, y = 12.0, y + 20
        legend.append(f'<path d="M{x:.0f} {y - 4}h26"{stroke(style)}/>{mark(style, x + 13, y - 4)}')
        legend.append(text(x + 32, y, name, "start"))
        x += length
    parts = [part for j, row in enumerate(rows) for i, p in enumerate(row) for part in drawn(p, styles, i, j)]
    size = f'width="{across * wide}" height="{y + 14}" viewBox="0 0 {across * wide} {y + 14}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, *legend, "</svg>"]) + "\n"


def stroke(style: Style) -> str:
    return f' fill="none" stroke="{style.colour}" stroke-width="1.6"{DASHES[style.dash]}'


def mark(style: Style, x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{style.colour}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def drawn(panel: Panel, styles: dict[str, Style], i: int, j: int) -> list[str]:
    """Return the elements of a panel in column i of row j."""
    x0, y0 = i * (LEFT + WIDTH + RIGHT) + LEFT, j * (TOP + HEIGHT + BOTTOM) + TOP
    left, right, low, high = panel.within
    scale: Callable[[float], float] = math.log if panel.log else float

    def at(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - scale(left)) / (scale(right) - scale(left))
        return x0 + WIDTH * across, y0 + HEIGHT * (1 - (y - low) / (high - low))

    parts = [f'<clipPath id="c{i}-{j}"><rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}"/></clipPath>']
    parts.append(text(x0 + WIDTH / 2, y0 - 12, panel.title, more=' font-weight="bold"'))
    for tick in log_ticks(left, right) if panel.log else ticks(left, right):
        x = at(tick, low)[0]
        shade = "#444" if panel.zeros[0] and abs(tick) < 1e-12 else "#ddd"
        parts.append(f'<path d="M{x:.1f} {y0}v{HEIGHT}" stroke="{shade}"/>' + text(x, y0 + HEIGHT + 16, written(tick)))
    for number, name in enumerate(panel.rows):
        y = at(right, number)[1]
        parts.append(f'<path d="M{x0} {y:.1f}h{WIDTH}" stroke="#eee"/>' + text(x0 - 6, y + 4, name, "end"))
    for tick in () if panel.rows else ticks(low, high):
        y = at(right, tick)[1]
        shade = "#444" if panel.zeros[1] and abs(tick) < 1e-12 else "#ddd"
        parts.append(f'<path d="M{x0} {y:.1f}h{WIDTH}" stroke="{shade}"/>' + text(x0 - 6, y + 4, written(tick), "end"))
    parts.append(f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
    parts.append(text(x0 + WIDTH / 2, y0 + HEIGHT + 34, panel.x))
    turned = f' transform="rotate(-90 {x0 - 48} {y0 + HEIGHT / 2:.0f})"'
    parts.append(text(x0 - 48, y0 + HEIGHT / 2, panel.y, more=turned))
    parts.append(f'<g clip-path="url(#c{i}-{j})">')
    for line in panel.lines:
        style, places = styles[line.name], [at(*point) for point in line.points]
        parts.append(f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"{stroke(style)}/>')
        for (x, y), (dx, dy) in zip(line.points, line.bars, strict=False):
            ends = [(at(x - dx, y), at(x + dx, y)), (at(x, y - dy), at(x, y + dy))]
            bars = "".join(f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" for (a, b), (c, d) in ends)
            parts.append(f'<path d="{bars}" stroke="{style.colour}" stroke-width="1" opacity="0.35"/>')
        if line.labels:
            parts += [mark(style, *place) for place in places]
            own = f' fill="{style.colour}" stroke="white" stroke-width="3" paint-order="stroke"'
            parts += [text(x + 5, y - 5, w, "start", own) for (x, y), w in zip(places, line.labels, strict=True)]
    return [*parts, "</g>"]


# ---- what is drawn


def bare(arm: str) -> str:
    """Return an arm's name without its warm start."""
    return arm.partition("@")[0]


def starts(comparison: Comparison) -> dict[str, list[str]]:
    """Return the arms of each warm start."""
    by_start: dict[str, list[str]] = {}
    for arm in comparison.arms:
        by_start.setdefault(arm.partition("@")[2], []).append(arm)
    return by_start


def seeds_of(comparison: Comparison, arm: str) -> set[int]:
    return {run.seed for run in comparison.runs(arm)}


def looks(comparison: Comparison) -> dict[str, Style]:
    return palette([*dict.fromkeys(map(bare, comparison.arms))], {bare(arm) for arm in comparison.bases})


def spanned(values: Sequence[float], least: float = 0.0) -> tuple[float, float]:
    """Return a range that holds all values, with a margin of at least `least`."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), least)
    return low - room, high + room


def panels(comparison: Comparison, difference: bool) -> str:
    """Return a row for each corpus and a panel for each warm start: the arms' mean NLL, or that minus their base's."""
    rows = []
    for corpus in comparison.corpora:
        row, inner = [], []
        for start, arms in starts(comparison).items():
            lines = []
            for arm in arms:
                base = comparison.reference(arm, BASE)
                if difference and base and seeds_of(comparison, arm) != seeds_of(comparison, base):
                    continue  # the two means are over different seeds
                theirs = dict(evaluations(comparison.arms[base].curve, corpus)) if base else {}
                tokens = {entry.step: entry.tokens for entry in comparison.arms[arm].curve}
                measured = evaluations(comparison.arms[arm].curve, corpus)
                points = [(tokens[step], nll, step) for step, nll in measured if step]
                if difference:
                    points = [(x, nll - theirs[step], step) for x, nll, step in points if step in theirs]
                if points:
                    lines.append(Line(bare(arm), [(x, y) for x, y, _ in points]))
                    # The first losses after a reset are far off the others and do not set the limits of the axis.
                    inner += [y for x, y, _ in points if x >= points[-1][0] * (0.4 if difference else 0.05)]
            title = f"{corpus}, from {start}" if start else corpus
            name = "NLL less base's, nats a token" if difference else "NLL, nats a token"
            row.append((title, name, lines))
        row = [panel for panel in row if panel[2]]
        if row:
            xs = [x for _, _, lines in row for line in lines for x, _ in line.points]
            within = (min(xs), max(xs) * 1.02, *spanned([*inner, *([0.0] if difference else [])], 1e-3))
            rows.append([Panel(t, "tokens", n, ls, within, True, (False, difference)) for t, n, ls in row])
    return svg(rows, looks(comparison))


def trade_off(comparison: Comparison) -> str:
    """Return a panel for each warm start: differences to base on old and new corpus, a line for each family of arms."""
    found: dict[str, dict[str, list[tuple[float, str, tuple[float, float], tuple[float, float]]]]] = {}
    for start, arms in starts(comparison).items():
        for arm in arms:
            base = comparison.reference(arm, BASE)
            if arm == base or comparison.methods(arm) == ["full_reset"] or not comparison.new or not comparison.first:
                continue
            pairs = [comparison.differences(arm, base, corpus) for corpus in (comparison.first, comparison.new)]
            if all(pairs):
                halves = [(i[1] - i[0]) / 2 if (i := paired_interval(pair)) else 0.0 for pair in pairs]
                strength = re.fullmatch(r"(.+?)-(\d*\.?\d+)", bare(arm))
                family, label = strength.groups() if strength else (bare(arm), "")
                place = (fmean(pairs[0]), fmean(pairs[1]))
                of_family = found.setdefault(start, {}).setdefault(family, [])
                of_family.append((float(label or "inf"), label, place, (halves[0], halves[1])))
    families = [*dict.fromkeys(family for own in found.values() for family in own)]
    rows = []
    for start, own in found.items():
        lines = []
        for family in own:
            points = sorted(own[family])
            lines.append(Line(family, [p[2] for p in points], [p[1] for p in points], [p[3] for p in points]))
        around = [[0.0, *(p[axis] for line in lines for p in line.points)] for axis in (0, 1)]
        title = f"against base, from {start}" if start else "against base"
        within = (*spanned(around[0], 1e-3), *spanned(around[1], 1e-3))
        axes = (f"{comparison.first} (old), nats a token", f"{comparison.new} (new), nats a token")
        rows.append(Panel(title, *axes, lines, within, zeros=(True, True)))
    return svg([rows], palette(families))


def against_base(tables: Mapping[str, Mapping[str, Any]], across: int = 2) -> str:
    """Return a panel for each table with a column `vs base`: the difference of each row, with half its interval."""
    panels = []
    for name, table in tables.items():
        column = next((i for i, head in enumerate(table["columns"]) if head.endswith("vs base")), None)
        cells = [(str(row[0]), row[column]) for row in table["rows"] if column is not None]
        known = [(arm, float(c["mean"]), float(c["half"])) for arm, c in cells if isinstance(c, dict) and "half" in c]
        if known:
            known.reverse()  # the first at the top
            lines = [Line(BAR, [(mean, i)], [""], [(half, 0.0)]) for i, (_, mean, half) in enumerate(known)]
            around = spanned([0.0, *(mean for _, mean, _ in known)], 0.5)
            within = (*around, -0.6, len(known) - 0.4)
            panels.append(
                Panel(name, "less base's", "", lines, within, zeros=(True, False), rows=[k[0] for k in known])
            )
    return svg([panels[i : i + across] for i in range(0, len(panels), across)], palette([BAR]))


BAR = "difference to base, paired by seed, with its 95 % interval"
TABLE_PLOTS: dict[str, tuple[Callable[[Mapping[str, Mapping[str, Any]]], str], str]] = {
    "against-base": (
        against_base,
        "Mean difference to base over the seeds, with its 95 % interval, which may reach beyond the panel.",
    )
}
"""The same for studies that keep only tables."""
PLOTS: dict[str, tuple[Callable[[Comparison], str], str]] = {
    "curves": (lambda of: panels(of, False), "Mean NLL over the seeds against tokens, logarithmic."),
    "differences": (
        lambda of: panels(of, True),
        "Mean NLL less that of base at the same tokens, logarithmic: below zero an arm is ahead, and where lines cross "
        "one overtakes another. An arm with other seeds than base is left out.",
    ),
    "trade-off": (
        trade_off,
        "Difference to base on the old corpus (right: more is lost) and on the new one (down: more is learned), with "
        "half 95 % intervals; points by strength.",
    ),
}
"""By the name in a placeholder: the function that draws the plot, and its caption."""
