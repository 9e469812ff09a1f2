"""Run the forward pass of a model in parts of one's own, its shards gathered once.

FSDP2 gathers and frees shards in hooks of the modules that it was given. A head that is run on a slice at a time would
be one forward pass a slice to them, and a trunk that is run alone one that never ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
        with forward_replaced(root, forward), _hooks([root], of_fsdp2=False):
            for module in behind:
                module.unshard()
            with _hooks(behind, of_fsdp2=False):
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
    forward, found = module.forward, []

    def inner() -> Any:
        with forward_replaced(module, forward), _hooks([module], of_fsdp2=False):
            found.append(_within(others, compute))
        return found[0]

    with _hooks([module], of_fsdp2=True), forward_replaced(module, inner):
        module()
    return found[0]


@contextmanager
def _hooks(modules: Iterable[nn.Module], *, of_fsdp2: bool) -> Iterator[None]:
    """Keep those of the modules' hooks that are FSDP2's, or those that are not."""
    with ExitStack() as stack:
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                before = dict(hooks)
                stack.callback(hooks.update, before)
                stack.callback(hooks.clear)
                for number, hook in before.items():
                    if hook.__module__.startswith("torch.distributed.fsdp.") != of_fsdp2:
                        del hooks[number]
        yield
