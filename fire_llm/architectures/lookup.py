"""Which layout a parameter has: the key (block class, child) that it is known by, the tables, and the refusal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fire_llm.architectures.families import TABLE
from fire_llm.architectures.grammar import WHOLE_SUBTREE, Layout, Table
from fire_llm.architectures.names import plain_modules, unwrap

REGISTERED: Table = {}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList)
_HEAD = Layout("lm_head")
_CLASSIFIERS = ("score", "classifier", "qa_outputs")
"""Names of the heads of transformers' classifiers and question answerers, beside the trunk; others are in the table."""

ANY_MODULE = (
    "Of a model that is no causal LM of transformers, fire_(model, layout='modules') takes every Linear, convolution "
    "and MultiheadAttention (docs/modules.md)"
)
"""The next step for a model without a layout."""


@dataclass(frozen=True)
class Location:
    """Where one name of a parameter lives.

    Args:
        name: Full plain name in the model.
        owner: Module that holds it.
        block: Nearest module that is no container, above the owner of a `weight`, else the owner itself.
        child: Path from the block to the owner of a `weight`, else to the parameter; indices as `*`.
        ancestors: Every module around it, the model first, the owner last.
    """

    name: str
    owner: nn.Module
    block: nn.Module
    child: str
    ancestors: tuple[nn.Module, ...]

    @property
    def block_class(self) -> str:
        """Return the name of the block's class as it was written."""
        return class_of(self.block).__name__

    @property
    def is_weight(self) -> bool:
        """Return whether a module inside the block holds it under the name `weight`, rather than the block itself."""
        return self.owner is not self.block and self.name.endswith(".weight")


@dataclass(frozen=True)
class Match:
    """What one name of a parameter means: its role, and the layout where it is cut into matrices."""

    role: str
    location: Location
    layout: Layout | None = None
    refused: str = ""
    """Why no reset of matrices may touch it, although its role says so; empty where one may."""


class Lookup:
    """Find the locations of a model's parameters and what the tables hold about them."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = plain_modules(model)
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if head is None and callable(getter):  # transformers looks for it behind a trunk that may be wrapped
            head = self._modules.get("lm_head")
        heads = list(head) if isinstance(head, nn.ModuleList) else [head]
        if class_of(model).__module__.startswith("transformers."):
            heads += [self._modules.get(name) for name in _CLASSIFIERS]
        self._heads = [unwrap(one) for one in heads if isinstance(one, nn.Module)]

    def location(self, name: str) -> Location:
        """Find the block and the child path of a parameter."""
        owner, _, attribute = name.rpartition(".")
        block, target = (owner.rpartition(".")[0], owner) if attribute == "weight" and owner else (owner, name)
        while block and class_of(self._modules[block]) in _CONTAINERS:
            block = block.rpartition(".")[0]
        child = ".".join("*" if step.isdigit() else step for step in target.removeprefix(f"{block}.").split("."))
        steps = owner.split(".") if owner else []
        around = tuple(self._modules[".".join(steps[:n])] for n in range(len(steps) + 1))
        return Location(name, self._modules[owner], self._modules[block], child, around)

    def classify(self, location: Location, ndim: int) -> Match | None:
        """Return what a parameter means; None where it has two or more dimensions and no table lists it."""
        for module in location.ancestors:
            if subtree := _entry(module, WHOLE_SUBTREE):
                return Match(subtree.role, location)
        if location.is_weight and any(location.owner is head for head in self._heads):
            return self._head(location)
        if layout := _entry(location.block, location.child):
            if not layout.matrix:
                return Match(layout.role, location)
            if layout.module_class in (None, class_of(location.owner).__name__) or not location.is_weight:
                return Match(layout.role, location, layout)
            if not (ndim == 1 and _is_norm(location.owner)):  # `child.*` may be a norm, and then a layer
                return None
        if isinstance(location.owner, nn.Embedding):
            return Match("embedding", location)
        if ndim > 1:
            return None
        if _is_norm(location.owner):
            return Match("norm", location)
        return Match("bias" if location.name.endswith("bias") else "other", location)

    @staticmethod
    def _head(location: Location) -> Match | None:
        """Return what an output head is: a plain linear layer, or of the very class that a table names."""
        kind = class_of(location.owner)
        if kind is nn.Linear:
            return Match("lm_head", location, _HEAD)
        listed = _entry(location.block, location.child)
        is_listed_class = listed is not None and listed.module_class == kind.__name__
        return Match("lm_head", location, listed) if is_listed_class else None


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm by its name; whole blocks are called RobertaPreLayerNorm… too."""
    return "Norm" in class_of(module).__name__ and not list(module.children())


def class_of(module: nn.Module) -> type:
    """Return the class a module was written as: fully_shard and replicate swap in subclasses of their own."""
    return next(
        kind
        for kind in type(module).__mro__
        if not any(base.__module__.startswith("torch.distributed.") for base in kind.__mro__)
    )


def in_adapter(location: Location) -> bool:
    """Return whether a parameter belongs to a layer of PEFT's, or has a name that adapters of LoRA have."""
    kinds = (kind.__name__ for module in location.ancestors for kind in type(module).__mro__)
    return "BaseTunerLayer" in kinds or any(step.startswith("lora_") for step in location.name.split("."))


def refusal(kind: str, unknown: list[tuple[Location, tuple[int, ...]]]) -> str:
    """Return the message about weights without a layout: the first in full, the others by name, and what to do.

    Args:
        kind: Class name of the model.
        unknown: Locations and stored shapes, at least one.
    """
    location, shape = unknown[0]
    block, child, module = location.block_class, location.child, class_of(location.block).__module__
    pairs = list(dict.fromkeys(f"{s.block_class}.{s.child}" for s, _ in unknown))[1:]
    registered = [other for name, other in REGISTERED if name == block and other != child]
    hints = f" Also unknown: {', '.join(pairs[:5])}{' and more' if len(pairs) > 5 else ''}." if pairs else ""
    if registered:
        hints += f" Registered for {block}: {', '.join(registered)}."
    if any(in_adapter(s) for s, _ in unknown):
        return (
            f"{kind}: '{location.name}' belongs to an adapter, whose product is added to weights that stay as they "
            "are. Reset the base before the adapter is put on it: fire_(model), then get_peft_model(model, config). "
            "Of a trained adapter, reset the sum: fire_(model.merge_and_unload())"
        )
    if (block, child) in REGISTERED:
        layout = REGISTERED[block, child]
        return (
            f"{kind}: the layout registered for {block}.{child} is for a {layout.module_class}, and '{location.name}' "
            f"(shape {shape}) is held by a {class_of(location.owner).__name__}.{hints} If it fits all the same, name "
            f"that class, or None for any: fire_llm.register_layout('{block}', '{child}', role='{layout.role}', "
            f"module_class='{class_of(location.owner).__name__}')"
        )
    if (block, child) in TABLE:
        hints += f" A layout of that name exists, for transformers' own {block} and a child of class "
        hints += f"{TABLE[block, child].module_class}; this {block} is defined in {module}."
    return (
        f"{kind}: no layout is known for {block}.{child} ('{location.name}', shape {shape}, held by "
        f"{class_of(location.owner).__name__}).{hints} Nothing is guessed: add an entry for ('{block}', '{child}') to "
        f"a file in fire_llm/architectures/families/ (docs/adding.md, 'A layout'), or call "
        f"fire_llm.register_layout('{block}', '{child}', role=...). {ANY_MODULE}"
    )


def _entry(block: nn.Module, child: str) -> Layout | None:
    """Find a layout by exact class; the built-in table speaks of transformers' own classes only."""
    kind = class_of(block)
    key = kind.__name__, child
    return REGISTERED.get(key) or (TABLE.get(key) if kind.__module__.startswith("transformers.") else None)
