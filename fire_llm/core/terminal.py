"""What stands between the work and a terminal, so that neither a name nor a reader undoes it.

Names come from checkpoints, tables and file systems, and may hold what a terminal would obey. Readers leave, disks
under a log fill up, and some terminals have no σ. Everything that is printed goes through here.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 10_000
"""Columns where there is no terminal: a log keeps its lines whole, so that they can be searched."""

_LINE_UP = "\x1b[A"
"""By which tqdm draws a bar above another."""

_IN_ASCII = {
    "±": "+-", "×": "x", "–": "-", "σ": "sigma", "λ": "lambda", "‖": "||", "→": "->", "≈": "~", "·": "*", "√": "sqrt",
    "…": "...",
}  # fmt: skip
_ERRORS = "fire_llm.terminal"


def _instead(error: UnicodeError) -> tuple[str, int]:
    """Return what is written for characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_IN_ASCII.get(c) or _escaped(c) for c in error.object[error.start : error.end]), error.end


codecs.register_error(_ERRORS, _instead)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shown(text: str) -> str:
    r"""Return text in which what a terminal obeys or hides is escaped as in `repr`; line ends and tabs stay.

    Example: a tensor called "\x1b[2J", which clears a screen, is shown as those six visible characters.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def fitting(text: str, encoding: str) -> str:
    """Return text whose characters an encoding has: `±` becomes `+-` in ASCII, what has no such form an escape."""
    return text.encode(encoding, _ERRORS).decode(encoding)


class _Stream:
    """A standard stream that takes any text, shows it as `shown` does, and goes on where nobody reads any longer.

    Args:
        stream: What it writes to.
        lost: Takes the error with which that ended, but for a reader that left.
        trusted: Let control characters through, for those who draw bars and colours.
    """

    def __init__(self, stream: TextIO, lost: list[OSError], trusted: bool = False) -> None:
        self._stream, self._lost, self._trusted = stream, lost, trusted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not (self._trusted or not text.replace(_LINE_UP, "").strip("\n")):
            begin = "\r" * text.startswith("\r")  # a bar is drawn over the last one
            text = begin + shown(text[len(begin) :])
        try:
            self._stream.write(fitting(text, self._stream.encoding or "utf-8"))
        except OSError as error:
            self._leave(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def trusted(self) -> TextIO:
        return cast(TextIO, _Stream(self._stream, self._lost, True))

    def _leave(self, error: OSError) -> None:
        """Let nothing that is written from here on fail, not even the interpreter's last flush."""
        if not isinstance(error, BrokenPipeError) and not self._lost:
            self._lost.append(error)
        with suppress(OSError, ValueError):  # a stream that is no file of the system's
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


@contextmanager
def standard_streams() -> Iterator[list[OSError]]:
    """Print to streams that no text and no reader can break while the block runs; yield what standard output lost.

    A stream that the process was started without (`>&-`) is opened to nowhere: the next file that is opened would
    otherwise take its number, and what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    before, lost = (sys.stdout, sys.stderr), list[OSError]()
    sys.stdout, sys.stderr = (
        cast(TextIO, _Stream(stream or _nowhere(), kept)) for stream, kept in zip(before, (lost, []), strict=True)
    )
    try:
        yield lost
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def open_console(*, stderr: bool = False) -> Console:
    """Return rich's console on a standard stream; `WIDE` where it is no terminal."""
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class Escaping(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(fitting(shown(text), self.encoding), **options)

        def render(self, *what: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*what, **options):
                yield segment if segment.control else segment._replace(text=shown(segment.text))

    stream = sys.stderr if stderr else sys.stdout
    out = Escaping(file=stream.trusted() if isinstance(stream, _Stream) else None, stderr=stderr)
    if not out.is_terminal and not out.is_jupyter:
        out.width = WIDE
    return out
