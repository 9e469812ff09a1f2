"""What the maps share: chunks of a stack, products of exact precision, checks.

Shapes: (..., out, in) at the surface; inside, a chunk is (B = batch, n = short side, m = long side), n <= m.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fire_llm.core.errors import UserError

CHUNK_ELEMENTS = 1 << 26  # upper bound on a batch worked on at once, 256 MB in fp32
CPU_BATCH_SIDE = 128  # batched products beat a loop on CPU only up to this n
_SAFE = 10  # largest entries between 2**-10 and 2**10 need no scaling: fp32 holds their squares, sums and fourth powers
LARGEST_NORM, LEAST_NORM = 2.0**60, 2.0**-40  # within, no square overflows in fp32, and none that counts underflows
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def chunks(
    w: Tensor, dtype: torch.dtype, name: str, *, copy: bool = True, only: slice | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (slice of the flattened batch, x, scale): x = w / scale as a (B, n, m) tensor, n <= m.

    `scale` (B, 1, 1) is the power of two that leaves the largest entry of each matrix in [1, 2), so that no later
    square or sum overflows or underflows, whatever the scale of `w`, and nothing is rounded.

    Args:
        w: (..., out, in).
        dtype: Of x.
        name: What error messages call `w`.
        copy: Whether x must be a new tensor. Otherwise it may be a view of `w`, with a scale of 1, where nothing can
            overflow or underflow, which saves the memory of a copy.
        only: One of `spans`; default: all.
    """
    if not w.numel():
        return
    n = min(w.shape[-2:])
    batch = w.reshape(-1, *w.shape[-2:])
    for chunk in spans(w) if only is None else (only,):
        x = batch[chunk].to(torch.promote_types(w.dtype, dtype))
        largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
        values = largest.flatten().tolist()
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            index = np.unravel_index(bad + chunk.start, w.shape[:-2]) if w.ndim > 2 else ()
            which = name + (f"[{', '.join(str(i) for i in index)}]" if index else "")
            raise UserError(
                f"{which}: holds NaN or infinity, which would spread to the whole matrix; "
                "reset from an earlier checkpoint, or leave this matrix out"
            )
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(positive(largest)).exponent - 1)
        fits = all(value == 0 or 2**-_SAFE <= value < 2 ** (_SAFE + 1) for value in values)
        if not copy and x.dtype == dtype and fits:
            scale = torch.ones_like(scale)
        else:
            x = (x / scale).to(dtype)
        yield chunk, x if w.shape[-2] == n else x.mT, scale


def spans(w: Tensor) -> Iterator[slice]:
    """Yield the slices of the flattened batch that are worked on at once; none of an empty one."""
    if not w.numel():
        return
    n, m = sorted(w.shape[-2:])
    count = 1 if w.device.type == "cpu" and n > CPU_BATCH_SIDE else max(1, CHUNK_ELEMENTS // (n * m))
    total = math.prod(w.shape[:-2])
    yield from (slice(start, min(start + count, total)) for start in range(0, total, count))


def oriented(w: Tensor, chunk: slice) -> Tensor:
    """Return one of `spans` as (B, n, m), a view of a contiguous `w`."""
    batch = w.reshape(-1, *w.shape[-2:])[chunk]
    return batch if w.shape[-2] <= w.shape[-1] else batch.mT


def store(out: Tensor, chunk: slice, x: Tensor) -> None:
    """Write a chunk of results (B, n, m) into the contiguous batch it belongs to, in its dtype and orientation."""
    batch = out.view(-1, *out.shape[-2:])
    batch[chunk] = (x if batch.shape[-2:] == x.shape[-2:] else x.mT).to(out.dtype)


def positive(x: Tensor) -> Tensor:
    """Return x with 1 in place of 0, so that a division by it keeps zeros zero."""
    return torch.where(x == 0, 1, x)


def norms(x: Tensor) -> Tensor:
    """Return Frobenius norms (B,) in fp64 of fp32 matrices read once: rows in fp32, which are put together in fp64."""
    lengths: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1).double(), dim=-1)
    return lengths


def in_range(norms: list[float]) -> bool:
    """Return whether norms are those of finite matrices whose squares fp32 holds; of zeros that is not known yet."""
    return all(LEAST_NORM < norm < LARGEST_NORM for norm in norms)


def indices(numbers: list[int], like: Tensor) -> Tensor:
    """Return indices (k,) on the device of a tensor, without waiting for it."""
    return torch.tensor(numbers).to(like.device, non_blocking=True)


def check_matrix(w: Tensor, name: str) -> None:
    """Refuse what is not a floating-point matrix or a batch of them."""
    if w.dtype not in FLOATS:
        raise UserError(f"{name}: dtype {w.dtype} cannot be orthogonalised; convert it to torch.float32 first")
    if w.ndim < 2:
        raise UserError(f"{name}: shape {tuple(w.shape)} is not a matrix; give (out, in) or a batch (..., out, in)")


def check_dtype(dtype: torch.dtype | None, allowed: tuple[torch.dtype, ...]) -> None:
    """Refuse a compute dtype that the function cannot work in."""
    if dtype is not None and dtype not in allowed:
        raise UserError(f"compute_dtype: {dtype} is not one of {', '.join(map(str, allowed))}")


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and bf16 shortcuts out of the products inside; afterwards every setting is as it was.

    autocast is a thread's, the settings are the process's: the first thread to come remembers them, the last to leave
    puts them back.
    """
    with _lock:
        if _inside.threads == 0:
            _inside.before = _settings()
        _inside.threads += 1
        # Both of torch's ways to choose, which refuse to be read where they differ; torch.compile reads the older one.
        torch.set_float32_matmul_precision("highest")
        for backend, _ in _inside.before[1]:
            backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside.threads -= 1
            if _inside.threads == 0:
                _put_back(*_inside.before)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put torch's settings for products in fp32 back as they were, whatever is done to them inside."""
    everywhere: Any = torch.backends
    before, settings = everywhere.fp32_precision, _settings()
    try:
        yield
    finally:
        everywhere.fp32_precision = before
        _put_back(*settings)


Settings = tuple[str | None, list[tuple[Any, str]]]
"""torch's setting for all matmuls, and its newer settings by backend; None for the first if they differ."""


@dataclass
class _Inside:
    """How many threads are inside `exact_products`, and the settings from before the first of them came."""

    threads: int = 0
    before: Settings = (None, [])


_lock, _inside = Lock(), _Inside()


@cache
def _silence_deprecation() -> None:
    """Let torch 2.9 warn, once and to nobody, that its older setting is going to be deprecated."""
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")
        torch.get_float32_matmul_precision()


def _settings() -> Settings:
    """Return the settings as they are."""
    torch_backends: Any = torch.backends  # torch's annotations leave their parts out
    cpu, cuda = torch_backends.mkldnn, torch_backends.cudnn
    backends = [torch_backends.cuda.matmul, cpu.matmul, cpu.conv, cpu.rnn]
    if torch.cuda.is_available():
        backends += [cuda.conv, cuda.rnn]  # TF32 unless somebody says otherwise
    _silence_deprecation()
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = None
    return overall, [(backend, backend.fp32_precision) for backend in backends]


def _put_back(overall: str | None, backends: list[tuple[Any, str]]) -> None:
    if overall is not None:
        torch.set_float32_matmul_precision(overall)
    for backend, precision in backends:
        backend.fp32_precision = "none"  # a setting that came from torch.backends.fp32_precision goes on following it
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision


@cache
def accumulates(device: str, dtype: torch.dtype) -> bool:
    """Try once whether a device's products of a dtype can be had in float32 without rounding them first."""
    one = torch.ones(1, 16, 16, dtype=dtype, device=device)
    try:
        return torch.baddbmm(one.float(), one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError, NotImplementedError):  # the CPU, and what has no such kernel
        return False


def step(x: Tensor, a: float, b: float, c: float = 0.0, *, normalise: bool = False) -> Tensor:
    """Return a x + b (x x^T) x + c (x x^T)^2 x, of x or of x over its Schatten-8 norm.

    The Schatten-8 norm (tr (x x^T)^4)^(1/8) bounds the largest singular value from above as the Frobenius norm does,
    exceeds it 1.0 to 2 times instead of up to sqrt(n) times, and is free where (x x^T)^2 is formed anyway.
    """
    gram = x @ x.mT
    squared = gram @ gram if c else None
    if normalise and squared is not None:
        norm = torch.linalg.vector_norm(squared, dim=(-2, -1), keepdim=True) ** 0.25
        x, gram, squared = x / norm, gram / norm**2, squared / norm**4
    polynomial = gram.mul_(b) if squared is None else gram.mul_(b).add_(squared, alpha=c)
    return add_product(x, a, polynomial)


def multiply(symmetric: Tensor, x: Tensor) -> Tensor:
    """Return symmetric @ x in the memory layout of x."""
    return (x.mT @ symmetric).mT if x.mT.is_contiguous() else symmetric @ x


def add_product(x: Tensor, a: float, symmetric: Tensor) -> Tensor:
    """Return a x + symmetric @ x in the memory layout of x: a tall matrix is never transposed in memory."""
    if x.mT.is_contiguous():
        return torch.baddbmm(x.mT, x.mT, symmetric, beta=a).mT
    return torch.baddbmm(x, symmetric, x, beta=a)
