"""Cut files of text into parts that are read by themselves; where they are cut depends on the files alone.

A cut is made only where a document begins, so that the parts' documents, one after another, are those of the file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PART_BYTES = 1 << 26
"""Of text in a part, about: half a minute's work of one core, which is what a killed process loses."""
MOST_PARTS = 4096
"""Beyond as many, parts are longer."""
_CHUNK = 1 << 20

# WikiText: " = Title = " opens an article, " = = Section = = " does not.
HEADING = re.compile(r"\s*= (?!=)(.*[^=])? =\s*")


class Range(NamedTuple):
    """Some of a file: bytes of lines, row groups of Parquet, or all of it."""

    path: Path
    start: int = 0
    stop: int | None = None
    """First that is not of it; None: to the end of the file."""


def cut_lines(path: Path, document: str, step: int) -> Iterator[tuple[Range, int]]:
    """Yield the ranges of a file of lines, at least `step` bytes each but the last, and their bytes.

    Args:
        path: the file, not compressed.
        document: `line`, `blank-line` or `heading`: what a document is, in lines.
        step: bytes.
    """
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while (cut := _cut(file, start + step, document) if start + step < size else None) is not None and cut < size:
            yield Range(path, start, cut), cut - start
            start = cut
    yield Range(path, start, None), size - start


def _cut(file: io.BufferedReader, at: int, document: str) -> int | None:
    """Return the first place from `at` on at which a document begins; None where none does."""
    file.seek(at - 1)
    _skip_line(file)
    blank = False
    while document != "line":
        begin = file.tell()
        line = file.readline(_CHUNK)
        if not line:
            return None
        whole = line.endswith(b"\n")
        if document == "heading" and blank and whole and HEADING.fullmatch(line.decode(errors="replace")):
            return begin
        blank = whole and not line.strip()
        if blank and document == "blank-line":
            return file.tell()
        if not whole:
            _skip_line(file)
    return file.tell()


def _skip_line(file: io.BufferedReader) -> None:
    while (line := file.readline(_CHUNK)) and not line.endswith(b"\n"):
        pass


def cut_rows(path: Path, step: int) -> Iterator[tuple[Range, int]]:
    """Yield the ranges of a Parquet file, row groups of at least `step` bytes together but the last, and their bytes.

    Args:
        path: the file.
        step: bytes, not compressed.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)]
    start = size = 0
    for number, own in enumerate(sizes, 1):
        size += own
        if size >= step or number == len(sizes):
            yield Range(path, start, number), size
            start, size = number, 0


def grouped(ranges: Iterable[tuple[Range, int]], step: int) -> Iterator[list[Range]]:
    """Yield ranges in parts of about `step` bytes, many small files in one."""
    part: list[Range] = []
    total = 0
    for each, size in ranges:
        if part and total + size > step:
            yield part
            part, total = [], 0
        part.append(each)
        total += size
    if part:
        yield part


class Limited(io.RawIOBase):
    """Some of an open file's bytes, as a stream.

    Args:
        file: read from `start` on.
        start: first byte.
        stop: first byte that is not read.
    """

    def __init__(self, file: io.RawIOBase | io.BufferedReader, start: int, stop: int) -> None:
        self._file, self._left = file, stop - start
        file.seek(start)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, and return how many bytes."""
        data = self._file.read(min(len(buffer), self._left)) or b""
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
