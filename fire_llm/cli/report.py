"""`fire-llm report`: print the tables of runs, finished or not, and write a page."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from fire_llm.cli.parser import path
from fire_llm.core.errors import UserError

if TYPE_CHECKING:
    from fire_llm.reporting.schema import Results

EXAMPLES = (
    "fire-llm report runs/demo",
    "fire-llm report runs/one runs/two --output both.html --markdown",
)


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's arguments and options."""
    verb.add_argument("runs", type=path, metavar="RUN_DIR", nargs="*", help="the folder of a run")
    verb.add_argument("--output", type=path, metavar="FILE", help="the page (RUN_DIR/report.html)")
    verb.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    verb.add_argument("--schema", action="store_true", help="print the JSON schema of results.json instead")


def main(arguments: Namespace) -> None:
    """Print a table for each run, and write one page for all."""
    from fire_llm.reporting.schema import results_schema
    from fire_llm.reporting.tables import markdown_table, print_table, write_report

    if arguments.schema:
        print(json.dumps(results_schema(), indent=1, ensure_ascii=False))
        return
    if not arguments.runs:
        raise UserError("report: name the folder of a finished run, RUN_DIR")
    results = [results_of(Path(run)) for run in arguments.runs]
    page = Path(arguments.output) if arguments.output else Path(arguments.runs[0]) / "report.html"
    try:
        page = write_report(results if len(results) > 1 else results[0], page)
    finally:  # the tables are printed even if no page can be made
        for of_run in results:
            if arguments.markdown:
                print(markdown_table(of_run))
            else:
                print_table(of_run)
    print(f"report: {page}")


def results_of(run: Path) -> Results:
    """Return the results of a run; if it has written none yet, those of its finished stages."""
    from fire_llm.core.atomic import is_run
    from fire_llm.reporting.tables import load_results

    if not is_run(run) or (run / "results.json").exists():
        return load_results(run)
    from fire_llm.experiment.collect import collect
    from fire_llm.experiment.evaluate_run import run_and_stages

    context, stages = run_and_stages(run, progress=False)
    return collect(stages, context, texts=False)
