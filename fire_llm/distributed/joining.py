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
"""How long ranks wait in a collective: one of them may be writing, hashing and reading back a checkpoint meanwhile, or
training a tokenizer. NCCL's own limit is 10 minutes. A rank that died is noticed by the launcher, and a machine that
is gone by `presence`, not by this."""


def ranks() -> Any:
    """Return accelerate's view of this process, joining the other ranks where a launcher started some."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    be_present()
    return state


@functools.cache
def cpu_group(world: Any, use: str) -> Any:
    """Return a gloo group of all ranks, whatever backend they train with; collective where it is made, once a use.

    Args:
        world: The group of all ranks.
        use: What it is for: two threads may not talk in one group.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def join(backend: str | None = None) -> None:
    """Join the other ranks of the launcher, without accelerate.

    Args:
        backend: As in `torch.distributed.init_process_group`; None for one a type of device.
    """
    dist.init_process_group(backend, timeout=PATIENCE)
    be_present()


@contextmanager
def leaving() -> Iterator[None]:
    """Destroy the process group that was made in the block, once the block has ended well.

    After an error the group stays: other ranks may wait in a collective, and the store holds their words.
    """
    before = dist.is_initialized()
    yield
    leave()
    if dist.is_initialized() and not before:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # it knows the group
        dist.destroy_process_group()
