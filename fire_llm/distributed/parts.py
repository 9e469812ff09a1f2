"""Run the forward pass of a model in parts of one's own, its shards gathered once.

FSDP2 gathers and frees shards in hooks of the modules that it was given. A head that is run on a slice at a time would
be one forward pass a slice to them, and a trunk that is run alone one that never ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fire_llm.distributed.placement import fsdp_modules


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward inside; afterwards what a library had put there itself is put back."""
    # An attribute of the instance hides the method of its class.
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def in_parts(
    root: nn.Module,
    trunk: nn.Module,
    first: Callable[[], Any],
    last: Callable[[Any], Any] = lambda found: found,
    **inputs: Any,
) -> Any:
    """Return `last(first())`, computed as the forward pass of a model in shards; collective.

    The hooks of FSDP2 on the root, and on what it gathers behind the trunk (a head with the final norm, say), run once,
    around all of it. Both functions may run the model and those modules as often as they like.

    Args:
        root: What FSDP2 gathers first.
        trunk: A part of it, which `first` runs once.
        first: Returns what `last` takes.
        last: Returns the result; gradients arrive at what is behind the trunk through it alone.
        **inputs: What the hooks of the root are shown.
    """
    inside = set(trunk.modules())
    behind = [module for module in fsdp_modules(root) if module is not root and module not in inside]
    forward, found = root.forward, []

    def parts(**_: Any) -> Any:
        with forward_replaced(root, forward), _hooks(root, of_fsdp2=False):
            with ExitStack() as stack:
                for module in behind:
                    module.unshard()
                    stack.enter_context(_hooks(module, of_fsdp2=False))
                given = first()
            found.append(_within(behind, lambda: last(given)))
        return found[0]

    with forward_replaced(root, parts):
        root(**inputs)
    return found[0]  # not what the root returned: FSDP2 casts that to 16 bits where it computes in them


def _within(modules: Sequence[nn.Module], compute: Callable[[], Any]) -> Any:
    """Return `compute()`, with FSDP2's hooks on some modules run once around it."""
    if not modules:
        return compute()
    module, *others = modules
    forward, hooks, found = module.forward, _of(module), []

    def inner() -> Any:
        with forward_replaced(module, forward), _hooks(module, hooks, of_fsdp2=False):
            found.append(_within(others, compute))
        return found[0]

    with _hooks(module, hooks, of_fsdp2=True), forward_replaced(module, inner):
        module()
    return found[0]


def _of(module: nn.Module) -> list[dict[int, Any]]:
    return [dict(module._forward_pre_hooks), dict(module._forward_hooks)]


@contextmanager
def _hooks(module: nn.Module, among: list[dict[int, Any]] | None = None, *, of_fsdp2: bool) -> Iterator[None]:
    """Let a module have those of its hooks that are FSDP2's, or those that are not; of its own, or of others given."""
    before = _of(module)
    places: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    try:
        for place, hooks in zip(places, among or before, strict=True):
            place.clear()
            place.update((number, hook) for number, hook in hooks.items() if _is_fsdp2(hook) == of_fsdp2)
        yield
    finally:
        for place, hooks in zip(places, before, strict=True):
            place.clear()
            place.update(hooks)


def _is_fsdp2(hook: Any) -> bool:
    return str(hook.__module__).startswith("torch.distributed.fsdp.")
