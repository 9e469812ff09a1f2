"""Let the ranks agree before anything is changed: all have come, with the same model and request, and no fault."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fire_llm.core.errors import UserError
from fire_llm.core.hashing import digest

AGREE_SECONDS = 300.0
"""Seconds that a rank waits for the others before it reports who is missing."""

_T = TypeVar("_T")
_GRACE = 10.0  # the others give the first rank, which decides for all, this much longer to do so
_agreements: Counter[str] = Counter()


def active() -> bool:
    """Return whether this process is one of several that can talk to each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Return whether this process is the first rank, or alone."""
    return not active() or dist.get_rank() == 0


def agree(group: Any, request: str, fault: str | None, seconds: float = AGREE_SECONDS) -> None:
    """Return once every rank of the group has come, with the same request and without a fault.

    Collectives are not used, because they would wait for a rank that never comes. The store by which the ranks found
    each other serves any backend, and names the missing rank.

    Args:
        group: Process group, None for all ranks.
        request: What this rank is about to do, in any form that is the same on all ranks.
        fault: What is wrong on this rank, None for nothing.
        seconds: How long to wait for the others.

    Raises:
        UserError: The same on every rank: one rank's fault, or which rank differs or did not come.
    """
    if not active():
        if fault is not None:
            raise UserError(fault)
        return
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    team = digest(str(ranks), 8)
    key = f"fire_llm/{team}/{_agreements[team]}"
    _agreements[team] += 1
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{key}/{me}", json.dumps([digest(request, 16), fault]))
    verdict_key = f"{key}/verdict"
    if me == ranks[0]:
        store.set(verdict_key, _verdict(store, key, ranks, seconds) or "-")
    else:
        try:
            store.wait([verdict_key], timedelta(seconds=seconds + _GRACE))
        except (RuntimeError, dist.DistStoreError):
            raise UserError(_missing([ranks[0]], len(ranks), seconds)) from None
    verdict = store.get(verdict_key).decode()
    if verdict != "-":
        raise UserError(verdict)


def together(
    group: Any, work: Callable[[], _T], request: str | Callable[[_T], str], seconds: float = AGREE_SECONDS
) -> _T:
    """Do this rank's part of a step, and return its result once no rank has a fault.

    Args:
        group: As in `agree`.
        work: This rank's part; it raises a `UserError` for a fault.
        request: As in `agree`, or a function that returns it from the result.
        seconds: As in `agree`.

    Raises:
        UserError: As in `agree`: what one rank's work raised, or which rank differs or did not come.
    """
    fault = None
    try:
        result = work()
    except UserError as error:
        fault = str(error)
    if fault is not None:
        agree(group, "", fault, seconds)  # which raises it, here without the first error's traceback
    agree(group, request if isinstance(request, str) else request(result), None, seconds)
    return result


def _verdict(store: Any, key: str, ranks: list[int], seconds: float) -> str | None:
    """Wait for every rank's request and fault, and return what is wrong, None for nothing."""
    try:
        store.wait([f"{key}/{rank}" for rank in ranks], timedelta(seconds=seconds))
    except (RuntimeError, dist.DistStoreError):
        return _missing([rank for rank in ranks if not store.check([f"{key}/{rank}"])], len(ranks), seconds)
    sent = {rank: json.loads(store.get(f"{key}/{rank}")) for rank in ranks}
    faults = {rank: fault for rank, (_, fault) in sent.items() if fault is not None}
    if faults:
        rank, fault = next(iter(faults.items()))
        return fault if len(faults) == len(ranks) else f"on rank {rank}: {fault}"
    different = [rank for rank in ranks if sent[rank][0] != sent[ranks[0]][0]]
    if different:
        return (
            f"rank {different[0]} holds another model than rank {ranks[0]}, or was asked for another reset: "
            "give every rank the same; where ranks hold different layers, give `process_group` the ranks that share one"
        )
    return None


def _missing(missing: list[int], total: int, seconds: float) -> str:
    return (
        f"rank {', '.join(map(str, missing))} did not come to the reset within {seconds:g} s: every one of the "
        f"{total} ranks must call it, and at about the same time (`timeout` sets for how long the others wait)"
    )


def gather_objects(group: Any, own: Any) -> list[Any]:
    """Return every rank's object, in the order of ranks; collective."""
    if not active():
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    return gathered


def wire_device(group: Any, device: torch.device) -> torch.device:
    """Return a device whose tensors the group can send: `device` if it can, else the CPU, else the accelerator.

    gloo claims every device, but some of its collectives (`all_to_all`) send tensors of CPUs alone.
    """
    entries = [entry.partition(":") for entry in str(dist.get_backend_config(group)).split(",")]
    able = {kind for kind, _, backend in entries if kind == "cpu" or backend != "gloo"}
    if device.type in able:
        return device
    return torch.device("cpu") if "cpu" in able else torch.device(able.pop(), torch.accelerator.current_device_index())
