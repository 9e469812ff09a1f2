"""What is printed: escaped, in any encoding, to readers that leave, in tables that are whole."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import unicodedata

import pytest
from rich.table import Table
from rich.text import Text

from fire_llm.core.console import show_table
from fire_llm.core.terminal import fitting, open_console, shown, standard_streams

HOSTILE = {
    "clear": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "return": "a\rb",
    "c1": "\x9b2J",
    "override": "a\u202eb",
    "isolate": "\u2066x",
    "separator": "a\u2028b",
    "surrogate": "a\udcffb",
    "tag": "\U000e0041",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_a_terminal_obeys_is_escaped_wherever_it_is_printed(text, capsys):
    assert shown(text) == "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    with standard_streams():
        print(text)
        print(text, file=sys.stderr)
        sys.stderr.writelines([f"{text}\n"])
        out = open_console()
        out.print(text, markup=False)
        out.print(Text(text))
        show_table(out, table)
    told = capsys.readouterr()
    for said in (told.out, told.err):
        assert not [c for c in said if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl") and c != "\n"]
    # rich leaves some of them out of a `Text` itself.
    assert told.out.count(shown(text)) in (5, 6) and told.err.count(shown(text)) == 2


def test_text_of_any_script_lines_and_bars_go_through(capsys):
    said = "größer 中文 العربية\n\tσ ± 1×2 → 3"
    with standard_streams():
        print(said)
        sys.stderr.write("\r 10%|#   |")
        sys.stderr.write("\n\x1b[A")
    told = capsys.readouterr()
    assert told.out == f"{said}\n" and told.err == "\r 10%|#   |\n\x1b[A"


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [("ascii", "sigma 1+-2 3x4 \\u2603"), ("latin-1", "sigma 1±2 3×4 \\u2603"), ("cp1252", "sigma 1±2 3×4 \\u2603")],
)
def test_an_encoding_that_lacks_characters_gets_others(encoding, wanted, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    table = Table(box=None)
    table.add_column("σ 1±2 3×4 ☃")
    table.add_row("x" * 30)
    with standard_streams():
        print("σ 1±2 3×4 ☃")
        show_table(open_console(), table)
    lines = raw.getvalue().decode(encoding).splitlines()
    assert lines[0] == wanted and lines[1].rstrip() == f" {wanted}" and len(lines[1]) == len(lines[2])
    assert fitting("σ", encoding) == "sigma"


def _writing_to(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> io.TextIOWrapper:
    stream = os.fdopen(descriptor, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_a_reader_that_left_is_no_failure(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = _writing_to(writer, monkeypatch)
    with standard_streams() as lost:
        for _ in range(3):
            print("x" * 100_000)
        open_console().print("yes " * 30_000)
    assert not lost
    stream.close()  # what is still in its memory goes nowhere


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_a_full_disk_did_not_take_is_known(monkeypatch):
    stream = _writing_to(os.open("/dev/full", os.O_WRONLY), monkeypatch)
    with standard_streams() as lost:
        print("x" * 100_000)
        print("x" * 100_000)
    assert [error.errno for error in lost] == [errno.ENOSPC]
    stream.close()


@pytest.mark.parametrize("closed", ["0<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_without_a_standard_stream_no_file_takes_its_place(closed, tmp_path):
    code = (
        "import sys\nfrom fire_llm.core.terminal import standard_streams\n"
        "with standard_streams():\n"
        "    file = open(sys.argv[1], 'w')\n    print('said'); sys.stderr.write('said')\n"
        "    raise SystemExit(file.fileno())"
    )
    command = f'exec "{sys.executable}" -c "$0" "$1" {closed}'
    done = subprocess.run(["bash", "-c", command, code, str(tmp_path / "f")], capture_output=True)
    assert done.returncode > 2 and (tmp_path / "f").read_text() == ""
