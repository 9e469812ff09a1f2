"""A model that reads its parameters rounded to 16 bits: residual stream, norms and all, not the products alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def rounded(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a module read its parameters in another dtype inside the block, without autocast.

    Gradients arrive at the parameters themselves, in their own dtype; a parameter that is tied is rounded once.

    Args:
        module: Run inside the block; not while it is checkpointed, which runs it again afterwards.
        dtype: Of what it reads; parameters that are no floating-point numbers are left as they are.
    """
    kept = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None and p.is_floating_point()
    ]
    copies: dict[int, Tensor] = {}
    try:
        for owner, name, p in kept:
            if id(p) not in copies:
                copies[id(p)] = p.to(dtype)
            slots: dict[str, Any] = owner._parameters
            slots[name] = copies[id(p)]
        with torch.autocast(kept[0][2].device.type, enabled=False), warnings.catch_warnings():
            # torch.compile looks for the gradients of whatever it reads.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
            yield
    finally:
        for owner, name, p in kept:
            owner._parameters[name] = p
