"""`fire-llm report`: print the table of finished runs and write the page."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fire_llm.core.errors import UserError

EXAMPLES = (
    "fire-llm report runs/demo",
    "fire-llm report runs/one runs/two --output both.html --markdown",
)


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's arguments and options."""
    verb.add_argument("runs", metavar="RUN_DIR", nargs="*", help="the folder of a run")
    verb.add_argument("--output", metavar="FILE", help="the page (RUN_DIR/report.html)")
    verb.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    verb.add_argument("--schema", action="store_true", help="print the JSON schema of results.json instead")


def main(arguments: Namespace) -> None:
    """Print a table a run, and write one page."""
    from fire_llm.reporting.schema import results_schema
    from fire_llm.reporting.tables import load_results, markdown_table, print_table, write_report

    if arguments.schema:
        print(json.dumps(results_schema(), indent=1, ensure_ascii=False))
        return
    if not arguments.runs:
        raise UserError("report: name the folder of a finished run, RUN_DIR")
    results = [load_results(Path(run)) for run in arguments.runs]
    page = Path(arguments.output) if arguments.output else Path(arguments.runs[0]) / "report.html"
    try:
        page = write_report(results if len(results) > 1 else results[0], page)
    finally:  # where no page can be made, the tables are all there is
        for one in results:
            if arguments.markdown:
                print(markdown_table(one))
            else:
                print_table(one)
    print(f"report: {page}")
