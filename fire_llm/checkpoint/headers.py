"""The header of a safetensors file: which bytes hold which tensor. Nothing is mapped into memory, nothing is loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fire_llm.core.errors import UserError
from fire_llm.core.files import LONGEST, Reader, SourceFile, read_file

WRITABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that a reset can read and write, under the names that safetensors has for them."""

NUMBERS = {
    **WRITABLE, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""The same with those of buffers."""

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_AXES, _NAME, _TENSORS = 64, 1000, 300_000  # no tensor has more axes, no name more characters, no file more tensors


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on the disk.

    Args:
        name: Its key.
        file: The safetensors file, as it was when its header was read.
        dtype: As the header spells it: F32, BF16, I64, …
        shape: Stored shape.
        offset: First byte, from the beginning of the file.
        n_bytes: Length in bytes.
    """

    name: str
    file: SourceFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """Count what lies along the first axis; a shape without axes counts as one row."""
        return self.shape[0] if self.shape else 1

    def read(self, rows: range | None = None, copy: Reader | None = None) -> Tensor:
        """Read rows along the first axis, all by default; a shape without axes counts as one row.

        Args:
            rows: Which rows.
            copy: A copy of the file to read instead.

        Raises:
            UserError: The file was changed since its header was read.
        """
        rows = range(self.n_rows) if rows is None else rows
        shape = (len(rows), *self.shape[1:]) if self.shape else ()
        data = torch.empty(shape, dtype=NUMBERS[self.dtype])
        with self.file.opened() if copy is None else nullcontext(copy) as reader:
            reader.read_into(_bytes(data), self._span(rows)[0])
        return data

    def write(self, rows: range, data: Tensor, file: int) -> None:
        """Overwrite rows along the first axis in a copy of the file, opened for writing under a descriptor."""
        start, length = self._span(rows)
        remaining = _bytes(data.detach().to(NUMBERS[self.dtype]).contiguous())
        assert len(remaining) == length
        while remaining:
            written = os.pwrite(file, remaining, start)
            start, remaining = start + written, remaining[written:]

    def same_bytes(self, other: StoredTensor) -> bool:
        """Return whether two tensors are equal, type and shape included."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(a == b for a, b in zip(self._chunks(), other._chunks(), strict=True))

    def _span(self, rows: range) -> tuple[int, int]:
        """Return the first byte and the length of some rows."""
        each = self.n_bytes // max(1, self.n_rows)
        return self.offset + rows.start * each, len(rows) * each

    def _chunks(self, size: int = 1 << 24) -> Iterator[bytes]:
        with self.file.opened() as reader:
            for start in range(0, self.n_bytes, size):
                chunk = bytearray(min(size, self.n_bytes - start))
                reader.read_into(memoryview(chunk), self.offset + start)
                yield bytes(chunk)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, everything about them checked against the file's length.

    Raises:
        UserError: The file is no safetensors file, is cut off, or its header contradicts itself.
    """
    file = SourceFile.of(path)
    with file.opened() as reader:
        head = reader.read(8)
        length = int.from_bytes(head, "little")
        raw = None
        if len(head) == 8 and length <= min(file.size - 8, LONGEST):
            raw = bytearray(length)
            reader.read_into(memoryview(raw), 8)
    if head == b"version ":
        raise UserError(f"'{path}' is a pointer of git-lfs, not the file that it stands for: run git lfs pull there")
    if raw is None:
        raise UserError(_damaged(path, f"its {file.size} bytes do not hold the header that it announces"))
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(_damaged(path, "its header is not JSON")) from error
    if not isinstance(header, dict):
        raise UserError(_damaged(path, "its header is not a JSON object"))
    header.pop("__metadata__", None)
    if len(header) > _TENSORS:
        raise UserError(_damaged(path, f"its header lists {len(header):,} tensors, and at most {_TENSORS:,} are read"))
    begin = 8 + length
    tensors = {name: _tensor(file, name, entry, begin) for name, entry in header.items()}
    end = begin
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.n_bytes)):
        if tensor.offset != end:
            kind = "a hole before" if tensor.offset > end else "bytes that belong to another tensor too in"
            raise UserError(_damaged(path, f"it has {kind} '{tensor.name}'"))
        end += tensor.n_bytes
    if end != file.size:
        kind = "is cut off" if end > file.size else "has bytes behind its last tensor"
        raise UserError(_damaged(path, f"it {kind}: its header lists {end} bytes, the file has {file.size}"))
    return tensors


def _tensor(file: SourceFile, name: str, entry: Any, begin: int) -> StoredTensor:
    """Read one entry of a header."""
    try:
        dtype, shape = str(entry["dtype"])[:20], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        sound = len(shape) <= _AXES and len(name) <= _NAME and start <= stop
        sound = sound and all(isinstance(n, int) and 0 <= n < 2**63 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise UserError(_damaged(file.path, f"the entry of '{name[:_NAME]}' is not what safetensors writes"))
    bits = _BITS.get(dtype)
    if bits is not None and (stop - start) * 8 != bits * math.prod(shape):
        raise UserError(_damaged(file.path, f"'{name}' is {dtype} of shape {shape}, but has {stop - start} bytes"))
    return StoredTensor(name, file, dtype, shape, begin + start, stop - start)


def read_index(path: Path) -> dict[str, str]:
    """Return which file an index names for each tensor.

    Raises:
        UserError: The index is not JSON, or has no map of names to files beside it.
    """
    raw = read_file(path)
    try:
        index = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(_damaged(path, "it is not JSON")) from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict):
        raise UserError(_damaged(path, "it holds no weight_map"))
    names = list(files.values())
    if not names or not all(isinstance(n, str) and n == Path(n).name and n.endswith(".safetensors") for n in names):
        raise UserError(_damaged(path, "its weight_map does not map tensors to .safetensors files beside it"))
    return files


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, to be read and written."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _damaged(path: Path, why: str) -> str:
    return f"'{path}' is damaged: {why}. Download or copy it again"
