"""How fast a phase trains: tokens a second, MFU, memory, and the share of time spent waiting for data.

Nothing here waits for an accelerator: clocks are read around what the host does, and what is derived from them is
derived where `Trainer` logs, which has waited for the loss by then.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MEASURES = ("tokens_per_second", "mfu", "peak_memory_bytes", "data_wait_share")
"""What is logged beside each training loss, where it is known."""

PEAK_FLOPS = {
    "GB200": 2.5e15, "B200": 2.25e15, "GH200": 989.4e12, "H200": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989.4e12, "A100": 312e12, "L40S": 362.05e12, "L4": 121e12, "A10": 125e12, "V100": 125e12, "T4": 65e12,
    "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense 16-bit tensor-core FLOP/s by a part of the device's name; the first that matches counts.

Source: NVIDIA's data sheets and architecture papers, without sparsity, with fp32 accumulation.
"""


def peak_flops(device: torch.device, half: bool) -> float | None:
    """Return a device's peak FLOP/s, None where it is not known.

    Args:
        device: Where training runs.
        half: Whether its products are in bf16 or fp16.
    """
    if device.type != "cuda" or not half:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def flops_per_token(model: nn.Module, context: int) -> float | None:
    """Return the floating-point operations of one token, forward and backward; None where this does not count them.

    6 for every weight that is multiplied, and 12·layers·width·context for attention. Tables that are only looked up
    do not count, a head does. Stacked experts, of which a token sees a few, and models without attention are not
    counted.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    config: Any = model.config
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    stacked = any(p.ndim == 3 for p in model.parameters())
    if heads is None or stacked:
        return None
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head}
    weights = sum(p.numel() for p in model.parameters() if p not in tables)
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return 6.0 * weights + 12.0 * text.num_hidden_layers * width * context


class Speedometer:
    """Measure the steps between two logs, evaluations and checkpoints left out.

    Args:
        flops: Floating-point operations a token, None where unknown.
        peak: FLOP/s of all devices together, None where unknown.
        device: Whose memory is looked at: torch's allocator on CUDA, elsewhere the process's resident memory.
    """

    def __init__(self, flops: float | None, peak: float | None, device: torch.device) -> None:
        self.flops, self.peak, self.device = flops, peak, device
        self.stop()

    def stop(self) -> None:
        """End a measurement: the next one begins with the next step."""
        self._began: float | None = None
        self._waited = 0.0
        self._tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent in here as waiting for data."""
        began = time.perf_counter()
        if self._began is None:
            self._began = began
        yield
        self._waited += time.perf_counter() - began

    def count(self, tokens: int) -> None:
        """Count tokens that are about to be trained on, over all ranks."""
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Return what is known of `MEASURES`, of the steps since the measurement began."""
        if self._began is None:
            return {}
        seconds = time.perf_counter() - self._began
        rate = self._tokens / seconds
        measured = {"tokens_per_second": rate, "peak_memory_bytes": peak_memory(self.device)}
        if self.flops is not None and self.peak is not None:
            measured["mfu"] = rate * self.flops / self.peak
        return {**measured, "data_wait_share": self._waited / seconds}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: of a CUDA device where it trains on one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
