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
"""The heading of each measure in a terminal."""

TOGETHER: dict[str, Callable[[list[float]], float]] = {"sigma_min": min, "sigma_max": max, "sfe": sum}
"""How one number stands for several matrices; for the other measures it is the median."""


def print_inspection(found: Mapping[str, Any], every: bool, console: Console | None = None) -> None:
    """Print the measures of each part over all layers, of each layer over all parts, and of each matrix.

    Args:
        found: What `Inspection.to_dict` returns.
        every: List each matrix in a terminal too; in a file or a pipe they are always listed.
        console: Where to print; standard output by default.
    """
    out = console or open_console()
    for line in about(found):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    rows = [InspectedMatrix.model_validate(row) for row in found["rows"]]
    keys = [key for key in HEADINGS if any(getattr(row, key) is not None for row in rows)]
    tables = [_grouped(rows, keys, "part"), _grouped(rows, keys, "layer")]
    list_each = every or not out.is_terminal
    if list_each:
        tables.append(_each(rows, keys))
    for table in tables:
        show_table(out, table.rich(dict.fromkeys(table.names, 8)))
    if not list_each:
        out.print(f"--all lists each of the {len(rows)} matrices", markup=False, highlight=False)
    note = "Of several matrices: the least σ min, the largest σ max, the sum of SFE, medians of the rest."
    out.print(note, markup=False, highlight=False, soft_wrap=True)


def about(found: Mapping[str, Any]) -> list[str]:
    """Return a line about the inspected checkpoint, and one about the checkpoint it was compared with, if any."""
    lines = [f"checkpoint {_described(found['checkpoint'])}"]
    if found["against"] is not None:
        lines.append(f"against {_described(found['against'])}: SFE and cosine compare the two")
    return lines


def _described(checkpoint: Mapping[str, Any]) -> str:
    revision = f", revision {checkpoint['revision']}" if checkpoint["revision"] else ""
    return f"{checkpoint['name']}{revision}, weights' SHA-256 {checkpoint['sha256'][:16]}"


def _grouped(rows: Sequence[InspectedMatrix], keys: Sequence[str], by: str) -> Table:
    """Return a table with a row for each role and `part`, over all layers, or for each role and `layer`."""
    groups: dict[tuple[str, str], list[InspectedMatrix]] = {}
    for row in rows:
        layer, part = parse_name(row.name, row.role or "")
        name = part if by == "part" else DASH if layer is None else str(layer)
        groups.setdefault((row.role or "", name), []).append(row)
    lines = [Row(names, (str(len(group)), *(_together(key, group) for key in keys))) for names, group in groups.items()]
    return Table(f"By {by}", ("matrices", *(HEADINGS[key] for key in keys)), tuple(lines), ("role", by))


def _each(rows: Sequence[InspectedMatrix], keys: Sequence[str]) -> Table:
    """Return a table of all matrices."""
    lines = [
        Row((row.name,), ("×".join(map(str, row.shape)), *(_short(getattr(row, key)) for key in keys))) for row in rows
    ]
    return Table("Each matrix", ("shape", *(HEADINGS[key] for key in keys)), tuple(lines), ("matrix",))


def _together(key: str, rows: Iterable[InspectedMatrix]) -> str:
    """Write one number for a measure of several matrices, a dash if none of them has it."""
    values = [value for row in rows if (value := getattr(row, key)) is not None]
    return _short(TOGETHER.get(key, median)(values)) if values else DASH


def inspect_page(rows: Sequence[Mapping[str, object]], output: Path, title: str, said: Sequence[str] = ()) -> Path:
    """Write one self-contained HTML page about a checkpoint's matrices: heat maps of layer x part, spectra, a table.

    Args:
        rows: a mapping for each matrix, with the keys of `InspectedMatrix`. Missing values are None or absent.
        output: the file, or an existing folder in which `report.html` is written.
        title: heading of the page.
        said: lines below the title, such as those of `about`.

    Raises:
        UserError: where the file cannot be written, or plotly is not installed.
    """
    check_page()
    matrices = [InspectedMatrix.model_validate(row) for row in rows]
    shades = "From the largest to the smallest; from dark (first layer) to light (last)."
    blocks = [
        Block("Matrices by layer and part", "", drawn(("", metric_figure(matrices))), "metric"),
        Block("Singular values", shades, drawn(("", layer_spectra_figure(matrices))), "part"),
    ]
    keys = [key for key in METRICS if any(getattr(matrix, key) is not None for matrix in matrices)]
    table = [
        Row((m.name, m.role or ""), (" × ".join(map(str, m.shape)), *(_short(getattr(m, key)) for key in keys)))
        for m in matrices
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
