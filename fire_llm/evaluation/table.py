"""Print what `fire-llm eval` measured: scores with their standard errors, differences with their intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, Protocol

from fire_llm.core.console import show_table
from fire_llm.core.terminal import open_console
from fire_llm.evaluation.measurement import all_described, each_once
from fire_llm.evaluation.records import CheckpointDiagnostics, CheckpointDifference

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCORES = {
    # key of a row: heading, decimals at least, decimals where no standard error says how many matter
    "nll": ("nll", 4, 6),
    "perplexity": ("perplexity", 2, 4),
    "bits_per_byte": ("bits/byte", 4, 6),
    "word_perplexity": ("word ppl", 2, 4),
}


FORGETTING = "Forgetting: NLL(after) less NLL(before, when its phase had ended): positive is lost"
FORWARD_TRANSFER = "Forward transfer, not yet trained on: NLL(after) less NLL(at the start): negative helps"


class _Row(Protocol):
    """What the table reads of a checkpoint on a text, beside the scores: a run's rows have more to them."""

    @property
    def checkpoint(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def word_perplexity(self) -> float | None: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def documents(self) -> int | None: ...
    @property
    def se(self) -> Mapping[str, float | None] | None: ...


class _Compared(Protocol):
    """What it reads of a difference between two checkpoints, beside their names."""

    @property
    def mean(self) -> float: ...
    @property
    def se(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def unit(self) -> str: ...
    @property
    def level(self) -> float: ...


def print_scores(
    rows: Sequence[_Row],
    *,
    differences: Sequence[CheckpointDifference] = (),
    forgetting: Sequence[_Compared] = (),
    forward_transfer: Sequence[_Compared] = (),
    left_out: Mapping[str, str] | None = None,
    unfinished: Sequence[str] = (),
    diagnostics: Sequence[CheckpointDiagnostics] = (),
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    max_tokens: int | None = None,
    console: Console | None = None,
) -> None:
    """Print an evaluation: a row each checkpoint and text, how it was measured, and paired differences.

    Args:
        rows: Of a `CheckpointEvaluation`, or of a run's evaluation.json.
        differences: Of a `CheckpointEvaluation`, like `diagnostics` and `tasks`.
        forgetting: Of a run, like the next three.
        forward_transfer: NLL before a corpus is trained on less that at the start of the run.
        left_out: By corpus, why it was not measured.
        unfinished: Stages that were not trained to their end.
        diagnostics: How plastic each checkpoint is on each text.
        tasks: By checkpoint, what `run_tasks` returns.
        max_tokens: Most tokens read of a text; None for all.
        console: Where to; standard output by default.
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
        title = f"NLL less that of {_below(differences[0].against, prefix)}: negative is better"
        _print_differences(out, differences, title, [("checkpoint", prefix), ("data", "")])
    for transfer, title in ((forgetting, FORGETTING), (forward_transfer, FORWARD_TRANSFER)):
        if transfer:
            _print_differences(out, transfer, title, [(name, prefix) for name in ("data", "after", "before")])
    if diagnostics:
        out.print("Plasticity", style="bold", highlight=False)
        _print(out, partial(_diagnostics_table, diagnostics))
    if tasks:
        out.print("Tasks of lm-eval", style="bold", highlight=False)
        _print(out, partial(_tasks_table, tasks))
        out.print("; ".join(_tasks_described(tasks)), markup=False, highlight=False)


def _print_rows(rows: Sequence[_Row], prefix: str, out: Console, max_tokens: int | None) -> None:
    """Print the table of scores, and below it how they were measured."""
    if prefix:
        out.print(f"checkpoints below {prefix}", markup=False, highlight=False)
    _print(out, partial(_scores_table, rows, prefix))
    notes = all_described({**vars(row), "checkpoint": _below(row.checkpoint, prefix)} for row in rows)
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


def _print(out: Console, build: Callable[[int | None], Table]) -> None:
    """Print a table, its long names broken behind their slashes where it is too wide as it is."""
    show_table(out, build(None), build(16))


def _scores_table(rows: Sequence[_Row], prefix: str, width: int | None) -> Table:
    """Build the table of scores; what no row has gets no column."""
    from rich.markup import escape

    kept = {key: look for key, look in SCORES.items() if any(getattr(row, key) is not None for row in rows)}
    table = _table(("checkpoint", "data"), (*(heading for heading, *_ in kept.values()), "tokens", "docs"))
    for checkpoint, of_it in groupby(rows, lambda row: row.checkpoint):
        group = list(of_it)
        # The lines of a long name stand beside the rows of its texts, and need none of their own.
        lines = _broken(_below(checkpoint, prefix), width).split("\n")
        names = [*lines[: len(group) - 1], "\n".join(lines[len(group) - 1 :])] + [""] * (len(group) - 1 - len(lines))
        for name, row in zip(names, group, strict=True):
            errors = row.se or {}
            cells = [plus_minus(getattr(row, key), errors.get(key), *look[1:]) for key, look in kept.items()]
            sizes = [f"{size:,}" for size in (row.tokens, row.documents)]
            table.add_row(escape(name), escape(_broken(row.data, width)), *cells, *sizes)
    return table


def _print_differences(out: Console, found: Sequence[_Compared], title: str, names: Sequence[tuple[str, str]]) -> None:
    """Print a table of differences; those whose interval leaves out 0 are bold."""
    out.print(title, style="bold", markup=False, highlight=False)
    _print(out, partial(_differences_table, found, names))


def _differences_table(found: Sequence[_Compared], names: Sequence[tuple[str, str]], width: int | None) -> Table:
    """Build a table of differences."""
    from rich.markup import escape

    levels = " and ".join(dict.fromkeys(f"{d.level:.0%}" for d in found))
    table = _table((name for name, _ in names), ("difference", f"{levels} interval", "nats per"))
    for d in found:
        interval, sure = "", False
        if d.low is not None and d.high is not None:
            interval, sure = f"{d.low:+.5f} to {d.high:+.5f}", not d.low <= 0 <= d.high
        cells = [escape(_broken(_below(getattr(d, name), prefix), width)) for name, prefix in names]
        cells += [plus_minus(d.mean, d.se, 5, 6, "+"), interval, d.unit]
        table.add_row(*cells, style="bold" if sure else "")
    return table


PLASTICITY = {
    "srank": "srank",
    "srank_share": "of width",
    "dormant_share": "dormant",
    "hessian_eigenvalue": "λ Hessian",
    "gradient_norm": "‖gradient‖",
    "dfi_mean": "mean DfI",
}


def _diagnostics_table(found: Sequence[CheckpointDiagnostics], width: int | None) -> Table:
    """Build a table of diagnostics (docs/diagnostics.md); what was not measured is an empty cell."""
    from rich.markup import escape

    table = _table(("checkpoint", "data"), PLASTICITY.values())
    prefix = _common_folder([row.checkpoint for row in found])
    for row in found:
        names = [escape(_broken(_below(name, prefix), width)) for name in (row.checkpoint, row.data)]
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
                metric, _, how_read = key.partition(",")
                if not isinstance(value, float) or metric.endswith("_stderr"):
                    continue
                error = values.get(f"{metric}_stderr,{how_read}")
                shown = plus_minus(value, error if isinstance(error, float) else None)
                name = metric if how_read in ("none", "") else f"{metric} ({how_read})"
                table.add_row(escape(_broken(_below(checkpoint, prefix), width)), escape(task), escape(name), shown)
    return table


def _tasks_described(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
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


def _broken(name: str, width: int | None) -> str:
    """Break a path into lines of at most `width` behind its slashes, where rich would break it anywhere."""
    if width is None:
        return name
    lines = [""]
    for part in re.findall(r"[^/]*/|[^/]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
