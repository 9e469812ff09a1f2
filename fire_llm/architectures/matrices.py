"""Which logical (out, in) matrices a model holds, and what role every parameter plays.

A parameter is looked up by (block class, child): the block is the nearest module above the one that owns the weight
which is no mere container, the child is the path from there with indices written `*`. What is not in the table of
`fire_llm/architectures/families/` is refused, never guessed. Shapes: out = rows of y = W x, in = its columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fire_llm.architectures.families import TYPES
from fire_llm.architectures.grammar import (
    MATRIX_ROLES,
    MODULE_MATRIX_ROLES,
    ROLES,
    Layout,
    Part,
    PartLike,
    Sizes,
    SliceSpec,
)
from fire_llm.architectures.lookup import ANY_MODULE, REGISTERED, Location, Lookup, Match, class_of, refusal
from fire_llm.architectures.names import names_by_tensor, plain_buffers, plain_parameters, unwrap
from fire_llm.core.compat import left_out
from fire_llm.core.errors import UserError, did_you_mean

__all__ = [
    "MATRIX_ROLES",
    "ROLES",
    "Layout",
    "ParameterSlice",
    "Part",
    "hidden_matrices",
    "logical_matrices",
    "parameter_slices",
    "register_layout",
    "supported_types",
    "unwrap",
]

_WRITABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BLOCK_ROLES = frozenset({"attention", "mlp", "ssm", "conv"})
_HOLD_MATRICES = {*MATRIX_ROLES, *MODULE_MATRIX_ROLES}


@dataclass(frozen=True, eq=False)
class ParameterSlice:
    """One slice of a model: a logical (out, in) matrix, the matrices of a kernel, or a parameter that is kept whole.

    Args:
        parameter: Full plain name, as `named_parameters()` of the model without wrappers has it.
        tensor: The parameter itself, or the rows of it that `within` was given.
        roles: Roles it plays; a tied embedding and head play two.
        block: Class name of the block that holds it.
        spec: Where the matrix lies in the parameter; None where the parameter is kept whole.
        buffer: Whether it is a buffer: numbers that training moves by other means than gradients, kept whole.
        frozen: Whether training leaves a buffer alone; a parameter's own `requires_grad` says so.
        refused: Why no reset of matrices may touch it, although its role says so; empty where one may.
        own_role: The role of one's own under which it is listed; empty where there is none.
        tied: The parameter's further plain names, where it is tied.
    """

    parameter: str
    tensor: Tensor
    roles: frozenset[str]
    block: str
    spec: SliceSpec | None = None
    buffer: bool = False
    frozen: bool = False
    refused: str = ""
    own_role: str = ""
    tied: tuple[str, ...] = ()

    @property
    def matrix(self) -> bool:
        """Return whether this is an (out, in) matrix, or a kernel of them, rather than a parameter kept whole."""
        return self.spec is not None

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the sizes of a convolution's kernel, (k, …); () where this is none."""
        return (self.spec and self.spec.kernel) or ()

    @property
    def part(self) -> str:
        """Return the name of the part of a fused parameter (`q`, `k`, `gate`, …), empty where there is one only."""
        return self.spec.name if self.spec else ""

    @property
    def role(self) -> str:
        """Return the one role it is listed under: that of a matrix where it plays several."""
        return self.own_role or min(self.roles, key=lambda role: (role not in _HOLD_MATRICES, role))

    @property
    def name(self) -> str:
        """Return a unique name: `h.0.attn.c_attn.weight[q]`, `experts.gate_up_proj[3.up]`, or the parameter's own."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name under each name of the parameter; a tied one has several."""
        index = "" if self.spec is None or self.spec.index is None else str(self.spec.index)
        inside = ".".join(filter(None, (index, self.part)))
        return tuple(f"{name}[{inside}]" if inside else name for name in (self.parameter, *self.tied))

    def found_by(self, pattern: str) -> bool:
        """Return whether a regular expression finds any of its names."""
        return any(re.search(pattern, name) for name in self.names)

    @property
    def shape(self) -> torch.Size:
        """Return (out, in), of a kernel (positions, out, in), or the stored shape of a parameter kept whole."""
        return torch.Size(self.spec.shape) if self.spec else self.tensor.shape

    @property
    def trainable(self) -> bool:
        """Return whether training moves it."""
        return not self.frozen if self.buffer else self.tensor.requires_grad

    @property
    def rows(self) -> range:
        """Return the rows of the parameter, along its first axis, that hold this slice and what is fused with it."""
        total = self.tensor.shape[0] if self.tensor.ndim else 1
        if self.spec is None or self.spec.index is None or self.spec.stack is None:
            return range(total)
        each = total // self.spec.stack
        return range(self.spec.index * each, (self.spec.index + 1) * each)

    def within(self, rows: Tensor) -> ParameterSlice:
        """Return the same slice of a tensor that holds the parameter's `rows`, wherever they came from.

        Args:
            rows: (len(self.rows), …), the stored axes after the first as in the parameter.
        """
        if self.spec is None or self.spec.index is None:
            return replace(self, tensor=rows)
        return replace(self, tensor=rows, spec=replace(self.spec, index=0, stack=1))

    @property
    def view(self) -> Tensor:
        """Return the (out, in) matrix as a view sharing storage with the parameter, outside autograd.

        Raises:
            UserError: It is a kernel, or its rows are interleaved with another part's, so that no 2-D view exists.
        """
        slot = self._slot()
        if self.spec is None:
            return slot
        if self.spec.kernel is not None:
            raise UserError(
                f"'{self.name}' holds {self.shape[0]} matrices, one at each position of a kernel, and no 2-D view of "
                "them exists: use read() and write_()"
            )
        try:
            return slot.view(self.shape)
        except RuntimeError as error:
            raise UserError(
                f"'{self.name}' lies interleaved with other parts in '{self.parameter}' ({self.spec.groups} groups of "
                f"{self.spec.size} rows), so no 2-D view of it exists: use read() and write_()"
            ) from error

    def read(self) -> Tensor:
        """Return what `shape` says, outside autograd; do not write into it, it may or may not be a copy."""
        return self._slot().reshape(self.shape)

    def write_(self, new: Tensor) -> None:
        """Write a matrix of the same shape through to the parameter, casting dtype and device.

        Raises:
            ValueError: The shape differs.
        """
        if new.shape != self.shape:
            raise ValueError(f"'{self.name}' is {tuple(self.shape)}, got {tuple(new.shape)}")
        slot = self._slot()
        slot.copy_(new.detach().reshape(slot.shape))

    def _slot(self) -> Tensor:
        """Return the stored elements as a strided view, (groups, size, in) of a matrix, (k, …, groups, size, in)."""
        stored, spec = self.tensor.detach(), self.spec
        if stored.layout != torch.strided:  # a copy, to be read: who writes refuses it
            stored = stored.to_dense()
        if spec is None:
            return stored
        if spec.index is not None:
            # A 2-D tensor stacks blocks of rows: split them off first.
            stored = (stored if stored.ndim > 2 else stored.unflatten(0, (spec.stack, -1)))[spec.index]
        if spec.in_first:
            stored = (stored if stored.ndim == 2 else stored.view(stored.shape[0], -1)).t()
        grouped: Tensor = stored.unflatten(0, (spec.groups, -1)).narrow(1, spec.offset, spec.size)
        # Of any memory format: the axes of a kernel are moved, and not joined before they are read.
        return grouped if spec.kernel is None else grouped.movedim((0, 1, 2), (-3, -2, -1))


def register_layout(
    block_class: str,
    child: str,
    *,
    role: str,
    parts: Sequence[PartLike] | Callable[[Any], Sequence[PartLike]] = (),
    orientation: str = "out_first",
    groups: Sizes = 1,
    stack: Sizes | None = None,
    module_class: str | None = "Linear",
    kernel: bool = False,
    leaf: str | None = "Linear",
) -> None:
    """Add one entry from outside; it goes before the built-in table and applies to any class of that name.

    Args:
        block_class: Class name of the nearest ancestor of the weight's owner that is no container.
        child: Path from there to the weight's owner, or to a parameter that is not called `weight`; indices as `*`.
            `**` keeps everything below the block whole.
        role: One of `ROLES`.
        parts: See `Layout`, like the rest. Sizes may be read off the block module: names of attributes, or callables.
        orientation: `out_first` or `in_first`.
        groups: Repeats of the parts on the out axis.
        stack: Matrices along the first axis.
        module_class: Class name of the module that holds `weight`.
        kernel: Whether it is a convolution's: one matrix at each position.
        leaf: The former name of `module_class`, which is still read.

    Raises:
        UserError: The role or the orientation is unknown.
    """
    REGISTERED[block_class, child] = Layout(
        role, parts, orientation, groups, stack, module_class if leaf == "Linear" else leaf, kernel
    )


def supported_types() -> list[str]:
    """List the `model_type`s of the installed transformers whose every weight is known, whatever their options."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - left_out()
    return [name for name in TYPES if name in known]


def logical_matrices(model: nn.Module, roles: Iterable[str] = ("attention", "mlp")) -> Iterator[ParameterSlice]:
    """Yield the logical (out, in) matrices that play one of the roles, in the order of `named_parameters()`.

    Args:
        model: Any causal LM whose layout is known, wrapped or not, on any device, `meta` included.
        roles: Some of `MATRIX_ROLES`; other roles are accepted but hold no matrices of their own.

    Raises:
        UserError: A role or the model's layout is unknown.
    """
    wanted = {roles} if isinstance(roles, str) else set(roles)
    for role in sorted(wanted - set(ROLES)):
        raise UserError(f"roles: unknown role '{role}'.{did_you_mean(role, ROLES)} Allowed: {', '.join(ROLES)}")
    return (weight for weight in parameter_slices(model) if weight.matrix and weight.roles & wanted)


def hidden_matrices(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are a matrix inside a block, as Muon wants them; a fused one is one.

    Embeddings, heads and routers are none, nor are stacks of experts.

    Raises:
        UserError: The model's layout is unknown.
    """
    stored = (p for p in parameter_slices(model) if p.spec is not None and p.spec.index is None and p.tensor.ndim == 2)
    return list(dict.fromkeys(p.parameter for p in stored if p.roles <= _BLOCK_ROLES))


def parameter_slices(model: nn.Module, *, strict: bool = True) -> list[ParameterSlice]:
    """Cut every parameter into its slices: logical matrices, and the other parameters whole.

    Args:
        model: Model, wrapped or not, on any device, `meta` included.
        strict: Refuse weights of two or more dimensions that no layout describes; otherwise keep them whole under
            the role `other`, which serves a reset that treats all parameters alike.

    Returns:
        Each parameter exactly once (a tied one under its first plain name), in the order of `named_parameters()`.

    Raises:
        UserError: A weight is not initialised yet, quantised, unknown (`strict`), or does not fit its layout; or there
            are no weights.
    """
    model = unwrap(model)
    kind = class_of(model).__name__
    if getattr(model, "is_quantized", False):
        raise UserError(f"{kind} is quantised, its weights are codes: load it in float32, float16 or bfloat16")
    names = names_by_tensor(plain_parameters(model))
    if not names:
        raise UserError(f"{kind} has no parameters: nothing to cut into matrices")
    lookup = Lookup(model)
    slices: list[ParameterSlice] = []
    unknown: list[tuple[Location, tuple[int, ...]]] = []
    for parameter, own_names in names.items():
        refuse_uninitialised(parameter, own_names[0])
        if parameter.ndim > 1 and parameter.dtype not in _WRITABLE:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"'{own_names[0]}' is {dtype}, quantised: load the model in float32, float16 or bfloat16")
        matches = []
        for location in map(lookup.location, own_names):
            match = lookup.classify(location, parameter.ndim)
            if match is None:
                unknown.append((location, tuple(parameter.shape)))
            elif strict:
                _refuse_convolution(parameter, match)
            matches.append(match or Match("other", location))
        slices += cut_parameter(parameter, matches)
    if strict and unknown:
        raise UserError(refusal(kind, unknown))
    if strict and not any(weight.roles & _BLOCK_ROLES for weight in slices):
        raise UserError(
            f"{kind} holds no attention, MLP or SSM matrix: is it a language model with at least one layer? "
            f"{ANY_MODULE}"
        )
    return slices


def refuse_uninitialised(tensor: Tensor, name: str) -> None:
    """Refuse a parameter or a buffer of a lazy module that has not seen an input.

    Raises:
        UserError: Naming it.
    """
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        raise UserError(f"'{name}' is not initialised yet (a lazy module): run one forward pass first")


def _refuse_convolution(parameter: nn.Parameter, match: Match) -> None:
    """Refuse a kernel of a convolution that is to be one matrix: the paper takes one at each position.

    Raises:
        UserError: Naming the weight.
    """
    kernel = tuple(parameter.shape[2:])
    one_matrix = match.role in MATRIX_ROLES and not (match.layout and match.layout.kernel)
    if one_matrix and isinstance(match.location.owner, _ConvNd) and math.prod(kernel) > 1:
        raise UserError(
            f"'{match.location.name}' is a convolution's kernel of {' × '.join(map(str, kernel))}, which holds an "
            "(out, in) matrix at each position: register it with kernel=True, or role='other' to leave it alone"
        )


def buffer_slices(model: nn.Module) -> list[ParameterSlice]:
    """List the buffers that a checkpoint holds, each whole: running statistics, what steers a router's balance.

    Args:
        model: As in `parameter_slices`.

    Returns:
        Each under its first plain name. One is frozen where the module that holds it has parameters, and all of them
        are.

    Raises:
        UserError: One is not initialised yet.
    """
    model = unwrap(model)
    lookup = Lookup(model)
    slices = []
    for buffer, (name, *tied) in names_by_tensor(plain_buffers(model)).items():
        refuse_uninitialised(buffer, name)
        location = lookup.location(name)
        match = lookup.classify(location, 1)
        roles = frozenset({match.role if match is not None else "other"})
        trained = [p.requires_grad for p in location.owner.parameters()]
        frozen = bool(trained) and not any(trained)
        block = location.block_class
        slices.append(ParameterSlice(name, buffer, roles, block, buffer=True, frozen=frozen, tied=(*tied,)))
    return slices


def slices_by_name(model: nn.Module) -> dict[str, ParameterSlice]:
    """Return every slice by its name, of parameters (without a layout: whole) and of buffers."""
    return {weight.name: weight for weight in [*parameter_slices(model, strict=False), *buffer_slices(model)]}


def cut_parameter(parameter: nn.Parameter, matches: list[Match]) -> Iterator[ParameterSlice]:
    """Yield the slices of one parameter, given what each of its names means."""
    name, *tied = (match.location.name for match in matches)
    roles = frozenset(match.role for match in matches)
    refused = next((match.refused for match in matches if match.refused), "")
    whole = ParameterSlice(name, parameter, roles, matches[0].location.block_class, refused=refused, tied=(*tied,))
    for match in matches:
        if match.layout and not refused and parameter.numel():
            for spec in match.layout.specs(match.location.block, parameter.shape, name):
                yield replace(whole, block=match.location.block_class, spec=spec)
            return
    yield whole
