"""Measure a loss around a point: the norm of its gradient, the eigenvalue of its Hessian with the largest magnitude.

A vector here is a list of tensors, one a parameter, of the parameters' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fire_llm.core.errors import UserError

Loss = Callable[[], Tensor | Iterable[Tensor]]
"""Computes the loss from the parameters: a scalar, or parts that sum to it, each made when the one before is done with,
so that memory holds the graph of one part."""

Vector = list[Tensor]

_REMEDY = "Use plain operations, or do without the Hessian"
_ASYMMETRY = 1e-3  # share by which u'Hv and v'Hu may differ; 1e-7 to 1e-8 was measured in fp32
_SPREAD = 1e-2  # sine of the angle between two iterates below which they span a line rather than a plane


@dataclass(frozen=True)
class TopEigenvalue:
    """Hold an estimate of the eigenvalue with the largest magnitude."""

    value: float
    """With its sign."""
    residual: float
    """||H x - value x|| of the unit vector x found: some eigenvalue of H lies within it of the value."""
    iterations: int
    """Products with the Hessian."""
    converged: bool
    """Whether the residual fell below the tolerance."""


def gradient_norm(loss: Loss, parameters: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of the gradient over all parameters; `.grad` is left alone.

    Args:
        loss: See `Loss`.
        parameters: Tensors that require gradients.

    Raises:
        UserError: There is no parameter, or the gradient is not finite.
    """
    tensors = _checked(parameters)
    total = [torch.zeros_like(p, requires_grad=False) for p in tensors]
    for part in _parts(loss):
        for sums, gradient in zip(total, torch.autograd.grad(part, tensors, materialize_grads=True), strict=True):
            sums += gradient
    return math.sqrt(_finite(_dot(total, total), "gradient"))


def top_hessian_eigenvalue(
    loss: Loss, parameters: Iterable[Tensor], iterations: int = 50, tolerance: float = 1e-2, seed: int = 0
) -> TopEigenvalue:
    """Estimate the eigenvalue of the loss's Hessian with the largest magnitude, by power iteration.

    Each iteration is a product with the Hessian: the derivative of the gradient along a vector. The estimate is the
    better of the two Ritz values of the last two iterates, so that a pair of opposite eigenvalues +-a, between which
    power iteration alone would swing for ever, is found too. Memory: three vectors, the gradient, and the graph of one
    part of the loss.

    Args:
        loss: See `Loss`; every operation in it must have a second derivative. It must give the same value each time.
        parameters: float32 or float64 tensors that require gradients; their `.grad` is left alone.
        iterations: Most products.
        tolerance: Stop where the residual is at most this share of the eigenvalue. The error of the eigenvalue is at
            most the residual, and about its square over the gap to the next one where there is a gap.
        seed: Of the normal vector that it starts from.

    Raises:
        UserError: There is no parameter, one is coarser than float32, `iterations` is not positive, an operation has no
            second derivative (the Hessian is then not symmetric, where torch says nothing), or it is not finite.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994; Rayleigh-Ritz on a plane.
    """
    tensors = _checked(parameters)
    if iterations < 1:
        raise UserError(f"iterations: {iterations} products with the Hessian find nothing; give 1 or more")
    if coarse := [p.dtype for p in tensors if p.element_size() < 4]:
        name = str(coarse[0]).removeprefix("torch.")
        raise UserError(f"parameters are {name}, too coarse for second derivatives: give float32 copies of them")
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=generator).to(p) for p in tensors]
    _scale(v, 1 / math.sqrt(_dot(v, v)))
    previous: Vector | None = None
    length = 0.0
    for count in range(1, iterations + 1):
        hv = _product(loss, tensors, v)
        pairs = [(v, hv), (hv, hv)] + ([(previous, hv), (previous, v)] if previous is not None else [])
        quotient, square, *across = _dots(pairs)
        # x = a v + b previous is a unit vector; H previous = length * v, by how v came about.
        value, a, b = quotient, 1.0, 0.0
        if previous is not None:
            _check_symmetry(across[0], length)
            cosine = max(-1.0, min(1.0, across[1]))
            value, a, b = _ritz(quotient, cosine, length)
        residual = math.sqrt(_squared_residual(v, hv, previous, value, a, b, length))
        length = math.sqrt(_finite(square, "Hessian"))
        if residual <= tolerance * abs(value):
            return TopEigenvalue(value, residual, count, True)
        previous, v = v, hv
        _scale(v, 1 / length)
    return TopEigenvalue(value, residual, iterations, False)


def _check_symmetry(across: float, back: float) -> None:
    """Compare u'Hv with v'Hu: what has no second derivative may drop out of both without an error, but not alike."""
    if abs(across - back) > _ASYMMETRY * max(abs(across), abs(back)):
        raise UserError(
            f"the Hessian is not symmetric, {across:.4g} one way and {back:.4g} the other: some operation, a fused "
            f"kernel perhaps, has no second derivative. {_REMEDY}"
        )


def _ritz(quotient: float, cosine: float, length: float) -> tuple[float, float, float]:
    """Return the Ritz value of the largest magnitude on the plane of two iterates, and its vector's coordinates.

    With v and u = `previous`, and H u = length v, all that a 2 x 2 problem needs is v'Hv (the quotient) and u'v.
    """
    sine = math.sqrt(1 - cosine**2)
    if sine < _SPREAD:
        return quotient, 1.0, 0.0
    # On the orthonormal basis v, w = (u - cosine v) / sine.
    cross = (length - cosine * quotient) / sine
    corner = cosine * (cosine * quotient - length) / sine**2
    middle, half = (quotient + corner) / 2, (quotient - corner) / 2
    value = middle + math.copysign(math.hypot(half, cross), middle)
    # Either row of (A - value) gives the eigenvector; the larger one is the more exact.
    along_v, along_w = max((cross, value - quotient), (value - corner, cross), key=lambda pair: math.hypot(*pair))
    norm = math.hypot(along_v, along_w)
    along_v, along_w = along_v / norm, along_w / norm
    return value, along_v - along_w * cosine / sine, along_w / sine


def _squared_residual(
    v: Vector, hv: Vector, previous: Vector | None, value: float, a: float, b: float, length: float
) -> float:
    """Return ||H x - value x||^2 of x = a v + b previous; of v alone, where there is no previous one."""
    total = torch.zeros((), dtype=torch.float64, device=v[0].device)
    for i, (component, product) in enumerate(zip(v, hv, strict=True)):
        gap = a * product + (b * length - value * a) * component
        if previous is not None:
            gap -= value * b * previous[i]
        total += gap.detach().double().square_().sum().to(total.device)
    return float(total)


def _product(loss: Loss, parameters: Sequence[Tensor], vector: Vector) -> Vector:
    """Return the Hessian times a vector, part by part of the loss."""
    total = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    for part in _parts(loss):
        gradients = torch.autograd.grad(part, parameters, create_graph=True, materialize_grads=True)
        # What the loss is linear in has a gradient that depends on nothing.
        pairs = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
        if pairs:
            outputs, weights = zip(*pairs, strict=True)
            try:
                second = torch.autograd.grad(outputs, parameters, weights, materialize_grads=True)
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                raise UserError(f"no second derivative: {error}. {_REMEDY}") from None
            for sums, product in zip(total, second, strict=True):
                sums += product
    return total


def _parts(loss: Loss) -> Iterable[Tensor]:
    value = loss()
    return (value,) if isinstance(value, Tensor) else value


def _checked(parameters: Iterable[Tensor]) -> list[Tensor]:
    tensors = list(parameters)
    if not tensors or not all(p.requires_grad for p in tensors):
        raise UserError("parameters: give at least one tensor, and only such as require gradients")
    return tensors


def _dot(a: Vector, b: Vector) -> float:
    return _dots([(a, b)])[0]


def _dots(pairs: Sequence[tuple[Vector, Vector]]) -> list[float]:
    """Return inner products, and wait for the device once for all of them."""
    totals = torch.zeros(len(pairs), dtype=torch.float64, device=pairs[0][0][0].device)
    for total, (a, b) in zip(totals, pairs, strict=True):
        for x, y in zip(a, b, strict=True):
            total += torch.sum(x.detach() * y.detach(), dtype=torch.float64).to(total.device)
    values: list[float] = totals.tolist()
    return values


def _scale(vector: Vector, factor: float) -> None:
    for tensor in vector:
        tensor.mul_(factor)


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise UserError(f"the {what} is not finite on this sample: the weights hold NaN or infinity, or overflow")
    return value
