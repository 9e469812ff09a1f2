"""Products of 16-bit operands, as accelerators compute them best, and of split ones that hold 22 bits.

A 16-bit product is 8 to 16 times as fast as one in fp32 there. Where 16 bits are too few, an operand is split into two
fp16 parts. Three products of parts then replace one product of 22 bits.

Shapes: (B = batch, n, m).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fire_llm.linalg.matmul import accumulates

Operand = tuple[Tensor, ...]
"""A matrix as a product reads it: itself, rounded to 16 bits, or two fp16 parts whose difference holds 22 bits."""

SPLIT_SCALE = 256.0  # of entries of order 1, so that fp16 holds their second parts as normal numbers
SPLIT_DEPTH = 2048  # longest sum within a tensor core, which cuts its sums; longer ones are put together in fp32


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
    """Set out = beta out + alpha a b, and return it.

    Of split operands, (h - l)(h' - l') = h h' - l h' - h l' + l l', and the last product is below 22 bits. The small
    ones are summed first.
    """
    length = depth = a[0].shape[-1]
    if len(a) > 1:
        alpha, depth = alpha / SPLIT_SCALE**2, SPLIT_DEPTH
        for small, large in ((a[1], b[0]), (a[0], b[1])):
            _multiply(out, small, large, -alpha, beta)
            beta = 1.0
    for k in range(0, length, depth):
        _multiply(out, a[0][..., k : k + depth], b[0][..., k : k + depth, :], alpha, beta)
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


def product(a: Operand, b: Operand, dtype: torch.dtype = torch.float32, alpha: float = 1.0) -> Tensor:
    """Return alpha a b (B, n, n) in a new tensor."""
    out = a[0].new_empty((len(a[0]), a[0].shape[-2], b[0].shape[-1]), dtype=dtype)
    return accumulate(out, a, b, alpha=alpha, beta=0.0)


def split_square(x: Tensor) -> Tensor:
    """Return x x (B, n, n) of split operands, in a new tensor."""
    operand = split(x)
    return product(operand, operand)


def single_square(x: Tensor) -> Tensor:
    """Return x x (B, n, n) of single operands, in a new tensor."""
    operand = single(x)
    return product(operand, operand, alpha=SPLIT_SCALE**-2)
