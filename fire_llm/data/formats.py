"""Files of token ids that other programs wrote: they are memory-mapped and never copied.

    nanoGPT     x.bin            the ids alone, 16 bits each (32 where the vocabulary needs them)
    llm.c       x.bin            256 int32 (magic, version, number of ids), then the ids
    Megatron    x.bin + x.idx    the ids alone; lengths of sequences, where they begin, which begin a document
    datasets    a folder         what `save_to_disk` wrote, with a column of ids

Sources: karpathy/nanoGPT, data/openwebtext/prepare.py; karpathy/llm.c, dev/data/data_common.py; NVIDIA/Megatron-LM,
megatron/core/datasets/indexed_dataset.py; datasets, `Dataset.save_to_disk`.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fire_llm.core.errors import UserError, did_you_mean, explained
from fire_llm.core.files import SourceFile, read_file, refuse_irregular

Array = np.ndarray[Any, Any]

RAW_DTYPES = ("uint16", "uint32")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""The file that marks a folder of `save_to_disk`: with one split, or with several."""
COLUMN = "input_ids"

_HEADER = 256
_LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""By llm.c's magic number: its version and dtype."""
_LLM_C_EXAMPLES = 20240522
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = "<9sQBQQ"
_INDEX_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Dtypes by Megatron's code; 6 and 7 are floating-point numbers."""


@dataclass(frozen=True)
class Source:
    """The place of token ids; it is compared and pickled without the ids.

    Attributes:
        path: file, or folder of a saved data set.
        dtype: dtype of the ids; empty for a saved data set, which has its own.
        offset: bytes before the first id.
        count: number of ids; 0 for a saved data set, which must be opened to count them.
        column: column of a saved data set.
        ends: (n_documents,) int64, where each document ends, in ids from the first of this source; None if only
            end-of-text tokens tell.
    """

    path: Path
    dtype: str = ""
    offset: int = 0
    count: int = 0
    column: str = ""
    ends: Array | None = field(default=None, repr=False, compare=False)

    def arrays(self) -> list[Array]:
        """Map the ids, read-only, as (n,) integers: one array or, for a saved data set, one for each batch of rows."""
        if self.column:
            return _saved_arrays(self.path, self.column)
        return [mapped(self.path, self.dtype, (self.count,), self.offset)]

    def tokens(self) -> int:
        """Return how many ids there are."""
        return self.count or sum(map(len, self.arrays()))


def is_saved_dataset(path: Path) -> bool:
    """Return whether datasets' `save_to_disk` wrote a folder, with one split or several."""
    return (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file()


def holds_ids(path: Path) -> bool:
    """Return whether a file or folder holds token ids, by its ending or by the files in it."""
    return path.suffix.lower() in (".bin", ".idx") or is_saved_dataset(path)


def saved_splits(path: Path) -> dict[str, Path]:
    """Return the folders of a saved data set's splits by name; empty if the data set has only one split.

    Raises:
        UserError: the list of splits is damaged.
    """
    if not (path / SAVED_SPLITS).is_file():
        return {}
    try:
        splits = json.loads(read_file(path / SAVED_SPLITS))["splits"]
        return {_plain(name): path / name for name in splits}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path / SAVED_SPLITS}' is damaged ({error}): save the data set again") from error


def split_folders(path: Path) -> tuple[Path, Path | None]:
    """Return the folders of training and validation rows of a saved data set; (path, None) if it has no splits.

    Raises:
        UserError: it has splits, and none is `train`.
    """
    splits = saved_splits(path)
    if not splits:
        return path, None
    if "train" not in splits:
        raise UserError(f"'{path}' has no 'train' split, only: {', '.join(splits)}")
    return splits["train"], splits.get("validation")


def index_of(path: Path) -> Path:
    """Return the path of the index that Megatron writes beside a .bin file; it may not exist."""
    return path.with_suffix(".IDX" if path.suffix.isupper() else ".idx")


def _plain(name: str) -> str:
    """Return a name, after a check that it does not lead out of its folder."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no name")
    return name


def files_of(path: Path) -> list[Path]:
    """Return the files that hold the ids of a path, in a fixed order.

    Raises:
        UserError: a saved data set is damaged, or has something else in the place of a file.
    """
    if not path.is_dir():
        index = index_of(path)
        return [path, SourceFile.of(index).path] if os.path.lexists(index) else [path]
    refuse_irregular(path)
    try:
        names = [_plain(entry["filename"]) for entry in json.loads(read_file(path / SAVED))["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path / SAVED}' is damaged ({error}): save the data set again") from error
    return [path / SAVED, *(path / name for name in names)]


def read_source(path: Path, vocabulary: int, dtype: str | None = None, column: str | None = None) -> Source:
    """Return where the ids of a path lie, after a check of the file's header and size.

    Args:
        path: a .bin file, with or without a Megatron .idx beside it, or the folder of a saved data set of one split.
        vocabulary: entries of the tokenizer: up to 65,536, a .bin without a header has 16 bits an id, else 32.
        dtype: dtype of a .bin without a header: uint16 or uint32.
        column: column of a saved data set; `input_ids` by default.

    Raises:
        UserError: the file contradicts its header, or its ids cannot have that dtype.
    """
    if path.is_dir():
        return Source(path, column=column or COLUMN)
    index = index_of(path)
    if os.path.lexists(index):
        return _agreeing(_indexed(path, index), dtype)
    file = SourceFile.of(path)
    with file.opened() as reader:
        head = reader.read(4 * _HEADER)
    if not head:
        raise UserError(f"'{path}' is empty: write its tokens again")
    header = np.frombuffer(head.ljust(4 * _HEADER, b"\0"), "<i4")
    if int(header[0]) in _LLM_C:
        return _agreeing(_with_header(file, header), dtype)
    if int(header[0]) == _LLM_C_EXAMPLES:
        raise UserError(f"'{path}' holds the examples of an evaluation of llm.c, which are no text: name another file")
    after = file.size - 4 * _HEADER
    if not header[3:].any() and int(header[2]) > 0 and int(header[2]) in (after // 2, after // 4):
        raise UserError(
            f"'{path}' begins as the files of llm.c do, with the magic number {header[0]}, which is none of theirs: "
            f"{' and '.join(map(str, _LLM_C))}. Write its tokens again"
        )
    return _raw(file, dtype or RAW_DTYPES[vocabulary > 1 << 16], vocabulary, head)


def mapped(path: Path, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Array:
    """Map numbers of a file, read-only. A map keeps its file open; at the limit of open files the limit is raised.

    Args:
        path: the file.
        dtype: dtype of the numbers, little-endian.
        shape: shape of the array.
        offset: bytes before the numbers.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    if 0 in shape:
        return np.empty(shape, kind)  # zero bytes cannot be mapped
    try:
        return np.memmap(path, kind, "r", offset, shape)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return np.memmap(path, kind, "r", offset, shape)


def _agreeing(source: Source, dtype: str | None) -> Source:
    """Return a source whose file has its dtype in a header, after a check that the setting agrees."""
    if dtype not in (None, source.dtype):
        raise UserError(f"'{source.path}' says that its tokens are {source.dtype}, and 'dtype' is {dtype}: remove it")
    return source


def _raw(file: SourceFile, dtype: str, vocabulary: int, head: bytes) -> Source:
    """Return the source of a file that holds nothing but ids."""
    size = np.dtype(dtype).itemsize
    if file.size % size:
        raise UserError(
            f"'{file}' has {file.size:,} bytes, which is no whole number of {dtype}: it is cut short, or of another "
            "kind. Write its tokens again"
        )
    pairs = np.frombuffer(head[: len(head) // 4 * 4], "<u2").reshape(-1, 2)
    # If ids of 32 bits are read as 16 bits, every second number is the upper half of an id.
    if size == 2 and len(pairs) > 7 and pairs[:, 0].any() and pairs[:, 1].max() <= (vocabulary - 1) >> 16:
        raise UserError(
            f"'{file}' holds no tokens of 16 bits: every second one is {pairs[:, 1].max()} or less, as in ids of 32 "
            "bits. Set dtype: uint32"
        )
    return Source(file.path, dtype, 0, file.size // size)


def _with_header(file: SourceFile, header: Array) -> Source:
    """Return the source of a file of llm.c."""
    version, dtype = _LLM_C[int(header[0])]
    after, count = file.size - 4 * _HEADER, int(header[2])
    if int(header[1]) != version:
        raise UserError(
            f"'{file}' is a file of llm.c of version {header[1]}; version {version} is read. Write its tokens again"
        )
    if count < 1 or after != count * np.dtype(dtype).itemsize:
        raise UserError(
            f"'{file}' says that it holds {count:,} tokens ({dtype}), and {max(after, 0):,} bytes follow: it is "
            "cut short, or its header is wrong. Fetch it or write its tokens again"
        )
    return Source(file.path, dtype, 4 * _HEADER, count)


def _indexed(path: Path, index: Path) -> Source:
    """Return the source of a data set of Megatron-LM, with the ends of its documents."""
    file, described = SourceFile.of(path), SourceFile.of(index)

    def refuse(why: str) -> UserError:
        return UserError(f"'{index}' is no index of Megatron-LM for '{path.name}': {why}. Write both again")

    size = struct.calcsize(_INDEX_HEADER)
    with described.opened() as reader:
        head = reader.read(size)
    if len(head) < size or not head.startswith(_INDEX_MAGIC):
        raise refuse(f"it does not begin with {_INDEX_MAGIC!r} and the {size} bytes of a header")
    _, version, code, n, d = struct.unpack(_INDEX_HEADER, head)
    if version != 1:
        raise refuse(f"it is of version {version}; version 1 is read")
    if code not in _INDEX_DTYPES:
        raise refuse(f"its dtype is number {code}, which is none of integers: {_INDEX_DTYPES}")
    sizes = (size + 12 * n + 8 * d, size + 13 * n + 8 * d)  # with modes, where the data set has pictures too
    if described.size not in sizes:
        raise refuse(f"it says {n:,} sequences and {d:,} documents, and has {described.size:,} bytes, not {sizes[0]:,}")
    lengths = mapped(index, "int32", (n,), size)
    pointers = mapped(index, "int64", (n,), size + 4 * n)
    documents = mapped(index, "int64", (d,), size + 12 * n)
    width = np.dtype(_INDEX_DTYPES[code]).itemsize
    if n and lengths.min() < 0:
        raise refuse("a sequence has a negative length")
    ends = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64)
    if not np.array_equal(pointers, ends[:-1] * width):
        raise refuse("its sequences do not follow one another")
    if file.size != ends[-1] * width:
        raise refuse(f"it says {ends[-1]:,} tokens of {width} bytes, and '{path.name}' has {file.size:,} bytes")
    if not d or documents[0] != 0 or documents[-1] != n or (np.diff(documents) < 0).any():
        raise refuse(f"its documents do not rise from sequence 0 to {n:,}")
    if not ends[-1]:
        raise refuse("it holds no token")
    document_ends = np.unique(ends[documents[1:]])
    return Source(path, _INDEX_DTYPES[code], 0, int(ends[-1]), ends=document_ends[document_ends > 0])


def _saved_arrays(path: Path, column: str) -> list[Array]:
    """Return the ids of a saved data set, row after row, as views of its memory map.

    Raises:
        UserError: it is damaged, or has no such column of whole numbers.
    """
    import datasets
    import pyarrow as pa

    try:
        table = datasets.load_from_disk(str(path)).data
        names = table.column_names
        chunks = table.column(column).chunks if column in names else None
    except Exception as error:  # datasets and pyarrow raise dozens of kinds
        raise UserError(f"'{path}' is no readable data set ({explained(error)}): save it again") from error
    if chunks is None:
        raise UserError(
            f"'{path}' has no column '{column}', only: {', '.join(names)}.{did_you_mean(column, names)} "
            "Name the column of token ids with 'text'"
        )
    arrays: list[Array] = []
    for chunk in chunks:
        kind = chunk.type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not lists or not pa.types.is_integer(kind.value_type):
            raise UserError(f"'{path}': column '{column}' is {kind}, where lists of token ids belong")
        values = chunk.flatten()
        if chunk.null_count or values.null_count:
            raise UserError(f"'{path}': column '{column}' has rows or ids that are missing")
        if len(values):
            arrays.append(values.to_numpy(zero_copy_only=True))
    if not arrays:
        raise UserError(f"'{path}' holds no token: its column '{column}' is empty")
    return arrays


@dataclass(frozen=True)
class Pretokenized:
    """The files of a corpus that hold tokens.

    Attributes:
        name: name of the corpus.
        train: files or folders of saved data sets; documents are held out of them if `validation` is empty.
        validation: files or folders of held-out text.
        holdout: share of the documents that is held out.
        dtype: dtype of .bin files without a header.
        column: column of saved data sets.
    """

    name: str
    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    holdout: float = 0.0
    dtype: str | None = None
    column: str | None = None

    def sources(self, split: str, vocabulary: int) -> tuple[Source, ...]:
        """Return the sources that contain a split.

        Raises:
            UserError: a file contradicts its header.
        """
        paths = self.validation if self.validation and split == "validation" else self.train
        try:
            return tuple(read_source(path, vocabulary, self.dtype, self.column) for path in paths)
        except UserError as error:
            raise UserError(f"corpus '{self.name}': {error}") from error

    def documents_of(self, split: str) -> float | None:
        """Return the share of documents held out of the split's sources; None if all of them belong to the split."""
        return None if self.validation or (split == "train" and not self.holdout) else self.holdout


class Stretches:
    """Parts of several arrays, one after another, that are read like one array; a slice is copied when it is read.

    Args:
        arrays: (n,) integers each.
        spans: (k, 2), [first, end) of each part, counted through all arrays; in any order.
    """

    ndim = 1

    def __init__(self, arrays: Sequence[Array], spans: Array) -> None:
        plain = map(np.asarray, arrays)  # slicing a plain view costs a tenth of slicing a memmap
        # numpy joins uint64 and signed integers as floating-point numbers; no id needs the last bit of uint64.
        self._arrays = [array.view(np.int64) if array.dtype == np.uint64 else array for array in plain]
        self._limits = np.cumsum([0, *map(len, self._arrays)], dtype=np.int64)
        self.spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        self._ends = np.cumsum(self.spans[:, 1] - self.spans[:, 0])
        self.dtype = np.result_type(*self._arrays)
        self.shape = (int(self._ends[-1]) if len(self._ends) else 0,)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: slice) -> Array:
        """Return the ids of a slice: a view if they lie side by side, else a copy."""
        start, stop, step = places.indices(len(self))
        pieces = [*self._pieces(start, max(start, stop))]
        joined = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])
        return joined[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def head(self, count: int) -> Stretches:
        """Return the first `count` ids, without reading them."""
        last = int(np.searchsorted(self._ends, count))
        spans = self.spans[: last + 1].copy()
        if last < len(spans):
            spans[last, 1] -= self._ends[last] - count
        return Stretches(self._arrays, spans)

    def pieces(self, longest: int) -> Iterator[Array]:
        """Yield all ids in arrays of at most `longest` ids."""
        for start in range(0, len(self), longest):
            yield from self._pieces(start, min(len(self), start + longest))

    def _pieces(self, start: int, stop: int) -> Iterator[Array]:
        """Yield views that together are the ids [start, stop)."""
        span = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self.spans[span, 1])
            place = end - int(self._ends[span] - start)  # counted through all arrays
            place_end = min(end, place + stop - start)
            start, span = start + place_end - place, span + 1
            number = int(np.searchsorted(self._limits, place, side="right")) - 1
            while place < place_end:
                first, limit = int(self._limits[number]), int(self._limits[number + 1])
                if place < limit:
                    yield self._arrays[number][place - first : min(place_end, limit) - first]
                place, number = min(place_end, limit), number + 1
