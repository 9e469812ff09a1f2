"""Floating-point operations: how many a token takes, and how many a second a device computes."""

from __future__ import annotations

import re
from collections.abc import Sequence
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

_ATTENTION = {
    "": "", "attention": "", "full_attention": "", "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}  # fmt: skip
"""Names of layers with attention in configs, and the attribute with the number of tokens that such a layer sees."""


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
    """Return the floating-point operations of one token, forward and backward; None for models that are not counted.

    6 for every weight that is multiplied, and 12·width·context for the attention of each layer, or 12·width·window
    where that is shorter; both as often as the layer runs. Embeddings, which are only looked up, do not count; a head
    does. Not counted are models with stacked experts, of which a token sees a few, or with layers without attention.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    config: Any = model.config
    attention = _attention(config.get_text_config(), context)
    stacked = any(p.ndim == 3 for p in model.parameters())
    if attention is None or stacked:
        return None
    head = getattr(model.get_output_embeddings(), "weight", None)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head}
    weights = sum(p.numel() for p in model.parameters() if p not in tables)
    runs = layer_runs(config.get_text_config())
    repeated = sum((n - 1) * size for n, size in zip(runs, layer_sizes(model, len(runs)), strict=False))
    return float(6.0 * (weights + repeated) + attention)


def layer_configs(text: Any) -> list[Any]:
    """Return the config of each layer of a text model: the model's own, unless it has one for each layer."""
    layers = getattr(text, "num_hidden_layers", 0)  # BLT has none: its parts have
    each = getattr(text, "per_layer_config", None) if layers else None
    return list(each) if isinstance(each, Sequence) else [text] * layers


def layer_runs(text: Any) -> list[int]:
    """Return how often a forward pass runs each layer of a text model: more than once in a loop."""
    first, end, runs = 0, 0, 1
    if hasattr(text, "n_recurrent_loops"):  # Dory
        first, runs = text.n_input_layers, text.n_recurrent_loops
        end = first + text.n_recurrent_layers
    elif hasattr(text, "loop_num_passes"):  # Inkling 2 Loop
        first, end, runs = text.loop_layer_index_start, text.loop_layer_index_end, text.loop_num_passes
    return [runs if first <= layer < end else 1 for layer in range(len(layer_configs(text)))]


def layer_sizes(model: nn.Module, layers: int) -> list[int]:
    """Return the number of parameters of each layer: of the first list with as many modules as there are layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return [sum(p.numel() for p in block.parameters()) for block in lists[0]] if lists else []


def _attention(text: Any, context: int) -> float | None:
    """Return the operations of a token's attention in all layers; None where one has none, or of an unknown kind."""
    layers = layer_configs(text)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [""] * len(layers)
    total = 0.0
    for layer, kind, runs in zip(layers, kinds, layer_runs(text), strict=False):
        heads, width = getattr(layer, "num_attention_heads", None), getattr(layer, "hidden_size", None)
        if kind not in _ATTENTION or not isinstance(heads, int) or not isinstance(width, int):
            return None
        window = getattr(layer, _ATTENTION[kind], None) if _ATTENTION[kind] else None
        key = getattr(layer, "qk_nope_head_dim", 0) + getattr(layer, "qk_rope_head_dim", 0)
        size = getattr(layer, "head_dim", None) or width // heads
        sizes = (key or size, getattr(layer, "v_head_dim", None) or size)  # of scores, of what they weigh
        if not all(isinstance(number, int) for number in (*sizes, window or 0)):
            return None
        total += 6.0 * heads * sum(sizes) * min(context, window or context) * runs
    return total if layers else None
