"""What a reset is to do to each slice of a model, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fire_llm.architectures.matrices import ROLES, ParameterSlice, buffer_slices, parameter_slices
from fire_llm.architectures.modules import ModuleLayout, is_fused, module_slices
from fire_llm.core.errors import UserError
from fire_llm.distributed import Block, blocks_of, is_sharded, make_current, refuse_engines
from fire_llm.resets.memory import refuse_memory, refuse_other_optimizer, same_memory
from fire_llm.resets.methods import RESETS, Kind
from fire_llm.resets.presets import QUERY_OR_KEY
from fire_llm.resets.report import Measures, Spectra, TensorReport, describe, fetch
from fire_llm.resets.spec import FROZEN, ResetSpec, refuse_kinds
from fire_llm.resets.unfound import refuse_unfound


@dataclass
class Plan:
    """What is to be done to each slice of a model, everything checked."""

    specs: list[ResetSpec]
    slices: list[ParameterSlice]
    actions: list[list[ResetSpec]]
    """Of each slice, in order."""
    start: Mapping[str, ParameterSlice] = field(default_factory=dict)
    """Initial slices by name; empty where no reset wants them."""
    fused: list[str] = field(default_factory=list)
    """Weights that are touched as one matrix each, although their names say that they hold several."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        specs: list[ResetSpec],
        initial: nn.Module | None,
        kind: Kind = "transition",
        *,
        whole: bool = True,
        layout: ModuleLayout | None = None,
    ) -> Plan:
        """Return what is done to each slice; names and shapes alone are looked at, so that `meta` will do.

        Args:
            model: What is reset.
            specs: How.
            initial: The initial weights, where a reset wants them.
            kind: Of the resets.
            whole: Whether the model is all there is: then patterns and layers that find nothing are refused.
            layout: How any torch module is cut into matrices; None for a language model, by the tables.

        Raises:
            UserError: There is nothing to do, a pattern or a layer finds nothing, a method is of another kind, the
                initial weights are missing or of another architecture, a gradient is missing, or a weight that a
                reset of matrices would touch is none, or not what the forward pass reads; or `refuse_memory`.
        """
        refuse_kinds(specs, kind)
        cut = slices_of(model, specs, kind, layout)
        if whole:
            refuse_unfound(specs, cut)
        plan = cls(specs, cut, [[s for s in specs if s.why_not(p) is None] for p in cut])
        wanting = [s.method for s in specs if s.needs_initial]
        if wanting and initial is None:
            raise UserError(
                f"'{wanting[0]}' needs the run's initial weights: give `initial` (on the command line, --init or "
                "--seed)"
            )
        if wanting and initial is not None:
            if not isinstance(initial, nn.Module):
                raise UserError(f"initial: a {type(initial).__name__} is given: give a module with the initial weights")
            plan.start = {p.name: p for p in slices_of(initial, specs, kind, layout)}
            own = next(
                (p for p in plan.reading_initial if p.name in plan.start and same_memory(plan.start[p.name], p)), None
            )
            if own is not None and kind == "transition":
                raise UserError(
                    f"'{wanting[0]}': `initial` holds the model's very own '{own.parameter}': give a copy from before "
                    "training, copy.deepcopy(model)"
                )
        plan._check_names()
        refuse_memory(plan.slices, plan.wanted)
        if layout is not None:
            plan._check_modules(layout, whole)
        return plan

    def _check_modules(self, layout: ModuleLayout, whole: bool) -> None:
        """Refuse weights that a reset of matrices cannot reach, and a reset that finds nothing."""
        for weight, actions in zip(self.slices, self.actions, strict=True):
            if weight.refused and any(RESETS[s.method].matrices_only for s in actions):
                raise UserError(weight.refused)
        for spec in self.specs:
            if whole and not spec.idle and not any(spec in actions for actions in self.actions):
                why = sorted({str(spec.why_not(weight)) for weight in self.slices})
                raise UserError(f"'{spec.label()}' finds nothing to reset in the model ({'; '.join(why[:3])})")
        if any(pattern == QUERY_OR_KEY for spec in self.specs for _, pattern in spec.patterns):
            hidden = next((w.parameter for w in self.slices if _is_open(w, layout)), None)
            if hidden is not None:
                raise UserError(
                    f"queries and keys are wanted, and by its name '{hidden}' holds several matrices: name its parts, "
                    "as in split={'qkv': ('q', 'k', 'v')}, or give 1 where it is one matrix"
                )
        self.fused = [
            weight.parameter
            for weight, actions in zip(self.slices, self.actions, strict=True)
            if _is_open(weight, layout) and any(RESETS[s.method].matrices_only for s in actions)
        ]

    @classmethod
    def make(
        cls,
        model: nn.Module,
        specs: list[ResetSpec],
        initial: nn.Module | None,
        optimizer: Any,
        *,
        whole: bool = True,
        layout: ModuleLayout | None = None,
    ) -> Plan:
        """Return the plan for a model in memory; refuse what cannot be done before anything is done."""
        refuse_engines(model, optimizer)
        make_current(model)
        plan = cls.of(model, specs, initial, whole=whole, layout=layout)
        if whole and not plan.wanted and not all(spec.idle for spec in specs):
            another = "the role conv" if plan.convolutions else "another role"
            raise UserError(f"{plan.idle(type(model).__name__)} Name {another}, or take back a pattern of exclude")
        plan.check_values()
        if optimizer is not None:
            refuse_other_optimizer(optimizer, [weight for weight in plan.wanted if not weight.buffer])
        return plan

    @property
    def wanted(self) -> list[ParameterSlice]:
        """List the slices that something is done to."""
        return [p for p, actions in zip(self.slices, self.actions, strict=True) if actions]

    @property
    def reading_initial(self) -> list[ParameterSlice]:
        """List the slices that something is done to with their initial weights."""
        rows = zip(self.slices, self.actions, strict=True)
        return [weight for weight, actions in rows if any(spec.needs_initial for spec in actions)]

    @property
    def blocks(self) -> list[Block]:
        """List the runs of rows that are worked on, in the order of the parameters."""
        costly = [any(RESETS[s.method].matrices_only for s in actions) for actions in self.actions]
        return [b for b in blocks_of(self.slices, costly) if any(self.actions[i] for i in b.members)]

    def keep(self, wanted: Callable[[ParameterSlice], bool]) -> None:
        """Leave slices out of the plan altogether."""
        rows = [row for row in zip(self.slices, self.actions, strict=True) if wanted(row[0])]
        self.slices, self.actions = [weight for weight, _ in rows], [actions for _, actions in rows]

    def _check_names(self) -> None:
        """Refuse a plan that would touch nothing but frozen parameters, or whose initial weights do not match."""
        if not self.wanted and any(s.why_not(p) == FROZEN for p in self.slices for s in self.specs):
            raise UserError("every parameter that the reset would touch is frozen: call requires_grad_(True) first")
        for weight in self.reading_initial if self.start else ():
            before = self.start.get(weight.name)
            if before is None or before.shape != weight.shape or before.tensor.shape != weight.tensor.shape:
                raise UserError(
                    f"the initial weights hold no '{weight.name}' of shape {tuple(weight.tensor.shape)}: another "
                    "architecture"
                )
            if is_sharded(before.tensor):
                raise UserError(f"the initial weights of '{weight.name}' are sharded: give them whole on every rank")
        for spec, weight in self._read_by_gradient():
            if is_sharded(weight.tensor):
                raise UserError(f"'{spec.method}' reads gradients, and FSDP2 holds them in shards: train replicas")
            if weight.tensor.grad is None:
                raise UserError(
                    f"'{spec.method}' needs the gradient of the loss, and '{weight.name}' has none: make it an arm of "
                    "a recipe, give it to ResetCallback in a ContinualTrainer, or call backward() before apply_reset"
                )

    def _read_by_gradient(self) -> Iterator[tuple[ResetSpec, ParameterSlice]]:
        """Yield the slices whose gradient a reset reads."""
        for weight, actions in zip(self.slices, self.actions, strict=True):
            yield from ((spec, weight) for spec in actions if spec.needs_gradient)

    def inputs(self, spec: ResetSpec) -> list[Callable[[int], Tensor]]:
        """Return what gives, of each slice, the tensors that a method takes beside the slice's own."""
        given: list[tuple[bool, Callable[[int], Tensor]]] = [
            (spec.needs_initial, lambda index: self.start[self.slices[index].name].read()),
            (spec.needs_gradient, lambda index: with_gradient(self.slices[index]).read()),
        ]
        return [read for wanted, read in given if wanted]

    def check_values(self) -> None:
        """Refuse weights, initial ones too, that are not there or not finite."""
        start = [self.start[w.name] for w in self.reading_initial if self.start]
        for whose, weights in (("", self.wanted), ("the initial ", start)):
            for weight in weights:
                if weight.tensor.is_meta:
                    raise UserError(f"{whose}'{weight.name}' is on the meta device: load the weights before a reset")
            for weight, finite in zip(weights, all_finite(held(weight) for weight in weights), strict=True):
                if not finite:
                    raise UserError(f"{whose}{not_finite(weight.name)}")
        read = list(self._read_by_gradient())
        gradients = all_finite(with_gradient(weight).read() for _, weight in read)
        for (spec, weight), finite in zip(read, gradients, strict=True):
            if not finite:
                raise UserError(
                    f"'{spec.method}': the gradient of '{weight.name}' is NaN or infinite; try fp32 or bf16"
                )

    def request(self) -> str:
        """Return what this rank is about to do, in a form that ranks can compare."""
        rows = zip(self.slices, self.actions, strict=True)
        return repr((self.specs, [(p.name, tuple(p.shape), str(p.tensor.dtype), len(actions)) for p, actions in rows]))

    def untouched(self, index: int, spectra: Spectra = False, measures: Measures | None = None) -> TensorReport:
        """Report on a slice that nothing came near; what lies in shards or on the disk is not measured."""
        weight = self.slices[index]
        apart = weight.tensor.is_meta or is_sharded(weight.tensor)
        report = TensorReport.of(weight) if apart else describe(weight, held(weight), spectra, measures)
        report.reason = self.reason(index) if not self.actions[index] else None
        return report

    @property
    def convolutions(self) -> bool:
        """Return whether there are convolutions whose role no reset names."""
        named = {role for spec in self.specs for role in spec.roles}
        return "conv" not in named and any(weight.role == "conv" for weight in self.slices)

    def idle(self, name: str) -> str:
        """Return the message about resets that would change nothing.

        Args:
            name: What the model is called.
        """
        matrices = sorted({p.role for p in self.slices if p.matrix})
        why = sorted({self.reason(i) for i, p in enumerate(self.slices) if p.matrix})
        return (
            f"nothing to reset in '{name}', whose matrices have the roles {', '.join(matrices)} ({'; '.join(why[:3])})."
        )

    def reason(self, index: int) -> str:
        """Return why a slice is left alone."""
        return "; ".join(dict.fromkeys(str(s.why_not(self.slices[index])) for s in self.specs))


def _is_open(weight: ParameterSlice, layout: ModuleLayout) -> bool:
    """Return whether a weight is one matrix, its name says that it holds several, and nobody has said which."""
    return is_fused(weight) and layout.parts(weight.parameter, *weight.tied) is None


def slices_of(
    model: nn.Module, specs: list[ResetSpec], kind: Kind = "transition", layout: ModuleLayout | None = None
) -> list[ParameterSlice]:
    """List the slices of a model that some resets of a kind choose from: of parameters, and once also of buffers.

    Raises:
        UserError: See `parameter_slices`; a weight without a layout may be kept whole where no roles are named. Or see
            `module_slices`, where any torch module is cut.
    """
    if layout is not None:
        found = module_slices(model, layout, buffers=kind == "transition")
        own = [pair for spec in specs for pair in spec.patterns]
        return [
            replace(weight, own_role=next((role for role, pattern in own if weight.found_by(pattern)), ""))
            for weight in found
        ]
    cut = parameter_slices(model, strict=any(set(spec.roles) != set(ROLES) for spec in specs))
    return [*cut, *buffer_slices(model)] if kind == "transition" else cut


def all_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Return whether each tensor is finite; each device is waited for once, after the checks of all are queued."""
    return fetch([torch.isfinite(tensor).all() for tensor in tensors])


def with_gradient(weight: ParameterSlice) -> ParameterSlice:
    """Return the same slice of the parameter's gradient."""
    gradient = weight.tensor.grad
    assert gradient is not None
    return replace(weight, tensor=gradient.to_dense())  # of an embedding it may be sparse


def not_finite(name: str) -> str:
    """Return the message about weights that are NaN or infinite."""
    return f"'{name}' holds NaN or infinity: a reset would spread it. Start from a sound checkpoint"


def held(weight: ParameterSlice) -> Tensor:
    """Return a slice, or, where it lies in shards, what this rank holds of the parameter around it."""
    tensor: Any = weight.tensor.detach()
    if not hasattr(tensor, "to_local"):
        return weight.read()
    return tensor.to_local() if is_sharded(tensor) else replace(weight, tensor=tensor.to_local()).read()
