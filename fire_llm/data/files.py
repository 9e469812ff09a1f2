"""Read a corpus from local files, as a stream: .txt, .jsonl and .json (also .gz and .zst), and .parquet."""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.hashing import digest
from fire_llm.data.cache import content_hashes, reporting
from fire_llm.data.spec import Corpus, CorpusSpec, Files, Part, setting, split_by_hash

DEFAULT_HOLDOUT = 0.05
LONGEST_LINE = 2**30
"""Bytes; enwik9 as one line is shorter."""
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")
ALLOWED = ".txt, .jsonl, .json (each also .gz or .zst) or .parquet"

# WikiText: " = Title = " opens an article, " = = Section = = " does not.
_HEADING = re.compile(r"\s*= (?!=)(.*[^=])? =\s*")


def file_kind(path: str | Path) -> tuple[str, str]:
    """Return (suffix, compression or "") of a name such as "a.jsonl.zst"; ("", "") where it is no readable kind."""
    name = Path(path).name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    readable = suffix in SUFFIXES and not (suffix == ".parquet" and compression)
    return (suffix, compression) if readable else ("", "")


def file_corpus(name: str, spec: CorpusSpec, root: Path) -> Corpus:
    """Return the corpus of local files, which are looked for and neither read nor hashed.

    Args:
        name: the corpus's name in the recipe.
        spec: its settings; `files` is set.
        root: folder that relative paths start from.

    Raises:
        UserError: for a missing file, an empty glob, an unknown kind of file, or settings that exclude each other.
    """
    assert spec.files is not None
    train = _find(name, "files", spec.files, root)
    validation = _find(name, "validation", spec.validation, root) if spec.validation is not None else []
    shared = sorted(set(train) & set(validation))
    if shared:
        raise UserError(f"corpus '{name}': {shared[0]} is in 'files' and in 'validation'. Leave it out of 'files'.")
    plain_text = {file_kind(path)[0] == ".txt" for path in train + validation}
    if spec.document and True not in plain_text:
        raise UserError(f"corpus '{name}': 'document' is for .txt files; elsewhere every row is a document. Remove it.")
    if spec.text and False not in plain_text:
        raise UserError(f"corpus '{name}': 'text' names a column, and .txt files have none. Remove it.")
    holdout = DEFAULT_HOLDOUT if spec.holdout is None else spec.holdout
    paths = train + validation

    def identity() -> str:
        held = zip(content_hashes(f"corpus '{name}'", paths), paths, strict=True)
        state = [(content, path in validation, *file_kind(path)) for content, path in held]
        settings = f"text={spec.text} document={spec.document} holdout={None if validation else holdout}"
        return f"files {digest(repr(state), 16)} {settings}"

    read = (
        (lambda split: read_files(name, train if split == "train" else validation, spec))
        if validation
        else split_by_hash(lambda: read_files(name, train, spec), holdout)
    )
    plain = all(path.suffix.lower() in (".txt", ".jsonl", ".json") for path in train)
    size = sum(path.stat().st_size for path in train) if plain else None
    parts = dict.fromkeys(train, Part((spec.document, spec.text), 0.0 if validation else holdout))
    parts |= dict.fromkeys(validation, Part((spec.document, spec.text), 1.0))
    return Corpus(name, identity, read, size, parts)


def _find(name: str, setting: str, patterns: Files, root: Path) -> list[Path]:
    """Return the files that paths and globs name, sorted, each once."""
    found: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = root / os.path.expanduser(pattern)
        if path.is_dir():
            raise UserError(f"corpus '{name}': '{pattern}' is a folder. Name its files: {pattern.rstrip('/')}/*.jsonl")
        # A name that exists is taken as it stands, brackets and all.
        matches = (
            [path] if path.is_file() else [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        )
        if not matches:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            what = "no file matches" if glob.has_magic(pattern) else "there is no file"
            raise UserError(
                f"corpus '{name}': {what} '{pattern}' (looked in {path.parent}).{did_you_mean(path.name, siblings)}"
            )
        found.update(match.resolve() for match in matches)
    for path in sorted(found):
        if not file_kind(path)[0]:
            raise UserError(
                f"corpus '{name}': cannot read '{path.name}': allowed are {ALLOWED}. Convert it, or narrow the glob."
            )
    if not found:
        raise UserError(f"corpus '{name}': '{setting}' is an empty list. Name at least one file.")
    return sorted(found)


def read_files(name: str, paths: Iterable[Path], spec: CorpusSpec) -> Iterator[str]:
    """Yield the documents of files in turn, holding one document (or Parquet batch) at a time.

    A .json file that is one array is the exception: it is read whole.

    Raises:
        UserError: for text that is not UTF-8, broken JSON, a missing column, a damaged or truncated file; it names the
            file and, where there are lines, the line.
    """
    column = spec.text or "text"
    for path in paths:
        suffix, compression = file_kind(path)
        with reporting(f"corpus '{name}'", path), _in_memory(name, path):
            if suffix == ".parquet":
                yield from _read_parquet(name, path, column)
                continue
            with _open(path, compression) as stream:
                if suffix == ".txt":
                    yield from _DOCUMENTS[spec.document or "blank-line"](_lines(name, path, stream))
                else:
                    yield from _read_json(name, path, stream, column, array_allowed=suffix == ".json")


@contextmanager
def _in_memory(name: str, path: Path) -> Iterator[None]:
    """Turn too little memory for a line, a document or an array into a message that names the file."""
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"corpus '{name}': {path} holds a line, a document or an array that there is not enough memory for. Break "
            "it into smaller documents, one a line (.jsonl), or raise the limit (`ulimit -v`, the container's)."
        ) from error


def _open(path: Path, compression: str) -> io.BufferedReader:
    """Open a file for reading decompressed bytes, all frames of it; a truncated one raises OSError at its end.

    Arrow decompresses .zst because `zstandard`'s reader takes a truncated frame for the end of the file.
    """
    if not compression:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="gzip" if compression == ".gz" else "zstd"))


def _lines(name: str, path: Path, stream: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text without its line break) of the lines of UTF-8 text."""
    if encoding := _wide(stream.peek(4096)[:4096]):
        raise UserError(
            f"corpus '{name}': {path} is not UTF-8, it looks like {encoding}. Convert its text: "
            f"iconv -f {encoding} -t UTF-8."
        )
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), start=1):
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"corpus '{name}': {path}, line {number}: longer than {LONGEST_LINE:,} bytes, which no memory should "
                "have to hold at once. Break the line between documents."
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"corpus '{name}': {path}, line {number}: not UTF-8 ({error.reason} at its byte {error.start}). "
                "Convert the file from what it is in, for example: iconv -f latin1 -t UTF-8."
            ) from error


def _wide(head: bytes) -> str | None:
    """Return the encoding of two or four bytes a character that a file begins with the signs of; None for none.

    Without a byte-order mark, western text shows it by NULs in every second place, which no text in UTF-8 has.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    for encoding, places in (("UTF-32LE", head[2::4] + head[3::4]), ("UTF-32BE", head[::4] + head[1::4])):
        if len(places) > 1 and not any(places):
            return encoding
    for encoding, places in (("UTF-16LE", head[1::2]), ("UTF-16BE", head[::2])):
        if len(places) > 1 and places.count(0) * 2 > len(places):
            return encoding
    return None


def _by_line(lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    return (text for _, text in lines)


def _by_blank_line(lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Yield the runs of lines between lines of white space."""
    for blank, group in itertools.groupby(_by_line(lines), key=lambda text: not text.strip()):
        if not blank:
            yield "\n".join(group)


def _by_file(lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    yield "\n".join(_by_line(lines))


def _by_heading(lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Yield WikiText articles: each starts at a title line that stands first or after an empty line."""
    article: list[str] = []
    for text in _by_line(lines):
        if _HEADING.fullmatch(text) and article and not article[-1].strip():
            yield "\n".join(article).strip()
            article = []
        article.append(text)
    yield "\n".join(article).strip()


_DOCUMENTS: dict[str, Callable[[Iterable[tuple[int, str]]], Iterator[str]]] = {
    "line": _by_line,
    "blank-line": _by_blank_line,
    "file": _by_file,
    "heading": _by_heading,
}


def _read_json(name: str, path: Path, stream: io.BufferedReader, column: str, array_allowed: bool) -> Iterator[str]:
    """Yield the texts of JSON objects, one a line; of a .json file that is an array, of its elements."""
    rows: Iterable[tuple[str, object]]
    if array_allowed and stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        whole = _parse(name, str(path), "\n".join(_by_line(_lines(name, path, stream))), "one array of objects")
        assert isinstance(whole, list)
        rows = ((f"{path}, element {number}", row) for number, row in enumerate(whole, start=1))
    else:
        rows = (
            (f"{path}, line {number}", _parse(name, f"{path}, line {number}", text, "one JSON object a line"))
            for number, text in _lines(name, path, stream)
            if text.strip()
        )
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"corpus '{name}': {place}: a {type(row).__name__}, where an object with '{column}' belongs."
            )
        if column not in row:
            raise UserError(
                f"corpus '{name}': {place}: no '{column}', only: {', '.join(row)}.{did_you_mean(column, row)} "
                f"Set {setting(name, 'text', '--column')}."
            )
        text = row[column]
        if not isinstance(text, str):
            raise UserError(f"corpus '{name}': {place}: '{column}' is {type(text).__name__}, not text.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"corpus '{name}': {place}: half a surrogate pair, which is no Unicode text. Repair or drop the row."
            ) from error
        yield text


def _parse(name: str, place: str, text: str, expected: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"corpus '{name}': {place}: broken JSON ({error}). Expected: {expected}.") from error


def _read_parquet(name: str, path: Path, column: str) -> Iterator[str]:
    """Yield the texts of a Parquet file's column, a batch of rows at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(
                    f"corpus '{name}': {path} has no column '{column}', only: {', '.join(names)}."
                    f"{did_you_mean(column, names)} Set {setting(name, 'text', '--column')}."
                )
            kind = file.schema_arrow.field(column).type
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        found = "null" if text is None else str(kind)
                        raise UserError(f"corpus '{name}': {path}, row {row}: '{column}' is {found}, not text.")
                    yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"corpus '{name}': {path} is no readable Parquet file ({error}). Fetch it again.") from error
