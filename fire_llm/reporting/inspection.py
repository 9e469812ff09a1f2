"""What `fire-llm inspect` found, by part, by layer and by matrix: in a terminal and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fire_llm.core.console import show_table
from fire_llm.core.terminal import open_console
from fire_llm.reporting.html import Block, drawn, numbered
from fire_llm.reporting.plots.matrices import METRICS, layer_spectra_figure, metric_figure, parse_name
from fire_llm.reporting.schema import InspectedMatrix
from fire_llm.reporting.table import DASH, Row, Table
from fire_llm.reporting.tables import check_page, write_page

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = {
    "sigma_min": "σ min", "sigma_median": "σ median", "sigma_max": "σ max", "dfi": "DfI", "effective_rank": "eff. rank",
    "norm": "norm", "sfe": "SFE", "cosine": "cosine",
}  # fmt: skip
"""Figures of a matrix, and what stands above them in a terminal."""

TOGETHER: dict[str, Callable[[list[float]], float]] = {"sigma_min": min, "sigma_max": max, "sfe": sum}
"""How the figures of several matrices become one; the others by their median."""


def print_inspection(found: Mapping[str, Any], every: bool, console: Console | None = None) -> None:
    """Print what was measured: of each part over the layers, of each layer over the parts, of each matrix.

    Args:
        found: What `Inspection.to_dict` returns.
        every: List each matrix in a terminal too; in a file or a pipe they are always listed.
        console: Where to; standard output by default.
    """
    out = console or open_console()
    for line in about(found):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    rows = [InspectedMatrix.model_validate(row) for row in found["rows"]]
    keys = [key for key in HEADINGS if any(getattr(row, key) is not None for row in rows)]
    listed = every or not out.is_terminal
    for table in (
        _grouped(rows, keys, "part"),
        _grouped(rows, keys, "layer"),
        *([_each(rows, keys)] if listed else []),
    ):
        show_table(out, table.rich(dict.fromkeys(table.names, 8)))
    if not listed:
        out.print(f"--all lists each of the {len(rows)} matrices", markup=False, highlight=False)
    said = "Of several matrices: the least σ min, the largest σ max, the sum of SFE, medians of the rest."
    out.print(said, markup=False, highlight=False, soft_wrap=True)


def about(found: Mapping[str, Any]) -> list[str]:
    """Return what was measured, and what it was compared with, as lines of text."""
    lines = [f"checkpoint {_described(found['checkpoint'])}"]
    if found["against"] is not None:
        lines.append(f"against {_described(found['against'])}: SFE and cosine compare the two")
    return lines


def _described(checkpoint: Mapping[str, Any]) -> str:
    revision = f", revision {checkpoint['revision']}" if checkpoint["revision"] else ""
    return f"{checkpoint['name']}{revision}, weights' SHA-256 {checkpoint['sha256'][:16]}"


def _grouped(rows: Sequence[InspectedMatrix], keys: Sequence[str], by: str) -> Table:
    """Return a table of parts over all layers, or of layers over all parts of a role."""
    groups: dict[tuple[str, str], list[InspectedMatrix]] = {}
    for row in rows:
        layer, part = parse_name(row.name, row.role or "")
        other = part if by == "part" else DASH if layer is None else str(layer)
        groups.setdefault((row.role or "", other), []).append(row)
    listed = [
        Row((role, other), (str(len(members)), *(_figure(key, members) for key in keys)))
        for (role, other), members in groups.items()
    ]
    return Table(f"By {by}", ("matrices", *(HEADINGS[key] for key in keys)), tuple(listed), ("role", by))


def _each(rows: Sequence[InspectedMatrix], keys: Sequence[str]) -> Table:
    """Return a table of all matrices."""
    listed = tuple(
        Row((row.name,), ("×".join(map(str, row.shape)), *(_figure(k, [row]) for k in keys))) for row in rows
    )
    return Table("Each matrix", ("shape", *(HEADINGS[key] for key in keys)), listed, ("matrix",))


def _figure(key: str, rows: Iterable[InspectedMatrix]) -> str:
    known = [value for row in rows if (value := getattr(row, key)) is not None]
    return _short(TOGETHER.get(key, median)(known)) if known else DASH


def inspect_page(rows: Sequence[Mapping[str, object]], output: Path, title: str, said: Sequence[str] = ()) -> Path:
    """Write one self-contained HTML page about a checkpoint's matrices: heat maps of layer x part, spectra, a table.

    Args:
        rows: a mapping a matrix, with the keys of `InspectedMatrix`; `sfe` and `cosine` where two checkpoints are
            compared. Missing values are None or absent.
        output: the file, or an existing folder in which `report.html` is written.
        title: heading of the page.
        said: Lines below it, such as those of `about`.

    Raises:
        UserError: where the file cannot be written, or plotly is not installed.
    """
    check_page()
    found = [InspectedMatrix.model_validate(row) for row in rows]
    shades = "From the largest to the smallest; from dark (first layer) to light (last)."
    blocks = [
        Block("Matrices by layer and part", "", drawn(("", metric_figure(found))), "metric"),
        Block("Singular values", shades, drawn(("", layer_spectra_figure(found))), "part"),
    ]
    keys = [key for key in METRICS if any(getattr(matrix, key) is not None for matrix in found)]
    table = [
        Row((m.name, m.role or ""), (" × ".join(map(str, m.shape)), *(_short(getattr(m, key)) for key in keys)))
        for m in found
    ]
    columns = ("shape", *(METRICS[key] for key in keys))
    return write_page(
        "inspect.html.j2",
        output,
        title=title,
        said=said,
        blocks=numbered(blocks, "m"),
        matrices=Table("", columns, tuple(table), ("matrix", "role")),
    )


def _short(value: float | None) -> str:
    """Write a number with four significant digits, a dash where there is none."""
    return DASH if value is None else f"{value:.4g}"
