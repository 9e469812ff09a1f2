"""What a reset is to do to each piece of a model, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fire_llm.architectures.matrices import ROLES, LogicalMatrix, pieces
from fire_llm.core.errors import UserError
from fire_llm.distributed import Block, blocks_of, make_current, refuse_engines
from fire_llm.resets.methods import RESETS, Kind
from fire_llm.resets.report import Measures, Spectra, TensorReport, describe, fetch
from fire_llm.resets.spec import FROZEN, ResetSpec, refuse_kinds


@dataclass
class Plan:
    """Hold what is to be done to each piece of a model, everything checked."""

    specs: list[ResetSpec]
    pieces: list[LogicalMatrix]
    todo: list[list[ResetSpec]]
    """Of each piece, in order."""
    start: Mapping[str, LogicalMatrix] = field(default_factory=dict)
    """Step-0 pieces by name; empty where no reset wants them."""

    @classmethod
    def of(cls, model: nn.Module, specs: list[ResetSpec], initial: nn.Module | None, kind: Kind = "transition") -> Plan:
        """Decide what is done to each piece; names and shapes alone are looked at, so that `meta` will do.

        Raises:
            UserError: There is nothing to do, a method is of another kind, the step-0 weights are missing or of another
                architecture, or a gradient is missing.
        """
        refuse_kinds(specs, kind)
        by_role = any(set(s.roles) != set(ROLES) for s in specs)
        cut = pieces(model, strict=by_role)
        plan = cls(specs, cut, [[s for s in specs if s.why_not(p) is None] for p in cut])
        wanting = [s.method for s in specs if s.needs_initial]
        if wanting and initial is None:
            raise UserError(
                f"'{wanting[0]}' needs the run's step-0 weights: give `initial` (on the command line, --init or --seed)"
            )
        if wanting and initial is not None:
            plan.start = {p.name: p for p in pieces(initial, strict=by_role)}
        plan._check_names()
        return plan

    @classmethod
    def make(cls, model: nn.Module, specs: list[ResetSpec], initial: nn.Module | None, optimizer: Any) -> Plan:
        """Decide, for a model in memory, and refuse what cannot be done before anything is."""
        refuse_engines(model, optimizer)
        make_current(model)
        plan = cls.of(model, specs, initial)
        plan._check_values()
        return plan

    @property
    def wanted(self) -> list[LogicalMatrix]:
        """List the pieces that something is done to."""
        return [p for p, todo in zip(self.pieces, self.todo, strict=True) if todo]

    @property
    def blocks(self) -> list[Block]:
        """List the runs of rows that are worked on, in the order of the parameters."""
        costly = [any(RESETS[s.method].matrices_only for s in todo) for todo in self.todo]
        return [b for b in blocks_of(self.pieces, costly) if any(self.todo[i] for i in b.members)]

    def _check_names(self) -> None:
        """Refuse a plan that would touch nothing but frozen parameters, or whose step-0 weights do not match."""
        if not self.wanted and any(s.why_not(p) == FROZEN for p in self.pieces for s in self.specs):
            raise UserError("every parameter that the reset would touch is frozen: call requires_grad_(True) first")
        for piece in self.wanted if self.start else ():
            before = self.start.get(piece.name)
            if before is None or before.shape != piece.shape:
                raise UserError(
                    f"the step-0 weights hold no '{piece.name}' of shape {tuple(piece.shape)}: another architecture"
                )
            if is_sharded(before.tensor):
                raise UserError(f"the step-0 weights of '{piece.name}' are sharded: give them whole on every rank")
        for spec, piece in self._read_by_gradient():
            if is_sharded(piece.tensor):
                raise UserError(f"'{spec.method}' reads gradients, and FSDP2 holds them in shards: train replicas")
            if piece.tensor.grad is None:
                raise UserError(
                    f"'{spec.method}' needs the gradient of the loss, and '{piece.name}' has none: make it an arm of a "
                    "recipe, give it to ResetCallback in a ContinualTrainer, or call backward() before apply_reset"
                )

    def _read_by_gradient(self) -> Iterator[tuple[ResetSpec, LogicalMatrix]]:
        """Yield the pieces whose gradient a reset reads."""
        for piece, todo in zip(self.pieces, self.todo, strict=True):
            yield from ((spec, piece) for spec in todo if spec.needs_gradient)

    def readings(self, spec: ResetSpec) -> list[Callable[[int], Tensor]]:
        """Return what gives, of each piece, the tensors that a method takes beside the piece's own."""
        given: list[tuple[bool, Callable[[int], Tensor]]] = [
            (spec.needs_initial, lambda index: self.start[self.pieces[index].name].read()),
            (spec.needs_gradient, lambda index: with_gradient(self.pieces[index]).read()),
        ]
        return [read for wanted, read in given if wanted]

    def _check_values(self) -> None:
        """Refuse weights that are not there or not finite."""
        for piece in self.wanted:
            if piece.tensor.is_meta:
                raise UserError(f"'{piece.name}' is on the meta device: load the weights before a reset")
        for piece, finite in zip(self.wanted, all_finite(held(piece) for piece in self.wanted), strict=True):
            if not finite:
                raise UserError(not_finite(piece.name))
        read = list(self._read_by_gradient())
        gradients = all_finite(with_gradient(piece).read() for _, piece in read)
        for (spec, piece), finite in zip(read, gradients, strict=True):
            if not finite:
                raise UserError(f"'{spec.method}': the gradient of '{piece.name}' is NaN or infinite; try fp32 or bf16")

    def request(self) -> str:
        """Say what this rank is about to do, in a form that ranks can compare."""
        rows = zip(self.pieces, self.todo, strict=True)
        return repr((self.specs, [(p.name, tuple(p.shape), str(p.tensor.dtype), len(todo)) for p, todo in rows]))

    def untouched(self, index: int, spectra: Spectra = False, measures: Measures | None = None) -> TensorReport:
        """Report on a piece that nothing came near; what lies in shards or on the disk is not measured."""
        piece = self.pieces[index]
        apart = piece.tensor.is_meta or is_sharded(piece.tensor)
        report = TensorReport.of(piece) if apart else describe(piece, held(piece), spectra, measures)
        report.reason = self.reason(index) if not self.todo[index] else None
        return report

    def reason(self, index: int) -> str:
        """Say why a piece is left alone."""
        return "; ".join(dict.fromkeys(str(s.why_not(self.pieces[index])) for s in self.specs))


def all_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Return whether each tensor is finite; each device is waited for once, after the checks of all are queued."""
    return fetch([torch.isfinite(tensor).all() for tensor in tensors])


def with_gradient(piece: LogicalMatrix) -> LogicalMatrix:
    """Stand for the same piece of the parameter's gradient."""
    gradient = piece.tensor.grad
    assert gradient is not None
    return replace(piece, tensor=gradient)


def not_finite(name: str) -> str:
    """Word the refusal of weights that are NaN or infinite."""
    return f"'{name}' holds NaN or infinity: a reset would spread it. Start from a sound checkpoint"


def is_sharded(tensor: Any) -> bool:
    """Tell whether this rank holds but a part of a parameter."""
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and any(
        mesh.size(dim) > 1 and not placement.is_replicate() for dim, placement in enumerate(tensor.placements)
    )


def held(piece: LogicalMatrix) -> Tensor:
    """Return a piece, or, where it lies in shards, what this rank holds of the parameter around it."""
    tensor: Any = piece.tensor.detach()
    if not hasattr(tensor, "to_local"):
        return piece.read()
    return tensor.to_local() if is_sharded(tensor) else replace(piece, tensor=tensor.to_local()).read()
