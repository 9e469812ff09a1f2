"""What accelerators do: products of 16-bit operands, and polar factors of stacks in them, with one wait of the host.

A 16-bit product is 8 to 16 times as fast as one in fp32 there. Where 16 bits are too few, an operand is two fp16 parts:
three products then stand for one of 22 bits.

Shapes: (B = batch, n = short side, m = long side), n <= m. Nothing here takes a decision from a value on the device but
what `tolist` fetches, once for a stack, and each matrix is decided on by its own values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fire_llm.linalg.matmul import accumulates, positive

Operand = tuple[Tensor, ...]
"""A matrix as a product reads it: itself, rounded to 16 bits, or two fp16 parts whose difference holds 22 bits."""

SPLIT_SCALE = 256.0  # of entries of order 1, so that fp16 holds their second parts as normal numbers
SPLIT_DEPTH = 2048  # longest sum within a tensor core, which cuts its sums; longer ones are put together in fp32
LARGEST_NORM, LEAST_NORM = 2.0**60, 2.0**-40  # within, no square overflows in fp32, and none that counts underflows


def split(x: Tensor) -> Operand:
    """Return fp16 tensors h and l with h - l = `SPLIT_SCALE` x to 22 bits, for x of entries below 255."""
    high, low = (torch.empty_like(x, dtype=torch.float16) for _ in range(2))
    torch.mul(x, SPLIT_SCALE, out=high)
    return high, torch.sub(high, x, alpha=SPLIT_SCALE, out=low)  # in fp32, where both are exact


def single(x: Tensor) -> Operand:
    """Return the first part of `split` alone: fp16 numbers of `SPLIT_SCALE` x to 11 bits."""
    return (torch.mul(x, SPLIT_SCALE, out=torch.empty_like(x, dtype=torch.float16)),)


def transposed(a: Operand) -> Operand:
    """Return the operand (B, m, n) of the transposed matrices, as views."""
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
    """Set out = beta out + alpha a b; on a CPU rounded operands are multiplied as fp32, 16 bits being far slower."""
    if a.dtype == out.dtype and (a.element_size() > 2 or a.device.type != "cpu"):
        torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif accumulates(a.device.type, a.dtype):
        torch.baddbmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        out.copy_(torch.baddbmm(out.float(), a.float(), b.float(), beta=beta, alpha=alpha))


def square_of(a: Operand, b: Operand, dtype: torch.dtype = torch.float32, alpha: float = 1.0) -> Tensor:
    """Return alpha a b (B, n, n) in a new tensor."""
    out = a[0].new_empty((len(a[0]), a[0].shape[-2], b[0].shape[-1]), dtype=dtype)
    return accumulate(out, a, b, alpha=alpha, beta=0.0)


def single_square(x: Tensor) -> Tensor:
    """Return x x (B, n, n) of single operands, in a new tensor."""
    one = single(x)
    return square_of(one, one, alpha=SPLIT_SCALE**-2)


def norms(x: Tensor) -> Tensor:
    """Return Frobenius norms (B,) in fp64 of fp32 matrices read once: rows in fp32, which are put together in fp64."""
    lengths: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1).double(), dim=-1)
    return lengths


def within(found: list[float]) -> bool:
    """Return whether norms are those of finite matrices whose squares fp32 holds; of zeros that is not known yet."""
    return all(LEAST_NORM < norm < LARGEST_NORM for norm in found)


def positions(at: list[int], like: Tensor) -> Tensor:
    """Return indices (k,) on the device of a tensor, without waiting for it."""
    return torch.tensor(at).to(like.device, non_blocking=True)


SPLIT_ROUNDING = 4e-6  # of a product of split operands; its sums, which tensor cores cut rather than round, included
PROBES = 8
FLOOR, RARE = 1e-4, 0.03  # what `polar.COMPOSITION` takes to 1; share of Gaussian squares that may be below it
LONE = 3.0  # a lone small singular value may be off by a third of `SPLIT_ROUNDING`, over it, and the mean hides it
WELL_CONDITIONED = 10.0  # what rounding costs a matrix of condition 1, in units of `SPLIT_ROUNDING`

Quintic = tuple[float, float, float]

# Takes [0.1, 1] to 1 within 2.5e-4; found as `polar.COMPOSITION` was, from that floor.
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
    h = single(gram)  # symmetric as far as the product of a matrix by its transpose is
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
    square = single_square(error)
    first, second = (torch.linalg.vector_norm(one, dim=(-2, -1)) for one in (error, square))
    correction = square.mul_(0.375).sub_(error, alpha=0.5)
    y = accumulate(x.clone(), single(correction), parts[:1], alpha=SPLIT_SCALE**-2)
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


def project_rectangles(
    x: Tensor, attempts: tuple[tuple[tuple[Quintic, ...], ...], ...], tolerance: float, sound: bool
) -> tuple[Tensor, list[int]] | None:
    """Do as `project`, which is given what is not certain after one pass of `one_factor`: for m >= 2 n.

    The host waits once, and then as often as `project` does where that is needed. In the eigenbasis of x x^T with
    singular values h the polar factor of P x, P any symmetric matrix, is that of x turned by
    K_ij = E_ij (h_j - h_i) / (2 (h_i + h_j)) to first order, E = P x (P x)^T - I: by less than half of a residual that
    is measured.
    """
    z, norm = normalised(x)
    y, traces = one_factor(z)
    y, residual, first = finish(y)
    roundings = (traces + WELL_CONDITIONED) * SPLIT_ROUNDING
    turned = first * (0.5 / math.sqrt(x.shape[-2])) + roundings
    found, *bounds = torch.stack([norm, residual.double(), turned.double()]).tolist()
    if not sound and not within(found):
        return None
    left = [i for i, pair in enumerate(zip(*bounds, strict=True)) if not all(one <= tolerance for one in pair)]  # NaN
    if not left:
        return y, []
    at = positions(left, x)
    again = project(x.index_select(0, at), attempts, tolerance, True)
    assert again is not None
    return y.index_copy_(0, at, again[0]), [left[i] for i in again[1]]


def one_factor(z: Tensor) -> tuple[Tensor, Tensor]:
    """Take singular values of [0.1, 1] of the Schatten-8 norm to 1, about, by one symmetric matrix.

    The longest products are of single fp16 operands: the first Gram matrix, squares and the final factor are rounded,
    which leaves E at 5e-4 sqrt(n). The updates between them are split, or it were ten times that. The factor is
    multiplied by all 22 bits of z.

    Args:
        z: (B, n, m), float32, of Frobenius norm sqrt(n).

    Returns:
        The product (B, n, m), and the traces (B,) of that matrix over n.
    """
    high, low = split(z)
    gram = square_of((high,), (high.mT,), alpha=SPLIT_SCALE**-2)
    fourth = positive(torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True))
    gram /= fourth
    square = single_square(gram)
    top = positive(torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).sqrt())
    gram /= top
    factor = (fourth * top).rsqrt()
    d, p = 1.0, torch.zeros(())
    for number, (a, b, c) in enumerate(SHORT):  # as in `compose`: by d I + p, the next by a I + b h
        square = square.div_(top**2) if number == 0 else single_square(gram)
        h = square.mul_(c / b).add_(gram)
        hs = split(h)
        p = h * b if number == 0 else accumulate(p * a, hs, split(p), alpha=b).add_(h, alpha=d * b)
        d *= a
        if number < len(SHORT) - 1:
            half = accumulate(gram * a, hs, split(gram), alpha=b)
            gram = accumulate(half * a, hs, split(half), alpha=b)
    p = p.add(p.mT).mul_(factor * 0.5)  # symmetric to the last bit
    means = p.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    p.diagonal(dim1=-2, dim2=-1).sub_(means[:, 0])  # the largest of it, which would be rounded most
    means = means + factor * d
    rounded = single(p)
    y = accumulate(z * means, rounded, (high,), alpha=SPLIT_SCALE**-2)
    return accumulate(y, rounded, (low,), alpha=-(SPLIT_SCALE**-2)), means[:, 0, 0]
