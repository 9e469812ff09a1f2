"""Cut files of text into parts that can be read by themselves; the cuts depend only on the files.

Each part begins with a document, so that the parts' documents, one after another, are those of the file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PART_BYTES = 1 << 26
"""About how many bytes of text a part has: half a minute's work of one core, which is lost if a process is killed."""
MOST_PARTS = 4096
"""Most parts of a corpus; a larger corpus has longer parts."""
_CHUNK = 1 << 20

# WikiText: " = Title = " opens an article, " = = Section = = " does not.
HEADING = re.compile(r"\s*= (?!=)(.*[^=])? =\s*")


class Range(NamedTuple):
    """A range of a file, in bytes of whole lines or in row groups of Parquet; by default the whole file."""

    path: Path
    start: int = 0
    stop: int | None = None
    """The first byte or row group after the range; None for the end of the file."""


def cut_lines(path: Path, document: str, step: int) -> Iterator[tuple[Range, int]]:
    """Yield (range, bytes) for a file of lines; all ranges but the last have at least `step` bytes.

    Args:
        path: the file, not compressed.
        document: what a document is: `line`, `blank-line` or `heading`.
        step: bytes.
    """
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while (cut := _cut(file, start + step, document) if start + step < size else None) is not None and cut < size:
            yield Range(path, start, cut), cut - start
            start = cut
    yield Range(path, start, None), size - start


def _cut(file: io.BufferedReader, start: int, document: str) -> int | None:
    """Return the first place from `start` on at which a document begins; None if none begins there."""
    file.seek(start - 1)
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
    """Yield (range, bytes) for a Parquet file; all ranges of row groups but the last have at least `step` bytes.

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
    """Yield parts of about `step` bytes; a part may have many small files."""
    part: list[Range] = []
    total = 0
    for piece, size in ranges:
        if part and total + size > step:
            yield part
            part, total = [], 0
        part.append(piece)
        total += size
    if part:
        yield part
