"""Apply resets to a model in memory, wherever its parameters live."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from fire_llm.architectures.modules import Kernels, ModuleLayout, SplitLike
from fire_llm.architectures.names import plain_parameters, unwrap
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.distributed import AGREE_SECONDS, is_first, optimizer_states, together
from fire_llm.resets.execute import ResetExecutor
from fire_llm.resets.methods import ComputeDtype, Scale, Solver, Strength
from fire_llm.resets.norms import newly_drawn, norm_warning
from fire_llm.resets.plan import Plan
from fire_llm.resets.report import ResetReport, Spectra
from fire_llm.resets.spec import ResetsLike, parse_resets

LayoutName = Literal["transformers", "modules"]
LAYOUTS = ("transformers", "modules")
"""Where the matrices of a model are found: in the tables of transformers' language models, or by kinds of modules."""


@torch.no_grad()
def apply_reset(
    model: nn.Module,
    resets: ResetsLike,
    *,
    initial: nn.Module | None = None,
    optimizer: Any = None,
    spectra: Spectra = False,
    progress: bool = False,
    process_group: Any = None,
    timeout: float = AGREE_SECONDS,
    layout: LayoutName = "transformers",
    split: SplitLike | None = None,
    kernels: Kernels = "positions",
    **options: Any,
) -> ResetReport:
    """Apply one reset, or several in order, to a model in place.

    Nothing is changed unless everything can be: names, roles, initial weights and finiteness are checked first.
    Under torch.distributed this is collective: every rank calls it, replicas share the work where that pays and end
    bitwise equal, and FSDP2's shards keep their placements; each rank works on a bounded share of rows at a time.

    Args:
        model: Any causal LM whose layout is known, or any torch module (see `layout`); wrapped by DDP or
            `torch.compile`, or sharded by FSDP2, is fine.
        resets: A method's name, `{"method": …, option: …}`, or a list of these, each with the roles it acts on.
        initial: The same architecture with the run's initial weights, whole on every rank; wanted by `full_reset` and
            `shrink_perturb`. (`dash` wants gradients: those that the parameters hold, the same on every rank.)
        optimizer: Its state of exactly the touched parameters is cleared, behind wrappers too; several as a list.
        spectra: Also report quantiles of the singular values (an eigendecomposition a matrix), or only their `range`.
        progress: Show a progress bar.
        process_group: Ranks that hold this model, None for all; give one where ranks hold different layers. What a
            pattern or a number of a layer does not find here is then taken to be elsewhere.
        timeout: Seconds that a rank waits for the others to call it too.
        layout: `transformers` looks the weights of a language model up in tables. `modules` takes every Linear,
            convolution and MultiheadAttention of any torch module as matrices, and knows the paper's presets by name
            (docs/modules.md).
        split: With `modules`, weights that hold several matrices: {regular expression of names: parts}, such as
            `{"qkv": ("q", "k", "v")}`.
        kernels: With `modules`, whether a convolution is one matrix at each of the `positions` of its kernel, as in the
            paper, or one `flattened`, (out, in · positions).
        **options: Options of the method, where `resets` is its name: `apply_reset(model, "fire", iterations=10)`.

    Returns:
        What was touched, what was left and why; the same on every rank, but for measures of what was left in shards,
        and for the count of states that a `ZeroRedundancyOptimizer` divides among the ranks.

    Raises:
        UserError: For an unknown reset, option, role or architecture, an option that is not read, a pattern or a layer
            that finds nothing, a method that acts during training, missing or
            unlike initial weights, missing or sharded gradients, a tensor that is not finite, parameters that are
            frozen or out of reach (FSDP1, DeepSpeed), or a rank that did not come. On every rank alike.
        RuntimeError: Where a result is not finite (those tensors are as they were), or a reset failed on another rank.
    """

    def make() -> Plan:
        module_cut = module_layout(layout, split, kernels)
        specs = parse_resets(resets, options, modules=module_cut is not None)
        return Plan.make(model, specs, initial, optimizer, whole=process_group is None, layout=module_cut)

    plan = together(process_group, make, Plan.request, timeout)
    if plan.fused and is_first():
        warnings.warn(
            f"{', '.join(plan.fused[:3])}{', …' if len(plan.fused) > 3 else ''}: taken as one matrix each. If they "
            "hold several, as their names say, name the parts, such as split={'qkv': ('q', 'k', 'v')}",
            stacklevel=3,
        )
    executor = ResetExecutor(plan, spectra)
    began = time.perf_counter()
    shared = executor.run(process_group, progress)
    seconds = time.perf_counter() - began - executor.measuring
    if shared > 1:
        executor.join(process_group)
    report = executor.report(seconds, shared)
    report.optimizer_states_cleared = clear_states(model, optimizer, report)
    return report


def module_layout(layout: str, split: SplitLike | None, kernels: str) -> ModuleLayout | None:
    """Return how any torch module is cut into matrices; None where the tables say it.

    Raises:
        UserError: The layout is unknown, or one option is not read with it.
    """
    if layout not in LAYOUTS:
        raise UserError(
            f"layout: {layout!r} is not allowed.{did_you_mean(layout, LAYOUTS)} Give {' or '.join(LAYOUTS)}"
        )
    if layout == "modules":
        return ModuleLayout.of(split, kernels)
    if split is not None or kernels != "positions":
        raise UserError(
            f"{'split' if split is not None else 'kernels'}: read with layout='modules' alone: leave it out"
        )
    return None


def clear_states(model: nn.Module, optimizer: Any, report: ResetReport) -> int:
    """Drop the optimizers' states of the touched parameters, which they make again at their next step; count them."""
    parameters, names = dict(plain_parameters(unwrap(model))), {t.parameter for t in report.touched}
    touched, states = [parameters[name] for name in names if name in parameters], optimizer_states(optimizer)
    # A buffer has no state, and a rank only its share of what replicas divide.
    return sum(any([state.pop(parameter, None) is not None for state in states]) for parameter in touched)


def fire_(
    model: nn.Module,
    *,
    iterations: int | None = None,
    solver: Solver = "newton-schulz",
    tolerance: float | None = None,
    scale: Scale = "sqrt",
    compute_dtype: ComputeDtype = None,
    strength: Strength = 1.0,
    roles: str | Iterable[str] | Mapping[str, str] | None = None,
    include: str | Iterable[str] | None = (),
    exclude: str | Iterable[str] | None = (),
    layers: str | int | None = None,
    optimizer: Any = None,
    process_group: Any = None,
    timeout: float = AGREE_SECONDS,
    layout: LayoutName = "transformers",
    split: SplitLike | None = None,
    kernels: Kernels = "positions",
) -> ResetReport:
    """Apply FIRE in place: each attention and MLP matrix of a causal LM becomes (nearly) its polar factor.

    In any other torch module, `layout="modules"`, each matrix of a Linear, a convolution and a MultiheadAttention does.

    Args:
        model: Any causal LM whose layout is known (q, k and v are separate matrices even where they are stored as one),
            or any torch module (see `layout`).
        iterations: Number of cubic Newton–Schulz steps, 5 by default: the paper's choice for language models. It takes
            10 elsewhere.
        solver: `newton-schulz`, or `polar` for the true projection to `tolerance`.
        tolerance: Largest relative Frobenius distance to the polar factor that `polar` may leave, 1e-3 by default.
        scale: `sqrt` for √(d_out/d_in), over the positions of a convolution's kernel, `keep-norm`, or `none`.
        compute_dtype: Precision of the matrix products; the iterate stays in fp32.
        strength: How far to go, from 0 to 1: (1−c)·W + c·FIRE(W).
        roles: Which matrices, attention and mlp by default; add `lm_head` (and with it a tied embedding) to mirror the
            paper's code. With `modules`: some of linear, conv, attention and recurrent, all by default, or roles of
            your own with regular expressions of names, `{"attention": "attn.(q|k)"}`.
        include: Regular expressions, looked for anywhere in a name: what none of them finds is left alone.
        exclude: Regular expressions of names to leave alone.
        layers: Act on these layers alone: 4, "4-11" or "0-3,8", counted from 0.
        optimizer: See `apply_reset`.
        process_group: See `apply_reset`; under torch.distributed every rank calls this.
        timeout: See `apply_reset`.
        layout: See `apply_reset`, like the next two.
        split: Weights that hold several matrices.
        kernels: What a convolution is.

    Warns:
        UserWarning: The norm of all touched matrices of a language model together falls or grows by more than half, and
            they are not as their initialisation drew them. Or a Linear of another module is named like several
            matrices in one, and `split` does not say which.

    Raises:
        UserError, RuntimeError: See `apply_reset`.

    Source: arXiv 2602.08040.
    """
    options = {
        "iterations": iterations,
        "solver": solver,
        "tolerance": tolerance,
        "scale": scale,
        "compute_dtype": compute_dtype,
        "strength": strength,
        "roles": _listed(roles),
        "include": _listed(include),
        "exclude": _listed(exclude),
        "layers": layers,
    }
    report = apply_reset(
        model,
        {"method": "fire", **{key: value for key, value in options.items() if value is not None}},
        optimizer=optimizer,
        process_group=process_group,
        timeout=timeout,
        layout=layout,
        split=split,
        kernels=kernels,
    )
    if layout == "modules":  # the bounds of the warning are those of language models
        return report
    warning = norm_warning(report.resets, report.touched)
    if warning is not None and is_first() and not newly_drawn(getattr(unwrap(model), "config", None), report):
        warnings.warn(warning, stacklevel=2)
    return report


def _listed(value: Any) -> Any:
    """Return a text or an iterable as a tuple, and anything else as it is."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, Mapping) else value
