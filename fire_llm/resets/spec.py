"""One reset with its options and roles, as a recipe, a script or the command line gives it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fire_llm.architectures.matrices import MATRIX_ROLES, ROLES, ParameterSlice
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.resets.methods import FORMER, RESETS, Kind, ResetMethod

FROZEN = "frozen: requires_grad is off"
"""Why a reset leaves a parameter alone that could not learn again what it loses."""

_ALWAYS_SHOWN = ("iterations", "shrink", "floor", "strength")
"""Options that a label shows at their defaults too."""

_PLACES = {"transition": "ResetCallback", "penalty": "PenaltyCallback", "recycling": "RecyclingCallback"}
"""What runs each kind of method in a script."""


@dataclass(frozen=True)
class ResetSpec:
    """One reset with its options filled in and its roles decided."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] = ROLES
    exclude: tuple[str, ...] = ()

    @property
    def needs_initial(self) -> bool:
        """Return whether the reset wants the initial weights."""
        return RESETS[self.method].needs_initial

    @property
    def needs_gradient(self) -> bool:
        """Return whether the reset wants the gradient of the loss."""
        return RESETS[self.method].needs_gradient

    @property
    def kind(self) -> Kind:
        """Return how it acts: transition, penalty or recycling."""
        return RESETS[self.method].kind

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any] | ResetSpec) -> ResetSpec:
        """Read `"fire"` or `{"method": "fire", "iterations": 5, "roles": [...]}`.

        Raises:
            UserError: With every fault, one a line, each as `key: what is wrong`.
        """
        if isinstance(spec, ResetSpec):
            return spec
        faults, parsed = cls.check(spec)
        if parsed is None:
            raise UserError("\n".join(f"{key}: {message}" for key, message in faults))
        return parsed

    @classmethod
    def check(cls, spec: str | Mapping[str, Any]) -> tuple[list[tuple[str, str]], ResetSpec | None]:
        """Return the faults as (key, message) pairs, and the spec where there are none."""
        given = {"method": spec} if isinstance(spec, str) else dict(spec)
        name = given.pop("method", None)
        if name is None:
            return [("method", f"missing; one of {', '.join(RESETS)}")], None
        if isinstance(name, str) and name not in RESETS:
            name = FORMER.get(name, name)
        if not isinstance(name, str) or name not in RESETS:
            return [("method", f"unknown reset '{name}'.{did_you_mean(name, RESETS)} Known: {', '.join(RESETS)}")], None
        method = RESETS[name]
        try:
            # Lists are what YAML and JSON have; the schema's tuples are strict.
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            options = method.options.model_validate(given).model_dump()
        except ValidationError as error:
            return list(dict(_fault(e, method) for e in error.errors()).items()), None
        roles, exclude = options.pop("roles"), options.pop("exclude")
        faults = [("exclude", f"'{e}' is not a regular expression") for e in exclude if not _compiles(e)]
        wrong = [r for r in roles if r not in MATRIX_ROLES]
        if method.matrices_only and wrong:
            allowed = ", ".join(MATRIX_ROLES)
            faults.append(("roles", f"'{name}' acts on matrices ({allowed}); {', '.join(wrong)} are not. Remove them"))
        return faults, None if faults else cls(name, options, roles, exclude)

    def why_not(self, weight: ParameterSlice) -> str | None:
        """Return why this reset leaves a slice alone, or None where it acts."""
        if self.method == "none":
            return "the reset is none"
        if not weight.roles & set(self.roles):
            return f"role {'/'.join(sorted(weight.roles))} is not among {', '.join(self.roles)}"
        pattern = next((e for e in self.exclude if re.search(e, weight.name)), None)
        if pattern is not None:
            return f"excluded by '{pattern}'"
        return None if weight.trainable else FROZEN

    def label(self) -> str:
        """Return the reset in one line: `fire, iterations 5, roles attention mlp`."""
        method = RESETS[self.method]
        defaults = method.options()
        shown = [f"{k} {v}" for k, v in self.options.items() if v != getattr(defaults, k) or k in _ALWAYS_SHOWN]
        if self.options.get("solver") == "polar":
            shown = [s for s in shown if not s.startswith("iterations")] + [f"tolerance {self.options['tolerance']:g}"]
        if self.roles != ROLES:
            shown.append(f"roles {' '.join(self.roles)}")
        return ", ".join([self.method, *shown])


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _fault(error: Any, method: ResetMethod) -> tuple[str, str]:
    """Return (key, message) for one error of pydantic, in our words."""
    loc = [str(part) for part in error["loc"]]
    key, value = ".".join(loc), error["input"]
    allowed = [*method.options.model_fields, "method"]
    if error["type"] == "extra_forbidden":
        return key, f"unknown option of '{method.name}'.{did_you_mean(key, allowed)} Known: {', '.join(allowed)}"
    if loc[0] == "roles":
        return "roles", f"unknown role {value!r}.{did_you_mean(str(value), ROLES)} Known: {', '.join(ROLES)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return key, f"{value!r} is not allowed: {message}"


ResetsLike = str | Mapping[str, Any] | ResetSpec | Iterable["str | Mapping[str, Any] | ResetSpec"]


def parse_resets(resets: ResetsLike) -> list[ResetSpec]:
    """Read one reset or a list of them."""
    many = [resets] if isinstance(resets, str | Mapping | ResetSpec) else list(resets)
    return [ResetSpec.parse(r) for r in many]


def refuse_kinds(specs: Iterable[ResetSpec], kind: Kind = "transition") -> None:
    """Refuse methods of another kind than the one that the caller can run.

    Raises:
        UserError: Naming the first, what it is, and where it belongs.
    """
    for spec in specs:
        if spec.kind != kind:
            acts = "acts on weights, once" if spec.kind == "transition" else "acts during training, not on weights"
            raise UserError(
                f"'{spec.method}' {acts}: make it an arm of a recipe, or in a script give it to {_PLACES[spec.kind]}"
            )
