"""Return a phase's optimizer, and check optimizers: unknown names, and keys that the chosen name does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from fire_llm.core.errors import did_you_mean
from fire_llm.experiment.recipe.sections import OptimizerSection, PhaseSection, Recipe

OWN_KEYS = {
    "muon_lr": ("name", ("muon",)),
    "muon_momentum": ("name", ("muon",)),
    "min_lr": ("schedule", ("cosine", "wsd", "infinite")),
    "decay": ("schedule", ("wsd", "infinite")),
    "decay_shape": ("schedule", ("wsd", "infinite")),
    "cooldown": ("schedule", ("infinite",)),
    "constant_lr": ("schedule", ("infinite",)),
}
"""Keys that only some names or schedules have: (the key that decides, its values)."""

_REFUSED = (
    ("lomo", "steps inside the backward pass, where nothing can be accumulated or reset"),
    ("layerwise", "steps inside the backward pass, where nothing can be accumulated or reset"),
    ("galore", "needs a list of modules that a recipe cannot give"),
    ("apollo", "needs a list of modules that a recipe cannot give"),
    ("schedule_free", "keeps other weights for evaluation than for training, so that checkpoints would hold neither"),
)
_LIBRARIES = (
    (r"adamw_torch_[48]bit", "torchao"),
    (r"adamw_torch_xla", "torch_xla"),
    (r"adamw_torch_npu_fused", "torch_npu"),
    (r"adamw_anyprecision", "torchdistx"),
    (r"grokadamw", "grokadamw"),
    (r"stable_adamw", "optimi"),
    (r".*(8bit|32bit|bnb)|ademamix", "bitsandbytes"),
)
_NO_BETAS = r"adafactor|sgd|adagrad|rmsprop.*"
_LACKS = {"betas": _NO_BETAS, "eps": rf"{_NO_BETAS}|.*lion.*"}
"""Keys of AdamW, and the names of optimizers that do not have them."""


def optimizer_of(recipe: Recipe, phase: PhaseSection) -> OptimizerSection:
    """Return a phase's optimizer: the recipe's, with the phase's own keys in place of the recipe's.

    Keys of the recipe that the phase's optimizer or schedule does not have go back to their defaults.
    """
    given = {key: getattr(phase.optimizer, key) for key in phase.optimizer.model_fields_set}
    merged = recipe.optimizer.model_copy(update=given)
    useless = {key for key, (chooser, having) in OWN_KEYS.items() if getattr(merged, chooser) not in having}
    useless |= {key for key, names in _LACKS.items() if re.fullmatch(names, merged.name)}
    return merged.model_copy(update={key: _default(key) for key in useless - given.keys()}) if given else merged


def optimizer_faults(section: OptimizerSection) -> Iterable[str]:
    """Yield the faults of an optimizer section whose values are each right by themselves."""
    if name_fault := _name_fault(section.name):
        yield f"optimizer.name: {name_fault}"
    for key, names in _LACKS.items():
        if re.fullmatch(names, section.name) and getattr(section, key) != _default(key):
            yield f"optimizer.{key}: '{section.name}' has none; remove the key"
    for key, (chooser, having) in OWN_KEYS.items():
        chosen = getattr(section, chooser)
        # A key at its default may always stand there: the recipe.json of every run lists all keys.
        if chosen not in having and getattr(section, key) != _default(key):
            yield f"optimizer.{key}: {chooser} '{chosen}' has no such key; it belongs to {', '.join(having)}"
    if section.schedule in ("wsd", "infinite"):
        yield from _schedule_faults(section)
    if section.schedule != "constant" and section.min_lr > section.lr:
        yield f"optimizer.min_lr: {section.min_lr} is above lr, {section.lr}"


def _default(key: str) -> Any:
    return OptimizerSection.model_fields[key].default


def _name_fault(name: str) -> str | None:
    if name in ("adamw", "muon"):
        return None
    from transformers.training_args import OptimizerNames

    known = ["adamw", "muon", *(o.value for o in OptimizerNames)]
    if name not in known:
        usable = [n for n in known if not any(word in n for word, _ in _REFUSED)]
        return f"unknown optimizer '{name}'.{did_you_mean(name, usable)} Known: {', '.join(usable)}"
    for word, why in _REFUSED:
        if word in name:
            return f"'{name}' {why}; take adamw or muon"
    for pattern, library in _LIBRARIES:
        if re.fullmatch(pattern, name):
            return None if find_spec(library) else f"'{name}' needs the library {library}, which is not installed"
    return None


def _schedule_faults(section: OptimizerSection) -> Iterable[str]:
    parts = {"warmup": section.warmup, "decay": section.decay}
    if section.schedule == "infinite":
        parts["cooldown"] = section.cooldown
        if section.constant_lr is None:
            yield "optimizer.constant_lr: missing; the schedule 'infinite' needs it, between min_lr and lr"
        elif not section.min_lr <= section.constant_lr <= section.lr:
            yield (
                f"optimizer.constant_lr: {section.constant_lr} should lie between min_lr, {section.min_lr}, "
                f"and lr, {section.lr}"
            )
    if sum(parts.values()) > 1 + 1e-9:  # 0.3 + 0.6 + 0.1 may come out above 1
        total = " + ".join(f"{key} {value:g}" for key, value in parts.items())
        yield f"optimizer.decay: {total} is more than the whole phase, 1; shorten one of them"
    if section.shape == "exponential" and section.min_lr == 0:
        yield "optimizer.min_lr: an exponential decay never reaches 0; give a rate above it, or another decay_shape"
