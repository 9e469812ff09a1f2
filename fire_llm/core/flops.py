"""Floating-point operations: what a token takes, and what devices give."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def flops_per_token(model: PreTrainedModel, context: int) -> float | None:
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
    head = getattr(model.get_output_embeddings(), "weight", None)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head}
    weights = sum(p.numel() for p in model.parameters() if p not in tables)
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return float(6.0 * weights + 12.0 * text.num_hidden_layers * width * context)
