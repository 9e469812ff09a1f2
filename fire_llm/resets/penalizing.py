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
        cut = module_layout(layout, split, kernels)
        specs = parse_resets(penalties, options, modules=cut is not None)
        plan = Plan.of(model, specs, initial, "penalty", layout=cut)
        plan.check_values()
        self._modules = plain_modules(unwrap(model))
        starts = {slice_.parameter: slice_.tensor for slice_ in plan.initial.values()}
        self._terms: list[tuple[ParameterSlice, Callable[..., Tensor], list[Tensor]]] = []
        for spec in specs:
            for slice_ in _given(plan, spec):
                beside = [_placed(starts[slice_.parameter], slice_)] if spec.needs_initial else []
                act = partial(RESETS[spec.method].act, options=spec.options, kernel=slice_.kernel)
                self._terms.append((slice_, act, beside))

    @torch.no_grad()
    def add_(self, scale: float = 1.0) -> None:
        """Add the penalties' gradients to those that the parameters hold.

        Args:
            scale: What the gradients are multiplied by at this point: that of a `GradScaler`, or 1.

        Raises:
            UserError: The model holds another parameter than it did.
        """
        refuse_replaced(self._modules, (slice_ for slice_, *_ in self._terms))
        for slice_, act, beside in self._terms:
            if slice_.tensor.grad is None:
                slice_.tensor.grad = torch.zeros_like(slice_.tensor)
            elif slice_.tensor.grad.is_sparse:  # of an embedding; a penalty concerns each of its rows
                slice_.tensor.grad = slice_.tensor.grad.to_dense()
            held, slope = (replace(slice_, tensor=local_part(t)) for t in (slice_.tensor, slice_.tensor.grad))
            slope.write_(slope.read().add(act(held.read(), *beside), alpha=scale))


def _given(plan: Plan, spec: ResetSpec) -> list[ParameterSlice]:
    """List the slices that a penalty is given; of a parameter in shards, the parameter, if any part of it will do.

    Raises:
        UserError: A matrix has to be whole and is not.
    """
    given: list[ParameterSlice] = []
    for parameter, slices in groupby(plan.slices, attrgetter("parameter")):
        own = [(slice_, spec.why_not(slice_) is None) for slice_ in slices]
        chosen = [slice_ for slice_, wanted in own if wanted]
        if chosen and is_dtensor(chosen[0].tensor):
            if not RESETS[spec.method].elementwise or len(chosen) < len(own):
                raise UserError(
                    f"'{spec.method}' needs the matrices of '{parameter}' whole, and FSDP2 shards them: train replicas"
                )
            chosen = [replace(chosen[0], spec=None)]
        given += chosen
    return given


def _placed(whole: Tensor, slice_: ParameterSlice) -> Tensor:
    """Return the part of a whole parameter that a slice stands for, where and as the slice is."""
    if is_dtensor(slice_.tensor):
        return local_part(placed_like(slice_.tensor, whole.detach()))
    return replace(slice_, tensor=whole).read().to(slice_.tensor, copy=True)  # `initial` may be the model itself
