"""Tables for people: whole in a pipe, folded or in a long form in a narrow terminal, and no figure cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fire_llm.core.console import show_table
from fire_llm.core.terminal import open_console

NAMES = ("model.layers.0.self_attn.q_proj.weight[q]", "runs/[red]/checkpoint-1000")
FIGURES = ("1.234e-05", "12,345,678", "-0.02000 to +0.03000")


def table() -> Table:
    built = Table(title="By part [all]".replace("[", "\\["), box=None, pad_edge=False)
    built.add_column("matrix", overflow="fold")
    for heading in ("σ min", "tokens", "95% interval"):
        built.add_column(heading, justify="right", no_wrap=True)
    for name in NAMES:
        built.add_row(escape(name), *FIGURES, style="bold")
    return built


def shown(width: int, folded: Table | None = None) -> list[str]:
    out = io.StringIO()
    show_table(Console(file=out, width=width), table(), folded)
    return out.getvalue().splitlines()


def test_what_is_no_terminal_has_no_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    show_table(open_console(), table())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "By part [all]" and len(lines) == 4
    for line, name in zip(lines[2:], NAMES, strict=True):
        assert line.split()[0] == name and all(figure in line for figure in FIGURES)


@pytest.mark.parametrize("width", [200, 90, 70, 60, 40])
def test_no_figure_is_cut_however_narrow_a_terminal_is(width):
    lines = shown(width)
    text = "\n".join(lines)
    assert "…" not in text and all(text.count(figure) == 2 for figure in FIGURES)
    joined = text.replace("\n", "").replace(" ", "")
    for name in NAMES:  # where names are folded, their pieces stand below each other
        assert name in text or all(part in joined for part in name[:16].split())
    figures = [line for line in lines[1:] if any(figure in line for figure in FIGURES)]
    assert all(len(line) <= width for line in figures)


def test_names_are_whole_in_the_long_form_and_figures_have_their_headings():
    lines = shown(40)
    assert lines == [
        "By part [all]",
        NAMES[0], "  σ min 1.234e-05   tokens 12,345,678", "  95% interval -0.02000 to +0.03000",
        NAMES[1], "  σ min 1.234e-05   tokens 12,345,678", "  95% interval -0.02000 to +0.03000",
    ]  # fmt: skip


def test_better_places_to_fold_are_taken_where_the_whole_is_too_wide():
    folded = Table(box=None, pad_edge=False)
    for column in ("name", "value"):
        folded.add_column(column)
    folded.add_row("runs/\na", "1")
    assert shown(30, folded)[1:] == ["name   value", "runs/  1    ", "a           "]
