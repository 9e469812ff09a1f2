"""Write beside training: copies of tensors on the host, and the thread that writes them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fire_llm.core.hardware import free_memory

MEMORY_FACTOR = 2
"""Free memory that copies must find, in their own size: page-locked blocks are rounded up to a power of two."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class NotCopied(Exception):
    """Report that something cannot be copied so that it would be written as the original is."""


class _Copying:
    """Copy nested dicts, lists and tuples of tensors; what shares memory, or is one object, does so in the copy."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._storages: dict[int, Tensor] = {}
        self._kept: list[Any] = []  # originals: an id is unique only while its object lives

    def copy(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if id(value) not in self._done:
            self._kept.append(value)
            self._done[id(value)] = self._new(value)
        return self._done[id(value)]

    def _new(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self.copy(one)) for key, one in value.items())
        if type(value) is list:
            return [self.copy(one) for one in value]
        if type(value) is tuple:
            copies = tuple(self.copy(one) for one in value)
            return value if all(a is b for a, b in zip(copies, value, strict=True)) else copies
        raise NotCopied(type(value).__name__)

    def _tensor(self, tensor: Tensor) -> Tensor:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta or tensor.requires_grad:
            raise NotCopied(f"a tensor of type {type(tensor).__name__}")
        storage, size = tensor.untyped_storage(), tensor.numel()
        known = self._storages.get(storage._cdata)
        if known is None:
            try:
                known = torch.empty(size, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            except RuntimeError as error:
                raise NotCopied("no memory") from error
            if storage.nbytes() == size * tensor.element_size():
                known.copy_(tensor.as_strided((size,), (1,), 0), non_blocking=tensor.is_cuda)
            self._storages[storage._cdata] = known
        if (known.dtype, known.numel(), known.nbytes) != (tensor.dtype, size, storage.nbytes()):
            raise NotCopied("a part of a larger tensor")
        return known.as_strided(tensor.shape, tensor.stride(), 0)


def on_host(*values: Any) -> tuple[Any, ...] | None:
    """Copy what is to be written, so that it can change while it is written.

    Args:
        values: Nested dicts, lists and tuples of tensors and plain values, on one device.

    Returns:
        Copies in host memory, page-locked where they come from CUDA; None where memory is short, or where what is
        written of a copy could differ from what is written of the original (tensors of other classes, or parts of
        larger ones).
    """
    free, needed = free_memory(), sum(_bytes(value) for value in values)
    if free is not None and free < MEMORY_FACTOR * needed:
        return None
    copying = _Copying()
    try:
        copies = tuple(copying.copy(value) for value in values)
    except NotCopied:
        return None
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # page-locked copies arrive whenever they do
    return copies


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_bytes(one) for one in inner)


class Writer:
    """Run one piece of work at a time in a thread, and raise what it ran into where it is waited for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start the work, after the work before has ended."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as fault:
                self._fault = fault

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work has ended, and raise its fault, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def check(self) -> None:
        """Raise the fault of work that has ended; do not wait for any."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
