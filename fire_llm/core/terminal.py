"""Print safely: no name that is shown, no reader that leaves and no encoding can break the work.

Names come from checkpoints, tables and file systems, and may hold control characters that a terminal would obey.
Readers leave, disks under a log fill up, and some terminals have no σ. Everything that is printed goes through here.
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
"""Columns where there is no terminal: lines of a log stay whole, so that they can be searched."""

_LINE_UP = "\x1b[A"
"""Moves the cursor up: tqdm draws bars above each other with it."""

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
    r"""Escape, as `repr` does, the characters of a text that a terminal obeys or hides; line ends and tabs stay.

    Example: a tensor called "\x1b[2J", which clears a screen, is shown as those six visible characters.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def fitting(text: str, encoding: str) -> str:
    """Replace the characters of a text that an encoding lacks: `±` by `+-` in ASCII, others by an escape."""
    return text.encode(encoding, _ERRORS).decode(encoding)


class _Stream:
    """A standard stream that takes any text, escapes it as `shown` does, and survives the end of its reader.

    Args:
        stream: What it writes to.
        lost: Gets the error with which writing ended, unless the reader left.
        trusted: Let control characters pass, which draw bars and colours.
    """

    def __init__(self, stream: TextIO, lost: list[OSError], trusted: bool = False) -> None:
        self._stream, self._lost, self._trusted = stream, lost, trusted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not (self._trusted or not text.replace(_LINE_UP, "").strip("\n")):
            start = "\r" * text.startswith("\r")  # a bar is drawn over the last one
            text = start + shown(text[len(start) :])
        try:
            self._stream.write(fitting(text, self._stream.encoding or "utf-8"))
        except OSError as error:
            self._discard(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def trusted(self) -> TextIO:
        return cast(TextIO, _Stream(self._stream, self._lost, True))

    def _discard(self, error: OSError) -> None:
        """Discard all further output, so that no write fails, not even the interpreter's last flush."""
        if not isinstance(error, BrokenPipeError) and not self._lost:
            self._lost.append(error)
        with suppress(OSError, ValueError):  # the stream has no file descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


@contextmanager
def standard_streams() -> Iterator[list[OSError]]:
    """Replace the standard streams by ones that no text and no reader can break; yield errors of standard output.

    A stream that the process was started without (`>&-`) is opened to /dev/null. Otherwise the next file that is opened
    would take its number, and receive what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    before, lost = (sys.stdout, sys.stderr), list[OSError]()
    sys.stdout, sys.stderr = (
        cast(TextIO, _Stream(stream or _nowhere(), errors)) for stream, errors in zip(before, (lost, []), strict=True)
    )
    try:
        yield lost
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def open_console(*, stderr: bool = False) -> Console:
    """Return rich's console on a standard stream, with `WIDE` lines where that is no terminal."""
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class Escaping(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(fitting(shown(text), self.encoding), **options)

        def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **options):
                yield segment if segment.control else segment._replace(text=shown(segment.text))

    stream = sys.stderr if stderr else sys.stdout
    console = Escaping(file=stream.trusted() if isinstance(stream, _Stream) else None, stderr=stderr)
    if not console.is_terminal and not console.is_jupyter:
        console.width = WIDE
    return console
