"""Which of a launcher's processes this one is, by its environment: known before the ranks have joined.

What the ranks of a process group share is asked of the group instead (`distributed.agree`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from fire_llm.core.errors import UserError

_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")

_SETTINGS = (
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_SAGEMAKER", "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
)  # fmt: skip
"""By which `accelerate launch` changes what a training computes, or what it needs."""

_OFF = ("", "0", "1", "no", "false")
"""Values of those that ask for nothing; 1 is that of steps accumulated."""


def launched() -> bool:
    """Return whether a launcher made this process."""
    return any(name in os.environ for name in _PLACE)


def first_rank() -> bool:
    """Return whether this process is the first of those that a launcher made, or alone: the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def launched_in_shards() -> bool:
    """Return whether a launcher asks for FSDP."""
    return flag("ACCELERATE_USE_FSDP")


def flag(name: str) -> bool:
    """Return whether a variable of the environment says yes, as accelerate reads it."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def settle_launcher() -> None:
    """Find out whether a launcher started this process; drop what one has left in the environment, and say so.

    A batch system, a container or an earlier shell may have set `WORLD_SIZE=1` alone, or `ACCELERATE_USE_FSDP=true`.
    accelerate would take that for a launch: wait for others, want another library or train in another precision.

    Raises:
        UserError: A part of what a launcher sets says that there are others: nobody knows where to meet them.
    """
    joined = sys.modules.get("torch.distributed")
    if joined is not None and joined.is_available() and joined.is_initialized():
        return  # by a program of the user's
    given = {name: os.environ[name] for name in _PLACE if name in os.environ}
    fault = _fault(given)
    if given and not fault and all(os.environ.get(name) for name in (*_PLACE, *_MEETING)):
        return
    left = {name: os.environ.pop(name) for name in (*given, *_SETTINGS) if name in os.environ}
    if fault:
        raise UserError(fault)
    ignored = [f"{name}={value}" for name, value in left.items() if name in given or value.lower() not in _OFF]
    if ignored and sys.stderr is not None:
        sys.stderr.write(f"fire-llm: {', '.join(ignored)} in the environment, and no launcher: ignored\n")


def _fault(given: Mapping[str, str]) -> str | None:
    """Return what is wrong with what says which of a launcher's processes this one is."""
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    if not all(value.isdecimal() for value in given.values()):
        return f"{said} in the environment: a launcher sets whole numbers. Unset them, or correct the launcher"
    rank, local, world = (int(given.get(name, default)) for name, default in zip(_PLACE, "001", strict=True))
    missing = [name for name in (*_PLACE, *_MEETING) if not os.environ.get(name)]
    if missing and (rank, local, world) != (0, 0, 1):
        return (
            f"{said} in the environment, without {', '.join(missing)}: a launcher sets all of them. Unset them to "
            "work in one process, or start with torchrun, accelerate launch or --num-processes"
        )
    if rank >= world or local >= world:
        return f"{said} in the environment: ranks count from 0 to WORLD_SIZE - 1. Unset them, or correct the launcher"
    return None
