"""One reset with its options and roles, as a recipe, a script or the command line gives it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fire_llm.architectures.grammar import MODULE_MATRIX_ROLES, MODULE_ROLES
from fire_llm.architectures.matrices import MATRIX_ROLES, ROLES, ParameterSlice
from fire_llm.architectures.names import compiles
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.resets.conditions import CONDITIONS, Overtraining, condition
from fire_llm.resets.methods import FORMER, RESETS, Kind, ResetMethod
from fire_llm.resets.presets import PRESETS
from fire_llm.resets.selection import LAYERS, layers_of, parse_layers

FROZEN = "frozen: requires_grad is off"
"""Why a reset leaves a parameter alone that could not learn again what it loses."""

_ALWAYS_SHOWN = ("iterations", "tolerance", "shrink", "floor", "strength")
"""Options that a label shows at their defaults too, but for a strength of 1: the whole reset."""

_PLACES = {"transition": "ResetCallback", "penalty": "PenaltyCallback", "recycling": "RecyclingCallback"}
"""What runs each kind of method in a script."""


@dataclass(frozen=True)
class ResetSpec:
    """One reset with its options filled in and its roles decided."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] = ROLES
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    layers: str = ""
    """Such as `4-11`; all of them, and what lies outside of layers, where it is empty."""
    when: dict[str, float] | None = None
    """The condition under which it acts, and its number; None for always."""
    found: Overtraining | None = None
    """What the condition found; None where there is none, or where nobody has looked."""
    patterns: tuple[tuple[str, str], ...] = ()
    """Roles of one's own in any torch module, each with the regular expression that finds its weights."""

    @property
    def read(self) -> dict[str, Any]:
        """Return the options that the method reads, given what the others are."""
        return {key: self.options[key] for key in self.options if not RESETS[self.method].ignores(key, self.options)}

    @property
    def selection(self) -> dict[str, Any]:
        """Return those of `layers`, `include` and `exclude` that are given, by name."""
        return {key: value for key in ("layers", "include", "exclude") if (value := getattr(self, key))}

    @property
    def idle(self) -> str:
        """Return why the reset leaves everything alone; empty where it does not."""
        if self.method == "none":
            return "the reset is none"
        return str(self.found) if self.found is not None and not self.found.applied else ""

    @property
    def needs_initial(self) -> bool:
        """Return whether the reset wants the initial weights."""
        return RESETS[self.method].needs_initial and not self.idle

    @property
    def needs_gradient(self) -> bool:
        """Return whether the reset wants the gradient of the loss."""
        return RESETS[self.method].needs_gradient and not self.idle

    @property
    def kind(self) -> Kind:
        """Return how it acts: transition, penalty or recycling."""
        return RESETS[self.method].kind

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any] | ResetSpec, *, modules: bool = False) -> ResetSpec:
        """Read `"fire"` or `{"method": "fire", "iterations": 5, "roles": [...]}`.

        Args:
            spec: What is read.
            modules: Whether its roles are those of any torch module rather than of a language model.

        Raises:
            UserError: With every fault, one a line, each as `key: what is wrong`.
        """
        if isinstance(spec, ResetSpec):
            return spec
        faults, parsed = cls.check(spec, modules=modules)
        if parsed is None:
            raise UserError("\n".join(f"{key}: {message}" for key, message in faults))
        return parsed

    @classmethod
    def check(
        cls, spec: str | Mapping[str, Any], *, modules: bool = False
    ) -> tuple[list[tuple[str, str]], ResetSpec | None]:
        """Return the faults as (key, message) pairs, and the spec where there are none; arguments as in `parse`."""
        given = {"method": spec} if isinstance(spec, str) else dict(spec)
        name: Any = given.pop("method", None)
        if isinstance(name, str) and name not in RESETS:
            name = FORMER.get(name, name)
        if fault := _unknown_method(name, modules):
            return [("method", fault)], None
        method = RESETS[name]
        own_roles = given.pop("roles", None) if modules else None
        try:
            # Lists are what YAML and JSON have; the schema's tuples are strict.
            given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
            options = method.options.model_validate(given).model_dump()
        except ValidationError as error:
            return list(dict(_fault(e, method) for e in error.errors()).items()), None
        faults = [(key, why) for key in given if (why := method.ignores(key, options))]
        names = {key: options.pop(key) for key in ("exclude", "include")}
        roles, when, numbers = options.pop("roles"), condition(options.pop("when", None)), options.pop("layers")
        for key, patterns in names.items():
            faults += [(key, f"'{text}' is not a regular expression") for text in patterns if not compiles(text)]
        layers = "" if numbers is None else str(numbers)
        if numbers is not None and parse_layers(layers) is None:
            faults.append(("layers", f"'{layers}' is not allowed: give {LAYERS}"))
        if numbers is not None and modules:
            faults.append(("layers", "counts the blocks of a language model: name modules with include=[…] instead"))
        roles, role_patterns, why = _module_roles(own_roles, method) if modules else (roles, (), "")
        matrix_roles = MODULE_MATRIX_ROLES if modules else MATRIX_ROLES
        wrong = [role for role in roles if role not in matrix_roles] if not role_patterns and not why else []
        if why:
            faults.append(("roles", why))
        if method.matrices_only and wrong:
            allowed = ", ".join(matrix_roles)
            faults.append(("roles", f"'{name}' acts on matrices ({allowed}); {', '.join(wrong)} are not. Remove them"))
        parsed = cls(name, options, roles, **names, layers=layers, when=when, patterns=role_patterns)
        return faults, None if faults else parsed

    def without_effect(self) -> list[tuple[str, str]]:
        """Return the option that leaves a method nothing to do, as (key, message), in a list; empty where it acts.

        It is asked where a reset is given: what a run was made with before this was refused can still be read.
        """
        if self.method == "rescale" and self.options["scale"] == "keep-norm":
            return [("scale", "keep-norm keeps the norm, and 'rescale' changes nothing else: give sqrt or none")]
        return []

    def why_not(self, weight: ParameterSlice) -> str | None:
        """Return why this reset leaves a slice alone, or None where it acts."""
        if self.idle:
            return self.idle
        if 0 in weight.tensor.shape:
            return f"it holds no numbers, its shape is {tuple(weight.tensor.shape)}"
        if self.patterns:
            if not any(weight.found_by(pattern) for _, pattern in self.patterns):
                return f"found by no pattern of roles ({', '.join(role for role, _ in self.patterns)})"
            if RESETS[self.method].matrices_only and not weight.matrix and not weight.refused:
                return f"no matrix, and '{self.method}' acts on matrices"
        elif not weight.roles & set(self.roles):
            return f"role {'/'.join(sorted(weight.roles))} is not among {', '.join(self.roles)}"
        if weight.buffer and (why := RESETS[self.method].leaves(weight.tensor)):
            return why
        if self.layers:
            chosen = parse_layers(self.layers) or ()
            layers = layers_of(weight.role, weight.parameter, *weight.tied)
            if not any(layer in numbers for numbers in chosen for layer in layers):
                return f"not in layers {self.layers}"
        if self.include and not any(weight.found_by(e) for e in self.include):
            return f"found by no pattern of include ({', '.join(self.include)})"
        pattern = next((e for e in self.exclude if weight.found_by(e)), None)
        if pattern is not None:
            return f"excluded by '{pattern}'"
        return None if weight.trainable else FROZEN

    def label(self) -> str:
        """Return the reset in one line: `fire, iterations 5, roles attention mlp`."""
        method = RESETS[self.method]
        defaults = method.options()
        shown = [
            f"{key} {value}"
            for key, value in self.read.items()
            if value != getattr(defaults, key) or (key in _ALWAYS_SHOWN and value != 1)
        ]
        if self.roles not in (ROLES, MODULE_ROLES):
            shown.append(f"roles {' '.join(self.roles)}")
        shown += [f"{key} {text if isinstance(text, str) else ' '.join(text)}" for key, text in self.selection.items()]
        shown += [f"when {name} by more than {number:g} nats" for name, number in (self.when or {}).items()]
        verdict = "" if self.found is None else ": applied" if self.found.applied else ": not applied"
        return ", ".join([self.method, *shown]) + verdict


def _unknown_method(name: Any, modules: bool) -> str:
    """Return why a name is no method's; empty where it is one."""
    if name is None:
        return f"missing; one of {', '.join(RESETS)}"
    if isinstance(name, str) and name in PRESETS:
        return (
            f"'{name}' is a preset for any torch module, with options of its own: give its name alone, as in "
            f"apply_reset(model, '{name}', layout='modules', initial=…)"
        )
    if isinstance(name, str) and name in RESETS:
        return ""
    near, presets = did_you_mean(str(name), [*RESETS, *PRESETS]), PRESETS if modules else ()
    return f"unknown reset '{name}'.{near} Known: {', '.join([*RESETS, *presets])}"


def _fault(error: Any, method: ResetMethod) -> tuple[str, str]:
    """Return (key, message) for one error of pydantic, in our words."""
    loc = [str(part) for part in error["loc"]]
    key, value = ".".join(loc), error["input"]
    allowed = [*method.options.model_fields, "method"]
    if loc[0] == "when" and method.kind != "transition":
        return key, f"'{method.name}' acts during the whole phase, and a condition is for what acts once: leave it out"
    if error["type"] == "extra_forbidden":
        return key, f"unknown option of '{method.name}'.{did_you_mean(key, allowed)} Known: {', '.join(allowed)}"
    if loc[0] == "roles" and isinstance(value, Mapping):
        return "roles", "patterns of roles are for any torch module: give layout='modules', or use include"
    if loc[0] == "roles":
        return "roles", f"unknown role {value!r}.{did_you_mean(str(value), ROLES)} Known: {', '.join(ROLES)}"
    if loc[0] == "layers":
        return "layers", f"{value!r} is not allowed: give {LAYERS}"
    if loc[0] == "when":
        return "when", f"{value!r} is not allowed: give {CONDITIONS}"
    message = error["msg"].removeprefix("Input ")
    return key, f"{value!r} is not allowed: {f'it {message}' if message != error['msg'] else message}"


ResetsLike = str | Mapping[str, Any] | ResetSpec | Iterable["str | Mapping[str, Any] | ResetSpec"]


def _module_roles(given: Any, method: ResetMethod) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...], str]:
    """Return the roles in any torch module, the patterns of roles of one's own, and what is wrong with them."""
    if given is None:
        if method.matrices_only:
            return MODULE_MATRIX_ROLES, (), ""
        wanted = {role for role in method.roles if role in MODULE_ROLES}
        wanted |= {*MODULE_MATRIX_ROLES} if set(method.roles) & set(MATRIX_ROLES) else set()
        wanted |= {"linear_bias", "conv_bias"} if "bias" in wanted else set()
        wanted |= {"buffer"} if method.buffers == "all" or method.name == "none" else set()
        return tuple(role for role in MODULE_ROLES if role in wanted), (), ""
    if isinstance(given, Mapping):
        for role, pattern in given.items():
            if not isinstance(role, str) or not role or not isinstance(pattern, str) or not compiles(pattern):
                return (), (), f"{role!r}: {pattern!r} is not allowed: give a name and a regular expression"
        if given:
            return tuple(given), tuple(given.items()), ""
    if not isinstance(given, Iterable):
        return (), (), f"{given!r} is not allowed: give a list of roles, or a mapping of roles to patterns"
    roles = (given,) if isinstance(given, str) else tuple(given)
    if unknown := [role for role in roles if role not in MODULE_ROLES]:
        role = unknown[0]
        return (), (), (
            f"unknown role {role!r}.{did_you_mean(str(role), MODULE_ROLES)} Of any torch module: "
            f"{', '.join(MODULE_ROLES)}; or a role of your own with a pattern of names, {{'mine': r'\\.fc\\d'}}"
        )  # fmt: skip
    return roles, (), "" if roles else "give one role at least"


def _spelt_out(reset: str | Mapping[str, Any] | ResetSpec) -> Iterable[str | Mapping[str, Any] | ResetSpec]:
    """Return the resets of a preset, or the one reset that is given."""
    name = reset.get("method") if isinstance(reset, Mapping) and len(reset) == 1 else reset
    return PRESETS[name] if isinstance(name, str) and name in PRESETS else (reset,)


def _several(resets: Any) -> list[Any]:
    """Return a list of resets.

    Raises:
        UserError: It is none, or holds what is no reset.
    """
    listed = [*resets] if isinstance(resets, Iterable) else [resets]
    for reset in listed:
        if not isinstance(reset, str | Mapping | ResetSpec):
            raise UserError(
                f"resets: {reset!r} is not allowed: give a method's name, such as 'fire', {{'method': …, option: …}}, "
                "or a list of these"
            )
    return listed


def parse_resets(
    resets: ResetsLike, options: Mapping[str, Any] | None = None, *, modules: bool = False
) -> list[ResetSpec]:
    """Read one reset or a list of them.

    Args:
        resets: A method's name, a spec, or a list of these; for any torch module also the name of a preset.
        options: Of the method, where `resets` is its name alone.
        modules: Whether they are for any torch module (`layout="modules"`).

    Raises:
        UserError: A method or an option is wrong, options stand beside a spec, which holds its own, a reset waits for
            what only a recipe knows, or one was read for the other layout.
    """
    if options:
        if not isinstance(resets, str):
            raise UserError(
                f"{', '.join(options)}: options stand beside a method's name alone; write them into the spec, such as "
                f"{{'method': 'fire', {next(iter(options))!r}: …}}"
            )
        specs = [ResetSpec.parse({"method": resets, **options}, modules=modules)]
    else:
        given = [resets] if isinstance(resets, str | Mapping | ResetSpec) else _several(resets)
        given = [part for reset in given for part in _spelt_out(reset)] if modules else given
        specs = [ResetSpec.parse(reset, modules=modules) for reset in given]
    for spec in specs:
        strange = set(spec.roles) - set(MODULE_ROLES if modules else ROLES) and not (modules and spec.patterns)
        if strange or (spec.patterns and not modules):
            raise UserError(
                f"roles: '{spec.method}' was read for {'a language model' if modules else 'any torch module'}, with "
                f"the roles {', '.join(spec.roles)}: give its name or its options"
            )
        for key, message in spec.without_effect():
            raise UserError(f"{key}: {message}")
        if spec.when is not None and spec.found is None:
            raise UserError(
                f"when: '{next(iter(spec.when))}' is judged by the phase before, and there is none here: make "
                f"'{spec.method}' an arm of a recipe, or leave when out"
            )
    return specs


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


def parse_one(method: Any, options: Mapping[str, Any], kind: Kind) -> ResetSpec:
    """Read the one method of a kind that the caller runs.

    Args:
        method: As in `parse_resets`, like the next.
        options: Of the method.
        kind: Of the method.

    Raises:
        UserError: As in `parse_resets` and `refuse_kinds`; or there is another number of methods.
    """
    specs = parse_resets(method, options)
    refuse_kinds(specs, kind)
    if len(specs) != 1:
        raise UserError(f"one method is wanted here, and {len(specs)} are given: give its name, or its spec")
    return specs[0]
