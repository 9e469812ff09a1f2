"""Tensors in shards on the disk, by torch's distributed checkpoints: each rank writes its own, any number reads them.

    FOLDER/shard-00001-of-00004.safetensors   the parts of the first of four ranks, with their offsets in the header

Torch decides who writes what (one of several replicas) and finds which part lies where. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from fire_llm.core.atomic import sync
from fire_llm.core.errors import UserError
from fire_llm.core.hashing import hash_file

_FILE = "shard-{:05}-of-{:05}.safetensors"
_NAME = re.compile(r"shard-\d{5}-of-(\d{5})\.safetensors")


class _Writer(HuggingFaceStorageWriter):
    """Write a rank's file directly from memory.

    Torch's own writer makes two copies first, which stop all other threads of the process meanwhile.
    """

    def __init__(self, folder: Path, group: Any) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.file = folder, folder / _FILE.format(dist.get_rank(group) + 1, dist.get_world_size(group))
        self.hashes: dict[Path, str] = {}
        """Hash of every rank's file, on the first rank."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        parts = {item.index.fqn: planner.resolve_data(item).detach().cpu().contiguous() for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in plan.items}
        # Only one key: safetensors writes several in a random order.
        save_file(parts, self.file, {"DCP_SHARDING_INFO": json.dumps(offsets)})
        sync(self.file, below=False)
        written: Any = Future()
        written.set_result([(self.file, hash_file(self.file))])
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        self.hashes = dict(file for rank in results for file in rank)
        for file in self.hashes:
            if not file.is_file():
                raise UserError(
                    f"'{file}' was written by a rank on another machine and is not to be seen here: choose an output "
                    "folder that every machine has, on a file system that they share"
                )


def write_shards(tensors: Mapping[str, Tensor], folder: Path, group: Any) -> dict[Path, str]:
    """Write each rank's part of some tensors to a file of its own; collective.

    Args:
        tensors: By name, the same on all ranks: `DTensor`s, and plain tensors, which every rank holds whole.
        folder: Made where it does not exist.
        group: Of all ranks, over gloo; nothing else may use it meanwhile.

    Returns:
        The hash of each file, on the first rank; nothing elsewhere.

    Raises:
        Exception: On every rank, what one of them raised.
    """
    writer = _Writer(folder, group)
    with _plain_errors():
        save(dict(tensors), storage_writer=writer, process_group=group)
    return writer.hashes


def read_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors from shards on the disk; each rank reads what it needs, without the others.

    Args:
        tensors: By name: `DTensor`s of any placement, or plain tensors, which are filled whole.
        folder: As `write_shards` left it.
    """
    _refuse_incomplete(folder)
    # torch warns that ranks do not exchange what they read, which is intended.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    with _plain_errors():
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def stored_shards(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the whole shape and the dtype of each stored tensor, by name."""
    _refuse_incomplete(folder)
    metadata: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (stored.size, stored.properties.dtype) for name, stored in metadata.items()}


def whole_tensors(folder: Path, scratch: Path | None = None) -> dict[str, Tensor]:
    """Return every stored tensor, whole.

    Args:
        folder: As `write_shards` left it.
        scratch: A folder for files that hold the tensors instead of memory; the caller deletes it.
    """
    whole: dict[str, Tensor] = {}
    for number, (name, (shape, dtype)) in enumerate(stored_shards(folder).items()):
        if scratch is None or not shape.numel():
            whole[name] = torch.empty(shape, dtype=dtype)
        else:
            scratch.mkdir(exist_ok=True)
            _reserve(file := scratch / str(number), shape.numel() * dtype.itemsize)
            whole[name] = torch.from_file(str(file), True, shape.numel(), dtype=dtype).view(shape)
    read_shards(whole, folder)
    return whole


def _reserve(file: Path, size: int) -> None:
    """Make a file and reserve its space: writing to memory that maps a file ends the process where the disk is full."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)


def _refuse_incomplete(folder: Path) -> None:
    ranks = {int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name))}
    if len(ranks) != 1:
        raise UserError(f"'{folder}' holds no shards, or those of several checkpoints: put back a copy of it")
    world = ranks.pop()
    for name in (_FILE.format(rank + 1, world) for rank in range(world)):
        if not (folder / name).is_file():
            raise UserError(f"'{folder / name}' is missing, the part of one of {world} ranks: put back a copy of it")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what a rank raised, instead of torch's bundle, which is no `Exception`."""
    try:
        yield
    except CheckpointException as bundle:
        raise next(iter(bundle.failures.values()))[0] from None
