"""Turn results.json into a terminal table, a markdown table and one self-contained HTML page that needs no network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_llm.core.errors import UserError
from fire_llm.reporting.comparison import Comparison, finite, steps_saved
from fire_llm.reporting.html import block, numbered, section
from fire_llm.reporting.sequence import every_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "check_page",
    "inspect_page",
    "load_results",
    "markdown_table",
    "page_fault",
    "page_told",
    "print_table",
    "render_table",
    "steps_saved",
    "write_page",
    "write_report",
]

Json = dict[str, Any]
SCHEMA_VERSION = 1


def load_results(path: Path) -> Json:
    """Read a results.json, or the one in a run folder; NaN and infinities in it become None.

    An evaluation.json beside it, which `fire-llm eval RUN_DIR` writes, comes under the key `evaluation`.

    Raises:
        UserError: for a missing or unreadable file, text that is not JSON, or a schema this version does not know.
    """
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no results there. Give a results.json or the folder of a finished run.") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}). Give the results.json that 'fire-llm run' wrote.") from None
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION or not isinstance(results.get("arms"), dict):
        raise UserError(
            f"{file}: schema_version {version!r} with its arms is not what this fire_llm reads ({SCHEMA_VERSION}). "
            "Run the recipe again with this version, or read the file with the version that wrote it."
        )
    return finite({**results, **_evaluation(file.with_name("evaluation.json"))})


def _evaluation(file: Path) -> Json:
    """Return {"evaluation": the content of the file}, or nothing where there is none.

    Raises:
        UserError: for a file that is damaged or of another version.
    """
    if not file.exists():
        return {}
    try:
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        if evaluation["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {evaluation['schema_version']}, not {SCHEMA_VERSION}")
        return {"evaluation": evaluation}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: not what 'fire-llm eval' writes ({error}). Delete it, or evaluate the run again."
        ) from None


def render_table(results: Json) -> list[Table]:
    """Return a rich table a corpus, a row an arm; the lowest loss is bold. Bits per byte are left out: 100 columns."""
    contents = every_table(Comparison(results))
    return [corpus_table(c, {"arm": 12}, [name for name in c["columns"] if name != "bits/byte"]) for c in contents]


def corpus_table(content: Json, names: Mapping[str, int], columns: Sequence[str]) -> Table:
    """Return the rich table of a corpus.

    Args:
        content: its {corpus, columns, rows}, each row with `cells`, one a column, `best`, and its own names.
        names: what a row is called by, and how many characters that gets at least.
        columns: those of the content's columns that there is room for.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(content["corpus"]), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, width in names.items():
        table.add_column(name, overflow="fold", min_width=width)
    kept = [i for i, column in enumerate(content["columns"]) if column in columns]
    for i in kept:
        table.add_column(content["columns"][i], justify="right", no_wrap=True)
    for row in content["rows"]:
        cells = [row["cells"][i].replace(" ± ", "±") for i in kept]
        table.add_row(*(escape(row[name]) for name in names), *cells, style="bold" if row["best"] else "")
    return table


def print_table(results: Json, console: Console | None = None) -> None:
    """Print the tables, then what they say and whether all arms saw the same batches."""
    from rich.console import Console

    out, comparison = console or Console(), Comparison(results)
    for table in render_table(results):
        out.print(table)
    agree, note = comparison.batches()
    if legend := comparison.legend():
        out.print(legend, markup=False, highlight=False, style="dim")
    out.print(" ".join(comparison.reading()), markup=False, highlight=False)
    out.print(note, markup=False, highlight=False, style="bold red" if agree is False else "dim")


def markdown_table(results: Json) -> str:
    """Return the tables, the reading and the note on batches as markdown."""
    comparison, blocks = Comparison(results), []
    for content in every_table(comparison):
        lines = [f"### {_md(content['corpus'])}", "", "| arm | " + " | ".join(content["columns"]) + " |"]
        lines.append("|---|" + "---:|" * len(content["columns"]))
        for row in content["rows"]:
            cells = [_md(row["arm"]), *row["cells"]]
            lines.append("| " + " | ".join(f"**{cell}**" if row["best"] else cell for cell in cells) + " |")
        blocks.append("\n".join(lines))
    said = [_md(comparison.legend()), _md(" ".join(comparison.reading())), comparison.batches()[1]]
    return "\n\n".join([*blocks, *filter(None, said)]) + "\n"


def _md(text: str) -> str:
    """Escape what markdown would read as markup or a cell's end."""
    return "".join("\\" + c if c in "|*_`<[\\" else c for c in text)


def page_fault() -> str | None:
    """Say why no page can be made here, None where one can: the library of figures is large, and left out at times."""
    if find_spec("plotly") is not None:
        return None
    return "pages need plotly, which is not installed: pip install plotly, then fire-llm report RUN_DIR"


def page_told(results: Json, page: Path) -> str:
    """Write the page of work that is done, and say where it is, or why there is none: the results are there."""
    fault = page_fault()
    return f"report: {write_report(results, page)}" if fault is None else f"no {page.name}: {fault}"


def write_report(results: Json | Sequence[Json], output: Path) -> Path:
    """Write one self-contained HTML page about one or several results and return its path.

    Args:
        results: what `load_results` returns, or a list of it (a section a run).
        output: the file, or an existing folder in which `report.html` is written. It appears whole or not at all.

    Raises:
        UserError: where the file cannot be written, or plotly is not installed.
    """
    check_page()
    runs = [results] if isinstance(results, Mapping) else list(results)
    names = [str(run.get("name") or "run") for run in runs]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    return write_page("report.html.j2", output, title=title, sections=[section(run, i) for i, run in enumerate(runs)])


def inspect_page(rows: Sequence[Json], output: Path, title: str) -> Path:
    """Write one self-contained HTML page about a checkpoint's matrices: heat maps of layer x part, spectra, a table.

    Args:
        rows: a dict a matrix: name, role, shape (out, in), sigma_min, sigma_median, sigma_max, dfi, effective_rank,
            norm, sigma (descending quantiles) and, where two checkpoints are compared, sfe and cosine. Missing values
            are None or absent.
        output: the file, or an existing folder in which `report.html` is written.
        title: heading of the page.

    Raises:
        UserError: where the file cannot be written, or plotly is not installed.
    """
    check_page()
    from fire_llm.reporting.plots.matrices import METRICS, layer_spectra_figure, metric_figure

    rows = finite(rows)
    shades = "From the largest to the smallest; from dark (first layer) to light (last)."
    blocks = [
        block("Matrices by layer and part", "", [("", metric_figure(rows))], "metric"),
        block("Singular values", shades, [("", layer_spectra_figure(rows))], "part"),
    ]
    keys = [key for key in METRICS if any(row.get(key) is not None for row in rows)]
    table = [[" × ".join(map(str, row.get("shape") or [])), *(_short(row.get(key)) for key in keys)] for row in rows]
    names = [(str(row["name"]), str(row.get("role") or "")) for row in rows]
    columns = ["shape", *(METRICS[key] for key in keys)]
    return write_page(
        "inspect.html.j2",
        output,
        title=title,
        blocks=numbered(blocks, "m"),
        columns=columns,
        rows=zip(names, table, strict=True),
    )


def check_page() -> None:
    """Raise a UserError where no page can be made here."""
    if fault := page_fault():
        raise UserError(fault)


def _short(value: float | None) -> str:
    """Write a number with four significant digits, a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def write_page(template: str, output: Path, **context: Any) -> Path:
    """Render a template with plotly's script inside and move the finished page into place."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("fire_llm.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = environment.get_template(template).render(plotly=get_plotlyjs(), **context)
    path = Path(output) / "report.html" if Path(output).is_dir() else Path(output)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(page, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written ({error.strerror}). Choose another --output.") from None
    return path
