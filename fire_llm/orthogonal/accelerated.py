"""The maps of stacks on accelerators: products of 16-bit operands, one wait of the host for a stack.

Shapes: (B = batch, n = short side, m = long side), n <= m. Nothing here takes a decision from a value on the device but
what `tolist` fetches, once for all matrices of a stack, and each matrix is decided on by its own values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fire_llm.orthogonal.products import accumulates, positive

Operand = tuple[Tensor, ...]
"""A matrix as a product reads it: itself, rounded to 16 bits, or two fp16 parts whose difference holds 22 bits."""

SPLIT_SCALE = 256.0  # of entries of order 1, so that fp16 holds their second parts as normal numbers
SPLIT_ROUNDING = 4e-6  # of a product of split operands; its sums, which tensor cores cut rather than round, included
SPLIT_DEPTH = 2048  # longest sum within a tensor core, for the same reason; longer ones are put together in fp32
LARGEST_NORM, LEAST_NORM = 2.0**60, 2.0**-40  # within, no square overflows in fp32, and none that counts underflows
LOW_PRECISION_SHARE = 0.07  # largest correction, relative to what it corrects, that is computed in low precision
REST_SCALE = 16.0  # keeps the last operand of the paper's map within fp16
PROBES = 8
FLOOR, RARE = 1e-4, 0.03  # what `projection.COMPOSITION` takes to 1; share of Gaussian squares that may be below it
LONE = 3.0  # a lone small singular value may be off by a third of `SPLIT_ROUNDING`, over it, and the mean hides it
WELL_CONDITIONED = 10.0  # what rounding costs a matrix of condition 1, in units of `SPLIT_ROUNDING`


def operand(x: Tensor, dtype: torch.dtype) -> Operand:
    """Round to the dtype of a product's operands."""
    return (x.to(dtype),)


def split(x: Tensor) -> Operand:
    """Return fp16 tensors h and l with h - l = `SPLIT_SCALE` x to 22 bits, for x of entries below 255."""
    high, low = (torch.empty_like(x, dtype=torch.float16) for _ in range(2))
    torch.mul(x, SPLIT_SCALE, out=high)
    return high, torch.sub(high, x, alpha=SPLIT_SCALE, out=low)  # in fp32, where both are exact


def transposed(a: Operand) -> Operand:
    return tuple(part.mT for part in a)


def accumulate(out: Tensor, a: Operand, b: Operand, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Set out = beta out + alpha a b, and return it; of split operands the three products that count are taken."""
    if len(a) > 1:
        alpha /= SPLIT_SCALE**2
        depth = range(0, a[0].shape[-1], SPLIT_DEPTH)
        for one, other in ((a[1], b[0]), (a[0], b[1])):
            _multiply(out, one, other, -alpha, beta)
            beta = 1.0
    else:
        depth = range(0, a[0].shape[-1], a[0].shape[-1])
    for k in depth:
        _multiply(out, a[0][..., k : k + depth.step], b[0][..., k : k + depth.step, :], alpha, beta)
        beta = 1.0
    return out


def _multiply(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    if a.dtype == out.dtype:
        torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif accumulates(a.device.type, a.dtype):
        torch.baddbmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        torch.baddbmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)


def square_of(a: Operand, b: Operand, dtype: torch.dtype = torch.float32, alpha: float = 1.0) -> Tensor:
    """Return alpha a b (B, n, n) in a new tensor."""
    out = a[0].new_empty((len(a[0]), a[0].shape[-2], b[0].shape[-1]), dtype=dtype)
    return accumulate(out, a, b, alpha=alpha, beta=0.0)


def norms(x: Tensor) -> Tensor:
    """Return Frobenius norms (B,) in fp64 of fp32 matrices read once: rows in fp32, which are put together in fp64."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1).double(), dim=-1)


def positions(at: list[int], like: Tensor) -> Tensor:
    """Return indices on the device of a tensor, without waiting for it."""
    return torch.tensor(at).to(like.device, non_blocking=True)


def within(found: list[float]) -> bool:
    """Tell whether norms are those of finite matrices whose squares fp32 holds; of zeros that is not known yet."""
    return all(LEAST_NORM < norm < LARGEST_NORM for norm in found)


def per_matrix(values: list[float], like: Tensor) -> Tensor:
    """Return one number a matrix as (B, 1, 1), without waiting for the device."""
    return torch.tensor(values, dtype=like.dtype)[:, None, None].to(like.device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's map


Polynomial = Callable[[float], "tuple[float, ...] | None"]
"""Gives, for (sum t^4)^(1/4), the coefficients of what a singular value of square t is multiplied by, in powers of t
and an odd number of them; None where there is none."""


def polynomial_map(
    x: Tensor, y: Tensor, dtype: torch.dtype | None, polynomial: Polynomial, sound: bool
) -> tuple[list[int], list[int]] | None:
    """Write the map of x / ||x||_F, as one polynomial of its Gram matrix, to y; each matrix has its own polynomial.

    With the Gram matrix scaled to a trace of u, G = u t, and S = G^2 / u, Horner's scheme in t^2 takes one product for
    two degrees. The share of the correction is at most kappa (sum t^3)^(1/2), kappa its slope at 0, and sum t^3 at most
    (sum t^4)^(2/3), as sum t = 1.

    Args:
        x: (B, n, m), float32, of norms within `within`, or zeros.
        y: (B, n, m), float32, where the result goes.
        dtype: Of the products' operands: float32, bfloat16 or float16; None for split ones.
        polynomial: See `Polynomial`.
        sound: Whether x is known to be finite and within range.

    Returns:
        The matrices that have no polynomial, and those whose correction is too large for the dtype: of both nothing
        useful was written. None, and nothing written, where x may not be finite or is out of range.
    """
    n, m = x.shape[-2:]
    norm = norms(x)
    size, u, rest_scale = math.sqrt(n * m), float(n), REST_SCALE  # entries of order 1
    if dtype is None:  # smaller ones, as `split` takes none above 255
        size, u, rest_scale = size / 16, u / 16, 8 * REST_SCALE
    parts = split if dtype is None else partial(operand, dtype=dtype)
    kept_as = dtype or x.dtype
    factor = (size / positive(norm)).to(x.dtype)[:, None, None]
    low = split(x * factor) if dtype is None else (torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype)),)
    gram = square_of(low, transposed(low), alpha=u / size**2)
    g = parts(gram)
    square = square_of(g, g, kept_as, alpha=1 / u)
    lengths = torch.linalg.vector_norm(square, dim=(-2, -1), dtype=torch.float32).double() / u
    found, roots = torch.stack([norm, lengths]).tolist()  # roots of sum t^4
    if not sound and not within(found):
        return None
    own = [polynomial(math.sqrt(root)) if math.isfinite(root) else None for root in roots]
    wide = [i for i, coefficients in enumerate(own) if coefficients is None]
    heavy = [
        i
        for i, (c, root) in enumerate(zip(own, roots, strict=True))
        if c is not None and kept_as != x.dtype and abs(c[1] / c[0]) * root ** (2 / 3) > LOW_PRECISION_SHARE
    ]
    left = {*wide, *heavy}
    if len(left) == len(x):
        return wide, heavy
    kept = [(1.0, 0.0, 0.0) if c is None else c for c in own]
    levels = max(len(c) for i, c in enumerate(kept) if i not in left) // 2
    # Horner's scheme on M_k = G + (even / odd) S + (odd of k + 1 / odd of k) S M_(k+1) / u; where a matrix's polynomial
    # has ended, the ratios are 0.
    odds = [[c[2 * k + 1] if len(c) > 2 * k + 1 else 0.0 for c in kept] for k in range(levels + 1)]
    evens = [[c[2 * k + 2] if len(c) > 2 * k + 2 else 0.0 for c in kept] for k in range(levels)]
    s, rest = (square,) if kept_as == dtype else parts(square), gram
    for k in reversed(range(levels)):
        ratio = per_matrix([e / o if o else 0.0 for e, o in zip(evens[k], odds[k], strict=True)], x)
        higher, rest = rest, torch.addcmul(gram, square, ratio)
        if k < levels - 1:
            ratio = per_matrix([h / o if o else 0.0 for h, o in zip(odds[k + 1], odds[k], strict=True)], x)
            rest.addcmul_(square_of(s, parts(higher), kept_as, alpha=1 / u), ratio)
    rest *= per_matrix([o / rest_scale for o in odds[0]], x)
    first = per_matrix([c[0] for c in kept], norm)[:, 0, 0] / positive(norm)
    torch.mul(x, first.to(x.dtype)[:, None, None], out=y)
    accumulate(y, parts(rest), low, alpha=rest_scale / (u * size))
    return wide, heavy


# ---------------------------------------------------------------------------------------------------------------------
# The polar factor

Quintic = tuple[float, float, float]

# Takes [0.1, 1] to 1 within 2.5e-4; found as `projection.COMPOSITION` was, from that floor.
SHORT: tuple[Quintic, ...] = (
    (5.603695, -13.88369, 9.733413),
    (2.124239, -1.498124, 0.396008),
    (1.880741, -1.257687, 0.376948),
)


def more_steps(n: int, gain: float) -> int:
    """Return how often a step that multiplies by `gain` is put in, for few Gaussian squares to need a second attempt.

    The smallest singular value is below RARE / (2 n) of the largest in RARE of all cases; the Schatten-8 norm, by which
    the matrix is divided, is (14 n)^(1/8) / 2 times the largest.
    """
    floor = RARE / (2 * n) / max(1, (14 * n) ** (1 / 8) / 2)
    return max(0, math.ceil(math.log(FLOOR / floor, gain)))


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x scaled to a Frobenius norm of sqrt(n), and the norms (B,) that it had."""
    norm = norms(x)
    return x * (math.sqrt(x.shape[-2]) / positive(norm)).to(x.dtype)[:, None, None], norm


def probes(x: Tensor) -> Tensor:
    """Return vectors (1, n, `PROBES`) of entries +-1, as good as random for an estimate of traces."""
    k = torch.arange(x.shape[-2] * PROBES, dtype=torch.float64, device=x.device)
    return torch.where((k * k * 0.7).cos() < 0, -1.0, 1.0).to(x.dtype).view(1, -1, PROBES)


def compose(x: Tensor, v: Tensor, steps: tuple[Quintic, ...], scale: bool) -> tuple[Tensor, Tensor]:
    """Apply odd quintics one after another to the singular values of x, by way of the Gram matrix x x^T alone.

    All factors are polynomials in the Gram matrix G; the product of those so far is d I + e P. A large multiple of I is
    kept apart, since added into a product it would cost the rest a digit.

    Args:
        x: (B, n, m), float32, of entries that `split` can take.
        v: (B, n, k), which is multiplied by the same matrix as x.
        steps: (a, b, c) of a s + b s^3 + c s^5.
        scale: Whether to divide x by its Schatten-8 norm, at least its largest singular value, first.

    Returns:
        Both products, the first in place of x unless it is scaled; with `scale`
        the second is the product by what the scaled x is multiplied by.
    """
    parts = split(x)
    gram = square_of(parts, transposed(parts))
    factor = None
    if scale:
        fourth = positive(torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True))
        gram /= fourth
    d, e, p = 1.0, 1.0, None
    for number, (a, b, c) in enumerate(steps):  # by a I + b H
        g, h = split(gram), gram
        if c:
            square = square_of(g, g)
            if scale and number == 0:
                top = positive(torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).sqrt())
                gram, square, factor = gram / top, square / top**2, (fourth * top).rsqrt()
                g = split(gram)
            h = torch.add(gram, square, alpha=c / b)
        last = number == len(steps) - 1
        hs = g if not c else split(h) if p is not None or not last else ()
        v = torch.baddbmm(v.expand(len(x), -1, -1), h, v.expand(len(x), -1, -1), beta=a, alpha=b)
        if not last:  # G <- (a I + b H)^2 G
            half = accumulate(gram * a, hs, g, alpha=b)
            gram = accumulate(half * a, hs, split(half), alpha=b)
        if p is None:
            p, e = h, b
        else:
            p, e = accumulate(p * (a * e), hs, split(p), alpha=b * e).add_(h, alpha=d * b), 1.0
        d *= a
    assert p is not None
    if factor is None:
        return accumulate(x, split(p), parts, alpha=e, beta=d), v
    return accumulate(x * (factor * d), split(p * factor), parts, alpha=e), v


def cubic(x: Tensor, v: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Apply a s + b s^3 to singular values near 1, as `compose` does, by a factor of 11 bits.

    The factor is symmetric, and so is its rounding, hence it rotates singular vectors only as far as the singular
    values differ: by less than `SPLIT_ROUNDING` where these are within 0.05 of 1. x has its 22 bits.
    """
    high, low = split(x)
    gram = square_of((high,), (high.mT,), alpha=SPLIT_SCALE**-2)
    h = ((gram * SPLIT_SCALE).half(),)  # symmetric as far as the product of a matrix by its transpose is
    v = torch.baddbmm(v.expand(len(x), -1, -1), gram, v.expand(len(x), -1, -1), beta=a, alpha=b)
    accumulate(x, h, (high,), alpha=b * SPLIT_SCALE**-2, beta=a)
    return accumulate(x, h, (low,), alpha=-b * SPLIT_SCALE**-2), v


def finish(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take singular values near 1 to 1 by a Taylor step, and bound what is left of ||I - X X^T||_F.

    With E = X X^T - I the step multiplies by I - E/2 + 3/8 E^2, and leaves 5/8 E^3 and less of E, of norm at most
    ||E^2||_F^(3/2). Its product is of fp16 operands, whose rounding, 2^-11 of a correction of E/2, is added, and so is
    the rounding of E itself.

    Returns:
        The result (B, n, m), the bounds (B,), and ||E||_F (B,).
    """
    parts = split(x)
    error = square_of(parts, transposed(parts))
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    e = ((error * SPLIT_SCALE).half(),)
    square = square_of(e, e, alpha=SPLIT_SCALE**-2)
    first, second = (torch.linalg.vector_norm(one, dim=(-2, -1)) for one in (error, square))
    correction = square.mul_(0.375).sub_(error, alpha=0.5)
    y = accumulate(x.clone(), ((correction * SPLIT_SCALE).half(),), parts[:1], alpha=SPLIT_SCALE**-2)
    return y, second**1.5 + first * 2.0**-11 + SPLIT_ROUNDING * math.sqrt(x.shape[-2]), first


def project(
    x: Tensor, attempts: tuple[tuple[tuple[Quintic, ...], ...], ...], tolerance: float, sound: bool
) -> tuple[Tensor, list[int]] | None:
    """Return polar factors, and which of them are not certain to be within the tolerance.

    Certain means: ||I - X X^T||_F is bounded by it, and so is what rounding moved the polar factor by, about
    `SPLIT_ROUNDING` ||x||_F / n times sum 1 / s_i. For that sum stands the trace of what the scaled x was multiplied
    by, estimated from a few vectors that are multiplied by the same. The residual alone would not show it. Where steps
    are composed on one Gram matrix, more digits are lost: there the root mean square of 1 / s_i counts too.

    Args:
        x: (B, n, m), float32, of norms within `within`, or zeros.
        attempts: Each a sequence of compositions; from the second on, what an attempt left uncertain goes on in it.
        tolerance: Of both bounds.
        sound: Whether x is known to be finite and within range.

    Returns:
        The factors and the uncertain ones, in order; None where x may not be finite or is out of range.
    """
    z, norm = normalised(x)
    start = probes(x)
    v, out = start, z
    left, uncertain = list(range(len(x))), []
    for number, compositions in enumerate(attempts):
        for k, steps in enumerate(compositions):
            if len(steps) == 1 and not steps[0][2]:
                z, v = cubic(z, v, *steps[0][:2])
            else:
                z, v = compose(z, v, steps, scale=number == k == 0)
        y, residual, _ = finish(z)
        # ||x||_F is at most sqrt(n), the largest s_i being 1
        growth = (start * v).mean((-2, -1))
        if any(len(steps) > 1 for steps in compositions):
            growth = torch.maximum(growth, v.square().mean((-2, -1)).sqrt() / LONE)  # NaN stays
        rounding = (growth + WELL_CONDITIONED) * SPLIT_ROUNDING
        rows = [residual.double(), rounding.double(), *([norm] if number == 0 else [])]  # later z may be a part of all
        residuals, roundings, *found = torch.stack(rows).tolist()
        if found and not sound and not within(found[0]):
            return None
        out = y if number == 0 else out.index_copy_(0, positions(left, y), y)
        again = [i for i, r in enumerate(residuals) if r > tolerance >= roundings[i] and number < len(attempts) - 1]
        held = [r <= tolerance and q <= tolerance for r, q in zip(residuals, roundings, strict=True)]  # not NaN
        uncertain += [left[i] for i, certain in enumerate(held) if not certain and i not in again]
        if not again:
            break
        if len(again) < len(left):  # from before the Taylor step, whose rounding far from 1 would count
            z, v = (one.index_select(0, positions(again, z)) for one in (z, v))
        left = [left[i] for i in again]
    return out, sorted(uncertain)
