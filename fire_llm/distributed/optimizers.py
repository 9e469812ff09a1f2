"""Optimizers behind wrappers, which may divide states among ranks: what they train, and where their states are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def optimizers_in(given: Any) -> list[Any]:
    """Return the optimizers that are given and those that they wrap, each once.

    A wrapper's own `state` may be empty or stale. Example: `ZeroRedundancyOptimizer` keeps the moments in its `optim`.

    Args:
        given: An optimizer, or a list, tuple or dict of several; anything else holds none.
    """
    optimizers, seen, queue = [], set(), [given]
    while queue:
        item = queue.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, list | tuple | dict):
            queue += item.values() if isinstance(item, dict) else item
        elif hasattr(item, "param_groups"):
            optimizers.append(item)
            attributes = getattr(item, "__dict__", {})
            queue += [value for name, value in attributes.items() if name not in ("param_groups", "state")]
    return optimizers


def optimizer_states(given: Any) -> list[Any]:
    """Return the different `state`s, by parameter, that some optimizers and those that they wrap keep."""
    states = [getattr(optimizer, "state", {}) for optimizer in optimizers_in(given)]
    return list({id(state): state for state in states}.values())


def trains_any(given: Any, tensors: Iterable[Tensor]) -> bool:
    """Return whether some optimizers, or those that they wrap, train one of some tensors."""
    trained = {id(p) for o in optimizers_in(given) for group in o.param_groups for p in group["params"]}
    return any(id(tensor) in trained for tensor in tensors)
