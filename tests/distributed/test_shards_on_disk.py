"""Tensors in shards on the disk: what ranks wrote is what any number of others reads, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
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
