"""Read a corpus from local files, as a stream: .txt, .jsonl and .json (also .gz and .zst), and .parquet."""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.hashing import digest
from fire_llm.data import partition
from fire_llm.data.cache import content_hashes, reporting
from fire_llm.data.formats import (
    Pretokenized,
    files_of,
    holds_ids,
    index_of,
    is_saved_dataset,
    saved_splits,
    split_folders,
)
from fire_llm.data.partition import HEADING, Range, cut_lines, cut_rows, grouped
from fire_llm.data.spec import Corpus, CorpusSpec, Files, Part, in_split, setting

DEFAULT_HOLDOUT = 0.05
LONGEST_LINE = 2**30
"""Most bytes of a line; enwik9 as one line is shorter."""
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")
ALLOWED = ".txt, .jsonl, .json (each also .gz or .zst) or .parquet; tokenised: .bin, or a folder that datasets saved"


def file_kind(path: str | Path) -> tuple[str, str]:
    """Return (suffix, compression or "") of a name such as "a.jsonl.zst"; ("", "") for a kind that is not read."""
    name = Path(path).name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    readable = suffix in SUFFIXES and not (suffix == ".parquet" and compression)
    return (suffix, compression) if readable else ("", "")


def file_corpus(name: str, spec: CorpusSpec, root: Path) -> Corpus:
    """Return the corpus of local files; it checks that they exist, and neither reads nor hashes them.

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
    paths = train + validation
    if any(map(holds_ids, paths)):
        return _token_corpus(name, spec, train, validation)
    if spec.dtype is not None:
        raise UserError(f"corpus '{name}': 'dtype' is of .bin files of tokens, and these hold text. Remove it.")
    suffixes = {file_kind(path)[0] for path in paths}
    if spec.document and ".txt" not in suffixes:
        raise UserError(f"corpus '{name}': 'document' is for .txt files; elsewhere every row is a document. Remove it.")
    if spec.text and suffixes == {".txt"}:
        raise UserError(f"corpus '{name}': 'text' names a column, and .txt files have none. Remove it.")
    holdout = DEFAULT_HOLDOUT if spec.holdout is None else spec.holdout

    def identity() -> str:
        content = _content_digest(name, [(path, (path in validation, *file_kind(path))) for path in paths])
        return f"files {content} text={spec.text} document={spec.document} holdout={None if validation else holdout}"

    plain = all(path.suffix.lower() in (".txt", ".jsonl", ".json") for path in train)
    size = sum(path.stat().st_size for path in train) if plain else None
    files = dict.fromkeys(train, Part((spec.document, spec.text), 0.0 if validation else holdout))
    files |= dict.fromkeys(validation, Part((spec.document, spec.text), 1.0))
    parts = FileParts(name, tuple(train), tuple(validation), spec, holdout)
    return Corpus(name, identity, parts.read, size, files, parts=parts)


def _content_digest(name: str, files: Sequence[tuple[Path, tuple[Any, ...]]]) -> str:
    """Return a hash of files' contents, each with what else is known of the file."""
    hashes = content_hashes(f"corpus '{name}'", [path for path, _ in files])
    return digest(repr([(content, *known) for content, (_, known) in zip(hashes, files, strict=True)]), 16)


@dataclass(frozen=True)
class FileParts:
    """The files of a corpus, cut into parts.

    Attributes:
        name: name of the corpus.
        train: files of training text, from which documents are held out if there are no `validation` files.
        validation: files of held-out text.
        spec: settings of the corpus.
        holdout: share of the documents that is held out.
    """

    name: str
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    spec: CorpusSpec
    holdout: float

    def settings(self) -> CorpusSpec:
        """Return the settings with the files that were found."""
        files = {"files": [*map(str, self.train)], "validation": [*map(str, self.validation)] or None}
        return self.spec.model_copy(update=files)

    def _paths(self, split: str) -> tuple[Path, ...]:
        return self.validation if self.validation and split == "validation" else self.train

    def plan(self, split: str) -> list[list[Range]]:
        """Return the parts of a split, each a list of ranges of files."""
        paths = self._paths(split)
        step = max(partition.PART_BYTES, sum(path.stat().st_size for path in paths) // partition.MOST_PARTS)
        return [*grouped(itertools.chain.from_iterable(self._ranges(path, step) for path in paths), step)]

    def _ranges(self, path: Path, step: int) -> Iterator[tuple[Range, int]]:
        suffix, compression = file_kind(path)
        document = "line" if suffix == ".jsonl" else self.spec.document or "blank-line"
        with reporting(f"corpus '{self.name}'", path):
            if suffix == ".parquet":
                with _readable_parquet(self.name, path):
                    yield from cut_rows(path, step)
            elif compression or suffix == ".json" or document == "file":
                yield Range(path), path.stat().st_size
            else:
                yield from cut_lines(path, document, step)

    def read(self, split: str, part: Sequence[Range] | None = None) -> Iterator[str]:
        """Yield the documents of a split, or of a part of it, which may be a list of lists read from JSON."""
        part = [*map(Range, self._paths(split))] if part is None else part
        ranges = [Range(Path(path), start, stop) for path, start, stop in part]
        texts = read_files(self.name, ranges, self.spec)
        return texts if self.validation else (text for text in texts if in_split(text, split, self.holdout))

    def files(self, part: Sequence[Range]) -> list[Path]:
        """Return the files of a part."""
        return [Path(path) for path, *_ in part]

    def cut(self, part: Sequence[Range]) -> list[Any]:
        """Return the ranges of a part, without the files' names."""
        return [ends for _, *ends in part]


def _token_corpus(name: str, spec: CorpusSpec, train: list[Path], validation: list[Path]) -> Corpus:
    """Return the corpus of files that hold tokens; arguments are as in `file_corpus`."""
    for path in train + validation:
        if not holds_ids(path):
            raise UserError(
                f"corpus '{name}': '{path.name}' holds text, and other files hold tokens. Make two corpora of them."
            )
    folders = [path for path in train + validation if path.is_dir()]
    if spec.document:
        raise UserError(f"corpus '{name}': 'document' is for .txt files, and these hold tokens. Remove it.")
    if spec.text and not folders:
        raise UserError(f"corpus '{name}': 'text' names a column, and .bin files have none. Remove it.")
    if spec.dtype and len(folders) == len(train + validation):
        raise UserError(f"corpus '{name}': 'dtype' is of .bin files, and a saved data set says its own. Remove it.")
    try:
        folders_of = {path: split_folders(path) for path in train}
        own_validation = [folder for _, folder in folders_of.values() if folder is not None]
        with_splits = [path for path, (_, folder) in folders_of.items() if folder is not None]
        if not validation and len(with_splits) == len(train) and spec.holdout is None:
            with_splits = []
        for path in [*with_splits, *(path for path in validation if saved_splits(path))]:
            raise UserError(f"'{path}' has several splits, which fit no other setting. Name one of its folders")
        train, validation = [folder for folder, _ in folders_of.values()], own_validation or validation
        files = [(file, path in validation) for path in train + validation for file in files_of(path)]
    except UserError as error:
        raise UserError(f"corpus '{name}': {error}") from error
    holdout = 0.0 if validation else DEFAULT_HOLDOUT if spec.holdout is None else spec.holdout
    pretokenized = Pretokenized(name, tuple(train), tuple(validation), holdout, spec.dtype, spec.text)

    def identity() -> str:
        content = _content_digest(name, [(file, (held_out, file.suffix)) for file, held_out in files])
        return f"tokens {content} dtype={spec.dtype} column={spec.text} holdout={holdout}"

    parts = {file: Part(("tokens", spec.text), 1.0 if held_out else holdout) for file, held_out in files}
    return Corpus(name, identity, lambda split: (), None, parts, pretokenized=pretokenized)


def _find(name: str, setting: str, patterns: Files, root: Path) -> list[Path]:
    """Return the files that paths and globs name, sorted, each once."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths = sorted({_data_file(name, path) for pattern in patterns for path in _matches(name, pattern, root)})
    for path in paths:
        if path.suffix.lower() == ".idx":
            raise UserError(f"corpus '{name}': there is no '{path.stem}.bin' beside '{path.name}'. Fetch it too.")
        if not file_kind(path)[0] and not holds_ids(path):
            raise UserError(
                f"corpus '{name}': cannot read '{path.name}': allowed are {ALLOWED}. Convert it, or narrow the glob."
            )
    if not paths:
        raise UserError(f"corpus '{name}': '{setting}' is an empty list. Name at least one file.")
    return paths


def _matches(name: str, pattern: str, root: Path) -> list[Path]:
    """Return the files and saved data sets that a path or a glob names; at least one."""
    path = root / os.path.expanduser(pattern)
    if path.is_file() or is_saved_dataset(path):  # also if its name looks like a glob
        return [path]
    if path.is_dir():
        raise UserError(f"corpus '{name}': '{pattern}' is a folder. Name its files: {pattern.rstrip('/')}/*.jsonl")
    matches = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file() or is_saved_dataset(p)]
    if not matches:
        siblings = [p.name for p in path.parent.iterdir() if p != path] if path.parent.is_dir() else []
        what = "no file matches" if glob.has_magic(pattern) else "there is no file"
        raise UserError(
            f"corpus '{name}': {what} '{pattern}' (looked in {path.parent}).{did_you_mean(path.name, siblings)}"
        )
    return matches


def _data_file(name: str, path: Path) -> Path:
    """Return a file's path without links; for either file of Megatron's pair, the path of the .bin file."""
    data = path.with_suffix(".BIN" if path.suffix.isupper() else ".bin")
    is_pair = path.suffix.lower() in (".bin", ".idx") and data.exists()
    real, index = (data if is_pair else path).resolve(), index_of(data)
    if is_pair and os.path.lexists(index) and index.resolve() != index_of(real):
        raise UserError(
            f"corpus '{name}': '{data}' and '{index.name}' are links to files that do not lie side by side "
            f"under one name, '{real}' and '{index.resolve()}'. Name the files, side by side"
        )
    return real


def read_files(name: str, ranges: Iterable[Range], spec: CorpusSpec) -> Iterator[str]:
    """Yield the documents of ranges of files in turn; one document (or Parquet batch) at a time is in memory.

    A .json file that is one array is the exception: it is read whole.

    Raises:
        UserError: for text that is not UTF-8, broken JSON, a missing column, a damaged or truncated file; it names the
            file and, if there are lines, the line.
    """
    for piece in ranges:
        with reporting(f"corpus '{name}'", piece.path), _enough_memory(name, piece.path):
            try:
                yield from _read_range(name, piece, spec, 0)
            except UserError:
                if not piece.start or file_kind(piece.path)[0] == ".parquet":
                    raise
                with piece.path.open("rb") as file:  # read it again, for a message with the line's number in the file
                    lines_before = sum(chunk.count(b"\n") for chunk in _chunks(file, piece.start))
                for _ in _read_range(name, piece, spec, lines_before):
                    pass
                raise


def _read_range(name: str, piece: Range, spec: CorpusSpec, lines_before: int) -> Iterator[str]:
    """Yield the documents of a range; messages count its lines from `lines_before`."""
    (suffix, compression), column = file_kind(piece.path), spec.text or "text"
    if suffix == ".parquet":
        yield from _read_parquet(name, piece, column)
        return
    with _open(piece, compression) as stream:
        lines = _lines(name, piece, stream, lines_before)
        if suffix == ".txt":
            yield from _DOCUMENTS[spec.document or "blank-line"](text for _, text in lines)
        else:
            yield from _read_json(name, piece.path, stream, lines, column, array_allowed=suffix == ".json")


def _chunks(file: io.BufferedReader, size: int) -> Iterator[bytes]:
    while size and (chunk := file.read(min(size, 1 << 20))):
        size -= len(chunk)
        yield chunk


@contextmanager
def _enough_memory(name: str, path: Path) -> Iterator[None]:
    """Turn a lack of memory for a line, a document or an array into a message that names the file."""
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"corpus '{name}': {path} holds a line, a document or an array that there is not enough memory for. Break "
            "it into smaller documents, one a line (.jsonl), or raise the limit (`ulimit -v`, the container's)."
        ) from error


def _open(piece: Range, compression: str) -> io.BufferedReader:
    """Open a file at the start of a range, decompressed; at the end of a truncated file it raises OSError.

    Arrow decompresses .zst because `zstandard`'s reader takes a truncated frame for the end of the file.
    """
    if not compression:
        file = open(piece.path, "rb")  # noqa: SIM115 - the caller closes it
        file.seek(piece.start)
        return file
    import pyarrow

    codec = "gzip" if compression == ".gz" else "zstd"
    return io.BufferedReader(pyarrow.input_stream(str(piece.path), compression=codec))


def _lines(name: str, piece: Range, stream: io.BufferedReader, lines_before: int) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text without its line break) of the lines of a range of UTF-8 text.

    Args:
        name: name of the corpus.
        piece: the range, which begins and ends with whole lines.
        stream: bytes of the file from the start of the range on.
        lines_before: number of lines before the range.
    """
    path, position, number = piece.path, piece.start, lines_before
    if encoding := None if piece.start else _wide(stream.peek(4096)[:4096]):
        raise UserError(
            f"corpus '{name}': {path} is not UTF-8, it looks like {encoding}. Convert its text: "
            f"iconv -f {encoding} -t UTF-8."
        )
    while piece.stop is None or position < piece.stop:
        line = stream.readline(LONGEST_LINE + 1)
        if not line:
            return
        position, number = position + len(line), number + 1
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"corpus '{name}': {path}, line {number}: longer than {LONGEST_LINE:,} bytes, which no memory should "
                "have to hold at once. Break the line between documents."
            )
        if position == len(line):  # the first line of the file
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"corpus '{name}': {path}, line {number}: not UTF-8 ({error.reason} at its byte {error.start}). "
                "Convert the file from what it is in, for example: iconv -f latin1 -t UTF-8."
            ) from error


def _wide(head: bytes) -> str | None:
    """Return the encoding of two or four bytes a character in which a file seems to begin; None for none.

    Signs are a byte-order mark and, in western text, a NUL at every second place, which text in UTF-8 does not have.
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


def _by_blank_line(lines: Iterable[str]) -> Iterator[str]:
    """Yield the runs of lines between lines of white space."""
    for blank, group in itertools.groupby(lines, key=lambda text: not text.strip()):
        if not blank:
            yield "\n".join(group)


def _by_file(lines: Iterable[str]) -> Iterator[str]:
    yield "\n".join(lines)


def _by_heading(lines: Iterable[str]) -> Iterator[str]:
    """Yield WikiText articles: each starts at a title line that stands first or after an empty line."""
    article: list[str] = []
    for text in lines:
        if HEADING.fullmatch(text) and article and not article[-1].strip():
            yield "\n".join(article).strip()
            article = []
        article.append(text)
    yield "\n".join(article).strip()


_DOCUMENTS: dict[str, Callable[[Iterable[str]], Iterator[str]]] = {
    "line": iter, "blank-line": _by_blank_line, "file": _by_file, "heading": _by_heading,
}  # fmt: skip
"""Makes documents of lines, by kind of document."""


def _read_json(
    name: str,
    path: Path,
    stream: io.BufferedReader,
    lines: Iterable[tuple[int, str]],
    column: str,
    array_allowed: bool,
) -> Iterator[str]:
    """Yield the texts of JSON objects, one on each line; or of the elements of a .json file that is an array."""
    rows: Iterable[tuple[str, object]]
    if array_allowed and stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        array = _parse(name, str(path), "\n".join(text for _, text in lines), "one array of objects")
        assert isinstance(array, list)
        rows = ((f"{path}, element {number}", row) for number, row in enumerate(array, start=1))
    else:
        rows = (
            (f"{path}, line {number}", _parse(name, f"{path}, line {number}", text, "one JSON object a line"))
            for number, text in lines
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


@contextmanager
def _readable_parquet(name: str, path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"corpus '{name}': {path} is no readable Parquet file ({error}). Fetch it again.") from error


def _read_parquet(name: str, piece: Range, column: str) -> Iterator[str]:
    """Yield the texts of a column in a range of a Parquet file's row groups, a batch of rows at a time."""
    from pyarrow import parquet

    path = piece.path
    with _readable_parquet(name, path), parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise UserError(
                f"corpus '{name}': {path} has no column '{column}', only: {', '.join(names)}."
                f"{did_you_mean(column, names)} Set {setting(name, 'text', '--column')}."
            )
        kind = file.schema_arrow.field(column).type
        groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
        row = sum(file.metadata.row_group(n).num_rows for n in range(piece.start))
        for batch in file.iter_batches(batch_size=1024, row_groups=[*groups], columns=[column]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    is_kind = "null" if text is None else str(kind)
                    raise UserError(f"corpus '{name}': {path}, row {row}: '{column}' is {is_kind}, not text.")
                yield text
