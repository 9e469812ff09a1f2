"""Freed memory: kept for the next step, given back after the last."""

from __future__ import annotations

import ctypes
import gc
import platform

import torch


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of giving it back and faulting it in again at every step.

    Measured on two cores with a 1 M-parameter GPT: 1.15 to 1.22 times the training speed, three pairs of runs.
    """
    if platform.libc_ver()[0] == "glibc" and not torch.accelerator.is_available():
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks


def release_memory() -> None:
    """Free the models that a training has left behind, with their gradients and moments.

    A trainer and its parts refer to each other. Python frees them when it next searches for such cycles: most often
    when the next model is already on the accelerator.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
