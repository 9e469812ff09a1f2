"""Write results as a terminal table, as Markdown and as one self-contained HTML page that needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fire_llm.core.console import show_table
from fire_llm.core.errors import UserError, system_reason
from fire_llm.core.terminal import open_console
from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.html import section
from fire_llm.reporting.load import load_results
from fire_llm.reporting.schema import Results
from fire_llm.reporting.sequence import every_table
from fire_llm.reporting.table import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

__all__ = [
    "check_page",
    "load_results",
    "markdown_table",
    "page_fault",
    "page_line",
    "print_table",
    "render_table",
    "report_page",
    "write_page",
    "write_report",
]


def render_table(results: Results) -> list[RichTable]:
    """Return the tables for a terminal, without bits per byte, so that they fit into 100 columns."""
    tables = every_table(Comparison(results))
    return [table.only([name for name in table.columns if name != "bits/byte"]).rich({"arm": 12}) for table in tables]


def print_table(results: Results, console: Console | None = None) -> None:
    """Print the tables, then sentences that sum them up and whether all arms saw the same batches."""
    out, comparison = console or open_console(), Comparison(results)
    for table in render_table(results):
        show_table(out, table)
    agree, note = comparison.batches()
    if legend := comparison.legend():
        out.print(legend, markup=False, highlight=False, style="dim")
    out.print(" ".join(comparison.reading()), markup=False, highlight=False)
    out.print(note, markup=False, highlight=False, style="bold red" if agree is False else "dim")
    if results.evaluation_note:
        out.print(results.evaluation_note, markup=False, highlight=False, style="bold red")


def markdown_table(results: Results) -> str:
    """Return the tables, the reading and the note on batches as Markdown."""
    comparison = Comparison(results)
    notes = [plain(comparison.legend()), plain(" ".join(comparison.reading())), comparison.batches()[1]]
    notes.append(plain(results.evaluation_note))
    return "\n\n".join([*(table.markdown() for table in every_table(comparison)), *filter(None, notes)]) + "\n"


def page_fault() -> str | None:
    """Return why no page can be made here: plotly is large and optional. None if it is installed."""
    if find_spec("plotly") is not None:
        return None
    return "pages need plotly, which is not installed: pip install plotly, then fire-llm report RUN_DIR"


def page_line(results: Results, page: Path) -> str:
    """Write the page of a finished run and return a line that says where; a failure is only said, not raised."""
    try:
        return f"report: {write_report(results, page)}"
    except UserError as fault:
        return f"no {page.name}: {fault}"


def write_report(results: Results | Sequence[Results], output: Path) -> Path:
    """Write one self-contained HTML page about one or several results and return its path.

    Args:
        results: what `load_results` returns, or a list of it (a section a run).
        output: the file, or an existing folder in which `report.html` is written. It appears whole or not at all.

    Raises:
        UserError: where the file cannot be written, or plotly is not installed.
    """
    return _write(output, report_page(results))


def report_page(results: Results | Sequence[Results]) -> str:
    """Return the page that `write_report` writes.

    Raises:
        UserError: plotly is not installed.
    """
    check_page()
    runs = [results] if isinstance(results, Results) else list(results)
    names = [run.name or "run" for run in runs]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    return render("report.html.j2", title=title, sections=[section(run, i) for i, run in enumerate(runs)])


def check_page() -> None:
    """Raise a UserError where no page can be made here."""
    if fault := page_fault():
        raise UserError(fault)


def write_page(template: str, output: Path, **context: object) -> Path:
    """Render a template and move the finished page into place."""
    return _write(output, render(template, **context))


def render(template: str, **context: object) -> str:
    """Return a template filled in, with plotly's script inside."""
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
    return environment.get_template(template).render(plotly=get_plotlyjs(), **context)


def _write(output: Path, page: str) -> Path:
    """Write a page so that it appears whole or not at all; `report.html` if `output` is a folder."""
    path = Path(output) / "report.html" if Path(output).is_dir() else Path(output)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = system_reason(error) or f"{error.strerror}. Choose another --output"
        raise UserError(f"{path}: the page cannot be written: {reason}") from None
    return path
