"""The registry and the resets in it: functions of one tensor, tensor in, tensor out.

To add a reset, add a function here; its keyword-only arguments are the options a recipe may give. What acts during a
whole phase rather than before it stands in the same registry, from `penalties` and `recycling`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor
from torch.nn.functional import normalize

from fire_llm.architectures.matrices import MATRIX_ROLES, ROLES
from fire_llm.linalg.newton_schulz import newton_schulz, newton_schulz_factor
from fire_llm.linalg.polar import polar
from fire_llm.resets.conditions import When

Buffers = Literal["none", "floats", "all"]
Kind = Literal["transition", "penalty", "recycling"]
"""How a method acts: once on the weights, on the gradients of every step, or on the hidden units while training."""


@dataclass(frozen=True)
class ReadWhen:
    """Mark an option, in its annotation, that is read only where another option has a certain value."""

    option: str
    value: str
    among: tuple[str, ...] = ()
    """The values of the marked option that this is true of; of all where there are none."""


@dataclass(frozen=True)
class ResetMethod:
    """One entry of the registry: a method, with its options and the roles it acts on."""

    name: str
    function: Callable[..., Any]
    """Of the kind recycling a class, else a function of one tensor."""
    roles: tuple[str, ...]
    """Roles the method acts on where a recipe names none."""
    needs_initial: bool
    """Whether the function takes the tensor's own initial value."""
    needs_gradient: bool
    """Whether the function takes the gradient of the loss over training data."""
    options: type[BaseModel]
    """The options, validated: the keyword-only arguments of the function, plus those that say what it acts on."""
    kind: Kind
    batched: bool = False
    """Whether the function also takes matrices of one shape stacked, (B, out, in)."""
    elementwise: bool = False
    """Whether a penalty looks at each element by itself, so that it may be given any part of a parameter."""
    reads: Mapping[str, ReadWhen] = field(default_factory=dict)
    """Options that are not always read, by name."""
    buffers: Buffers = "none"
    """Which buffers it acts on, beside parameters."""
    gives_grams: bool = False
    """Whether the function takes a list `grams`, for the Gram matrices that it forms on the way."""
    takes_kernels: bool = False
    """Whether the function takes `positions`, the number of matrices of a convolution's kernel, and all of them."""

    @property
    def when(self) -> Literal["transition", "training"]:
        """Return whether it acts once, between two phases, or during the whole phase."""
        return "transition" if self.kind == "transition" else "training"

    @property
    def matrices_only(self) -> bool:
        """Return whether the method is defined for (out, in) matrices alone."""
        return set(self.roles) <= set(MATRIX_ROLES)

    def ignores(self, key: str, options: Mapping[str, Any]) -> str | None:
        """Return why an option has no effect beside the others, None where it has one."""
        if self.name == "none":
            return "'none' leaves every weight as it is, whatever its options: leave it out"
        when = self.reads.get(key)
        if when is None or options[when.option] == when.value or (when.among and options[key] not in when.among):
            return None
        what = f"'{options[key]}' is" if when.among else "it is"
        return f"{what} read with {when.option} {when.value} alone, not with {options[when.option]}: leave it out"

    def act(
        self, x: Tensor, *beside: Tensor, options: Mapping[str, Any], kernel: tuple[int, ...] = (), **more: Any
    ) -> Tensor:
        """Return what the method makes of a slice.

        Args:
            x: (out, in), a parameter kept whole, or the matrices of a kernel, (K, out, in); stacks of these, (B, …),
                where the method is batched.
            *beside: Initial values or a gradient, of the shape of `x`.
            options: Of the method.
            kernel: Sizes of the kernel, () where there is none.
            **more: Further arguments, where it takes them.
        """
        if kernel and not self.takes_kernels and not self.batched:
            by_position = zip(*(tensor.unbind() for tensor in (x, *beside)), strict=True)
            return torch.stack([self.function(*tensors, **options, **more) for tensors in by_position])
        positions = {"positions": math.prod(kernel)} if kernel and self.takes_kernels else {}
        result: Tensor = self.function(x, *beside, **positions, **options, **more)
        return result

    def leaves(self, buffer: Tensor) -> str | None:
        """Return why a buffer is left alone, None where it is not."""
        if self.buffers == "none":
            return f"a buffer, and '{self.name}' acts on parameters"
        if self.buffers == "floats" and not buffer.is_floating_point():
            kind = "yes and no" if buffer.dtype == torch.bool else "complex numbers" if buffer.is_complex() else ""
            return f"a buffer of {kind or 'whole numbers'}, which '{self.name}' does not mix"
        return None


RESETS: dict[str, ResetMethod] = {}

FORMER = {"keep": "none"}
"""Names that methods had before, which recipes and scripts may still give."""


def register_reset(
    name: str,
    *,
    roles: tuple[str, ...] = ROLES,
    options_of: Callable[..., Tensor] | None = None,
    batched: bool = False,
    buffers: Buffers = "none",
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a reset: `f(w, *, option=default, …)`, `f(w, initial, *, …)` or `f(w, gradient, *, …)`.

    All tensors are of one shape, fp32 or fp64. The matrices of a convolution's kernel, one at each of its K positions,
    come one by one, or where `f` has an argument `positions` before the options, as (K, out, in) with K; it is 0 for
    one matrix.

    Args:
        name: What recipes call it.
        roles: Roles it acts on unless the recipe says otherwise; if all of them are matrix roles, the function is
            only ever given 2-D matrices oriented (out, in).
        batched: Whether `f` also takes matrices of one shape stacked, (B, out, in), which accelerators are faster at.
        options_of: A reset whose options this one takes too, as `**options`; its own are its keyword-only arguments.
        buffers: Whether `f` is also given the buffers that checkpoints hold, such as running statistics: `floats`
            those of floating-point numbers, `all` also those of whole numbers, of yes and no, and of complex numbers,
            in their own dtype.
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _register(name, function, options_of or function, roles, "transition", batched=batched, buffers=buffers)
        return function

    return add


_T = TypeVar("_T", bound=Callable[..., Any])


def register_training(
    name: str,
    *,
    roles: tuple[str, ...] = ROLES,
    kind: Literal["penalty", "recycling"],
    elementwise: bool = False,
) -> Callable[[_T], _T]:
    """Register what acts during a whole phase; an arm may list it beside resets, which come first.

    Args:
        name: What recipes call it.
        roles: Roles it acts on unless the recipe says otherwise; as in `register_reset`.
        kind: Of a penalty, `f(w, *, option=default, …)` or `f(w, initial, *, …)` returns the gradient of what is added
            to the loss, of the same shape as w. Of recycling, a class whose options are the keyword-only arguments of
            `__init__` decides which hidden units are reinitialised.
        elementwise: Whether a penalty looks at each element by itself: FSDP2's shards are then trained with it too.
    """

    def add(entry: _T) -> _T:
        _register(name, entry, entry, roles, kind, elementwise=elementwise)
        return entry

    return add


def _register(
    name: str,
    entry: Callable[..., Any],
    schema_of: Callable[..., Any],
    roles: tuple[str, ...],
    kind: Kind,
    **traits: Any,
) -> None:
    """Put an entry in the registry, its options read off the keyword-only arguments of `schema_of`.

    Args:
        name: Of the method.
        entry: What it calls.
        schema_of: Whose keyword-only arguments are the options.
        roles: Roles it acts on unless the recipe says otherwise.
        kind: How it acts.
        **traits: Further fields of `ResetMethod`.
    """
    typed: Any = schema_of.__init__ if inspect.isclass(schema_of) else schema_of
    hints = get_type_hints(typed, include_extras=True)
    options: dict[str, Any] = {
        p.name: (hints[p.name], p.default)
        for p in inspect.signature(schema_of).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    # mypy wants the literals spelt out; pydantic takes them from the tuple that is the one list of roles.
    options["roles"] = (tuple[Literal[ROLES], ...], Field(roles, min_length=1))  # type: ignore[valid-type]
    options["exclude"] = (tuple[str, ...], Field((), description="Regular expressions of parameter names to leave"))
    options["include"] = (
        tuple[str, ...],
        Field((), description="Regular expressions: act on the names they find alone"),
    )
    options["layers"] = (int | str | None, Field(None, description="Act on these layers alone: 4, 4-11 or 0-3,8"))
    if kind == "transition":
        options["when"] = (When, Field(None, description="Act where the phase before was overtrained alone"))
    reads = {
        key: mark
        for key, hint in hints.items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, ReadWhen)
    }
    schema = create_model(
        f"{name}_options", __config__=ConfigDict(extra="forbid", strict=True), __doc__=entry.__doc__, **options
    )
    taken = {p.name for p in inspect.signature(entry).parameters.values() if p.kind is not p.KEYWORD_ONLY}
    RESETS[name] = ResetMethod(
        name=name,
        function=entry,
        roles=roles,
        needs_initial="initial" in taken,
        needs_gradient="gradient" in taken,
        options=schema,
        kind=kind,
        reads=reads,
        gives_grams="grams" in taken,
        takes_kernels="positions" in taken,
        **traits,
    )


@register_reset("none")
def none(w: Tensor) -> Tensor:
    """Leave every weight as it is: the arm without a reset."""
    return w


@register_reset("full_reset", buffers="all")
def full_reset(w: Tensor, initial: Tensor) -> Tensor:
    """Return to the run's own initial weights."""
    return initial


@register_reset("shrink_perturb", buffers="floats")
def shrink_perturb(w: Tensor, initial: Tensor, *, shrink: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Tensor:
    """Shrink towards the initial weights: θ ← (1−c)·θ + c·θ₀, with c = `shrink`.

    Source: Ash & Adams, arXiv 1910.08475; c as in arXiv 2602.08040.
    """
    return torch.lerp(w, initial, shrink)


Solver = Literal["newton-schulz", "polar"]
Scale = Literal["sqrt", "keep-norm", "none"]
ComputeDtype = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"] | None,
    ReadWhen("solver", "newton-schulz", among=("float16", "bfloat16")),
]
Iterations = Annotated[int, Field(ge=0, le=1000), ReadWhen("solver", "newton-schulz")]
Tolerance = Annotated[float, Field(gt=0, le=0.1), ReadWhen("solver", "polar")]
Strength = Annotated[float, Field(ge=0, le=1)]


@register_reset("fire", roles=("attention", "mlp"), batched=True)
def fire(
    w: Tensor,
    grams: list[Tensor] | None = None,
    positions: int = 0,
    *,
    iterations: Iterations = 5,
    solver: Solver = "newton-schulz",
    tolerance: Tolerance = 1e-3,
    scale: Scale = "sqrt",
    compute_dtype: ComputeDtype = None,
    strength: Strength = 1.0,
) -> Tensor:
    """Replace a matrix by (nearly) its orthogonal polar factor.

    `solver` newton-schulz takes `iterations` cubic steps, as the paper does; polar projects truly, to `tolerance`.
    `scale` sqrt multiplies by √(d_out/d_in), keep-norm restores the Frobenius norm of w, none does neither. Of a
    convolution, w is the matrix at one of the K positions of its kernel, and sqrt is √(d_out/d_in)/K.
    With c = `strength` below 1, the result is (1−c)·w + c·fire(w), as in `shrink_perturb`.
    Source: arXiv 2602.08040, algorithm 1.
    """
    dtype = getattr(torch, compute_dtype) if compute_dtype else None
    if solver == "polar":
        x = polar(w, tolerance, compute_dtype=dtype)
    else:
        x = newton_schulz(w, iterations, compute_dtype=dtype, grams=grams)
    if scale == "sqrt":
        x = x * (math.sqrt(w.shape[-2] / w.shape[-1]) / (positions or 1))
    elif scale == "keep-norm":
        x = _with_norm(x, _norm(w))
    return x if strength == 1 else torch.lerp(w, x, strength)


def fire_by_gram(
    gram: Tensor, rows: int, *, iterations: int, scale: Scale, strength: float = 1.0, **others: Any
) -> Tensor:
    """Return P with `fire(w)` = w P for a tall w, whose rows may lie anywhere.

    Args:
        gram: (n, n) float64, wᵀ w.
        rows: Of w.
        iterations: As in `fire`; the solver is newton-schulz, and products are taken in the Gram matrix's dtype.
        scale: As in `fire`, like the next.
        strength: c: the result is (1−c)·I + c·P.
        **others: Further options of `fire`, which do not matter here.
    """
    p = newton_schulz_factor(gram, iterations)
    if scale == "sqrt":
        p = p * math.sqrt(rows / gram.shape[-1])
    elif scale == "keep-norm":
        p = p * (gram.trace() / (p @ gram @ p).trace()).sqrt()
    return p if strength == 1 else torch.lerp(torch.eye(len(p), dtype=p.dtype, device=p.device), p, strength)


@register_reset("rescale", roles=("attention", "mlp"), options_of=fire, batched=True)
def rescale(w: Tensor, positions: int = 0, **options: Any) -> Tensor:
    """Scale a matrix to the Frobenius norm that `fire` with the same options would give it; keep its direction.

    The control for FIRE: what part of its effect is the change of norm alone.
    """
    return _with_norm(w, _norm(fire(w, positions=positions, **options)))


@register_reset("flatten_spectrum", roles=("attention", "mlp"), batched=True)
def flatten_spectrum(w: Tensor, *, strength: Strength = 0.5) -> Tensor:
    """Draw the singular values towards their mean s, and keep the singular vectors: σ ← σ^(1−c)·s^c, c = `strength`.

    1 gives s times the polar factor, `fire`'s true projection at the nuclear norm of w; 0 gives w. Between them, large
    singular values fall and small ones rise by the same rule, where `fire` with a strength moves along the straight
    line. Taken by an SVD in fp64; matrices of zeros stay.
    """
    u, sigma, vh = torch.linalg.svd(w.double(), full_matrices=False)
    mean = sigma.mean(-1, keepdim=True)
    flattened: Tensor = (u * (sigma ** (1 - strength) * mean**strength).unsqueeze(-2)) @ vh
    return flattened.to(w.dtype)


@register_reset("dash", roles=("attention", "mlp"), batched=True)
def dash(
    w: Tensor,
    gradient: Tensor,
    positions: int = 0,
    *,
    floor: Annotated[float, Field(ge=0, le=1)] = 0.3,
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.3,
    batches: Annotated[int, Field(ge=1)] = 10,
) -> Tensor:
    """Shrink each row by max(λ, cos(row, −gradient)), λ = `floor`: what the data to come does not ask for is forgotten.

    A trainer gathers the gradient G ← (1−α)·G + α·g over the `batches` steps to come, before any of the arm's resets;
    with α = 0.3, 97 % of it comes from the last 10. Elsewhere it is what the parameters' `.grad` holds. Of a
    convolution, the weights from one channel to another, at all K positions of the kernel, take the place of a row.

    Source: Shin et al., arXiv 2410.23495, algorithm 1; λ and α as in the authors' code.
    """
    tiny = torch.finfo(w.dtype).tiny
    along = -3 if positions else -1
    cosine = -(normalize(w, dim=along, eps=tiny) * normalize(gradient, dim=along, eps=tiny)).sum(along, keepdim=True)
    return w * cosine.clamp(floor, 1)


@register_reset("initial_norm", roles=("attention", "mlp"))
def initial_norm(w: Tensor, initial: Tensor, *, times: Annotated[float, Field(gt=0, le=100)] = 1.0) -> Tensor:
    """Scale a matrix to `times` the Frobenius norm of its initial value; keep its direction.

    Behind `fire`, it takes the place of √(d_out/d_in), with which the norm depends on a model's width.
    """
    return _with_norm(w, times * _norm(initial))


def _norm(w: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(w, dtype=torch.float64, keepdim=True)
    return norm


def _with_norm(w: Tensor, norm: Tensor) -> Tensor:
    """Return a matrix scaled to a norm; zeros stay."""
    own_norm = _norm(w)
    return w * torch.where(own_norm > 0, norm / own_norm, 1).to(w.dtype)
