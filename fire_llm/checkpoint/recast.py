"""Copies of a checkpoint's weights in another dtype: what the reset's results are written to.

shard ─ every floating tensor rounded ─▶ shard.cast ─ results over it ─▶ renamed to the shard; config and index follow
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fire_llm.checkpoint.headers import WRITABLE, StoredTensor, read_header
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.evaluation.precision import LONG

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""Dtypes that a result may be written in, and what safetensors calls them."""

SHORT = {LONG[short]: short for short in DTYPES}
"""Names of `DTYPES` by those of torch and of `eval`."""

_ELEMENTS = 1 << 22  # converted at a time


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is neither `keep` nor one of `DTYPES`.

    Raises:
        UserError: Naming those there are.
    """
    if dtype != "keep" and dtype not in DTYPES:
        near = did_you_mean(dtype, DTYPES)
        raise UserError(f"--dtype {dtype}: it must be keep or one of {', '.join(DTYPES)}.{near}")


def torch_dtype(dtype: str) -> torch.dtype:
    """Return a dtype of `DTYPES` as torch has it."""
    return WRITABLE[DTYPES[dtype]]


def cast_bytes(tensors: Iterable[StoredTensor], dtype: str) -> int:
    """Count the bytes of some tensors in another dtype."""
    size = torch_dtype(dtype).itemsize
    return sum(math.prod(t.shape) * size if t.dtype in WRITABLE else t.n_bytes for t in tensors)


def cast_of(folder: Path, shard: str) -> Path:
    """Return where the copy of a shard in another dtype lies."""
    return folder / f"{shard}.cast"


def write_casts(folder: Path, shards: Iterable[str], dtype: str) -> None:
    """Write a copy of each shard of a folder in another dtype beside it; numbers that are no floats stay as they are.

    Raises:
        UserError: A number is beyond the range of the dtype.
    """
    for shard in shards:
        tensors = read_header(folder / shard)
        with (folder / shard).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        new_header, offset = {"__metadata__": header.get("__metadata__", {"format": "pt"})}, 0
        # Whole numbers first, which may be wider, so that they begin at a multiple of their size.
        ordered = sorted(tensors.values(), key=lambda t: (t.dtype in WRITABLE, t.offset))
        for tensor in ordered:
            length = cast_bytes([tensor], dtype)
            name = DTYPES[dtype] if tensor.dtype in WRITABLE else tensor.dtype
            span = [offset, offset + length]
            new_header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": span}
            offset += length
        text = json.dumps(new_header).encode()
        text += b" " * (-len(text) % 8)
        with cast_of(folder, shard).open("wb") as out, (folder / shard).open("rb") as raw:
            out.write(len(text).to_bytes(8, "little") + text)
            for tensor in ordered:
                if tensor.dtype in WRITABLE:
                    _write(tensor, dtype, out)
                    continue
                raw.seek(tensor.offset)
                for start in range(0, tensor.n_bytes, _ELEMENTS):
                    out.write(raw.read(min(_ELEMENTS, tensor.n_bytes - start)))


def _write(tensor: StoredTensor, dtype: str, out: Any) -> None:
    """Append a tensor in another dtype to a file, some rows at a time."""
    step = max(1, _ELEMENTS * tensor.n_rows // max(1, math.prod(tensor.shape)))
    for start in range(0, tensor.n_rows, step):
        rows = tensor.read(range(start, min(start + step, tensor.n_rows)))
        cast = rows.to(torch_dtype(dtype))
        beyond = torch.isfinite(rows) & ~torch.isfinite(cast)
        if beyond.any():
            raise UserError(
                f"--dtype {dtype}: '{tensor.name}' holds {float(rows[beyond][0]):.4g}, which is beyond the range of "
                f"{dtype}: write it in bf16 or fp32"
            )
        out.write(cast.reshape(-1).view(torch.uint8).numpy().tobytes())


def cast_tensors(folder: Path, shards: Iterable[str]) -> dict[str, StoredTensor]:
    """Return the tensors of the copies by name."""
    return {name: tensor for shard in shards for name, tensor in read_header(cast_of(folder, shard)).items()}


def settle(folder: Path, shards: Iterable[str], index: str | None, dtype: str) -> None:
    """Put the copies in the place of the shards, and write their dtype and size to the config and the index."""
    total = 0
    for shard in shards:
        total += sum(tensor.n_bytes for tensor in read_header(cast_of(folder, shard)).values())
        os.replace(cast_of(folder, shard), folder / shard)
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    name = str(torch_dtype(dtype)).removeprefix("torch.")
    if not _renamed(settings, name):
        settings["dtype"] = name
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if index is not None:
        listed = json.loads((folder / index).read_text(encoding="utf-8"))
        if isinstance(listed.get("metadata"), dict):
            listed["metadata"]["total_size"] = total
        (folder / index).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _renamed(settings: dict[str, Any], dtype: str) -> bool:
    """Set the dtype of a config and of the configs in it; return whether the outermost names one."""
    for key, value in settings.items():
        if key.endswith("_config") and isinstance(value, dict):
            _renamed(value, dtype)
    named = [key for key in ("dtype", "torch_dtype") if key in settings]
    settings.update(dict.fromkeys(named, dtype))
    return bool(named)
