"""Plots of arms: losses, steps saved, plasticity, retention, norms; and the curve of a phase without arms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from fire_llm.reporting.plots.base import COLOURS, NEUTRAL, Figure, Style, band, escaped, figure, line, log_axis, short
from fire_llm.reporting.schema import Arm, CurveEntry, Run, TensorEntry

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
"""Captions of the measures of plasticity that are drawn, by heading."""


def series(curve: Sequence[CurveEntry], corpus: str | None = None, averaged: bool = False) -> list[tuple[float, float]]:
    """Return (tokens, NLL) of the evaluations on a corpus, or (tokens, training loss) where `corpus` is None.

    Args:
        curve: Of a run or an arm.
        corpus: Name of the corpus.
        averaged: Of the weights' moving average.
    """
    if corpus is None:
        losses = [(entry.tokens, entry.train_loss) for entry in curve if not averaged]
    elif averaged:
        losses = [(entry.tokens, entry.ema[corpus].nll) for entry in curve if corpus in entry.ema]
    else:
        losses = [(entry.tokens, entry.eval[corpus].nll) for entry in curve if corpus in entry.eval]
    return [(tokens, loss) for tokens, loss in losses if loss is not None]


def thin(points: list[tuple[float, float]], most: int = 250) -> list[tuple[float, float]]:
    """Average neighbouring points until at most `most` remain."""
    group = math.ceil(len(points) / most) or 1
    chunks = [points[i : i + group] for i in range(0, len(points), group)]
    return [(fmean(t for t, _ in chunk), fmean(v for _, v in chunk)) for chunk in chunks]


def loss_figure(
    arms: Mapping[str, Arm], corpus: str | None, styles: Mapping[str, Style], height: int = 380
) -> Figure | None:
    """Draw loss against tokens, a line an arm, seeds as a min-max band; None where nothing was measured.

    The axis opens on what follows the first third of training: a full reset starts at the logarithm of the
    vocabulary and would flatten everything else.
    """
    bands, lines, settled, lowest = [], [], [], []
    for arm, entry in arms.items():
        points = thin(series(entry.curve, corpus))
        if not points:
            continue
        style, label = styles[arm], escaped(arm)
        per_seed: dict[float, list[float]] = {}
        for run in entry.runs:
            for tokens, loss in thin(series(run.curve, corpus)):
                per_seed.setdefault(tokens, []).append(loss)
        spread = [(t, min(v), max(v)) for t, v in sorted(per_seed.items()) if len(v) > 1]
        if spread:
            tokens_at, low, high = zip(*spread, strict=True)
            bands.append(band(tokens_at, low, high, arm, style))
        if corpus is None:
            what, look = "training loss %{y:.4f}", {"mode": "lines", "line_width": 1.5}
        else:
            perplexities = [round(math.exp(min(v, 700.0)), 4) for _, v in points]
            what, look = "NLL %{y:.4f} · perplexity %{customdata:.2f}", {"customdata": perplexities}
        hover = f"<b>{label}</b><br>{what}<br>%{{x:.4s}} tokens"
        lines.append(line(_rounded(points), arm, style, hover, name=label, **look))
        if averaged := thin(series(entry.curve, corpus, averaged=True)):
            name, look = f"{label} (EMA)", {"mode": "lines", "line_dash": "dot", "line_width": 1.5}
            hover = f"<b>{name}</b><br>NLL %{{y:.4f}}<br>%{{x:.4s}} tokens"
            lines.append(line(_rounded(averaged), arm, style, hover, name=name, **look))
            lowest.append(min(v for _, v in averaged))
        after = [v for t, v in points if t >= points[-1][0] / 3]
        settled.append(max(after))
        lowest.append(min(v for _, v in points))
    if not lines:
        return None
    pad = 0.05 * (max(settled) - min(lowest)) or 0.1
    return figure(
        bands + lines,
        height=height,
        xaxis={"title": {"text": "tokens seen in this phase"}, "tickformat": "~s", "rangemode": "tozero"},
        yaxis={"title": {"text": "nats per token"}, "range": [min(lowest) - pad, max(settled) + pad]},
    )


def _rounded(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Round losses to five decimals, which no screen resolves."""
    return [(x, round(loss, 5)) for x, loss in points]


def measure_figure(arms: Mapping[str, Arm], key: str, styles: Mapping[str, Style]) -> Figure | None:
    """Draw a measure of plasticity against optimizer steps, a line an arm; None where no arm has it.

    Args:
        arms: By name; the measures are in the entries of their curves.
        key: One of the measures.
        styles: Look of every arm.
    """
    traces = []
    for arm, entry in arms.items():
        measured = [(e.step, getattr(e.diagnostics, key)) for e in entry.curve if e.diagnostics]
        points = [(step, float(f"{value:.4g}")) for step, value in measured if value is not None]
        if points:
            hover = f"<b>{escaped(arm)}</b><br>%{{y:.4g}} after %{{x}} steps"
            traces.append(line(points, arm, styles[arm], hover))
    if not traces:
        return None
    shares = {"tickformat": ".1%", "rangemode": "tozero"} if key.endswith("_share") else {}
    return figure(traces, height=300, xaxis={"title": {"text": "optimizer steps in this phase"}}, yaxis=shares)


def phase_figure(runs: Sequence[Run]) -> Figure | None:
    """Draw a phase without arms: its training loss in grey and, a colour a corpus, its evaluations; one line a seed."""
    from plotly import graph_objects as go

    corpora = list(dict.fromkeys(c for run in runs for e in run.curve for c in e.eval))
    colours: dict[str | None, str] = {None: NEUTRAL, **{c: COLOURS[i % len(COLOURS)] for i, c in enumerate(corpora)}}
    traces = []
    for number, run in enumerate(runs):
        for corpus, colour in colours.items():
            points = thin(series(run.curve, corpus))
            label = "training loss" if corpus is None else escaped(corpus)
            line = {"color": colour, "width": 1.2 if corpus is None else 2}
            hover = f"<b>{label}</b>, seed {run.seed}<br>%{{y:.4f}} at %{{x:.4s}} tokens<extra></extra>"
            mode = "lines" if corpus is None else "lines+markers"
            look = {"mode": mode, "line": line, "showlegend": number == 0, "hovertemplate": hover, "name": label}
            if points:
                traces.append(go.Scatter(x=[t for t, _ in points], y=[round(v, 5) for _, v in points], **look))
    if not traces:
        return None
    return figure(
        traces,
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"title": {"text": "tokens seen in this phase"}, "tickformat": "~s"},
        yaxis={"title": {"text": "nats per token"}},
    )


def steps_figure(
    saved: Mapping[str, tuple[float | None, Sequence[float]]], styles: Mapping[str, Style]
) -> Figure | None:
    """Draw the fraction of steps each arm saves: a bar from the mean curve, a dot a seed, words if it never arrives."""
    from plotly import graph_objects as go

    if not saved:
        return None
    traces: list[Any] = []
    for row, (arm, (value, seeds)) in enumerate(saved.items()):
        label = "not reached" if value is None else f"{value:.0%}"
        look = {"legendgroup": arm, "hovertemplate": f"<b>{escaped(arm)}</b>: {label}<extra></extra>"}
        traces.append(
            go.Bar(x=[value or 0], y=[row], orientation="h", width=0.62, marker={"color": styles[arm].colour}, **look)
        )
        several = list(seeds) if len(seeds) > 1 else []
        dots = {"color": "#fff", "size": 7, "line": {"width": 1.5, "color": "#333"}}
        hover = {"legendgroup": arm, "hovertemplate": "one seed: %{x:.1%}<extra></extra>"}
        traces.append(go.Scatter(x=short(several), y=[row] * len(several), mode="markers", marker=dots, **hover))
        end = max(0.0, value or 0.0, *several) + 0.015
        words = {"mode": "text", "textposition": "middle right", "cliponaxis": False, "hoverinfo": "skip"}
        traces.append(go.Scatter(x=[end], y=[row], text=[label], legendgroup=arm, **words))
    values = [v for value, seeds in saved.values() for v in (value or 0, *seeds)]
    ticks = {"tickvals": list(range(len(saved))), "ticktext": [escaped(a, 20) for a in saved]}
    reach = [min(0.0, *values) * 1.25, max(0.05, *values) * 1.25]
    return figure(
        traces,
        height=70 + 34 * len(saved),
        barmode="overlay",
        xaxis={"tickformat": ".0%", "range": reach, "title": {"text": "fewer steps"}},
        yaxis={**ticks, "range": [len(saved) - 0.4, -0.6], "showgrid": False},
    )


def retention_figure(
    points: Mapping[str, Sequence[tuple[float, float]]], styles: Mapping[str, Style], new: str
) -> Figure | None:
    """Draw plasticity against retention, (NLL on the new corpus, forgetting): an arm's mean large, its seeds small."""
    from plotly import graph_objects as go

    traces = []
    for arm, pairs in points.items():
        if not pairs:
            continue
        style, label = styles[arm], escaped(arm)
        hover = f"<b>{label}</b>%{{text}}<br>{escaped(new)} %{{x:.4f}}<br>forgetting %{{y:+.4f}}<extra></extra>"
        mean = (fmean(x for x, _ in pairs), fmean(y for _, y in pairs))
        rows = [*(pairs if len(pairs) > 1 else ()), mean]
        small = len(rows) - 1
        marker = {
            "color": style.colour,
            "symbol": style.symbol,
            "size": [6] * small + [14],
            "opacity": [0.7] * small + [0.85],
        }
        text = [", one seed"] * small + [""]
        look = {"mode": "markers", "marker": marker, "text": text, "legendgroup": arm, "hovertemplate": hover}
        traces.append(go.Scatter(x=[x for x, _ in rows], y=[y for _, y in rows], **look))
    if not traces:
        return None
    return figure(
        traces,
        height=400,
        xaxis={"title": {"text": f"NLL on {escaped(new)} (left is more plastic)"}, "showgrid": True},
        yaxis={"title": {"text": "forgetting (low retains more)"}, "tickformat": "+.2f"},
    )


def norms_figure(matrices: Mapping[str, Sequence[TensorEntry]], styles: Mapping[str, Style]) -> Figure | None:
    """Draw Frobenius norms after the reset against those before, with the line where nothing changes."""
    from plotly import graph_objects as go

    traces, ends = [], []
    for arm, entries in matrices.items():
        pairs = [(e.norm_before, e.norm_after, e.name) for e in entries if e.norm_before and e.norm_after]
        if not pairs:
            continue
        ends += [v for before, after, _ in pairs for v in (before, after)]
        hover = f"<b>{escaped(arm)}</b><br>%{{text}}<br>%{{x:.4g}} → %{{y:.4g}}<extra></extra>"
        marker = {"color": styles[arm].colour, "symbol": styles[arm].symbol, "size": 8, "opacity": 0.8}
        look = {"mode": "markers", "marker": marker, "hovertemplate": hover, "legendgroup": arm}
        text = [escaped(n, 60) for _, _, n in pairs]
        traces.append(go.Scatter(x=short(b for b, _, _ in pairs), y=short(a for _, a, _ in pairs), text=text, **look))
    if not ends:
        return None
    line = [min(ends) * 0.85, max(ends) * 1.18]
    same = go.Scatter(
        x=line, y=line, mode="lines", line={"color": NEUTRAL, "width": 1, "dash": "dot"}, hoverinfo="skip"
    )
    log = log_axis(line[0], line[1], steps=(1, 2, 5))
    x, y = {"title": {"text": "norm before"}, **log}, {"title": {"text": "norm after"}, **log}
    return figure([same, *traces], height=400, xaxis=x, yaxis=y)
