"""Measure how fast a phase trains: tokens a second, MFU, memory, and the share of time spent waiting for data.

Nothing here waits for an accelerator. Clocks are read around what the host does, and read out where `Trainer` logs: it
has waited for the loss by then.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fire_llm.core.flops import flops_per_token, peak_flops

MEASURES = ("tokens_per_second", "mfu", "peak_memory_bytes", "data_wait_share")
"""What is logged beside each training loss, where it is known."""


class Throughput:
    """Measure the steps between two logs, without evaluations and checkpoints.

    Args:
        flops: Floating-point operations a token, None where unknown.
        peak: FLOP/s of all devices together, None where unknown.
        device: Whose memory is measured; on CUDA, the peak of torch's allocator is reset here.
    """

    def __init__(self, flops: float | None, peak: float | None, device: torch.device) -> None:
        self.flops, self.peak, self.device = flops, peak, device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.stop()

    def stop(self) -> None:
        """End a measurement; the next step begins another."""
        self._began: float | None = None
        self._waited = 0.0
        self._tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        began = time.perf_counter()
        if self._began is None:
            self._began = began
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave out the time of the block, such as that of a checkpoint in the middle of a measurement."""
        began = time.perf_counter()
        yield
        if self._began is not None:
            self._began += time.perf_counter() - began

    def count(self, tokens: int) -> None:
        """Count tokens that are about to be trained on, over all ranks."""
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Return those of `MEASURES` that are known, for the steps since the measurement began."""
        if self._began is None:
            return {}
        seconds = time.perf_counter() - self._began
        rate = self._tokens / seconds
        measured = {"tokens_per_second": rate, "peak_memory_bytes": peak_memory(self.device)}
        if self.flops is not None and self.peak is not None:
            measured["mfu"] = rate * self.flops / self.peak
        return {**measured, "data_wait_share": self._waited / seconds}


def throughput(trainer: Any) -> Throughput:
    """Return the measurement of a `ContinualTrainer`'s phase, with MFU where all samples have one length."""
    args, flops = trainer.args, None
    if trainer.order == "numbered":  # other samples may have several lengths
        flops = flops_per_token(trainer.model, len(trainer.train_dataset[0]["input_ids"]))
    peak = peak_flops(args.device, half=args.bf16 or args.fp16)
    total = None if peak is None else peak * args.world_size
    return Throughput(flops, total, args.device)


def peak_memory(device: torch.device) -> int:
    """Return the peak of memory in bytes: of torch on CUDA, since it was reset, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
