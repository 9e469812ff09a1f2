"""Plot of a run's matrix: checkpoints × corpora."""

from __future__ import annotations

from collections.abc import Sequence

from fire_llm.reporting.plots.base import BAR, Json, escaped, figure, short

ROW_HEIGHT = 26
"""Pixels: a line of text and some air."""


def row_name(row: Json) -> str:
    """Name a row's checkpoint for people: `second / fire`, `first, step 20 (best)`, `init`."""
    labels = row["labels"]
    if row["phase"] is None:
        return row["checkpoint"] if "start" in labels else "init"
    name = " / ".join(filter(None, [row["phase"], row["arm"]]))
    if "final" not in labels:
        name += f", step {row['step']}"
    return name + (" (best)" if "best" in labels else "")


def corpora_figure(rows: Sequence[Json]) -> Json | None:
    """Draw a heat map of checkpoints × corpora, a variant a seed; numbers are bits per byte.

    Colours are the distance to the best checkpoint of the column, all alike from the worst trained one on: beside the
    step-0 weights all others would look the same.

    Args:
        rows: Of evaluation.json.
    """
    from plotly import graph_objects as go

    rows = [row for row in rows if row.get("bits_per_byte") is not None]
    if not rows:
        return None
    corpora = list(dict.fromkeys(row["data"] for row in rows))
    names = list(dict.fromkeys(map(row_name, rows)))
    seeds = list(dict.fromkeys(row["seed"] for row in rows if row["seed"] is not None)) or [None]
    variants, worst = [], 0.0
    for seed in seeds:
        cells = {(row_name(row), row["data"]): row for row in rows if row["seed"] in (seed, None)}
        best = {c: min(row["bits_per_byte"] for (_, d), row in cells.items() if d == c) for c in corpora}
        apart = {key: row["bits_per_byte"] - best[key[1]] for key, row in cells.items()}
        worst = max([worst, *(apart[key] for key, row in cells.items() if row["phase"] is not None)])
        grid = [[(name, c) for c in corpora] for name in names]
        patch = {
            "z": [short(apart.get(key) for key in line) for line in grid],
            "text": [[f"{cells[key]['bits_per_byte']:.4f}" if key in cells else "" for key in line] for line in grid],
            "customdata": [[_tip(cells[key], apart[key]) if key in cells else "" for key in line] for line in grid],
        }
        variants.append({"label": str(seed), "group": "", "data": [patch]})
    heat = go.Heatmap(
        x=list(range(len(corpora))),
        y=list(range(len(names))),
        z=[],
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
        texttemplate="%{text}",
        textfont={"size": 12},
        hovertemplate="%{customdata}<extra></extra>",
    )
    axis: Json = {"showgrid": False, "showline": False, "ticks": ""}
    return figure(
        [heat],
        variants,
        height=100 + ROW_HEIGHT * len(names),
        coloraxis={"cmin": 0, "cmax": worst or 1.0, "colorscale": "Cividis", "colorbar": BAR},
        xaxis={
            **axis,
            "side": "top",
            "tickvals": list(range(len(corpora))),
            "ticktext": [escaped(c, 24) for c in corpora],
        },
        yaxis={
            **axis,
            "range": [len(names) - 0.5, -0.5],
            "tickvals": list(range(len(names))),
            "ticktext": [escaped(name, 40) for name in names],
        },
    )


def _tip(row: Json, apart: float) -> str:
    """Say what a cell stands for, in full."""
    error = (row.get("se") or {}).get("bits_per_byte")
    bits = f"{row['bits_per_byte']:.5f}" + ("" if error is None else f" ± {error:.5f}")
    where = f"{escaped(row['checkpoint'], 60)} on {escaped(row['data'], 40)}"
    return f"{where}<br>{bits} bits per byte, {apart:.5f} above the best<br>perplexity {row['perplexity']:.5g}"
