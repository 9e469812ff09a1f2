"""Apply resets to a model in memory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fire_llm.errors import UserError
from fire_llm.layout import ROLES, LogicalMatrix, pieces, unwrap
from fire_llm.metrics import sfe
from fire_llm.resets.methods import RESETS, ComputeDtype, Scale, Solver
from fire_llm.resets.report import ResetReport, TensorReport, describe
from fire_llm.resets.spec import ResetsLike, ResetSpec, parse_resets


@torch.no_grad()
def apply_reset(
    model: nn.Module,
    resets: ResetsLike,
    *,
    initial: nn.Module | None = None,
    optimizer: Any = None,
    spectra: bool = False,
    progress: bool = False,
) -> ResetReport:
    """Apply one reset, or several in order, to a model in place.

    Nothing is changed unless everything can be: names, roles, step-0 weights and finiteness are checked first.

    Args:
        model: Any causal LM whose layout is known; wrapped by DDP or `torch.compile` is fine.
        resets: A method's name, `{"method": …, option: …}`, or a list of these, each with the roles it acts on.
        initial: The same architecture with the run's step-0 weights; wanted by `full_reset` and `shrink_perturb`.
        optimizer: Its state of exactly the touched parameters is cleared.
        spectra: Also report quantiles of the singular values (an eigendecomposition a matrix).
        progress: Show a progress bar.

    Raises:
        UserError: For an unknown reset, option, role or architecture, missing or unlike step-0 weights, or a tensor
            that is not finite.
    """
    specs = parse_resets(resets)
    by_role = any(set(s.roles) != set(ROLES) for s in specs)
    cut = pieces(model, strict=by_role)
    plan = [(p, [s for s in specs if s.why_not(p) is None]) for p in cut]
    start = _initial_pieces(specs, initial, by_role)
    for piece, todo in plan:
        if not todo:
            continue
        tensor = piece.read()
        if tensor.is_meta:
            raise UserError(f"'{piece.name}' is on the meta device: load the weights before a reset")
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"'{piece.name}' holds NaN or infinity: a reset would spread it. Start from a sound checkpoint"
            )
        if start and (piece.name not in start or start[piece.name].shape != piece.shape):
            raise UserError(
                f"the step-0 weights hold no '{piece.name}' of shape {tuple(piece.shape)}: another architecture"
            )

    touched: list[TensorReport] = []
    untouched: list[TensorReport] = []
    seconds = 0.0
    if progress:
        from tqdm.auto import tqdm

        plan = tqdm(plan, desc="reset", unit="tensor", leave=False)
    for piece, todo in plan:
        before = piece.read()
        report = describe(piece, before, spectra)
        if not todo:
            report.reason = "; ".join(dict.fromkeys(str(s.why_not(piece)) for s in specs))
            untouched.append(report)
            continue
        before = before.clone()
        began = time.perf_counter()
        x = before.to(torch.promote_types(before.dtype, torch.float32))  # rounded once, when it is written
        for spec in todo:
            arguments = (start[piece.name].read().to(x),) if spec.needs_initial else ()
            x = RESETS[spec.method].function(x, *arguments, **spec.options)
        piece.write_(x)
        seconds += time.perf_counter() - began
        after = piece.read()
        later = describe(piece, after, spectra)
        report.sfe = sfe(before, after)
        report.dfi_after, report.norm_after, report.sigma_after = later.dfi_after, later.norm_after, later.sigma_after
        touched.append(report)
    cleared = _clear_states(model, optimizer, {t.parameter for t in touched})
    return ResetReport(specs, touched, untouched, seconds, cleared)


def _initial_pieces(specs: list[ResetSpec], initial: nn.Module | None, by_role: bool) -> dict[str, LogicalMatrix]:
    wanting = [s.method for s in specs if s.needs_initial]
    if not wanting:
        return {}
    if initial is None:
        raise UserError(f"'{wanting[0]}' needs the run's step-0 weights: give `initial` (on the command line, --init)")
    return {p.name: p for p in pieces(initial, strict=by_role)}


def _clear_states(model: nn.Module, optimizer: Any, names: set[str]) -> int:
    """Drop the optimizer's state of the named parameters; it is made anew at their next step."""
    if optimizer is None:
        return 0
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    return sum(optimizer.state.pop(parameters[name], None) is not None for name in names)


def fire_(
    model: nn.Module,
    *,
    iterations: int = 5,
    solver: Solver = "newton-schulz",
    tolerance: float = 1e-3,
    scale: Scale = "sqrt",
    compute_dtype: ComputeDtype = None,
    roles: Iterable[str] = ("attention", "mlp"),
    exclude: Iterable[str] = (),
    optimizer: Any = None,
) -> ResetReport:
    """Apply FIRE to a causal LM in place: each attention and MLP matrix becomes (nearly) its polar factor.

    Args:
        model: Any causal LM whose layout is known (q, k and v are told apart even where they are stored as one).
        iterations: Number of cubic Newton–Schulz steps; 5 is the paper's choice for language models.
        solver: `newton-schulz`, or `polar` for the true projection to `tolerance`.
        tolerance: Largest relative Frobenius distance to the polar factor that `polar` may leave.
        scale: `sqrt` for √(d_out/d_in), `keep-norm`, or `none`.
        compute_dtype: Precision of the matrix products; the iterate stays in fp32.
        roles: Which matrices; add `lm_head` (and with it a tied embedding) to mirror the paper's code.
        exclude: Regular expressions of names to leave alone.
        optimizer: Its state of exactly the touched parameters is cleared.

    Raises:
        UserError: See `apply_reset`.

    Source: arXiv 2602.08040.
    """
    options = {"iterations": iterations, "solver": solver, "tolerance": tolerance, "scale": scale}
    spec = {
        "method": "fire",
        **options,
        "compute_dtype": compute_dtype,
        "roles": tuple(roles),
        "exclude": tuple(exclude),
    }
    return apply_reset(model, spec, optimizer=optimizer)
