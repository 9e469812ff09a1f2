"""Tables for people: whole where nobody says how wide the page is, in a long form where a terminal is too narrow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fire_llm.core.terminal import WIDE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

LEAST = 16
"""Characters that a column of names is folded to at least, where it says nothing of it."""


def show_table(out: Console, table: Table, folded: Table | None = None) -> None:
    """Print a table of which no figure is cut: names are folded where that is enough, else each row gets lines.

    Args:
        out: Where to.
        table: Its columns of figures are `no_wrap`, the others are names; its title is printed on a line of its own.
        folded: The same with long names broken at better places than their last character that fits.
    """
    if table.title:
        out.print(table.title, style=table.title_style or "bold", highlight=False, soft_wrap=True)
    for one in (table, folded or table):
        one.title = None
        if _natural(out, one) <= out.width:
            out.print(one)
            return
    if _fold(out, folded or table):
        out.print(folded or table)
    else:
        _print_rows(out, table)


def _natural(out: Console, table: Table) -> int:
    """Return how wide a table is whose cells are all on one line."""
    return out.measure(table, options=out.options.update(width=WIDE)).maximum


def _widths(column: Column) -> tuple[int, int]:
    """Return how wide a column of names must be at least, and how wide its cells are."""
    from rich.text import Text

    cells = [str(column.header), *map(str, column.cells)]
    natural = max(line.cell_len for cell in cells for line in Text.from_markup(cell).split())
    return min(natural, column.min_width or LEAST), natural


def _fold(out: Console, table: Table) -> bool:
    """Set the widths of the columns of names so that the table fits; return whether it does."""
    names = {id(column): _widths(column) for column in table.columns if not column.no_wrap}
    needed = sum(natural for _, natural in names.values())
    room = out.width - (_natural(out, table) - needed)
    spare = room - sum(least for least, _ in names.values())
    if spare < 0:
        return False
    slack = needed - sum(least for least, _ in names.values())
    for column in table.columns:
        if id(column) in names:
            least, natural = names[id(column)]
            column.width = least + (spare * (natural - least) // slack if slack else 0)
    return True


def _print_rows(out: Console, table: Table) -> None:
    """Print each row as its names on a line and its figures below, as many on a line as fit."""
    from rich.text import Text

    columns = [(str(column.header), [str(cell) for cell in column.cells], column.no_wrap) for column in table.columns]
    last: dict[str, str] = {}
    for number, row in enumerate(table.rows):
        for heading, cells, figures in columns:
            if not figures and cells[number]:  # an empty name is the one above
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
