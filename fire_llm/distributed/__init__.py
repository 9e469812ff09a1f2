"""Who computes what when a model lives on many ranks, and how the results get home."""

from __future__ import annotations

from fire_llm.distributed.agree import MEETING_SECONDS, active, gather_objects, is_first, meet
from fire_llm.distributed.balance import assign, cost, makespan, rounds, split_cost, splits, worthwhile
from fire_llm.distributed.joining import PATIENCE, join, leaving, ranks
from fire_llm.distributed.placement import Block, Home, blocks_of, fsdp_modules, home_of, make_current, refuse_engines
from fire_llm.distributed.redistribute import Exchange

__all__ = [
    "MEETING_SECONDS",
    "PATIENCE",
    "Block",
    "Exchange",
    "Home",
    "active",
    "assign",
    "blocks_of",
    "cost",
    "fsdp_modules",
    "gather_objects",
    "home_of",
    "is_first",
    "join",
    "leaving",
    "make_current",
    "makespan",
    "meet",
    "ranks",
    "refuse_engines",
    "rounds",
    "split_cost",
    "splits",
    "worthwhile",
]
