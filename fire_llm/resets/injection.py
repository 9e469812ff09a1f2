"""Plasticity injection: a network goes on learning with a newly drawn head, and computes what it did until it does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fire_llm.architectures.matrices import refuse_uninitialised
from fire_llm.architectures.names import unwrap
from fire_llm.core.errors import UserError, did_you_mean


class PlasticityInjection(nn.Module):
    """A head that learns anew: old(x) + new(x) − drawn(x), of which `new` alone is trained.

    `drawn` is `new` as it was drawn, so that at first the sum is old(x).
    Source: Nikishin et al., "Deep reinforcement learning with plasticity injection", arXiv 2305.15555, section 4.
    """

    def __init__(self, old: nn.Module, new: nn.Module) -> None:
        super().__init__()
        self.old = old.requires_grad_(False)
        self.new = new.requires_grad_(True)
        self.drawn = copy.deepcopy(new).requires_grad_(False)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return what the old head gives, and what the new one has learned.

        Raises:
            UserError: The head returns no tensor.
        """
        old = self.old(*inputs, **named)
        if not isinstance(old, Tensor):
            raise UserError(
                f"plasticity injection adds what heads return, and this {type(self.old).__name__} returns a "
                f"{type(old).__name__}: inject into a part of it that returns a tensor"
            )
        output: Tensor = old + self.new(*inputs, **named) - self.drawn(*inputs, **named)
        return output


def inject_plasticity_(model: nn.Module, name: str, *, seed: int = 0) -> PlasticityInjection:
    """Replace a network's head by one that can learn anew, in place; what the network computes stays as it is.

    Make a new optimizer afterwards, and keep the head's dropout, if it has any, out of `name`: the three parts would
    draw their own.

    Args:
        model: Any module.
        name: Of the head: a module that returns a tensor, whose parts can draw themselves (`reset_parameters`). A
            head that was injected before gets another new part; the part that learned until now is frozen.
        seed: Of what is drawn; no other generator is touched.

    Warns:
        UserWarning: The head shares a weight with the rest of the model, such as the embedding that it is tied to. It
            gets a copy, which is frozen; the rest goes on learning.

    Raises:
        UserError: There is no such module, it is the whole model, has no parameters, or a part of it cannot be drawn.
    """
    model = unwrap(model)
    known = dict(model.named_modules(remove_duplicate=False))
    if name not in known or not name:
        raise UserError(f"'{name}' names no module inside the model.{did_you_mean(name, known)}")
    old = known[name]
    for key, tensor in (*old.named_parameters(), *old.named_buffers()):
        refuse_uninitialised(tensor, f"{name}.{key}")
    new = copy.deepcopy(old.new if isinstance(old, PlasticityInjection) else old).cpu()
    with_weights = [(key, m) for key, m in new.named_modules() if [*m.parameters(recurse=False)]]
    undrawable = [key or name for key, module in with_weights if not hasattr(module, "reset_parameters")]
    if undrawable or not with_weights:
        why = f"'{undrawable[0]}' in it has no reset_parameters" if undrawable else "it has no parameters"
        raise UserError(f"'{name}' cannot be drawn again: {why}")
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())  # torch.manual_seed seeds CUDA too
        for _, module in with_weights:
            module.reset_parameters()
    places = [place for place, module in known.items() if module is old]
    if shared := _shared(known, old, places):
        warnings.warn(
            f"'{name}' shares '{shared}' with the rest of the model: the old head is frozen as a copy of its own, so "
            f"that '{shared}' goes on learning",
            stacklevel=2,
        )
        old = copy.deepcopy(old)
    injected = PlasticityInjection(old, new.to(next(old.parameters()).device))
    for place in places:
        above, _, child = place.rpartition(".")
        setattr(model.get_submodule(above), child, injected.train(old.training))
    return injected


def _shared(known: dict[str, nn.Module], head: nn.Module, places: list[str]) -> str:
    """Return the name, outside of a head, of a parameter that it shares with the model; empty where there is none."""
    in_head, prefixes = {id(p) for p in head.parameters()}, tuple(f"{place}." for place in places)
    for place, module in known.items():
        if f"{place}.".startswith(prefixes):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in in_head:
                return f"{place}.{key}" if place else key
    return ""
