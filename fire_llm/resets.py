"""Resets: what happens to the weights between two phases.

A reset is a function of one tensor (and of that tensor at step 0): tensor in, tensor out. Where the tensors live — in
a running `Trainer`, in a checkpoint on disk, on another rank — is the business of whoever calls it, so the same
function serves them all. Its signature is its schema: the keyword-only arguments are the options a recipe may give.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor, nn

from fire_llm.errors import UserError, did_you_mean
from fire_llm.layout import MATRIX_ROLES, ROLES, LogicalMatrix, pieces, unwrap
from fire_llm.metrics import dfi, sfe
from fire_llm.orthogonal import newton_schulz, polar, singular_values

SIGMA_QUANTILES = 64
"""Number of singular values kept of each matrix's spectrum in a report, evenly spread over the ranks."""


@dataclass(frozen=True)
class ResetMethod:
    """Describe one entry of the registry."""

    name: str
    function: Callable[..., Tensor]
    roles: tuple[str, ...]
    """Roles the method acts on where a recipe names none."""
    needs_initial: bool
    """Whether the function takes the tensor's own step-0 value."""
    options: type[BaseModel]
    """The options, validated: the keyword-only arguments of the function, plus `roles` and `exclude`."""

    @property
    def matrices_only(self) -> bool:
        """Tell whether the method is defined for (out, in) matrices alone."""
        return set(self.roles) <= set(MATRIX_ROLES)


RESETS: dict[str, ResetMethod] = {}


def register_reset(name: str, *, roles: tuple[str, ...] = ROLES) -> Callable[[Callable[..., Tensor]], Callable]:
    """Register a reset: `f(w, *, option=default, …)` or `f(w, initial, *, …)`, both tensors of one shape.

    Args:
        name: What recipes call it.
        roles: Roles it acts on unless the recipe says otherwise; if all of them are matrix roles, the function is
            only ever given 2-D matrices oriented (out, in).
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        options: dict[str, Any] = {
            p.name: (hints[p.name], p.default) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        options["roles"] = (tuple[Literal[ROLES], ...], Field(roles, min_length=1))  # type: ignore[valid-type]
        options["exclude"] = (tuple[str, ...], Field((), description="Regular expressions of parameter names to leave"))
        schema = create_model(
            f"{name}_options", __config__=ConfigDict(extra="forbid", strict=True), __doc__=function.__doc__, **options
        )
        RESETS[name] = ResetMethod(name, function, roles, "initial" in hints, schema)
        return function

    return add


@register_reset("keep")
def keep(w: Tensor) -> Tensor:
    """Leave every weight as it is: the arm without a reset."""
    return w


@register_reset("full_reset")
def full_reset(w: Tensor, initial: Tensor) -> Tensor:
    """Return to the run's own step-0 weights."""
    return initial


@register_reset("shrink_perturb")
def shrink_perturb(w: Tensor, initial: Tensor, *, shrink: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Tensor:
    """Shrink towards the step-0 weights: θ ← (1−c)·θ + c·θ₀, with c = `shrink`.

    Source: Ash & Adams, arXiv 1910.08475; c as in arXiv 2602.08040.
    """
    return torch.lerp(w.float(), initial.float(), shrink)


Solver = Literal["newton-schulz", "polar"]
Scale = Literal["sqrt", "keep-norm", "none"]
ComputeDtype = Literal["float64", "float32", "float16", "bfloat16"] | None
Iterations = Annotated[int, Field(ge=0, le=1000)]
Tolerance = Annotated[float, Field(gt=0, le=0.1)]


@register_reset("fire", roles=("attention", "mlp"))
def fire(
    w: Tensor,
    *,
    iterations: Iterations = 5,
    solver: Solver = "newton-schulz",
    tolerance: Tolerance = 1e-3,
    scale: Scale = "sqrt",
    compute_dtype: ComputeDtype = None,
) -> Tensor:
    """Replace a matrix by (nearly) its orthogonal polar factor.

    `solver` newton-schulz takes `iterations` cubic steps, as the paper does; polar projects truly, to `tolerance`.
    `scale` sqrt multiplies by √(d_out/d_in), keep-norm restores the Frobenius norm of w, none does neither.
    Source: arXiv 2602.08040, algorithm 1.
    """
    dtype = getattr(torch, compute_dtype) if compute_dtype else None
    if solver == "polar":
        x = polar(w, tolerance, compute_dtype=dtype)
    else:
        x = newton_schulz(w, iterations, compute_dtype=dtype)
    if scale == "sqrt":
        return x * math.sqrt(w.shape[-2] / w.shape[-1])
    return _with_norm(x, _norm(w)) if scale == "keep-norm" else x


@register_reset("rescale", roles=("attention", "mlp"))
def rescale(
    w: Tensor,
    *,
    iterations: Iterations = 5,
    solver: Solver = "newton-schulz",
    tolerance: Tolerance = 1e-3,
    scale: Scale = "sqrt",
    compute_dtype: ComputeDtype = None,
) -> Tensor:
    """Give a matrix the Frobenius norm that `fire` with the same options would, and keep its direction.

    The control that tells what of FIRE's effect is the change of norm alone.
    """
    target = fire(
        w, iterations=iterations, solver=solver, tolerance=tolerance, scale=scale, compute_dtype=compute_dtype
    )
    return _with_norm(w, _norm(target))


def _norm(w: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(w, dtype=torch.float64)


def _with_norm(w: Tensor, norm: Tensor) -> Tensor:
    own = _norm(w)
    return w * (norm / own).to(w.dtype) if own > 0 else w


@dataclass(frozen=True)
class ResetSpec:
    """Hold one reset with its options filled in and its roles decided."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] = ROLES
    exclude: tuple[str, ...] = ()

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any] | ResetSpec) -> ResetSpec:
        """Read `"fire"` or `{"method": "fire", "iterations": 5, "roles": [...]}`.

        Raises:
            UserError: With every fault, one a line, each as `key: what is wrong`.
        """
        if isinstance(spec, ResetSpec):
            return spec
        faults, parsed = cls.check(spec)
        if parsed is None:
            raise UserError("\n".join(f"{key}: {message}" for key, message in faults))
        return parsed

    @classmethod
    def check(cls, spec: str | Mapping[str, Any]) -> tuple[list[tuple[str, str]], ResetSpec | None]:
        """Return the faults as (key, message) pairs, and the spec where there are none."""
        given = {"method": spec} if isinstance(spec, str) else dict(spec)
        name = given.pop("method", None)
        if name is None:
            return [("method", f"missing; one of {', '.join(RESETS)}")], None
        if name not in RESETS:
            return [("method", f"unknown reset '{name}'.{did_you_mean(name, RESETS)} Known: {', '.join(RESETS)}")], None
        method = RESETS[name]
        try:
            # Lists are what YAML and JSON have; the schema's tuples are strict.
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            options = method.options.model_validate(given).model_dump()
        except ValidationError as error:
            return list(dict(_fault(e, method) for e in error.errors()).items()), None
        roles, exclude = options.pop("roles"), options.pop("exclude")
        faults = [("exclude", f"'{e}' is not a regular expression") for e in exclude if not _compiles(e)]
        wrong = [r for r in roles if r not in MATRIX_ROLES]
        if method.matrices_only and wrong:
            allowed = ", ".join(MATRIX_ROLES)
            faults.append(("roles", f"'{name}' acts on matrices ({allowed}); {', '.join(wrong)} are not. Remove them"))
        return faults, None if faults else cls(name, options, roles, exclude)

    def why_not(self, piece: LogicalMatrix) -> str | None:
        """Return why this reset leaves a piece alone, or None where it acts."""
        if self.method == "keep":
            return "the reset is keep"
        if not piece.roles & set(self.roles):
            return f"role {'/'.join(sorted(piece.roles))} is not among {', '.join(self.roles)}"
        pattern = next((e for e in self.exclude if re.search(e, piece.name)), None)
        return f"excluded by '{pattern}'" if pattern is not None else None

    def label(self) -> str:
        """Say the reset in one line: `fire, iterations 5, roles attention mlp`."""
        method = RESETS[self.method]
        defaults = method.options()
        shown = [
            f"{k} {v}" for k, v in self.options.items() if v != getattr(defaults, k) or k in ("iterations", "shrink")
        ]
        if self.options.get("solver") == "polar":
            shown = [s for s in shown if not s.startswith("iterations")] + [f"tolerance {self.options['tolerance']:g}"]
        if self.roles != ROLES:
            shown.append(f"roles {' '.join(self.roles)}")
        return ", ".join([self.method, *shown])


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _fault(error: Any, method: ResetMethod) -> tuple[str, str]:
    """Say one pydantic error in our words."""
    loc = [str(part) for part in error["loc"]]
    key, value = ".".join(loc), error["input"]
    allowed = [*method.options.model_fields, "method"]
    if error["type"] == "extra_forbidden":
        return key, f"unknown option of '{method.name}'.{did_you_mean(key, allowed)} Known: {', '.join(allowed)}"
    if loc[0] == "roles":
        return "roles", f"unknown role {value!r}.{did_you_mean(str(value), ROLES)} Known: {', '.join(ROLES)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return key, f"{value!r} is not allowed: {message}"


@dataclass
class TensorReport:
    """Tell what became of one logical matrix or parameter."""

    name: str
    parameter: str
    part: str
    role: str
    shape: list[int]
    reason: str | None = None
    """Why it was left alone; None where it was touched."""
    sfe: float = 0.0
    """Squared Frobenius distance between before and after."""
    dfi_before: float | None = None
    dfi_after: float | None = None
    norm_before: float | None = None
    norm_after: float | None = None
    sigma_before: list[float] | None = None
    sigma_after: list[float] | None = None


@dataclass
class ResetReport:
    """Tell what a reset touched, what it left and why."""

    resets: list[ResetSpec]
    touched: list[TensorReport]
    untouched: list[TensorReport]
    seconds: float
    """Time of the reset itself, without the measuring before and after."""
    optimizer_states_cleared: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data (see docs/results-schema.md)."""
        return asdict(self)

    def __str__(self) -> str:
        """Say in two lines what was done."""
        matrices = [t for t in self.touched if t.dfi_after is not None]
        left = ", ".join(sorted({t.role for t in self.untouched})) or "nothing"
        return (
            f"{'; '.join(r.label() for r in self.resets)}: "
            f"{len(self.touched)} tensors touched ({len(matrices)} matrices) in {self.seconds:.2f} s; SFE {sum(t.sfe for t in self.touched):.4g}; "
            f"{len(self.untouched)} left alone ({left}); {self.optimizer_states_cleared} optimizer states cleared"
        )


ResetsLike = str | Mapping[str, Any] | ResetSpec | Iterable["str | Mapping[str, Any] | ResetSpec"]


def parse_resets(resets: ResetsLike) -> list[ResetSpec]:
    """Read one reset or a list of them."""
    many = [resets] if isinstance(resets, str | Mapping | ResetSpec) else list(resets)
    return [ResetSpec.parse(r) for r in many]


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
        report = _describe(piece, before, spectra)
        if not todo:
            report.reason = "; ".join(dict.fromkeys(str(s.why_not(piece)) for s in specs))
            untouched.append(report)
            continue
        before = before.clone()
        began = time.perf_counter()
        x = before
        for spec in todo:
            method = RESETS[spec.method]
            arguments = (start[piece.name].read().to(x.device),) if method.needs_initial else ()
            x = method.function(x, *arguments, **spec.options)
        piece.write_(x)
        seconds += time.perf_counter() - began
        after = piece.read()
        later = _describe(piece, after, spectra)
        report.sfe = sfe(before, after)
        report.dfi_after, report.norm_after, report.sigma_after = later.dfi_after, later.norm_after, later.sigma_after
        touched.append(report)
    cleared = _clear_states(model, optimizer, {t.parameter for t in touched})
    return ResetReport(specs, touched, untouched, seconds, cleared)


def _initial_pieces(specs: list[ResetSpec], initial: nn.Module | None, by_role: bool) -> dict[str, LogicalMatrix]:
    wanting = [s.method for s in specs if RESETS[s.method].needs_initial]
    if not wanting:
        return {}
    if initial is None:
        raise UserError(f"'{wanting[0]}' needs the run's step-0 weights: give `initial` (on the command line, --init)")
    return {p.name: p for p in pieces(initial, strict=by_role)}


def _describe(piece: LogicalMatrix, tensor: Tensor, spectra: bool) -> TensorReport:
    """Measure a piece as it is now; before and after are the same until something touches it."""
    role = "lm_head" if "lm_head" in piece.roles else min(piece.roles)
    report = TensorReport(piece.name, piece.parameter, piece.part, role, list(tensor.shape))
    report.norm_before = report.norm_after = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if piece.matrix:
        report.dfi_before = report.dfi_after = dfi(tensor)
        if spectra:
            sigma = singular_values(tensor)
            at = torch.linspace(0, len(sigma) - 1, min(SIGMA_QUANTILES, len(sigma))).round().long()
            report.sigma_before = report.sigma_after = [float(s) for s in sigma[at]]
    return report


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
