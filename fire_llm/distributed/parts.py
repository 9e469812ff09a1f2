"""Run the forward pass of a model in two parts, with its shards gathered once.

FSDP2 gathers and frees shards in hooks of its modules. To these hooks, each slice that a head computes would be a
forward pass of its own, and a trunk that runs alone a pass that never ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fire_llm.distributed.placement import fsdp_modules


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward in the block; a forward that a library had set is put back afterwards."""
    # An attribute of the instance hides the method of the class.
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
    last: Callable[[Any], Any] = lambda output: output,
    **inputs: Any,
) -> Any:
    """Return `last(first())`, computed as one forward pass of a model in shards; collective.

    FSDP2's hooks of the root, and of the modules behind the trunk (a head with the final norm, say), run once, around
    both functions. These may run the model and those modules any number of times.

    Args:
        root: The module that FSDP2 gathers first.
        trunk: A part of it, which `first` runs once.
        first: Returns what `last` takes.
        last: Returns the result. Modules behind the trunk get gradients through it alone.
        **inputs: Passed to the hooks of the root.
    """
    inside = set(trunk.modules())
    behind = [module for module in fsdp_modules(root) if module is not root and module not in inside]
    forward, results = root.forward, []

    def parts(**_: Any) -> Any:
        with forward_replaced(root, forward), _hooks(root, of_fsdp2=False):
            with ExitStack() as stack:
                for module in behind:
                    module.unshard()
                    stack.enter_context(_hooks(module, of_fsdp2=False))
                output = first()
            results.append(_within(behind, lambda: last(output)))
        return results[0]

    with forward_replaced(root, parts):
        root(**inputs)
    return results[0]  # not what the root returned, which FSDP2 casts to 16 bits where it computes in them


def _within(modules: Sequence[nn.Module], compute: Callable[[], Any]) -> Any:
    """Return `compute()`, with FSDP2's hooks of some modules run once around it."""
    if not modules:
        return compute()
    module, *others = modules
    forward, hooks, results = module.forward, _hooks_of(module), []

    def inner() -> Any:
        with forward_replaced(module, forward), _hooks(module, hooks, of_fsdp2=False):
            results.append(_within(others, compute))
        return results[0]

    with _hooks(module, hooks, of_fsdp2=True), forward_replaced(module, inner):
        module()
    return results[0]


def _hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    return [dict(module._forward_pre_hooks), dict(module._forward_hooks)]


@contextmanager
def _hooks(module: nn.Module, among: list[dict[int, Any]] | None = None, *, of_fsdp2: bool) -> Iterator[None]:
    """Let a module have only FSDP2's hooks in the block, or only others: of its present hooks, or of those given."""
    before = _hooks_of(module)
    registries: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    try:
        for registry, hooks in zip(registries, among or before, strict=True):
            registry.clear()
            registry.update((number, hook) for number, hook in hooks.items() if _is_fsdp2(hook) == of_fsdp2)
        yield
    finally:
        for registry, hooks in zip(registries, before, strict=True):
            registry.clear()
            registry.update(hooks)


def _is_fsdp2(hook: Any) -> bool:
    return str(hook.__module__).startswith("torch.distributed.fsdp.")
