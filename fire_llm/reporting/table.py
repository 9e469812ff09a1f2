"""A table of text, written in a terminal or as Markdown; HTML pages write it with a macro of their templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

DASH = "–"
"""A cell without a value."""


@dataclass(frozen=True)
class Row:
    """A row: its names, its cells, and whether it is the best."""

    names: tuple[str, ...]
    cells: tuple[str, ...]
    best: bool = False

    @property
    def name(self) -> str:
        """Return the first name."""
        return self.names[0]


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption: columns of names on the left, columns of values on the right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    names: tuple[str, ...] = ("arm",)
    """Headings of the columns of names."""

    def only(self, columns: Sequence[str]) -> Table:
        """Return the table with these of its columns, in its own order."""
        kept = [i for i, column in enumerate(self.columns) if column in columns]
        rows = tuple(Row(row.names, tuple(row.cells[i] for i in kept), row.best) for row in self.rows)
        return Table(self.caption, tuple(self.columns[i] for i in kept), rows, self.names)

    def rich(self, widths: Mapping[str, int]) -> RichTable:
        """Return the table for a terminal; the best row is bold.

        Args:
            widths: The columns of names in the order shown, with the least width of each in characters.
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.caption), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name, width in widths.items():
            table.add_column(name, overflow="fold", min_width=width)
        for column in self.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            names = dict(zip(self.names, row.names, strict=True))
            cells = [cell.replace(" ± ", "±") for cell in row.cells]
            table.add_row(*(escape(names[name]) for name in widths), *cells, style="bold" if row.best else "")
        return table

    def markdown(self) -> str:
        """Return the table in Markdown below its caption; the best row is bold."""
        heads = " | ".join([*self.names, *self.columns])
        lines = [f"### {plain(self.caption)}", "", f"| {heads} |"]
        lines.append("|" + "---|" * len(self.names) + "---:|" * len(self.columns))
        for row in self.rows:
            cells = [*map(plain, row.names), *row.cells]
            lines.append("| " + " | ".join(f"**{cell}**" if row.best else cell for cell in cells) + " |")
        return "\n".join(lines)


def first_few(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """List some names; those beyond `most` are only counted."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def plain(text: str) -> str:
    """Escape characters that Markdown would read as markup or as the end of a cell."""
    return "".join("\\" + c if c in "|*_`<[\\" else c for c in text)
