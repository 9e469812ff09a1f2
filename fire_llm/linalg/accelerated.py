"""Polar factors of stacks on accelerators, in products of 16-bit operands, with one wait of the host.

It takes four steps:

1. `normalised` scales each matrix X to a Frobenius norm of sqrt(n), so that its entries are of order 1.
2. `compose`, `cubic` or `one_factor` multiply X by polynomials of its Gram matrix, which takes singular values near 1.
3. `finish` takes them to 1 by a Taylor step, and bounds what is left of ||I - X X^T||_F.
4. `project` compares that bound, and one on the rounding, with the tolerance. What fails is tried again, or reported.

Shapes: (B = batch, n = short side, m = long side), n <= m. No decision here depends on a value on the device but those
that `tolist` fetches, once for a stack. Each matrix is decided on by its own values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fire_llm.linalg.matmul import in_range, indices, norms, positive
from fire_llm.linalg.split_products import (
    SPLIT_SCALE,
    accumulate,
    product,
    single,
    single_square,
    split,
    split_square,
    transposed,
)

SPLIT_ROUNDING = 4e-6  # of a product of split operands; its sums, which tensor cores cut rather than round, included
PROBES = 8
FLOOR, RARE = 1e-4, 0.03  # what `polar.COMPOSITION` takes to 1; share of Gaussian squares that may be below it
LONE = 3.0  # a lone small singular value may be off by a third of `SPLIT_ROUNDING`, over it, and the mean hides it
WELL_CONDITIONED = 10.0  # what rounding costs a matrix of condition 1, in units of `SPLIT_ROUNDING`

Quintic = tuple[float, float, float]
"""(a, b, c) of a s + b s^3 + c s^5, which each singular value s becomes."""
Composition = tuple[Quintic, ...]
"""Quintics one after another, computed on one Gram matrix."""
Attempt = tuple[Composition, ...]
"""Compositions one after another, each on a Gram matrix of its own."""

# Takes [0.1, 1] to 1 within 2.5e-4; found as `polar.COMPOSITION` was, from that floor.
SHORT: Composition = (
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


def _scaled(gram: Tensor, square_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Scale a Gram matrix x x^T to that of x over its Schatten-8 norm (tr (x x^T)^4)^(1/8), in place.

    That norm is at least the largest singular value and rarely twice it.

    Args:
        gram: (B, n, n).
        square_of: Multiplies a matrix by itself.

    Returns:
        The scaled Gram matrix, its square, and (B, 1, 1) what x is to be multiplied by.
    """
    length = positive(torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True))
    gram /= length  # so that fp16 holds the entries of the square
    square = square_of(gram)
    root = positive(torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).sqrt())
    return gram.div_(root), square.div_(root**2), (length * root).rsqrt()


def _multiply_probes(h: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """Return (a I + b h) v."""
    v = v.expand(len(h), -1, -1)
    return torch.baddbmm(v, h, v, beta=a, alpha=b)


def compose(x: Tensor, v: Tensor, steps: Composition, scale: bool) -> tuple[Tensor, Tensor]:
    """Apply odd quintics one after another to the singular values of x, by way of the Gram matrix x x^T alone.

    With G the Gram matrix, a quintic multiplies x by a I + b H, where H = G + (c / b) G^2, and G by the square of that.
    The product of the factors so far is kept as constant I + multiple P. A large multiple of I is kept apart, because
    added into a product it would cost the rest a digit.

    Args:
        x: (B, n, m), float32, of entries that `split` can take.
        v: (B, n, k), which is multiplied by the same matrix as x.
        steps: The quintics; c of the first is not 0.
        scale: Whether to divide x by its Schatten-8 norm, at least its largest singular value, first.

    Returns:
        Both products, the first in place of x unless it is scaled; with `scale`
        the second is the product by what the scaled x is multiplied by.
    """
    operand = split(x)
    gram = product(operand, transposed(operand))
    scaling = square = None
    if scale:
        gram, square, scaling = _scaled(gram, split_square)
    constant, multiple, p = 1.0, 1.0, None
    for number, (a, b, c) in enumerate(steps):
        last = number == len(steps) - 1
        g = split(gram)
        if c:
            h = torch.add(gram, product(g, g) if square is None else square, alpha=c / b)
            h_operand = split(h) if p is not None or not last else ()  # which a single quintic does not read
        else:
            h, h_operand = gram, g
        square = None
        v = _multiply_probes(h, v, a, b)
        if not last:  # G <- (a I + b H)^2 G
            half = accumulate(gram * a, h_operand, g, alpha=b)
            gram = accumulate(half * a, h_operand, split(half), alpha=b)
        if p is None:
            p, multiple = h, b
        else:  # (a I + b H) (constant I + multiple P)
            p = accumulate(p * (a * multiple), h_operand, split(p), alpha=b * multiple).add_(h, alpha=constant * b)
            multiple = 1.0
        constant *= a
    assert p is not None
    if scaling is None:
        return accumulate(x, split(p), operand, alpha=multiple, beta=constant), v
    return accumulate(x * (scaling * constant), split(p * scaling), operand, alpha=multiple), v


def cubic(x: Tensor, v: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Apply a s + b s^3 to singular values near 1, as `compose` does, by a factor of 11 bits.

    The factor is symmetric, and so is its rounding, hence it rotates singular vectors only as far as the singular
    values differ: by less than `SPLIT_ROUNDING` where these are within 0.05 of 1. x has its 22 bits.
    """
    high, low = split(x)
    gram = product((high,), (high.mT,), alpha=SPLIT_SCALE**-2)
    factor = single(gram)  # symmetric as far as the product of a matrix by its transpose is
    v = _multiply_probes(gram, v, a, b)
    accumulate(x, factor, (high,), alpha=b * SPLIT_SCALE**-2, beta=a)
    return accumulate(x, factor, (low,), alpha=-b * SPLIT_SCALE**-2), v


def one_factor(z: Tensor) -> tuple[Tensor, Tensor]:
    """Take singular values of [0.1, 1] of the Schatten-8 norm near 1, by one symmetric matrix.

    It computes `SHORT` as `compose` does, but the longest products are of single fp16 operands: the first Gram matrix,
    squares and the final factor are rounded, which leaves E = X X^T - I at 5e-4 sqrt(n). The updates between them are
    split, or it were ten times that. The factor is multiplied by all 22 bits of z.

    Args:
        z: (B, n, m), float32, of Frobenius norm sqrt(n).

    Returns:
        The product (B, n, m), and the traces (B,) of that matrix over n.
    """
    high, low = split(z)
    gram = product((high,), (high.mT,), alpha=SPLIT_SCALE**-2)
    gram, square, scaling = _scaled(gram, single_square)
    constant, p = 1.0, torch.zeros(())
    for number, (a, b, c) in enumerate(SHORT):  # by constant I + p so far
        h = (square if number == 0 else single_square(gram)).mul_(c / b).add_(gram)
        h_operand = split(h)
        p = h * b if number == 0 else accumulate(p * a, h_operand, split(p), alpha=b).add_(h, alpha=constant * b)
        constant *= a
        if number < len(SHORT) - 1:
            half = accumulate(gram * a, h_operand, split(gram), alpha=b)
            gram = accumulate(half * a, h_operand, split(half), alpha=b)
    p = p.add(p.mT).mul_(scaling * 0.5)  # symmetric to the last bit
    # The mean of the diagonal is the largest part of p, and would be rounded most: it is kept apart.
    means = p.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    p.diagonal(dim1=-2, dim2=-1).sub_(means[:, 0])
    means = means + scaling * constant
    factor = single(p)
    y = accumulate(z * means, factor, (high,), alpha=SPLIT_SCALE**-2)
    return accumulate(y, factor, (low,), alpha=-(SPLIT_SCALE**-2)), means[:, 0, 0]


def finish(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take singular values near 1 to 1 by a Taylor step, and bound what is left of ||I - X X^T||_F.

    With E = X X^T - I the step multiplies by I - E/2 + 3/8 E^2, and leaves 5/8 E^3 and less of E, of norm at most
    ||E^2||_F^(3/2). Its product is of fp16 operands, whose rounding, 2^-11 of a correction of E/2, is added, and so is
    the rounding of E itself.

    Returns:
        The result (B, n, m), the bounds (B,), and ||E||_F (B,).
    """
    operand = split(x)
    error = product(operand, transposed(operand))
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    square = single_square(error)
    error_norm, square_norm = (torch.linalg.vector_norm(matrix, dim=(-2, -1)) for matrix in (error, square))
    correction = square.mul_(0.375).sub_(error, alpha=0.5)
    y = accumulate(x.clone(), single(correction), operand[:1], alpha=SPLIT_SCALE**-2)
    bound = square_norm**1.5 + error_norm * 2.0**-11 + SPLIT_ROUNDING * math.sqrt(x.shape[-2])
    return y, bound, error_norm


def project(
    x: Tensor, attempts: tuple[Attempt, ...], tolerance: float, *, checked: bool
) -> tuple[Tensor, list[int]] | None:
    """Return polar factors, and which of them are not certain to be within the tolerance.

    Certain means that two bounds are within it. One is that of `finish` on the residual ||I - X X^T||_F. It would not
    show a rotation by rounding, which moves the polar factor by about `SPLIT_ROUNDING` ||x||_F / n times sum 1 / s_i:
    that is the second. For the sum stands the trace of what the scaled x was multiplied by, estimated from a few
    vectors that are multiplied by the same. Where steps are composed on one Gram matrix, more digits are lost: there
    the root mean square of 1 / s_i counts too.

    Args:
        x: (B, n, m), float32, of norms that are `in_range`, or zeros.
        attempts: From the second on, each goes on with what the one before left above the tolerance.
        tolerance: Of both bounds.
        checked: Whether x is known to be finite and in range.

    Returns:
        The factors and the uncertain ones, in order; None where x may not be finite or is out of range.
    """
    z, norm = normalised(x)
    start = probes(x)
    v, out = start, z
    members, uncertain = list(range(len(x))), []
    for number, attempt in enumerate(attempts):
        for k, steps in enumerate(attempt):
            if len(steps) == 1 and not steps[0][2]:
                z, v = cubic(z, v, *steps[0][:2])
            else:
                z, v = compose(z, v, steps, scale=number == k == 0)
        y, residual, _ = finish(z)
        # ||x||_F is at most sqrt(n), the largest s_i being 1
        growth = (start * v).mean((-2, -1))
        if any(len(steps) > 1 for steps in attempt):
            growth = torch.maximum(growth, v.square().mean((-2, -1)).sqrt() / LONE)  # NaN stays
        rounding = (growth + WELL_CONDITIONED) * SPLIT_ROUNDING
        bounds = [residual.double(), rounding.double()]
        if number == 0:
            residuals, roundings, norm_values = torch.stack([*bounds, norm]).tolist()
            if not checked and not in_range(norm_values):
                return None
            out = y
        else:
            residuals, roundings = torch.stack(bounds).tolist()
            out.index_copy_(0, indices(members, y), y)
        retried = []
        for i, (r, q) in enumerate(zip(residuals, roundings, strict=True)):
            if r > tolerance >= q and number < len(attempts) - 1:
                retried.append(i)
            elif not (r <= tolerance and q <= tolerance):  # NaN too
                uncertain.append(members[i])
        if not retried:
            break
        if len(retried) < len(members):  # from before the Taylor step, whose rounding far from 1 would count
            z, v = (tensor.index_select(0, indices(retried, z)) for tensor in (z, v))
        members = [members[i] for i in retried]
    return out, sorted(uncertain)


def project_rectangles(
    x: Tensor, attempts: tuple[Attempt, ...], tolerance: float, *, checked: bool
) -> tuple[Tensor, list[int]] | None:
    """Do as `project`, for m >= 2 n: by one pass of `one_factor`, and by `project` what is not certain after it.

    The host waits once, and where `project` is needed as often as that does. The pass multiplies x by a symmetric
    matrix P, which may be any: the polar factor of P x is that of x, turned by an angle that is measured. To first
    order, in the eigenbasis of x x^T with singular values h and with E = P x (P x)^T - I, it is turned by
    K_ij = E_ij (h_j - h_i) / (2 (h_i + h_j)), and so by less than half of E.
    """
    z, norm = normalised(x)
    y, traces = one_factor(z)
    y, residual, error_norm = finish(y)
    rounding = (traces + WELL_CONDITIONED) * SPLIT_ROUNDING
    turned = error_norm * (0.5 / math.sqrt(x.shape[-2])) + rounding
    norm_values, *bounds = torch.stack([norm, residual.double(), turned.double()]).tolist()
    if not checked and not in_range(norm_values):
        return None
    within = [all(bound <= tolerance for bound in pair) for pair in zip(*bounds, strict=True)]  # of NaN it is not
    failed = [i for i, certain in enumerate(within) if not certain]
    if not failed:
        return y, []
    members = indices(failed, x)
    again = project(x.index_select(0, members), attempts, tolerance, checked=True)
    assert again is not None
    factors, uncertain = again
    return y.index_copy_(0, members, factors), [failed[i] for i in uncertain]
