"""A model that reads its parameters rounded to 16 bits, so that norms and the residual stream are in 16 bits too."""

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
        dtype: Of what it reads; integer parameters are left as they are.
    """
    parameters = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None and p.is_floating_point()
    ]
    copies: dict[int, Tensor] = {}
    try:
        for owner, name, p in parameters:
            if id(p) not in copies:
                copies[id(p)] = p.to(dtype)
            slots: dict[str, Any] = owner._parameters
            slots[name] = copies[id(p)]
        with torch.autocast(parameters[0][2].device.type, enabled=False), warnings.catch_warnings():
            # torch.compile looks for the gradients of whatever it reads.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
            yield
    finally:
        for owner, name, p in parameters:
            owner._parameters[name] = p
