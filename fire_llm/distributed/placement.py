"""Where parameters live: whole on one rank, on replicas, in shards of rows (FSDP2) or columns, or replicas of these."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.architectures.names import refuse_no_module
from fire_llm.core.errors import ENGINES, UserError
from fire_llm.distributed.agree import active
from fire_llm.distributed.balance import cost
from fire_llm.distributed.optimizers import optimizers_in


@dataclass(frozen=True)
class Placement:
    """The ranks that share a parameter: R replicas of S shards along an axis, cut as `torch.chunk` does."""

    replicas: Any = field(default=None, compare=False)
    """Process group of the ranks that hold the same as this one; None where there is no other."""
    shards: Any = field(default=None, compare=False)
    """Process group of the ranks that hold the other shards; None where this one holds whole parameters."""
    members: tuple[tuple[int, ...], ...] = ()
    """The global ranks of both groups, by which placements are compared."""
    axis: int = 0
    """Axis that is cut: 0, rows, as FSDP2 does; 1, columns, as a row-wise plan of tensor parallelism does."""

    @classmethod
    def of(cls, replicas: Any = None, shards: Any = None, axis: int = 0) -> Placement:
        """Make the placement of two process groups, either of which may be None."""
        groups = (replicas, shards)
        return cls(replicas, shards, tuple(tuple(dist.get_process_group_ranks(g)) if g else () for g in groups), axis)

    @property
    def n_replicas(self) -> int:
        """Return R."""
        return len(self.members[0]) if self.replicas is not None else 1

    @property
    def n_shards(self) -> int:
        """Return S."""
        return len(self.members[1]) if self.shards is not None else 1

    @property
    def replica(self) -> int:
        """Return this rank's place among the replicas."""
        return dist.get_group_rank(self.replicas, dist.get_rank()) if self.replicas is not None else 0

    @property
    def shard(self) -> int:
        """Return this rank's place among the shards."""
        return dist.get_group_rank(self.shards, dist.get_rank()) if self.shards is not None else 0

    def held(self, shard: int, total: int) -> range:
        """Return which of `total` rows (columns) of a parameter a shard holds; the last shards may hold none."""
        size = -(-total // self.n_shards)
        return range(min(shard * size, total), min((shard + 1) * size, total))


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive rows of a parameter that contain whole logical matrices: the smallest unit of work."""

    tensor: Tensor
    """The parameter, of any placement."""
    rows: range
    """Along its first axis."""
    members: tuple[int, ...]
    """The slices in these rows, as indices of the list that the blocks were made from."""
    cost: int
    """The sum of `balance.cost` over its expensive slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the stored shape."""
        return (len(self.rows), *self.tensor.shape[1:]) if self.tensor.ndim else ()

    @property
    def n_bytes(self) -> int:
        """Return the bytes of the whole block."""
        return self.tensor.element_size() * math.prod(self.shape)


def is_dtensor(value: Any) -> bool:
    """Return whether a value is a DTensor, of which each rank holds a part, or a copy."""
    return hasattr(value, "placements")


def is_sharded(tensor: Any) -> bool:
    """Return whether this rank holds only a part of a tensor."""
    return is_dtensor(tensor) and any(
        tensor.device_mesh.size(dim) > 1 and not placement.is_replicate()
        for dim, placement in enumerate(tensor.placements)
    )


def local_part(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor, outside autograd."""
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return part.detach()


def placement_of(tensor: Any, group: Any = None) -> Placement | None:
    """Return where a parameter lives; None for placements that `Placement` cannot describe, as shards along two axes.

    Args:
        tensor: Parameter, a plain tensor or a DTensor.
        group: Ranks that hold the same plain tensors, None for all.
    """
    if not is_dtensor(tensor):
        several = active() and dist.get_world_size(group) > 1
        return Placement.of(replicas=group or dist.group.WORLD) if several else Placement()
    mesh = tensor.device_mesh
    arguments: dict[str, Any] = {}
    for dim, placement in enumerate(tensor.placements):
        if mesh.size(dim) == 1:
            continue
        # By name: a strided shard, which FSDP2 over tensor parallelism makes, holds rows in another order.
        plain = type(placement).__name__ == "Shard"
        kind = "replicas" if placement.is_replicate() else "shards" if plain else None
        if kind is None or kind in arguments:
            return None
        arguments[kind] = mesh.get_group(dim)
        if kind == "shards":
            arguments["axis"] = placement.dim % tensor.ndim
    return Placement.of(**arguments)


def blocks_of(slices: Sequence[ParameterSlice], expensive: Sequence[bool]) -> list[Block]:
    """Group slices by the rows of the parameter that they lie in, in the order of the slices.

    Args:
        slices: Of one placement or several.
        expensive: Whether the cost of each slice counts.
    """
    by_rows: dict[tuple[int, range], list[int]] = {}
    for index, weight in enumerate(slices):
        by_rows.setdefault((id(weight.tensor), weight.rows), []).append(index)
    return [
        Block(slices[m[0]].tensor, rows, tuple(m), sum(cost(slices[i].shape) for i in m if expensive[i]))
        for (_, rows), m in by_rows.items()
    ]


def make_current(model: nn.Module) -> None:
    """Put FSDP2's sharded parameters back: a forward pass leaves gathered copies, and writes to these would be lost."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 shards."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # without an import: where there are shards, it is there
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def refuse_engines(model: nn.Module, optimizer: Any = None) -> None:
    """Refuse engines that keep weights where a reset cannot reach them.

    Raises:
        UserError: For FSDP1 and DeepSpeed, with what to use instead; and for a model that is no torch module.
    """
    refuse_no_module(model)
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    fsdp1 = any(c.__name__ == "FullyShardedDataParallel" and c.__module__.startswith("torch.") for c in classes)
    if fsdp1 or any(type(p).__name__ == "FlatParameter" for p in model.parameters()):
        raise UserError(ENGINES["FSDP1"])
    classes |= {kind for one in [optimizer, *optimizers_in(optimizer)] for kind in type(one).__mro__}
    deepspeed = any("deepspeed" in c.__module__.split(".") or c.__name__.startswith("DeepSpeed") for c in classes)
    if deepspeed or any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters()):
        raise UserError(ENGINES["DEEPSPEED"])


def placed_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return a whole tensor, placed like a parameter, from the first rank's copy; collective for shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = whole.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
