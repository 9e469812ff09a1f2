"""The plain names of a model's modules and tensors: those that they have without what is wrapped around them.

DistributedDataParallel, torch.compile and activation checkpointing put modules of their own around a model or its
blocks, and steps of their own into every name below: `layers.0._orig_mod.mlp.up_proj.weight`. Options, initial weights
and reports speak of `layers.0.mlp.up_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from fire_llm.core.errors import UserError

STEPS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Attributes that hold what torch.compile, activation checkpointing and FSDP1 wrap; no model has such names itself."""


def _inner(module: nn.Module) -> str | None:
    """Return the attribute under which a wrapper holds what it wraps; None of any other module."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    # Wrappers pass on what they are asked for: only their own attributes tell.
    attributes = {**vars(module), **dict(module.named_children())}
    return next((step for step in STEPS if isinstance(attributes.get(step), nn.Module)), None)


def refuse_no_module(model: Any) -> None:
    """Refuse what is given in the place of a model.

    Raises:
        UserError: It is no torch module, but a path, a state_dict or the like.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(
            f"model: {kind} is given, and a torch module is wanted: load it first. (A checkpoint on the disk is reset "
            "by reset_checkpoint, or `fire-llm apply`)"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Peel what DistributedDataParallel, DataParallel, torch.compile and the like put around a model.

    Raises:
        UserError: It is no torch module.
    """
    refuse_no_module(model)
    while (step := _inner(model)) is not None:
        model = getattr(model, step)
    return model


def plain_name(name: str) -> str:
    """Strip what torch.compile and activation checkpointing put into the name of a stored tensor."""
    return ".".join(step for step in name.split(".") if step not in STEPS)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of an unwrapped model by every plain name, parents first; wrappers within have none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    plain_names: dict[str, str] = {}
    plain: dict[str, nn.Module] = {}
    for name, module in modules.items():
        parent, _, step = name.rpartition(".")
        wrapped = name and step == _inner(modules[parent])
        plain_names[name] = plain_names[parent] if wrapped else ".".join(filter(None, (plain_names.get(parent), step)))
        plain[plain_names[name]] = module
    return plain


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of an unwrapped model under every plain name, in the order of `named_parameters()`."""
    for owner, module in plain_modules(model).items():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{owner}.{name}" if owner else name, parameter


_T = TypeVar("_T", bound=Tensor)


def names_by_tensor(named: Iterable[tuple[str, _T]]) -> dict[_T, list[str]]:
    """Return the names of each tensor, in the order of first names; a tied one has several."""
    names: dict[_T, list[str]] = {}
    for name, tensor in named:
        names.setdefault(tensor, []).append(name)
    return names


def compiles(pattern: str) -> bool:
    """Return whether a text is a regular expression, which may be looked for in names."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def plain_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of an unwrapped model that a checkpoint holds, under every plain name."""
    for owner, module in plain_modules(model).items():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{owner}.{name}" if owner else name, buffer
