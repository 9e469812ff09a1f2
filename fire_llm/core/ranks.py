"""Read from the environment which of a launcher's processes this one is, before the ranks have joined.

Once they have joined, the process group knows (`distributed.agree`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from fire_llm.core.errors import UserError

_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that say which process this one is, and of how many."""
_MEETING = ("MASTER_ADDR", "MASTER_PORT")

_SETTINGS = (
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_SAGEMAKER", "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
)  # fmt: skip
"""Variables by which `accelerate launch` changes what a training computes or needs."""

_OFF = ("", "0", "1", "no", "false")
"""Values of these variables that change nothing; 1 is that of `ACCELERATE_GRADIENT_ACCUMULATION_STEPS`."""


def launched() -> bool:
    """Return whether a launcher made this process."""
    return any(name in os.environ for name in _PLACE)


def first_rank() -> bool:
    """Return whether this process prints: it is the first of a launcher's processes, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def launched_in_shards() -> bool:
    """Return whether a launcher asks for FSDP."""
    return flag("ACCELERATE_USE_FSDP")


def flag(name: str) -> bool:
    """Return whether an environment variable is true, as accelerate reads it."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def settle_launcher() -> None:
    """Find out whether a launcher started this process; if none did, unset its variables, and say so.

    A batch system, a container or an earlier shell may have set `WORLD_SIZE=1` alone, or `ACCELERATE_USE_FSDP=true`.
    accelerate would take that for a launch. It would wait for others, need another library or change the precision.

    Raises:
        UserError: Variables say that there are other processes, and others that a launcher sets are missing.
    """
    joined = sys.modules.get("torch.distributed")
    if joined is not None and joined.is_available() and joined.is_initialized():
        return  # by a program of the user's
    place = {name: os.environ[name] for name in _PLACE if name in os.environ}
    fault = _fault(place)
    if place and not fault and all(os.environ.get(name) for name in (*_PLACE, *_MEETING)):
        return
    unset = {name: os.environ.pop(name) for name in (*place, *_SETTINGS) if name in os.environ}
    if fault:
        raise UserError(fault)
    ignored = [f"{name}={value}" for name, value in unset.items() if name in place or value.lower() not in _OFF]
    if ignored and sys.stderr is not None:
        sys.stderr.write(f"fire-llm: {', '.join(ignored)} in the environment, and no launcher: ignored\n")


def _fault(place: Mapping[str, str]) -> str | None:
    """Return what is wrong with the values of `_PLACE`; None for nothing."""
    values = ", ".join(f"{name}={value}" for name, value in place.items())
    if not all(value.isdecimal() for value in place.values()):
        return f"{values} in the environment: a launcher sets whole numbers. Unset them, or correct the launcher"
    rank, local, world = (int(place.get(name, default)) for name, default in zip(_PLACE, "001", strict=True))
    missing = [name for name in (*_PLACE, *_MEETING) if not os.environ.get(name)]
    if missing and (rank, local, world) != (0, 0, 1):
        return (
            f"{values} in the environment, without {', '.join(missing)}: a launcher sets all of them. Unset them to "
            "work in one process, or start with torchrun, accelerate launch or --num-processes"
        )
    if rank >= world or local >= world:
        return f"{values} in the environment: ranks count from 0 to WORLD_SIZE - 1. Unset them, or correct the launcher"
    return None
