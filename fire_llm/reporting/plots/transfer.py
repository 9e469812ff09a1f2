"""Plot of a run's matrix: checkpoints × corpora."""

from __future__ import annotations

from collections.abc import Sequence

from fire_llm.core.atomic import AVERAGED
from fire_llm.reporting.plots.base import HEAT_CELLS, Figure, escaped, figure, heat_layout, short
from fire_llm.reporting.schema import EvaluationRow
from fire_llm.reporting.table import DASH

ROW_HEIGHT = 26
"""Pixels: a line of text and some air."""


def row_name(row: EvaluationRow) -> str:
    """Name a row's checkpoint for people: `second / fire`, `first, step 20 (best)`, `second / fire (EMA)`, `init`."""
    if row.phase is None:
        return row.checkpoint if "start" in row.labels else "init"
    name = " / ".join(filter(None, [row.phase, row.arm]))
    if AVERAGED in row.labels:
        return f"{name} (EMA)"
    if "final" not in row.labels:
        name += f", step {row.step}"
    return name + (" (best)" if "best" in row.labels else "")


def corpora_figure(rows: Sequence[EvaluationRow]) -> Figure | None:
    """Draw a heat map of checkpoints × corpora, a variant a seed; numbers are bits per byte.

    Colours are the distance to the best checkpoint of the column. They end at the worst trained checkpoint, because
    beside untrained weights all others would look the same.

    Args:
        rows: Of evaluation.json.
    """
    from plotly import graph_objects as go

    measured = [(row_name(row), row, row.bits_per_byte) for row in rows if row.bits_per_byte is not None]
    if not measured:
        return None
    corpora = list(dict.fromkeys(row.data for _, row, _ in measured))
    names = list(dict.fromkeys(name for name, *_ in measured))
    seeds: list[int | None] = list(dict.fromkeys(row.seed for _, row, _ in measured if row.seed is not None)) or [None]
    variants: list[Figure] = []
    worst = 0.0
    for seed in seeds:
        cells = {(name, row.data): (row, bits) for name, row, bits in measured if row.seed in (seed, None)}
        best = {c: min((b for (_, data), (_, b) in cells.items() if data == c), default=0.0) for c in corpora}
        apart = {key: bits - best[key[1]] for key, (_, bits) in cells.items()}
        worst = max([worst, *(apart[key] for key, (row, _) in cells.items() if row.phase is not None)])
        grid = [[(name, c) for c in corpora] for name in names]
        patch = {
            "z": [short(apart.get(key) for key in line) for line in grid],
            "text": [[f"{cells[key][1]:.4f}" if key in cells else "" for key in line] for line in grid],
            "customdata": [[_tip(*cells[key], apart[key]) if key in cells else "" for key in line] for line in grid],
        }
        variants.append({"label": str(seed), "group": "", "data": [patch]})
    cells = go.Heatmap(x=list(range(len(corpora))), y=list(range(len(names))), texttemplate="%{text}", **HEAT_CELLS)
    rows_by_y: dict[float, str] = {y: escaped(name, 40) for y, name in enumerate(names)}
    layout = heat_layout([escaped(c, 24) for c in corpora], rows_by_y, len(names) - 0.5, (0, worst or 1.0))
    return figure([cells], variants, height=100 + ROW_HEIGHT * len(names), **layout)


def _tip(row: EvaluationRow, bits: float, apart: float) -> str:
    """Return the hover text of a cell: checkpoint, corpus and numbers in full."""
    error = (row.se or {}).get("bits_per_byte")
    exact = f"{bits:.5f}" + ("" if error is None else f" ± {error:.5f}")
    where = f"{escaped(row.checkpoint, 60)} on {escaped(row.data, 40)}"
    perplexity = DASH if row.perplexity is None else f"{row.perplexity:.5g}"
    return f"{where}<br>{exact} bits per byte, {apart:.5f} above the best<br>perplexity {perplexity}"
