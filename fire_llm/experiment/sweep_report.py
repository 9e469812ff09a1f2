"""Show what a sweep found: its table, its page, and, before it runs, what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fire_llm.core.console import show_table
from fire_llm.core.terminal import open_console
from fire_llm.experiment.estimate import plan, totals
from fire_llm.experiment.recipe import Trial, words
from fire_llm.experiment.run import Sweep
from fire_llm.experiment.summary import Summary
from fire_llm.reporting.html import RETENTION, Block, drawn, numbered
from fire_llm.reporting.plots.arms import retention_figure
from fire_llm.reporting.plots.base import Style, palette
from fire_llm.reporting.plots.sweep import key_figure
from fire_llm.reporting.tables import page_fault, page_line, print_table, write_page


def show(sweep: Sweep, output: Path) -> None:
    """Write every trial's page and, where there is a grid, the sweep's; print the table and where the page is."""
    for trial, results in zip(sweep.trials, sweep.results, strict=True):
        line = page_line(results, trial.folder(output) / "report.html")
    if sweep.trials[0].name:
        summary = Summary(sweep.trials, sweep.results)
        if page_fault() is None:
            line = f"report: {write_summary(summary, output)}"
        print_summary(summary)
    else:
        print_table(sweep.results[0])
    print(line)


def print_summary(summary: Summary) -> None:
    """Print a table a corpus, a row for each arm of each trial, of the two columns that 80 characters have room for."""
    out = open_console()
    for table in [*(table.only(("NLL", "vs base")) for table in summary.tables()), *summary.averaged()]:
        show_table(out, table.rich({"trial": 16, "arm": 10}))
    said = " ".join(filter(None, [*summary.reading(), summary.legend()]))
    out.print(said, markup=False, highlight=False)


def write_summary(summary: Summary, output: Path) -> Path:
    """Write the page of a sweep: one table a corpus, plots over the grid, links to the trials' own pages."""
    looks = palette(summary.arms, [arm for comparison in summary.comparisons for arm in comparison.bases])
    trials = [
        {
            "name": trial.name,
            "link": f"{quote(trial.name)}/report.html",
            "settings": ", ".join(f"{key} = {words(value)}" for key, value in trial.settings.items()),
            "reading": comparison.reading()[0],
        }
        for trial, comparison in zip(summary.trials, summary.comparisons, strict=True)
    ]
    return write_page(
        "sweep.html.j2",
        output / "report.html",
        title=summary.trials[0].recipe.name,
        trials=trials,
        reading=summary.reading(),
        tables=summary.tables(),
        averaged=summary.averaged(),
        legend=summary.legend(),
        chips=list(looks.items()),
        blocks=numbered([*_by_key(summary, looks), _trade_off(summary, looks)], "s"),
    )


def _by_key(summary: Summary, looks: dict[str, Style]) -> list[Block]:
    """Return a block for each swept key: the final loss on each corpus against its values."""
    blocks = []
    for key in summary.swept():
        others = " One line for each setting of the other keys." if len(summary.swept()) > 1 else ""
        figures = drawn(*((c, key_figure(summary.lines(key, c), key, looks)) for c in summary.corpora))
        text = "Final loss on held-out text: means over the seeds, bands their range." + others
        blocks.append(Block(f"Against {key}", text, figures))
    return blocks


def _trade_off(summary: Summary, looks: dict[str, Style]) -> Block:
    """Return the block about plasticity and retention, over all trials."""
    points: dict[str, list[tuple[float, float]]] = {}
    arm_of: dict[str, str] = {}
    for entry in summary.entries:
        label = f"{entry.arm} · {entry.where(summary.trials)}"
        points[label], arm_of[label] = entry.comparison.retention(entry.arm), entry.arm
    first = summary.comparisons[0]
    figure = retention_figure(points, {label: looks[arm] for label, arm in arm_of.items()}, str(first.new))
    for trace in figure["data"] if figure else ():
        trace["legendgroup"] = arm_of[trace["legendgroup"]]  # the page's buttons switch arms
    text = RETENTION.format(first.first) + " A marker for each arm of each trial; small ones are seeds."
    return Block("Plasticity and retention", text, drawn(("", figure)))


def print_trials(trials: Sequence[Trial], output: Path, arms: Sequence[str] = ()) -> None:
    """Print the trials and what is to do in each: the stages' states."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("trial", "stage", "state"):
        table.add_column(column, overflow="fold")
    rows = [(trial, row) for trial in trials for row in plan(trial.recipe, trial.folder(output), arms)["stages"]]
    once: dict[str, tuple[Trial, dict[str, Any]]] = {}
    for trial, row in rows:
        first, same = once.setdefault(row["key"], (trial, row))
        state = f"as in {first.name}" if same is not row and row["state"] == "to do" else row["state"]
        table.add_row(escape(trial.name or "–"), escape(row["stage"]), escape(state))
    show_table(open_console(), table)
    print(f"{len(trials)} trials of {len(rows)} stages, {len(once)} of them different: each is trained once")
    print(totals([row for _, row in once.values()]))
