"""What the machine can do: its native precision and its memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fire_llm.core.errors import UserError

CPU_BF16 = "FIRE_LLM_CPU_BF16"
"""Environment variable that replaces the check of the processor: 1 or 0."""


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 natively; elsewhere bf16 is several times slower than fp32."""
    given = os.environ.get(CPU_BF16, "")
    if given not in ("", "0", "1"):
        raise UserError(f"{CPU_BF16} is '{given}': set it to 1 (native bf16) or 0 (none), or unset it to ask the CPU")
    if given:
        return given == "1"
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8", errors="replace") if flags.exists() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


def device_memory(device: torch.device) -> int:
    """Return the bytes of an accelerator's own memory, -1 where torch does not know."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else -1


def accelerator_memory() -> int:
    """Return `device_memory` of this process's accelerator, 0 where it has none."""
    if torch.cuda.is_available():
        return device_memory(torch.device("cuda", torch.cuda.current_device()))
    return -1 if torch.accelerator.is_available() else 0


def resolve_precision(precision: str) -> str:
    """Return a recipe's precision; `auto` is bf16 where the hardware multiplies it natively, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if torch.accelerator.is_available():
        return "fp32"
    return "bf16" if cpu_has_bf16() else "fp32"


def free_memory() -> int | None:
    """Return the bytes of free memory, of the machine or of the container; None where unknown."""
    free = [1024 * n for n in _numbers("/proc/meminfo", "MemAvailable:")]
    limits, used = _numbers(f"{_CGROUP}/memory.max"), _numbers(f"{_CGROUP}/memory.current")
    cached = _numbers(f"{_CGROUP}/memory.stat", "inactive_file")
    free += [limit - now + reclaimable for limit, now, reclaimable in zip(limits, used, cached, strict=False)]
    return min(free, default=None)


_CGROUP = "/sys/fs/cgroup"


def _numbers(path: str, name: str | None = None) -> list[int]:
    """Return the number in a file, or behind a name in it, as a list of one; an empty list without a number."""
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines()]
    except OSError:
        return []
    words = [line if name is None else line[1:] for line in lines if name in (None, *line[:1])]
    return [int(found[0]) for found in words[:1] if found and found[0].isdigit()]
