"""What a reset is to do to each slice of a model, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    initial: Mapping[str, ParameterSlice] = field(default_factory=dict)
    """Slices of the initial weights by name; empty where no reset wants them."""
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
        slices = slices_of(model, specs, kind, layout)
        if whole:
            refuse_unfound(specs, slices)
        plan = cls(specs, slices, [[spec for spec in specs if spec.why_not(weight) is None] for weight in slices])
        if method := next((spec.method for spec in specs if spec.needs_initial), None):
            plan._take_initial(initial, method, kind, layout)
        plan._check_names()
        refuse_memory(plan.slices, plan.wanted)
        if layout is not None:
            plan._check_modules(layout, whole)
        return plan

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
    def items(self) -> list[tuple[ParameterSlice, list[ResetSpec]]]:
        """List each slice with what is done to it."""
        return [*zip(self.slices, self.actions, strict=True)]

    @property
    def wanted(self) -> list[ParameterSlice]:
        """List the slices that something is done to."""
        return [weight for weight, actions in self.items if actions]

    @property
    def reading_initial(self) -> list[ParameterSlice]:
        """List the slices that something is done to with their initial weights."""
        return [weight for weight, actions in self.items if any(spec.needs_initial for spec in actions)]

    @property
    def blocks(self) -> list[Block]:
        """List the runs of rows that are worked on, in the order of the parameters."""
        costly = [_of_matrices(actions) for actions in self.actions]
        return [b for b in blocks_of(self.slices, costly) if any(self.actions[i] for i in b.members)]

    def keep(self, wanted: Callable[[ParameterSlice], bool]) -> None:
        """Leave slices out of the plan altogether."""
        kept = [item for item in self.items if wanted(item[0])]
        self.slices, self.actions = [weight for weight, _ in kept], [actions for _, actions in kept]

    def _take_initial(self, initial: Any, method: str, kind: Kind, layout: ModuleLayout | None) -> None:
        """Read the initial weights that a method wants; refuse what cannot be them."""
        if initial is None:
            raise UserError(
                f"'{method}' needs the run's initial weights: give `initial` (on the command line, --init or --seed)"
            )
        if not isinstance(initial, nn.Module):
            raise UserError(f"initial: a {type(initial).__name__} is given: give a module with the initial weights")
        self.initial = {weight.name: weight for weight in slices_of(initial, self.specs, kind, layout)}
        for weight in self.reading_initial if kind == "transition" else ():
            if weight.name in self.initial and same_memory(self.initial[weight.name], weight):
                raise UserError(
                    f"'{method}': `initial` holds the model's very own '{weight.parameter}': give a copy from before "
                    "training, copy.deepcopy(model)"
                )

    def _check_names(self) -> None:
        """Refuse a plan that would touch nothing but frozen parameters, or lacks what a reset reads."""
        if not self.wanted and any(s.why_not(weight) == FROZEN for weight in self.slices for s in self.specs):
            raise UserError("every parameter that the reset would touch is frozen: call requires_grad_(True) first")
        for weight in self.reading_initial:
            before = self.initial.get(weight.name)
            if before is None or before.shape != weight.shape or before.tensor.shape != weight.tensor.shape:
                raise UserError(
                    f"the initial weights hold no '{weight.name}' of shape {tuple(weight.tensor.shape)}: another "
                    "architecture"
                )
            if is_sharded(before.tensor):
                raise UserError(f"the initial weights of '{weight.name}' are sharded: give them whole on every rank")
        for spec, weight in self._reading_gradient():
            if is_sharded(weight.tensor):
                raise UserError(f"'{spec.method}' reads gradients, and FSDP2 holds them in shards: train replicas")
            if weight.tensor.grad is None:
                raise UserError(
                    f"'{spec.method}' needs the gradient of the loss, and '{weight.name}' has none: make it an arm of "
                    "a recipe, give it to ResetCallback in a ContinualTrainer, or call backward() before apply_reset"
                )

    def _check_modules(self, layout: ModuleLayout, whole: bool) -> None:
        """Refuse weights that a reset of matrices cannot reach, and a reset that finds nothing."""
        for weight, actions in self.items:
            if weight.refused and _of_matrices(actions):
                raise UserError(weight.refused)
        for spec in self.specs:
            if whole and not spec.idle and not any(spec in actions for actions in self.actions):
                why = sorted({str(spec.why_not(weight)) for weight in self.slices})
                raise UserError(f"'{spec.label()}' finds nothing to reset in the model ({'; '.join(why[:3])})")
        unsplit = [(weight, actions) for weight, actions in self.items if _is_unsplit(weight, layout)]
        if unsplit and any(pattern == QUERY_OR_KEY for spec in self.specs for _, pattern in spec.patterns):
            raise UserError(
                f"queries and keys are wanted, and by its name '{unsplit[0][0].parameter}' holds several matrices: "
                "name its parts, as in split={'qkv': ('q', 'k', 'v')}, or give 1 where it is one matrix"
            )
        self.fused = [weight.parameter for weight, actions in unsplit if _of_matrices(actions)]

    def _reading_gradient(self) -> list[tuple[ResetSpec, ParameterSlice]]:
        """List the slices whose gradient a reset reads, each with the reset."""
        return [(spec, weight) for weight, actions in self.items for spec in actions if spec.needs_gradient]

    def inputs(self, spec: ResetSpec) -> list[Callable[[int], Tensor]]:
        """Return functions that give, of each slice, the tensors that a method takes beside the slice's own."""
        reads: list[Callable[[int], Tensor]] = []
        if spec.needs_initial:
            reads.append(lambda index: self.initial[self.slices[index].name].read())
        if spec.needs_gradient:
            reads.append(lambda index: with_gradient(self.slices[index]).read())
        return reads

    def check_values(self) -> None:
        """Refuse weights, initial ones too, that are not there or not finite."""
        initial = [self.initial[weight.name] for weight in self.reading_initial]
        for whose, weights in (("", self.wanted), ("the initial ", initial)):
            for weight in weights:
                if weight.tensor.is_meta:
                    raise UserError(f"{whose}'{weight.name}' is on the meta device: load the weights before a reset")
            for weight, finite in zip(weights, all_finite(map(local_values, weights)), strict=True):
                if not finite:
                    raise UserError(f"{whose}{not_finite(weight.name)}")
        read = self._reading_gradient()
        gradients = all_finite(with_gradient(weight).read() for _, weight in read)
        for (spec, weight), finite in zip(read, gradients, strict=True):
            if not finite:
                raise UserError(
                    f"'{spec.method}': the gradient of '{weight.name}' is NaN or infinite; try fp32 or bf16"
                )

    def request(self) -> str:
        """Return what this rank is about to do, in a form that ranks can compare."""
        slices = [(w.name, tuple(w.shape), str(w.tensor.dtype), len(actions)) for w, actions in self.items]
        return repr((self.specs, slices))

    def untouched(self, index: int, spectra: Spectra = False, measures: Measures | None = None) -> TensorReport:
        """Report on a slice that nothing came near; what lies in shards or on the disk is not measured."""
        weight = self.slices[index]
        if weight.tensor.is_meta or is_sharded(weight.tensor):
            report = TensorReport.of(weight)
        else:
            report = describe(weight, local_values(weight), spectra, measures)
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
        matrices = sorted({weight.role for weight in self.slices if weight.matrix})
        why = sorted({self.reason(i) for i, weight in enumerate(self.slices) if weight.matrix})
        return (
            f"nothing to reset in '{name}', whose matrices have the roles {', '.join(matrices)} ({'; '.join(why[:3])})."
        )

    def reason(self, index: int) -> str:
        """Return why a slice is left alone."""
        return "; ".join(dict.fromkeys(str(spec.why_not(self.slices[index])) for spec in self.specs))


def _of_matrices(actions: Iterable[ResetSpec]) -> bool:
    """Return whether one of some resets takes matrices alone."""
    return any(RESETS[spec.method].matrices_only for spec in actions)


def _is_unsplit(weight: ParameterSlice, layout: ModuleLayout) -> bool:
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
        patterns = [pair for spec in specs for pair in spec.patterns]
        return [
            replace(weight, own_role=next((role for role, pattern in patterns if weight.found_by(pattern)), ""))
            for weight in module_slices(model, layout, buffers=kind == "transition")
        ]
    slices = parameter_slices(model, strict=any(set(spec.roles) != set(ROLES) for spec in specs))
    return [*slices, *buffer_slices(model)] if kind == "transition" else slices


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


def local_values(weight: ParameterSlice) -> Tensor:
    """Return a slice, or, where it lies in shards, what this rank holds of the parameter around it."""
    tensor: Any = weight.tensor.detach()
    if not hasattr(tensor, "to_local"):
        return weight.read()
    return tensor.to_local() if is_sharded(tensor) else replace(weight, tensor=tensor.to_local()).read()
