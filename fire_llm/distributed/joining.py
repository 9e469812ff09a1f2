"""Join the other ranks of a launcher, and leave them at the end."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fire_llm.distributed.presence import be_present, leave

PATIENCE = timedelta(hours=2)
"""How long ranks wait in a collective: meanwhile one may write, hash and read back a checkpoint, or train a tokenizer.
NCCL's own limit is 10 minutes. The launcher notices a rank that died, and `presence` a machine that is lost."""


def ranks() -> Any:
    """Join the other ranks where a launcher started some, and return accelerate's state of this process."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    be_present()
    return state


@functools.cache
def cpu_group(world: Any, use: str) -> Any:
    """Return a gloo group of all ranks, whatever backend they train with; collective at the first call for each use.

    Args:
        world: The group of all ranks.
        use: Purpose of the group: two threads must not use the same one.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def join(backend: str | None = None) -> None:
    """Join the other ranks of the launcher, without accelerate.

    Args:
        backend: As in `torch.distributed.init_process_group`; None for one for each type of device.
    """
    dist.init_process_group(backend, timeout=PATIENCE)
    be_present()


@contextmanager
def leaving() -> Iterator[None]:
    """Destroy the process group that was made in the block, unless the block raises.

    After an error the group stays: other ranks may wait in a collective, and exchange messages through its store.
    """
    before = dist.is_initialized()
    yield
    leave()
    if dist.is_initialized() and not before:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # it holds the group
        dist.destroy_process_group()
