"""Print what `fire-llm eval` measured: scores with their standard errors, differences with their intervals."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from fire_llm.evaluation.measurement import all_described, each_once

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = dict[str, Any]

WIDTH = 100
"""Columns where the output is no terminal, which would say its own."""

SCORES = {
    # key of a row: heading, decimals at least, decimals where no standard error says how many matter
    "nll": ("nll", 4, 6),
    "perplexity": ("perplexity", 2, 4),
    "bits_per_byte": ("bits/byte", 4, 6),
    "word_perplexity": ("word ppl", 2, 4),
}


def print_scores(evaluation: Json, console: Console | None = None) -> None:
    """Print an evaluation: a row each checkpoint and text, paired differences, and how it was measured.

    Args:
        evaluation: The JSON of `fire-llm eval`, or a run's `evaluation.json`: `rows`, and where there are any
            `differences`, `forgetting`, `forward_transfer`, `left_out` and `unfinished`, `diagnostics`, `tasks`.
        console: Where to; standard output by default.
    """
    from rich.console import Console

    out = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    if rows := evaluation["rows"]:
        _print_rows(evaluation, rows, out)
    if found := evaluation.get("diagnostics"):
        out.print("Plasticity", style="bold", highlight=False)
        out.print(_diagnostics_table(found))
    if answers := evaluation.get("tasks"):
        out.print("Tasks of lm-eval", style="bold", highlight=False)
        out.print(_tasks_table(answers))
        out.print("; ".join(_tasks_described(answers)), markup=False, highlight=False)


def _print_rows(evaluation: Json, rows: Sequence[Json], out: Console) -> None:
    prefix = _common_folder([row["checkpoint"] for row in rows])
    if prefix:
        out.print(f"checkpoints below {prefix}", markup=False, highlight=False)
    out.print(_scores_table(rows, prefix))
    notes = all_described({**row, "checkpoint": _below(row["checkpoint"], prefix)} for row in rows)
    if any(row.get("word_perplexity") is not None for row in rows):
        notes.append("word perplexity per piece between runs of white space")
    if any(error is not None for row in rows for error in (row.get("se") or {}).values()):
        notes.append("± standard error over documents")
    out.print("nll in nats per token; " + "; ".join(notes), markup=False, highlight=False)
    for why in (evaluation.get("left_out") or {}).values():
        out.print(f"left out: {why}", markup=False, highlight=False)
    if evaluation.get("unfinished"):
        out.print(f"not trained to the end: {', '.join(evaluation['unfinished'])}", markup=False, highlight=False)
    for against in dict.fromkeys(d["against"] for d in evaluation.get("differences") or ()):
        found = [d for d in evaluation["differences"] if d["against"] == against]
        title = f"NLL less that of {_below(against, prefix)}: negative is better"
        _print_differences(out, found, title, [("checkpoint", prefix), ("data", "")])
    for key, title in SIGNS.items():
        if evaluation.get(key):
            columns = [(c, prefix) for c in ("data", "after", "before")]
            _print_differences(out, evaluation[key], title, columns)


SIGNS = {
    "forgetting": "Forgetting: NLL(after) less NLL(before, when its phase had ended): positive is lost",
    "forward_transfer": "Forward transfer, not yet trained on: NLL(after) less NLL(at the start): negative helps",
}
"""What the numbers of a run's transfer mean, by their key in evaluation.json."""


def plus_minus(value: float | None, error: float | None, least: int = 4, alone: int = 6, sign: str = "") -> str:
    """Write a number with its standard error to the decimals that matter: at least two digits of the error.

    Args:
        value: None for an empty cell.
        error: None for a number without one.
        least: Decimals at least.
        alone: Decimals where there is no error.
        sign: "+" writes a plus too.
    """
    if value is None:
        return ""
    if not 1e-6 < abs(value) < 1e6 and value != 0:
        return f"{value:{sign}.3g}" + ("" if error is None else f"±{error:.2g}")
    if error is None:
        return f"{value:{sign}.{alone}f}"
    decimals = least if error <= 0 else min(8, max(least, 1 - math.floor(math.log10(error))))
    return f"{value:{sign}.{decimals}f}±{error:.{decimals}f}"


def _table(names: Iterable[str], numbers: Iterable[str]) -> Table:
    """Return an empty table: columns of names, which may be folded, and columns of numbers, which may not."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in names:
        table.add_column(column, overflow="fold", min_width=8)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _scores_table(rows: Sequence[Json], prefix: str) -> Table:
    """Build the table of scores; what no row has gets no column."""
    from rich.markup import escape

    kept = {key: look for key, look in SCORES.items() if any(row.get(key) is not None for row in rows)}
    table = _table(("checkpoint", "data"), (*(heading for heading, *_ in kept.values()), "tokens", "docs"))
    for checkpoint, of_it in groupby(rows, lambda row: row["checkpoint"]):
        group = list(of_it)
        # The lines of a long name stand beside the rows of its texts, and need none of their own.
        lines = _broken(_below(checkpoint, prefix), 16).split("\n")
        names = [*lines[: len(group) - 1], "\n".join(lines[len(group) - 1 :])] + [""] * (len(group) - 1 - len(lines))
        for name, row in zip(names, group, strict=True):
            errors = row.get("se") or {}
            cells = [plus_minus(row.get(key), errors.get(key), *look[1:]) for key, look in kept.items()]
            sizes = [f"{row[key]:,}" for key in ("tokens", "documents")]
            table.add_row(escape(name), escape(_broken(row["data"], 16)), *cells, *sizes)
    return table


def _print_differences(out: Console, found: Sequence[Json], title: str, names: Sequence[tuple[str, str]]) -> None:
    """Print a table of differences; those whose interval leaves out 0 are bold."""
    from rich.markup import escape

    levels = " and ".join(dict.fromkeys(f"{d['level']:.0%}" for d in found))
    table = _table((name for name, _ in names), ("difference", f"{levels} interval", "nats per"))
    for d in found:
        sure = d["low"] is not None and not d["low"] <= 0 <= d["high"]
        interval = "" if d["low"] is None else f"{d['low']:+.5f} to {d['high']:+.5f}"
        cells = [escape(_broken(_below(d[name], prefix), 20)) for name, prefix in names]
        cells += [plus_minus(d["mean"], d["se"], 5, 6, "+"), interval, d["unit"]]
        table.add_row(*cells, style="bold" if sure else "")
    # A table's own title would be folded to its width.
    out.print(title, style="bold", markup=False, highlight=False)
    out.print(table)


PLASTICITY = {
    "srank": "srank",
    "srank_share": "of width",
    "dormant_share": "dormant",
    "hessian_eigenvalue": "λ Hessian",
    "gradient_norm": "‖gradient‖",
    "dfi_mean": "mean DfI",
}


def _diagnostics_table(found: Sequence[Json]) -> Table:
    """Build a table of diagnostics (docs/diagnostics.md); what was not measured is an empty cell."""
    from rich.markup import escape

    table = _table(("checkpoint", "data"), PLASTICITY.values())
    prefix = _common_folder([row["checkpoint"] for row in found])
    for row in found:
        names = [escape(_broken(_below(row[name], prefix), 16)) for name in ("checkpoint", "data")]
        table.add_row(*names, *("" if row[key] is None else f"{row[key]:.4g}" for key in PLASTICITY))
    return table


def _tasks_table(answers: Json) -> Table:
    """Build a table of what lm_eval measured: a row each checkpoint, task and metric, with its standard error."""
    from rich.markup import escape

    table = _table(("checkpoint", "task", "metric"), ("value",))
    prefix = _common_folder(list(answers))
    for checkpoint, answer in answers.items():
        for task, values in answer["results"].items():
            for key, value in values.items():
                metric, _, how_read = key.partition(",")
                if not isinstance(value, float) or metric.endswith("_stderr"):
                    continue
                error = values.get(f"{metric}_stderr,{how_read}")
                shown = plus_minus(value, error if isinstance(error, float) else None)
                name = metric if how_read in ("none", "") else f"{metric} ({how_read})"
                table.add_row(escape(_broken(_below(checkpoint, prefix), 16)), escape(task), escape(name), shown)
    return table


def _tasks_described(answers: Json) -> list[str]:
    """Return how lm_eval measured, once each way."""
    prefix, settings = _common_folder(list(answers)), {name: answer["settings"] for name, answer in answers.items()}
    return each_once(
        (
            _below(name, prefix),
            f"in {how['precision']}, at most {how['context']} tokens at once, texts after {how['prefix_text']}",
        )
        for name, how in settings.items()
    )


def _common_folder(names: Sequence[str]) -> str:
    """Return the folder that all of several paths lie below, with its last slash; nothing where there is none."""
    parts = [name.split("/")[:-1] for name in dict.fromkeys(names)]
    if len(parts) < 2:
        return ""
    return "".join(f"{part[0]}/" for part in takewhile(lambda part: len(set(part)) == 1, zip(*parts, strict=False)))


def _below(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _broken(name: str, width: int) -> str:
    """Break a path into lines of at most `width` behind its slashes, where rich would break it anywhere."""
    lines = [""]
    for part in re.findall(r"[^/]*/|[^/]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
