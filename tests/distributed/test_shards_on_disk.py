"""Tensors in shards on the disk: what ranks wrote is what any number of others reads, to the bit."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.ranks import Raised, run_ranks

from fire_llm import UserError
from fire_llm.distributed.shards import read_shards, stored_shards, whole_tensors

SHAPES = {"even": (6, 4), "uneven": (5, 3), "fewer rows than ranks": (2, 3), "one": (1,), "none": (0, 3)}
PLAIN = {"scalar": torch.tensor(2.5), "step": torch.tensor(7), "flags": torch.tensor([True, False])}


def wanted() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {**drawn, "half": torch.randn(7, 2, generator=generator).bfloat16(), **PLAIN}


def in_places(mesh_shape, tensors):
    """Return them as FSDP2 (one axis) and HSDP (two) place them."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", mesh_shape)
    places = [*(Replicate() for _ in mesh_shape[1:]), Shard(0)]
    return {n: t if n in PLAIN else distribute_tensor(t, mesh, places) for n, t in tensors.items()}


def write_and_read(rank, world, written, mesh_shape, folder):
    import torch.distributed as dist

    from fire_llm.distributed import cpu_group
    from fire_llm.distributed.shards import write_shards

    tensors = in_places(mesh_shape, wanted())
    hashes = write_shards(tensors, folder, cpu_group(dist.group.WORLD, "test"))
    equal = []
    for one in (written, folder):
        empty = {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}
        read_shards(empty, one)
        whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in empty.items()}
        equal += [torch.equal(whole[n], t) for n, t in wanted().items()]
    return sorted(path.name for path in hashes), all(equal)


def test_what_some_ranks_wrote_others_and_one_process_read(tmp_path):
    """Three shards, then two replicas of two shards."""
    first, replicas = tmp_path / "of-3", tmp_path / "of-4"
    for mesh, folder in (((3,), first), ((2, 2), replicas)):
        world = torch.Size(mesh).numel()
        told = run_ranks(world, write_and_read, tmp_path, first, mesh, folder)
        assert not any(isinstance(one, Raised) or one is None for one in told), told
        assert all(equal for _, equal in told)
        names = [f"shard-0000{n + 1}-of-0000{world}.safetensors" for n in range(world)]
        assert told[0][0] == names == sorted(path.name for path in folder.iterdir()) and not told[1][0]
    for folder, scratch in itertools.product((first, replicas), (None, tmp_path / "scratch")):
        whole = whole_tensors(folder, scratch)
        assert whole.keys() == wanted().keys() == stored_shards(folder).keys()
        assert all(torch.equal(whole[name], tensor) for name, tensor in wanted().items())
        assert all(whole[name].dtype == tensor.dtype for name, tensor in wanted().items())
    (first / "shard-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00002-of-00003.safetensors' is missing, the part of one of 3 ranks"):
        whole_tensors(first)
    (replicas / "shard-00001-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="those of several checkpoints"):
        stored_shards(replicas)


def test_memory_that_stands_for_a_full_disk_is_never_written_to(tmp_path, monkeypatch):
    """A write there is no error but the end of the process, by SIGBUS."""
    places = json.dumps({"w": {"saved_offsets": [0]}})
    folder, scratch = tmp_path / "shards", tmp_path / "scratch"
    folder.mkdir()
    wanted = torch.arange(4096.0)
    save_file({"w": wanted}, folder / "shard-00001-of-00001.safetensors", {"DCP_SHARDING_INFO": places})
    assert torch.equal(whole_tensors(folder, scratch)["w"], wanted)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        whole_tensors(folder, scratch)


def write_elsewhere(rank, world, folder):
    import torch.distributed as dist

    from fire_llm.distributed import cpu_group
    from fire_llm.distributed.shards import write_shards

    (folder / str(rank)).mkdir(parents=True)
    os.chdir(folder / str(rank))
    write_shards(in_places((world,), wanted()), Path("out"), cpu_group(dist.group.WORLD, "test"))


def test_a_part_that_the_first_rank_cannot_see_is_refused_by_all(tmp_path):
    """As where each machine has a disk of its own under one name."""
    for told in run_ranks(2, write_elsewhere, tmp_path, tmp_path / "out"):
        assert "shard-00002-of-00002.safetensors' was written by a rank on another machine" in told, told
