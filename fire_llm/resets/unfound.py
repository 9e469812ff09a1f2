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
    found: Sequence[ParameterSlice]
    for spec in specs:
        for pattern in spec.exclude:
            if not any(weight.found_by(pattern) for weight in slices):
                raise UserError(_unfound("exclude", pattern, slices))
        for pattern in spec.include:
            found = [weight for weight in slices if weight.found_by(pattern)]
            if not found:
                raise UserError(_unfound("include", pattern, slices))
            _refuse_idle(spec, f"include '{pattern}'", found)
        for role, pattern in spec.patterns:
            found = [weight for weight in slices if weight.found_by(pattern)]
            if not found:
                fused = next((weight.parameter for weight in slices if is_fused(weight)), "")
                hint = f". If '{fused}' holds it, name its parts with split" if fused else ""
                raise UserError(_unfound(f"roles: {role}", pattern, slices) + hint)
            _refuse_idle(spec, f"the role {role}, '{pattern}',", found)
        _refuse_layers(spec, slices)


def _refuse_layers(spec: ResetSpec, slices: Sequence[ParameterSlice]) -> None:
    there = {number for weight in slices for number in layers_of(weight)}
    for numbers in parse_layers(spec.layers) or ():
        if missing := [number for number in numbers if number not in there]:
            known = f"{min(there)} to {max(there)}" if there else "none"
            raise UserError(f"layers '{spec.layers}': the model has no layer {missing[0]}; its layers are {known}")
        found = [weight for weight in slices if any(number in numbers for number in layers_of(weight))]
        _refuse_idle(spec, f"layers '{spec.layers}'", found)


def _refuse_idle(spec: ResetSpec, named: str, found: Sequence[ParameterSlice]) -> None:
    """Refuse a name of which everything found is left alone for another reason."""
    reasons = [spec.why_not(weight) for weight in found]
    if reasons and None not in reasons:
        raise UserError(
            f"{named} finds nothing that '{spec.method}' would touch: '{found[0].name}' is left alone ({reasons[0]})"
        )


def _unfound(option: str, pattern: str, slices: Sequence[ParameterSlice]) -> str:
    names = list(dict.fromkeys(name for weight in slices for name in weight.names))

    def likeness(name: str) -> int:
        return sum(block.size for block in SequenceMatcher(None, pattern, name, autojunk=False).get_matching_blocks())

    near = ", ".join(f"'{name}'" for name in sorted(names, key=likeness, reverse=True)[:3])
    return (
        f"{option} '{pattern}' finds no name in the model. The nearest are {near}. It is a regular expression, looked "
        "for anywhere in a name; --dry-run, inspect and module_matrices(model) list all of them"
    )
