"""Who computes what when a model lives on many ranks, and how the results get back."""

from __future__ import annotations

from fire_llm.distributed.agree import AGREE_SECONDS, active, agree, gather_objects, is_first, together
from fire_llm.distributed.balance import cost, splits, worthwhile
from fire_llm.distributed.joining import PATIENCE, cpu_group, join, leaving, ranks
from fire_llm.distributed.optimizers import optimizer_states, trains_any
from fire_llm.distributed.parts import forward_replaced, in_parts
from fire_llm.distributed.placement import (
    Block,
    Placement,
    blocks_of,
    fsdp_modules,
    is_dtensor,
    is_sharded,
    local_part,
    make_current,
    placed_like,
    placement_of,
    refuse_engines,
)
from fire_llm.distributed.redistribute import Redistribution

__all__ = [
    "AGREE_SECONDS",
    "PATIENCE",
    "Block",
    "Placement",
    "Redistribution",
    "active",
    "agree",
    "blocks_of",
    "cost",
    "cpu_group",
    "forward_replaced",
    "fsdp_modules",
    "gather_objects",
    "in_parts",
    "is_dtensor",
    "is_first",
    "is_sharded",
    "join",
    "leaving",
    "local_part",
    "make_current",
    "optimizer_states",
    "placed_like",
    "placement_of",
    "ranks",
    "refuse_engines",
    "splits",
    "together",
    "trains_any",
    "worthwhile",
]
