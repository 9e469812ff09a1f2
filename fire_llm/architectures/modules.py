"""Which (out, in) matrices any torch module holds, by the kind of module that holds a weight, whatever its name.

Nothing here is looked up in a table: who asks for this says that each Linear is one matrix, and names those that hold
several (`split`). Shapes: out = rows of y = W x, in = its columns; of a convolution at each position of its kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fire_llm.architectures.grammar import MODULE_MATRIX_ROLES, Layout, Part, PartLike, as_part
from fire_llm.architectures.lookup import REGISTERED, Location, Lookup, Match, class_of, in_adapter
from fire_llm.architectures.matrices import ParameterSlice, buffer_slices, cut_parameter, refuse_uninitialised
from fire_llm.architectures.names import compiles, names_by_tensor, plain_modules, plain_parameters, unwrap
from fire_llm.core.errors import UserError, did_you_mean

Kernels = Literal["positions", "flattened"]
KERNELS = ("positions", "flattened")
MOST_PARTS = 1 << 20
"""Most parts of one weight: more than any weight has rows."""
SplitLike = Mapping[str, int | Sequence[PartLike]]

FUSED = re.compile(r"(^|[._])(w?qkv|w?kv|qkvz?|in_proj|c_attn|query_key_value|gate_up_proj)(_proj)?$", re.IGNORECASE)
"""Names of Linears that hold several matrices in most libraries."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
_GATES = {(nn.LSTM, nn.LSTMCell): ("i", "f", "g", "o"), (nn.GRU, nn.GRUCell): ("r", "z", "n")}
_ROLES = {"mlp": "linear", "ssm": "linear", "lm_head": "linear", "router": "other"}
"""The role in any torch module for a role that a registered layout may have."""
_LINEAR_OR_CONV: dict[type[nn.Module] | None, str] = {nn.Linear: "linear_bias", _ConvNd: "conv_bias"}
_UNDONE = {
    "g": "remove_weight_norm(module)",
    "v": "remove_weight_norm(module)",
    "orig": "remove_spectral_norm(module), or prune.remove(module, name)",
}
"""Endings of the tensors that hooks compute a weight from, and the call that takes such a hook off."""
_IN_PROJECTIONS = {"in_proj_weight": ("q", "k", "v"), "q_proj_weight": (), "k_proj_weight": (), "v_proj_weight": ()}


@dataclass(frozen=True)
class ModuleLayout:
    """What is asked for beyond the kinds of modules.

    Args:
        split: Patterns of names, each with the parts that the out axis of such a weight holds.
        kernels: Whether a convolution is one matrix at each position of its kernel, or one (out, in · positions).
    """

    split: tuple[tuple[str, tuple[PartLike, ...]], ...] = ()
    kernels: Kernels = "positions"

    @classmethod
    def of(cls, split: SplitLike | None = None, kernels: str = "positions") -> ModuleLayout:
        """Return the layout that is asked for, checked.

        Args:
            split: By regular expression, looked for anywhere in a name: a number of equal parts, or the parts' names
                (`("q", "k", "v")`), or names with rows (`(("q", 64), ("k", 16), ("v", 16))`).
            kernels: One of `KERNELS`.

        Raises:
            UserError: A pattern, a part or `kernels` is not as above.
        """
        if kernels not in KERNELS:
            near = did_you_mean(kernels, KERNELS)
            raise UserError(f"kernels: {kernels!r} is not allowed.{near} Give {' or '.join(map(repr, KERNELS))}")
        parsed = []
        if split is not None and not isinstance(split, Mapping):
            raise UserError(
                f"split: {split!r} is not allowed: give patterns with their parts, as {{r'\\.qkv\\.': ('q', 'k', 'v')}}"
            )
        for pattern, given in (split or {}).items():
            parts = _named(given)
            if not isinstance(pattern, str) or not compiles(pattern) or not parts:
                raise UserError(
                    f"split: {pattern!r}: {given!r} is not allowed: give a regular expression and its parts, as "
                    "{r'\\.qkv\\.': ('q', 'k', 'v')}, or their number"
                )
            parsed.append((pattern, parts))
        return cls(tuple(parsed), "positions" if kernels == "positions" else "flattened")

    def parts(self, *names: str) -> tuple[PartLike, ...] | None:
        """Return the parts that a weight is split into, by its names; None where no pattern finds any of them.

        Raises:
            UserError: Several patterns find it, with different parts.
        """
        matching = [entry for entry in self.split if any(re.search(entry[0], name) for name in names)]
        if len({parts for _, parts in matching}) > 1:
            patterns = " and ".join(f"'{pattern}'" for pattern, _ in matching)
            raise UserError(f"split: '{names[0]}' is found by {patterns}, with different parts: leave it one of them")
        return matching[0][1] if matching else None


def _named(given: Any) -> tuple[PartLike, ...]:
    """Return the parts that a split gives; none where it is not allowed."""
    if isinstance(given, int) and not isinstance(given, bool) and given <= MOST_PARTS:
        return tuple(str(n) if given > 1 else "" for n in range(given))
    parts: list[PartLike] = []
    for part in given if isinstance(given, (list, tuple)) else ():
        match part:
            case str() | Part(size=int() | None):
                parts.append(part)
            case (str(name), int(rows)) if rows > 0:
                parts.append((name, rows))
            case _:
                return ()
    names = [as_part(part).name for part in parts]
    return tuple(parts) if len({*names}) == len(names) else ()  # slices are known by their names


def module_slices(model: nn.Module, layout: ModuleLayout, *, buffers: bool = True) -> list[ParameterSlice]:
    """Cut every parameter of any torch module into its matrices, and list the others whole.

    Args:
        model: Module, wrapped or not, on any device, `meta` included.
        layout: What is asked for.
        buffers: Whether the buffers that a checkpoint holds are listed too, with the role `buffer`.

    Returns:
        Each parameter exactly once (a tied one under its first plain name, with the roles of all of its names), in the
        order of `named_parameters()`.

    Raises:
        UserError: There are no parameters, one is quantised, complex or not initialised yet, or `split` finds nothing
            or does not fit.
    """
    model = unwrap(model)
    _refuse_quantised(model)
    names = names_by_tensor(plain_parameters(model))
    if not names:
        raise UserError(f"{class_of(model).__name__} has no parameters: nothing to reset")
    lookup, modules = Lookup(model), plain_modules(model)
    slices: list[ParameterSlice] = []
    for parameter, own_names in names.items():
        _refuse_values(parameter, own_names[0])
        parts = layout.parts(*own_names)
        locations = [lookup.location(name) for name in own_names]
        matches = [_classify(location, parameter, modules, parts, layout.kernels) for location in locations]
        slices += cut_parameter(parameter, matches)
    for pattern, _ in layout.split:
        if not any(weight.matrix and weight.found_by(pattern) for weight in slices):
            raise UserError(
                f"split: '{pattern}' finds no weight that can be split. The matrices are "
                f"{', '.join(list(dict.fromkeys(w.parameter for w in slices if w.matrix))[:5])}, …"
            )
    return [*slices, *(replace(b, roles=frozenset({"buffer"})) for b in buffer_slices(model))] if buffers else slices


def module_matrices(
    model: nn.Module, roles: Iterable[str] | None = None, *, split: SplitLike | None = None, kernels: str = "positions"
) -> Iterator[ParameterSlice]:
    """Yield the matrices of any torch module, in the order of `named_parameters()`; a kernel is one slice.

    Args:
        model: As in `module_slices`.
        roles: Some of `MODULE_MATRIX_ROLES`, all by default.
        split: Weights that hold several matrices, as in `ModuleLayout.of`.
        kernels: What a convolution is, as there.

    Raises:
        UserError: As in `module_slices` and `ModuleLayout.of`; a role is unknown, or a weight is not understood.
    """
    wanted = {*MODULE_MATRIX_ROLES} if roles is None else {roles} if isinstance(roles, str) else {*roles}
    for role in sorted(wanted - {*MODULE_MATRIX_ROLES}):
        allowed = f"{did_you_mean(role, MODULE_MATRIX_ROLES)} Allowed: {', '.join(MODULE_MATRIX_ROLES)}"
        raise UserError(f"roles: unknown role '{role}'.{allowed}")
    slices = [weight for weight in module_slices(model, ModuleLayout.of(split, kernels)) if weight.roles & wanted]
    for weight in slices:
        if weight.refused:
            raise UserError(weight.refused)
    return (weight for weight in slices if weight.matrix)


def is_fused(weight: ParameterSlice) -> bool:
    """Return whether a weight is one matrix although its name says that it holds several."""
    one_matrix = weight.matrix and not weight.kernel and not weight.part
    return one_matrix and any(FUSED.search(name.removesuffix(".weight")) for name in weight.names)


def _classify(
    location: Location,
    parameter: Tensor,
    modules: Mapping[str, nn.Module],
    parts: tuple[PartLike, ...] | None,
    kernels: Kernels,
) -> Match:
    """Say what a parameter is by the kind of module that holds it."""
    owner, name = location.owner, location.name
    if (known := _registered(location)) or (known := _recomputed(location, modules)):
        return known
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return Match("embedding", location)
    # By its name too, but for a NormedLinear, which is a Linear.
    named_norm = "Norm" in class_of(owner).__name__ and _kind(owner) is None and not list(owner.children())
    if isinstance(owner, _NORMS) or (named_norm and _is_vector(parameter)):
        return Match("norm", location)
    if parameter.ndim < 2:
        attribute = name.rpartition(".")[2]
        role = "" if _in_attention(location) or attribute != "bias" else _LINEAR_OR_CONV.get(_kind(owner), "")
        return Match(role or ("bias" if "bias" in attribute else "other"), location)
    if in_adapter(location):
        why = "belongs to an adapter, whose product is added to weights that stay as they are: reset the model before "
        return Match(
            "linear", location, refused=f"'{name}' {why}the adapter is put on it, or the sum, merge_and_unload()"
        )
    return _classify_matrix(location, parameter, parts, kernels)


def _classify_matrix(
    location: Location, parameter: Tensor, parts: tuple[PartLike, ...] | None, kernels: Kernels
) -> Match:
    """Say what a parameter of two or more dimensions is, where it is no embedding, norm or adapter."""
    owner, name, kind = location.owner, location.name, class_of(location.owner).__name__
    attribute = name.rpartition(".")[2]
    if isinstance(owner, nn.MultiheadAttention) and attribute in _IN_PROJECTIONS:
        return Match("attention", location, _layout(name, parts or _IN_PROJECTIONS[attribute], parameter))
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) and attribute.startswith("weight_"):
        gates = next((gates for kinds, gates in _GATES.items() if isinstance(owner, kinds)), ())
        projected = attribute.startswith("weight_hr")  # what an LSTM puts out, made smaller
        return Match("recurrent", location, _layout(name, parts or (() if projected else gates), parameter))
    if attribute == "weight" and _kind(owner) is nn.Linear:
        return Match("attention" if _in_attention(location) else "linear", location, _layout(name, parts, parameter))
    if attribute == "weight" and _kind(owner) is _ConvNd:
        return Match("conv", location, _layout(name, parts, parameter, kernel=kernels == "positions"))
    exclude = f"leave it out with exclude=[r'{re.escape(name)}']"
    if attribute == "weight" and isinstance(owner, _ConvTransposeNd):
        why = f"belongs to a {kind}, stored (in, out/groups, …), for which no rule is published"
        return Match("conv", location, refused=f"'{name}' {why}: {exclude}")
    if kind == "Conv1D" and class_of(owner).__module__.startswith("transformers."):
        return Match("linear", location, replace(_layout(name, parts, parameter.mT), orientation="in_first"))
    if parts is not None:
        return Match("linear", location, _layout(name, parts, parameter))
    if attribute != "weight":
        return Match("other", location)
    unknown = "and what that does with it is not known"
    otherwise = "where it is stored (out, in), say how many matrices it holds"
    if isinstance(owner, nn.Bilinear):
        unknown = "which multiplies two inputs"
        otherwise = "for one matrix (out, in1 · in2) that maps their products, give"
    belongs = f"'{name}', of shape {tuple(parameter.shape)}, belongs to a {kind}, {unknown}"
    return Match(
        "linear", location, refused=f"{belongs}: {exclude}, or, {otherwise}: split={{r'{re.escape(name)}': 1}}"
    )


def _in_attention(location: Location) -> bool:
    """Return whether a module is a part of a MultiheadAttention, or one itself that has no module around it."""
    return isinstance(location.ancestors[-2:][0], nn.MultiheadAttention)


def _is_vector(parameter: Tensor) -> bool:
    """Return whether one axis alone is longer than 1, as of a scale (channels, 1, 1)."""
    return sum(size > 1 for size in parameter.shape) < 2


def _kind(owner: nn.Module) -> type[nn.Module] | None:
    """Return nn.Linear or _ConvNd where a module is one, or of a class that extends it."""
    if isinstance(owner, _ConvNd) and not isinstance(owner, _ConvTransposeNd):
        return _ConvNd
    return nn.Linear if isinstance(owner, nn.Linear) else None


def _layout(name: str, parts: Sequence[PartLike] | None, parameter: Tensor, kernel: bool = False) -> Layout:
    """Return the layout of a weight (out, in, …), once its parts are known to fit.

    Raises:
        UserError: They do not.
    """
    sizes = [None if (size := as_part(part).size) is None else int(size) for part in parts or ()]
    equal_shares, rows_left = sizes.count(None), parameter.shape[0] - sum(size or 0 for size in sizes)
    if sizes and (rows_left % equal_shares or not rows_left if equal_shares else rows_left):
        raise UserError(
            f"split: '{name}' has {parameter.shape[0]} rows, which the parts {list(parts or ())} do not fill"
        )
    return Layout("other", parts or (), kernel=kernel)


def _registered(location: Location) -> Match | None:
    """Return what a layout says that was registered for the block and child, but for a kernel taken as one matrix."""
    layout = REGISTERED.get((location.block_class, location.child))
    kinds = (None, class_of(location.owner).__name__)
    if layout is None or (location.is_weight and layout.module_class not in kinds):
        return None
    if layout.matrix and not layout.kernel and _kind(location.owner) is _ConvNd:
        return None
    role = "conv" if layout.kernel else _ROLES.get(layout.role, layout.role)
    return Match(role, location, layout if layout.matrix else None)


def _recomputed(location: Location, modules: Mapping[str, nn.Module]) -> Match | None:
    """Refuse what a weight is computed from at each forward pass: what is written to the weight itself is lost."""
    name = location.name
    path, _, attribute = name.rpartition(".")
    above, parametrised, below = f".{name}".partition(".parametrizations.")
    if parametrised:
        path, weight = above[1:], below.partition(".")[0]
        undo = f"parametrize.remove_parametrizations(module, '{weight}')"
    else:
        weight, _, suffix = attribute.rpartition("_")
        computed = getattr(modules[path], weight, None) if suffix in _UNDONE and weight else None
        if not isinstance(computed, Tensor) or weight in modules[path]._parameters:
            return None
        undo = _UNDONE[suffix]
    owner, full_name = modules[path], f"{path}.{weight}" if path else weight
    if "weight" not in weight:
        return Match("bias" if "bias" in weight else "other", location)
    recurrent = (nn.RNNBase, nn.RNNCellBase)
    kinds: dict[Any, str] = {_ConvNd: "conv", nn.MultiheadAttention: "attention", recurrent: "recurrent"}
    role = next((role for kind, role in kinds.items() if isinstance(owner, kind)), "linear")
    why = f"'{full_name}' is computed from '{name}' at each forward pass, so a reset of it would be lost"
    undone = f"take that off before (torch.nn.utils.{undo}), and put it on again afterwards"
    return Match(role, location, refused=f"{why}: {undone}")


def _refuse_values(parameter: nn.Parameter, name: str) -> None:
    """Refuse a parameter whose values are not there, or are no real numbers.

    Raises:
        UserError: Naming it.
    """
    refuse_uninitialised(parameter, name)
    if parameter.is_complex():
        raise UserError(f"'{name}' is complex ({parameter.dtype}): resets are for real weights")
    kind = type(parameter.data)
    if parameter.ndim > 1 and (parameter.dtype not in _FLOATS or kind.__module__.startswith("torchao.")):
        dtype = str(parameter.dtype).removeprefix("torch.")
        raise UserError(f"'{name}' is {dtype}, quantised: load the model in float32, float16 or bfloat16")


def _refuse_quantised(model: nn.Module) -> None:
    """Refuse modules that hold codes in place of weights, which would be passed over.

    Raises:
        UserError: Naming the first.
    """
    for name, module in plain_modules(model).items():
        if class_of(module).__module__.startswith(_QUANTISED) and "qat" not in class_of(module).__module__.split("."):
            raise UserError(
                f"'{name}' is a {class_of(module).__name__}, quantised, its weights are codes: reset the model before "
                "it is quantised"
            )
