"""Write while training goes on: copies of tensors on the host, and the thread that writes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fire_llm.core.hardware import free_memory

MEMORY_FACTOR = 2
"""Free memory that copies need, as a multiple of their size: page-locked blocks are rounded up to a power of two."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def on_host(*values: Any) -> tuple[Any, ...] | None:
    """Copy what is to be written, so that the originals may change while the copies are written.

    Tensors that share memory, and values that are one object, do so in the copy, so that the files are the same.

    Args:
        values: Nested dicts, lists and tuples of tensors and plain values, on one device.

    Returns:
        Copies in host memory, page-locked where they come from CUDA. None where memory is short, or where a copy might
        be written in another way than the original (tensors of other classes, parts of larger tensors, other objects).
    """
    leaves = [*_leaves(values)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    free, needed = free_memory(), sum(t.numel() * t.element_size() for t in tensors)
    if free is not None and free < MEMORY_FACTOR * needed:
        return None
    if not all(_whole(leaf) if isinstance(leaf, Tensor) else isinstance(leaf, _PLAIN) for leaf in leaves):
        return None
    storages: dict[int, Tensor] = {}
    copies: dict[int, Any] = {}
    for tensor in tensors:
        size, key = tensor.numel(), tensor.untyped_storage()._cdata
        if key not in storages:
            try:
                block = torch.empty(size, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            except RuntimeError:
                return None  # no memory
            storages[key] = block.copy_(tensor.as_strided((size,), (1,), 0), non_blocking=tensor.is_cuda)
        if storages[key].dtype != tensor.dtype:
            return None
        copies[id(tensor)] = storages[key].as_strided(tensor.shape, tensor.stride(), 0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # page-locked copies arrive whenever they do
    return deepcopy(values, copies)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what nested dicts, lists and tuples hold; an object of a derived class is a leaf itself."""
    if type(value) in (dict, OrderedDict, list, tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _whole(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one that fills its memory."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta or tensor.requires_grad:
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class Writer:
    """Run one task at a time in a thread, and raise its error where it is waited for."""

    def __init__(self) -> None:
        self._task: Future[None] | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Start a task, once the one before has ended."""
        self.wait()
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._task = thread.submit(task)
        thread.shutdown(wait=False)  # it ends with the task

    def wait(self) -> None:
        """Wait until the task has ended, and raise its error, once."""
        if self._task is not None:
            wait([self._task])
            ended, self._task = self._task, None
            ended.result()

    def check(self) -> None:
        """Raise the error of a task that has ended, without waiting."""
        if self._task is not None and self._task.done():
            self.wait()
