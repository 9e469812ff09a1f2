"""The grammar of layouts: how a stored tensor holds its logical (out, in) matrices; sizes only, no torch.

    stored tensor ─ stack ─▶ A × B ─ orientation ─▶ out × in ─ groups × parts, on the out axis ─▶ one matrix a part

The kernel of a convolution, out × in × k × …, is one (out, in) matrix at each of its positions.

FIRE does not care in which order a matrix keeps its rows or columns (permuting them commutes with orthogonalising),
so a layout only has to state WHICH rows belong together and which axis is `out`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from fire_llm.core.errors import UserError, did_you_mean

ROLES = ("attention", "mlp", "ssm", "conv", "embedding", "lm_head", "norm", "bias", "router", "other")
MATRIX_ROLES = ("attention", "mlp", "ssm", "conv", "lm_head")
MODULE_MATRIX_ROLES = ("linear", "conv", "attention", "recurrent")
MODULE_ROLES = (*MODULE_MATRIX_ROLES, "embedding", "norm", "bias", "linear_bias", "conv_bias", "other", "buffer")
"""Roles in any torch module, by the kind of module that holds a weight rather than by a table."""
ORIENTATIONS = ("out_first", "in_first")
WHOLE_SUBTREE = "**"
"""The child that stands for every parameter below a module, e.g. below a vision tower."""


@dataclass(frozen=True)
class Part:
    """One logical matrix inside a fused one.

    Args:
        name: `q`, `k`, `v`, `gate`, `up`, …; empty where the tensor is one matrix.
        size: Rows on the out axis within one group, or the attribute of the block module that holds their number; None
            for an equal share of what the sized parts leave.
    """

    name: str
    size: int | str | None = None


PartLike = Part | tuple[str, int | str] | str
Sizes = int | str | Callable[[Any], int]
"""A number, the attribute of the block module that holds it, such as `config.num_heads`, or a function of the block."""


@dataclass(frozen=True)
class SliceSpec:
    """Where one logical matrix lies in its stored tensor, all sizes resolved.

    Args:
        name: Its part, empty where the tensor (or the stack's item) is one matrix.
        index: Its place on the stack axis, None where there is no stack.
        stack: Length of the stack axis, None where there is none.
        in_first: Whether the stored axes are (in, out).
        groups: Times the parts repeat along the out axis.
        offset: First row of the part within a group.
        size: Rows of the part within a group.
        columns: Length of the in axis.
        kernel: Sizes of a convolution's kernel, (k, …), of which each position is a matrix; None for one matrix.
    """

    name: str
    index: int | None
    stack: int | None
    in_first: bool
    groups: int
    offset: int
    size: int
    columns: int
    kernel: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (out, in) of the logical matrix; of a kernel (positions, out, in)."""
        one = (self.groups * self.size, self.columns)
        return one if self.kernel is None else (math.prod(self.kernel), *one)


@dataclass(frozen=True)
class Layout:
    """How one child of a block class stores its logical matrices.

    Names of attributes and callables are read off the block module, so that layers of one model may differ in size.

    Args:
        role: One of `ROLES`. A role outside `MATRIX_ROLES` keeps the parameter whole.
        parts: Parts of one group on the out axis, in order: `Part`, (name, rows) or a name alone for an equal share.
            Empty: the whole axis is one matrix.
        orientation: `out_first` (nn.Linear) or `in_first` (Conv1D), after the stack axis.
        groups: Times the parts repeat along the out axis: heads, or rows where gate and up alternate.
        stack: Matrices along the first axis (experts), each cut alike; None where the first axis is no stack.
        module_class: Class that must hold a parameter called `weight`, because a quantised or adapted substitute
            stores something else; None accepts any. It does not apply to parameters that the block holds itself.
        kernel: Whether the axes after (out, in) are the positions of a convolution's kernel, each a matrix. Otherwise
            they belong to the in axis.

    Raises:
        UserError: The role or the orientation is unknown.
    """

    role: str
    parts: Sequence[PartLike] | Callable[[Any], Sequence[PartLike]] = ()
    orientation: str = "out_first"
    groups: Sizes = 1
    stack: Sizes | None = None
    module_class: str | None = "Linear"
    kernel: bool = False

    def __post_init__(self) -> None:
        for what, value, allowed in (("role", self.role, ROLES), ("orientation", self.orientation, ORIENTATIONS)):
            if value not in allowed:
                raise UserError(
                    f"layout {what}: unknown '{value}'.{did_you_mean(value, allowed)} Allowed: {', '.join(allowed)}"
                )

    @property
    def matrix(self) -> bool:
        """Return whether resets may treat the parameter as matrices."""
        return self.role in MATRIX_ROLES

    def specs(self, block: Any, shape: Sequence[int], name: str) -> list[SliceSpec]:
        """Cut a stored tensor into its logical matrices.

        Args:
            block: Module that the sizes are read from.
            shape: Stored shape; the axes after the first (or after the stack axis) count as one.
            name: Parameter name, for messages.

        Raises:
            UserError: The sizes do not fill the stored shape exactly.
        """
        stack, rest = self._unstack(block, tuple(shape), name)
        if len(rest) < 2:
            raise UserError(
                f"'{name}': shape {tuple(shape)} leaves no matrix once the stack axis ({stack}) is taken off"
            )
        kernel = rest[2:] if self.kernel else None
        first, second = rest[0], rest[1] if self.kernel else math.prod(rest[1:])
        in_first = self.orientation == "in_first"
        rows, columns = (second, first) if in_first else (first, second)
        groups = _resolve(self.groups, block)
        given = self.parts(block) if callable(self.parts) else self.parts
        parts = [as_part(part) for part in given or ("",)]
        sizes = [None if part.size is None else _resolve(part.size, block) for part in parts]
        rows_left, equal_shares = rows // groups - sum(size or 0 for size in sizes), sizes.count(None)
        share, remainder = divmod(rows_left, equal_shares) if equal_shares else (0, rows_left)
        if rows % groups or remainder or (equal_shares and share < 1):
            named = [(part.name or "whole", size) for part, size in zip(parts, sizes, strict=True)]
            says = " + ".join(f"{part}: {'equal share' if size is None else size}" for part, size in named)
            raise UserError(
                f"'{name}': its layout says {groups} × [{says}] on the out axis, but the stored shape "
                f"{tuple(shape)} has {rows} rows there. Correct the layout of {type(block).__name__}"
            )
        specs: list[SliceSpec] = []
        for index in range(stack) if stack is not None else (None,):
            offset = 0
            for part, size in zip(parts, sizes, strict=True):
                n_rows = share if size is None else size
                specs.append(SliceSpec(part.name, index, stack, in_first, groups, offset, n_rows, columns, kernel))
                offset += n_rows
        return specs

    def _unstack(self, block: Any, shape: tuple[int, ...], name: str) -> tuple[int | None, tuple[int, ...]]:
        """Take the stack axis off: the first axis of a 3-D tensor, or blocks of rows of a 2-D one."""
        if self.stack is None:
            return None, shape
        stack = _resolve(self.stack, block)
        if len(shape) > 2 and shape[0] == stack:
            return stack, shape[1:]
        if len(shape) == 2 and stack > 0 and shape[0] % stack == 0:
            return stack, (shape[0] // stack, shape[1])
        raise UserError(f"'{name}': its layout says a stack of {stack}, which the stored shape {shape} does not hold")


def _resolve(size: Sizes, block: Any) -> int:
    """Read a size from the block module where the layout says how."""
    if isinstance(size, str):
        size = attrgetter(size)
    return int(size(block)) if callable(size) else size


def as_part(part: PartLike) -> Part:
    """Return a part that may be given in short: a name, or a name and rows."""
    if isinstance(part, Part):
        return part
    return Part(part) if isinstance(part, str) else Part(*part)


Table = dict[tuple[str, str], Layout]


def entries(role: str, children: str, blocks: str, **options: Any) -> Table:
    """Return a table that gives every listed child of every listed block class one layout.

    Args:
        role: One of `ROLES`.
        children: Child paths parted by spaces; an index in a path is written `*`.
        blocks: Class names parted by spaces.
        **options: Further arguments of `Layout`.
    """
    return {(block, child): Layout(role, **options) for block in blocks.split() for child in children.split()}


def classes(prefixes: str, ending: str) -> str:
    """Return the class names that begin with each of some prefixes and end alike, parted by spaces."""
    return " ".join(prefix + ending for prefix in prefixes.split())


def merge(*tables: Table) -> Table:
    """Join tables; a key listed twice is an error, because one of the two would be lost unnoticed."""
    merged: Table = {}
    for table in tables:
        for block, child in table.keys() & merged.keys():
            raise ValueError(f"layout of {block}.{child} is listed twice")
        merged |= table
    return merged
