"""Refuse names that find nothing: what is misspelt would be done to other weights than were meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.architectures.modules import is_fused
from fire_llm.core.errors import UserError
from fire_llm.resets.selection import layers_of, parse_layers
from fire_llm.resets.spec import ResetSpec


def refuse_unfound(specs: Iterable[ResetSpec], slices: Sequence[ParameterSlice]) -> None:
    """Refuse patterns and layers that find nothing in a model.

    Args:
        specs: Resets.
        slices: All of the model.

    Raises:
        UserError: Naming the pattern and the names nearest to it, or the layers that there are.
    """
    for spec in specs:
        for pattern in spec.exclude:
            _matching("exclude", pattern, slices)
        for pattern in spec.include:
            _refuse_idle(spec, f"include '{pattern}'", _matching("include", pattern, slices))
        for role, pattern in spec.patterns:
            fused = next((weight.parameter for weight in slices if is_fused(weight)), "")
            hint = f". If '{fused}' holds it, name its parts with split" if fused else ""
            _refuse_idle(spec, f"the role {role}, '{pattern}',", _matching(f"roles: {role}", pattern, slices, hint))
        _refuse_layers(spec, slices)


def _matching(option: str, pattern: str, slices: Sequence[ParameterSlice], hint: str = "") -> Sequence[ParameterSlice]:
    """Return the slices that a pattern finds.

    Raises:
        UserError: There are none.
    """
    if matching := [weight for weight in slices if weight.found_by(pattern)]:
        return matching
    names = list(dict.fromkeys(name for weight in slices for name in weight.names))

    def likeness(name: str) -> int:
        return sum(block.size for block in SequenceMatcher(None, pattern, name, autojunk=False).get_matching_blocks())

    nearest = ", ".join(f"'{name}'" for name in sorted(names, key=likeness, reverse=True)[:3])
    raise UserError(
        f"{option} '{pattern}' finds no name in the model. The nearest are {nearest}. It is a regular expression, "
        f"looked for anywhere in a name; --dry-run, inspect and module_matrices(model) list all of them{hint}"
    )


def _refuse_layers(spec: ResetSpec, slices: Sequence[ParameterSlice]) -> None:
    holding = [layers_of(weight.role, weight.parameter, *weight.tied) for weight in slices]
    layers = set().union(*holding)
    for numbers in parse_layers(spec.layers) or ():
        if missing := [number for number in numbers if number not in layers]:
            known = f"{min(layers)} to {max(layers)}" if layers else "none"
            raise UserError(f"layers '{spec.layers}': the model has no layer {missing[0]}; its layers are {known}")
        inside = [weight for weight, own in zip(slices, holding, strict=True) if own & {*numbers}]
        _refuse_idle(spec, f"layers '{spec.layers}'", inside)


def _refuse_idle(spec: ResetSpec, named: str, slices: Sequence[ParameterSlice]) -> None:
    """Refuse a name if every slice that it finds is left alone for another reason."""
    reasons = [spec.why_not(weight) for weight in slices]
    if None not in reasons:
        raise UserError(
            f"{named} finds nothing that '{spec.method}' would touch: '{slices[0].name}' is left alone ({reasons[0]})"
        )
