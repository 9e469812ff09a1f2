"""Print tables without cutting a figure: in full width, with folded names, or as lines where a terminal is narrow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fire_llm.core.terminal import WIDE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

LEAST = 16
"""Fewest characters that a column of names is folded to, where it has no `min_width`."""


def show_table(out: Console, table: Table, folded: Table | None = None) -> None:
    """Print a table: whole where it fits, else with folded names, else each row on lines of its own.

    Args:
        out: The console.
        table: Its columns of figures are `no_wrap`, the others are names; its title is printed on a line of its own.
        folded: The same table with line breaks in long names; without it, they break where a column ends.
    """
    if table.title:
        out.print(table.title, style=table.title_style or "bold", highlight=False, soft_wrap=True)
    for version in (table, folded or table):
        version.title = None
        if _full_width(out, version) <= out.width:
            out.print(version)
            return
    if _fold(out, folded or table):
        out.print(folded or table)
    else:
        _print_rows(out, table)


def _full_width(out: Console, table: Table) -> int:
    """Return the width of a table with each cell on one line."""
    return out.measure(table, options=out.options.update(width=WIDE)).maximum


def _widths(column: Column) -> tuple[int, int]:
    """Return the least width of a column of names, and its width with each cell on one line."""
    from rich.text import Text

    cells = [str(column.header), *map(str, column.cells)]
    full = max(line.cell_len for cell in cells for line in Text.from_markup(cell).split())
    return min(full, column.min_width or LEAST), full


def _fold(out: Console, table: Table) -> bool:
    """Set the widths of the columns of names so that the table fits; return whether it does."""
    names = {id(column): _widths(column) for column in table.columns if not column.no_wrap}
    least_sum, full_sum = (sum(widths) for widths in zip(*names.values(), strict=True)) if names else (0, 0)
    spare = out.width - (_full_width(out, table) - full_sum) - least_sum
    if spare < 0:
        return False
    slack = full_sum - least_sum
    for column in table.columns:
        if id(column) in names:
            least, full = names[id(column)]
            column.width = least + (spare * (full - least) // slack if slack else 0)
    return True


def _print_rows(out: Console, table: Table) -> None:
    """Print the names of each row on a line, and its figures on the lines below, as many on each as fit."""
    from rich.text import Text

    columns = [(str(column.header), [str(cell) for cell in column.cells], column.no_wrap) for column in table.columns]
    last: dict[str, str] = {}
    for number, row in enumerate(table.rows):
        for heading, cells, figures in columns:
            if not figures and cells[number]:  # an empty name stands for the one above
                last[heading] = " ".join(cells[number].split("\n"))
        out.print("  ".join(last.values()), style=row.style or "", highlight=False, soft_wrap=True)
        pairs = [f"{heading} {cells[number]}" for heading, cells, figures in columns if figures and cells[number]]
        lines = [""]
        for pair in pairs:
            if lines[-1] and Text.from_markup(f"{lines[-1]}   {pair}").cell_len > out.width:
                lines.append("")
            lines[-1] += f"{'  ' if not lines[-1] else '   '}{pair}"
        for line in lines:
            out.print(line, style=row.style or "", highlight=False, soft_wrap=True)
