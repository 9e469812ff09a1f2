"""Print the measurements of `fire-llm eval`: scores with standard errors, differences with intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from fire_llm.core.console import show_table
from fire_llm.core.terminal import open_console
from fire_llm.evaluation.measurement import all_described, each_once
from fire_llm.evaluation.records import CheckpointDiagnostics, CheckpointDifference

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCORES = {
    # field of a row: heading, decimals at least, decimals if no standard error says how many matter
    "nll": ("nll", 4, 6),
    "perplexity": ("perplexity", 2, 4),
    "bits_per_byte": ("bits/byte", 4, 6),
    "word_perplexity": ("word ppl", 2, 4),
}

FORGETTING = "Forgetting: NLL(after) less NLL(before, when its phase had ended): positive is lost"
FORWARD_TRANSFER = "Forward transfer, not yet trained on: NLL(after) less NLL(at the start): negative helps"


def print_scores(
    rows: Sequence[Any],
    *,
    differences: Sequence[CheckpointDifference] = (),
    forgetting: Sequence[Any] = (),
    forward_transfer: Sequence[Any] = (),
    left_out: Mapping[str, str] | None = None,
    unfinished: Sequence[str] = (),
    diagnostics: Sequence[CheckpointDiagnostics] = (),
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    max_tokens: int | None = None,
    console: Console | None = None,
) -> None:
    """Print an evaluation: a row each checkpoint and text, how it was measured, and paired differences.

    Args:
        rows: `CheckpointRow`s, or the rows of a run's evaluation.json, which have the same fields and more.
        differences: Differences from the first checkpoint.
        forgetting: Of a run: differences with the corpus and the checkpoints `after` and `before`.
        forward_transfer: Of a run, likewise.
        left_out: Of a run: by corpus, why it was not measured.
        unfinished: Of a run: stages that were not trained to their end.
        diagnostics: How plastic each checkpoint is on each text.
        tasks: By checkpoint, what `run_tasks` returns.
        max_tokens: Most tokens read of a text; None for all.
        console: Where to print; standard output by default.
    """
    out = console or open_console()
    prefix = _common_folder([row.checkpoint for row in rows])
    if rows:
        _print_rows(rows, prefix, out, max_tokens)
    for why in (left_out or {}).values():
        out.print(f"left out: {why}", markup=False, highlight=False)
    if unfinished:
        out.print(f"not trained to the end: {', '.join(unfinished)}", markup=False, highlight=False)
    if differences:
        title = f"NLL less that of {differences[0].against.removeprefix(prefix)}: negative is better"
        _print(out, title, partial(_differences_table, differences, [("checkpoint", prefix), ("data", "")]))
    for transfer, title in ((forgetting, FORGETTING), (forward_transfer, FORWARD_TRANSFER)):
        if transfer:
            columns = [(name, prefix) for name in ("data", "after", "before")]
            _print(out, title, partial(_differences_table, transfer, columns))
    if diagnostics:
        _print(out, "Plasticity", partial(_diagnostics_table, diagnostics))
    if tasks:
        _print(out, "Tasks of lm-eval", partial(_tasks_table, tasks))
        out.print("; ".join(_tasks_described(tasks)), markup=False, highlight=False)


def _print_rows(rows: Sequence[Any], prefix: str, out: Console, max_tokens: int | None) -> None:
    """Print the table of scores, and below it how they were measured."""
    if prefix:
        out.print(f"checkpoints below {prefix}", markup=False, highlight=False)
    _print(out, "", partial(_scores_table, rows, prefix))
    notes = all_described({**vars(row), "checkpoint": row.checkpoint.removeprefix(prefix)} for row in rows)
    if max_tokens is not None:
        notes.append(f"of each text the first documents, at most {max_tokens:,} tokens")
    if any(row.word_perplexity is not None for row in rows):
        notes.append("word perplexity per piece between runs of white space")
    if any(error is not None for row in rows for error in (row.se or {}).values()):
        notes.append("± standard error over documents")
    out.print("nll in nats per token; " + "; ".join(notes), markup=False, highlight=False)


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


def _print(out: Console, title: str, build: Callable[[int | None], Table]) -> None:
    """Print a title and a table; if the table is too wide, its names are broken into lines of 16 characters."""
    if title:
        out.print(title, style="bold", markup=False, highlight=False)
    show_table(out, build(None), build(16))


def _scores_table(rows: Sequence[Any], prefix: str, width: int | None) -> Table:
    """Build the table of scores; a score that no row has gets no column."""
    from rich.markup import escape

    kept = {key: look for key, look in SCORES.items() if any(getattr(row, key) is not None for row in rows)}
    table = _table(("checkpoint", "data"), (*(heading for heading, *_ in kept.values()), "tokens", "docs"))
    for checkpoint, its_rows in groupby(rows, lambda row: row.checkpoint):
        group = list(its_rows)
        # The lines of a long name stand beside the rows of its texts, and need none of their own.
        lines = _short(checkpoint, prefix, width).split("\n")
        names = [*lines[: len(group) - 1], "\n".join(lines[len(group) - 1 :])] + [""] * (len(group) - 1 - len(lines))
        for name, row in zip(names, group, strict=True):
            errors = row.se or {}
            cells = [plus_minus(getattr(row, key), errors.get(key), *look[1:]) for key, look in kept.items()]
            sizes = [f"{size:,}" for size in (row.tokens, row.documents)]
            table.add_row(escape(name), escape(_short(row.data, "", width)), *cells, *sizes)
    return table


def _differences_table(differences: Sequence[Any], names: Sequence[tuple[str, str]], width: int | None) -> Table:
    """Build a table of differences; those whose interval leaves out 0 are bold.

    Args:
        differences: A row each.
        names: The fields in the columns of names, each with the prefix that is left out of it.
        width: As in `_short`.
    """
    from rich.markup import escape

    levels = " and ".join(dict.fromkeys(f"{d.level:.0%}" for d in differences))
    table = _table((name for name, _ in names), ("difference", f"{levels} interval", "nats per"))
    for d in differences:
        interval, excludes_0 = "", False
        if d.low is not None and d.high is not None:
            interval, excludes_0 = f"{d.low:+.5f} to {d.high:+.5f}", not d.low <= 0 <= d.high
        cells = [escape(_short(getattr(d, name), prefix, width)) for name, prefix in names]
        cells += [plus_minus(d.mean, d.se, 5, 6, "+"), interval, d.unit]
        table.add_row(*cells, style="bold" if excludes_0 else "")
    return table


PLASTICITY = {
    "srank": "srank",
    "srank_share": "of width",
    "dormant_share": "dormant",
    "hessian_eigenvalue": "λ Hessian",
    "gradient_norm": "‖gradient‖",
    "dfi_mean": "mean DfI",
}


def _diagnostics_table(rows: Sequence[CheckpointDiagnostics], width: int | None) -> Table:
    """Build a table of diagnostics (docs/diagnostics.md); what was not measured is an empty cell."""
    from rich.markup import escape

    table = _table(("checkpoint", "data"), PLASTICITY.values())
    prefix = _common_folder([row.checkpoint for row in rows])
    for row in rows:
        names = [escape(_short(name, prefix, width)) for name in (row.checkpoint, row.data)]
        values = (getattr(row, key) for key in PLASTICITY)
        table.add_row(*names, *("" if value is None else f"{value:.4g}" for value in values))
    return table


def _tasks_table(answers: Mapping[str, Mapping[str, Any]], width: int | None) -> Table:
    """Build a table of what lm_eval measured: a row each checkpoint, task and metric, with its standard error."""
    from rich.markup import escape

    table = _table(("checkpoint", "task", "metric"), ("value",))
    prefix = _common_folder(list(answers))
    for checkpoint, answer in answers.items():
        for task, values in answer["results"].items():
            for key, value in values.items():
                metric, _, answer_filter = key.partition(",")
                if not isinstance(value, float) or metric.endswith("_stderr"):
                    continue
                error = values.get(f"{metric}_stderr,{answer_filter}")
                shown = plus_minus(value, error if isinstance(error, float) else None)
                name = metric if answer_filter in ("none", "") else f"{metric} ({answer_filter})"
                table.add_row(escape(_short(checkpoint, prefix, width)), escape(task), escape(name), shown)
    return table


def _tasks_described(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return each way in which lm_eval measured, once."""
    prefix = _common_folder(list(answers))
    how = "in {precision}, at most {context} tokens at once, texts after {prefix_text}"
    return each_once((name.removeprefix(prefix), how.format(**answer["settings"])) for name, answer in answers.items())


def _common_folder(names: Sequence[str]) -> str:
    """Return the folder that several paths have in common, with its last slash; nothing if they have none."""
    parts = [name.split("/")[:-1] for name in dict.fromkeys(names)]
    if len(parts) < 2:
        return ""
    return "".join(f"{part[0]}/" for part in takewhile(lambda part: len(set(part)) == 1, zip(*parts, strict=False)))


def _short(path: str, prefix: str, width: int | None) -> str:
    """Return a path without a prefix, broken behind its slashes into lines of `width`: rich breaks it anywhere."""
    lines = [""]
    for part in re.findall(r"[^/]*/|[^/]+", path.removeprefix(prefix)):
        if width and lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
