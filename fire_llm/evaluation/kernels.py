"""The negative log-likelihood of rows of logits on a GPU, in one kernel.

torch's operations read the logits seven times, in fp32; this kernel reads them twice, in their own dtype.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:  # a part of torch's builds for GPUs
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of logits that the kernel reads."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""Triton's options of compilation. Products and sums are fused, whatever this version's default is."""


@cache
def usable(device: torch.device, dtype: torch.dtype, vocabulary: int) -> bool:
    """Return whether the kernel runs on a device with the results of torch's operations; it is tried once."""
    if triton is None or dtype not in DTYPES:
        return False
    logits = torch.linspace(-9, 9, 3 * vocabulary, device=device).view(3, vocabulary).to(dtype)
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1], device=device)
    try:
        apart = float((row_nll(logits, targets) - _plain(logits, targets)).abs().max())
    except Exception as error:  # no compiler for Triton's launcher, a GPU that Triton does not know
        warnings.warn(
            f"Triton builds no kernel here ({type(error).__name__}: {error}): perplexity takes torch's operations for "
            "the softmax, which read the logits seven times instead of twice",
            stacklevel=2,
        )
        return False
    if not apart < 1e-6:
        warnings.warn(f"Triton's softmax is off by {apart:.1e} here: perplexity takes torch's", stacklevel=2)
        return False
    return True


def row_nll(logits: Tensor, targets: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood of each target in nats: exponentials in fp32, their sum in fp64.

    A row is always summed in the same order, whatever the other rows are.

    Args:
        logits: (S, V), of `DTYPES`.
        targets: (S,) int64, each in [0, V).
        out: (S,) fp64 to write to; a new tensor by default.

    Returns:
        (S,) fp64.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    nll = torch.empty(len(targets), dtype=torch.float64, device=logits.device) if out is None else out
    if len(targets):
        with torch.cuda.device_of(logits):
            kernel()[(len(targets),)](
                logits, targets.contiguous(), nll, logits.stride(0), SIZE=logits.shape[1], BLOCK=4096, **OPTIONS
            )
    return nll


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    return -torch.log_softmax(logits.double(), -1).gather(-1, targets[:, None])[:, 0]


@cache
def kernel() -> Any:
    """Return the kernel, which handles one row per program."""
    return triton.jit(_row_nll)


# Triton gives pointers and numbers types of its own, which annotations cannot name.
def _row_nll(logits, targets, out, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    begin = logits + row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    for at in range(0, SIZE, BLOCK):
        x = tl.load(begin + at + columns, mask=at + columns < SIZE, other=float("-inf")).to(tl.float32)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, 0)
    sums = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, SIZE, BLOCK):
        x = tl.load(begin + at + columns, mask=at + columns < SIZE, other=float("-inf")).to(tl.float32) - top
        x = tl.where(x < -87.0, -87.0, x)  # exp(-87) is about the smallest normal number of fp32; NaN stays
        # exp(x) = 2^n exp(r) with |r| <= ln(2)/2, by the series to r^7. The hardware's instruction is as exact as fp32,
        # but its errors may all have one sign; those of the series have a mean below 1e-9. ln(2) is the sum of two
        # parts, and n times the first one is exact.
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - n * 0.693359375) + n * 2.12194440e-4
        q = 1.0 / 720.0 + r * (1.0 / 5040.0)
        q = 1.0 / 120.0 + r * q
        q = 1.0 / 24.0 + r * q
        q = 1.0 / 6.0 + r * q
        q = 0.5 + r * q
        e = 1.0 + (r + r * r * q)
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        sums += (e * power).to(tl.float64)
    picked = tl.load(begin + tl.load(targets + row)).to(tl.float32)
    tl.store(out + row, top.to(tl.float64) - picked.to(tl.float64) + tl.log(tl.sum(sums, 0)))
