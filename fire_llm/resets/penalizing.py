"""Add the gradients of penalties to those of a loss, for a `Trainer`'s callback and for loops of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.architectures.modules import Kernels, SplitLike
from fire_llm.architectures.names import plain_modules, unwrap
from fire_llm.core.errors import UserError
from fire_llm.distributed import is_dtensor, local_part, placed_like
from fire_llm.resets.apply import LayoutName, module_layout
from fire_llm.resets.memory import refuse_replaced
from fire_llm.resets.methods import RESETS
from fire_llm.resets.plan import Plan
from fire_llm.resets.spec import ResetsLike, ResetSpec, parse_resets


class Penalties:
    """Train with `l2_init`, `parseval` or the like in the loss, in a loop of your own.

        penalties = Penalties(model, "l2_init", initial=initial, strength=1e-4, layout="modules")
        loss(model(x), y).backward()
        penalties.add_()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    Nothing is kept from step to step. Replicas add the same to gradients that are the same.

    Args:
        model: What is trained, as in `apply_reset`.
        penalties: A method's name, a spec, or a list of specs.
        initial: A module of the same architecture with the initial weights, where a method wants them; a copy of what
            is penalised is kept where the model's weights are.
        layout: As in `apply_reset`, like the next two.
        split: Weights that hold several matrices.
        kernels: What a convolution is.
        **options: Options of the method, where `penalties` is its name.

    Raises:
        UserError: For an unknown method or option, one that is no penalty, missing or unlike initial weights, a model
            without a layout, or shards of what has to be whole.
    """

    def __init__(
        self,
        model: nn.Module,
        penalties: ResetsLike,
        *,
        initial: nn.Module | None = None,
        layout: LayoutName = "transformers",
        split: SplitLike | None = None,
        kernels: Kernels = "positions",
        **options: Any,
    ) -> None:
        module_cut = module_layout(layout, split, kernels)
        specs = parse_resets(penalties, options, modules=module_cut is not None)
        plan = Plan.of(model, specs, initial, "penalty", layout=module_cut)
        plan.check_values()
        self._modules = plain_modules(unwrap(model))
        initial_tensors = {weight.parameter: weight.tensor for weight in plan.initial.values()}
        self._terms: list[tuple[ParameterSlice, Callable[..., Tensor], list[Tensor]]] = []
        for spec in specs:
            for weight in _penalised(plan, spec):
                inputs = [_placed(initial_tensors[weight.parameter], weight)] if spec.needs_initial else []
                act = partial(RESETS[spec.method].act, options=spec.options, kernel=weight.kernel)
                self._terms.append((weight, act, inputs))

    @torch.no_grad()
    def add_(self, scale: float = 1.0) -> None:
        """Add the penalties' gradients to those that the parameters hold.

        Args:
            scale: What the gradients are multiplied by at this point: that of a `GradScaler`, or 1.

        Raises:
            UserError: The model holds another parameter than it did.
        """
        refuse_replaced(self._modules, (weight for weight, *_ in self._terms))
        for weight, act, inputs in self._terms:
            if weight.tensor.grad is None:
                weight.tensor.grad = torch.zeros_like(weight.tensor)
            elif weight.tensor.grad.is_sparse:  # of an embedding; a penalty concerns each of its rows
                weight.tensor.grad = weight.tensor.grad.to_dense()
            values, gradient = (replace(weight, tensor=local_part(t)) for t in (weight.tensor, weight.tensor.grad))
            gradient.write_(gradient.read().add(act(values.read(), *inputs), alpha=scale))


def _penalised(plan: Plan, spec: ResetSpec) -> list[ParameterSlice]:
    """List the slices that a penalty is given; of a parameter in shards, the parameter, if any part of it will do.

    Raises:
        UserError: A matrix has to be whole and is not.
    """
    penalised: list[ParameterSlice] = []
    for parameter, group in groupby(plan.slices, attrgetter("parameter")):
        slices = list(group)
        chosen = [weight for weight in slices if spec.why_not(weight) is None]
        if chosen and is_dtensor(chosen[0].tensor):
            if not RESETS[spec.method].elementwise or len(chosen) < len(slices):
                raise UserError(
                    f"'{spec.method}' needs the matrices of '{parameter}' whole, and FSDP2 shards them: train replicas"
                )
            chosen = [replace(chosen[0], spec=None)]
        penalised += chosen
    return penalised


def _placed(whole: Tensor, weight: ParameterSlice) -> Tensor:
    """Return the part of a whole parameter that a slice stands for, where and as the slice is."""
    if is_dtensor(weight.tensor):
        return local_part(placed_like(weight.tensor, whole.detach()))
    return replace(weight, tensor=whole).read().to(weight.tensor, copy=True)  # `initial` may be the model itself
