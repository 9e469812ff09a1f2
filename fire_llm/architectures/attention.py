"""Which kernels of attention can be trained with here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from fire_llm.core.errors import UserError

PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""The module and the package of kernels that torch does not bring. Nothing is fetched from the Hub in their place."""


def refuse_attention(name: str, model: Any, *, half: bool, document_mask: bool) -> None:
    """Refuse an attention that cannot be trained with.

    Args:
        name: As transformers calls it.
        model: On any device, meta too.
        half: Whether products are in 16 bits.
        document_mask: Whether attention stays within documents.

    Raises:
        UserError: Why, and what to take.
    """
    why = _machine_lacks(name) or _model_lacks(name, model)
    if why is None and name in PACKAGES:
        if not half:
            why = "it computes in 16 bits alone: set precision to bf16"
        elif document_mask:
            why = "it takes no mask, which batch.document_mask needs: take sdpa or flex_attention"
    if why is not None:
        raise UserError(f"attention: '{name}' cannot be had: {why}")


def _machine_lacks(name: str) -> str | None:
    if name in PACKAGES:
        module, package = PACKAGES[name]
        if find_spec(module) is None:
            return f"the package {package} is not installed; take sdpa, which has a flash kernel of torch's own"
    if name not in ("eager", "sdpa") and not torch.cuda.is_available():
        return "there is no CUDA device here; take sdpa or eager"
    return None


def _model_lacks(name: str, model: Any) -> str | None:
    supports = {
        "eager": True,
        "sdpa": getattr(model, "_supports_sdpa", False),
        "flex_attention": getattr(model, "_supports_flex_attn", False),
    }
    if supports.get(name, getattr(model, "_supports_flash_attn", False)):
        return None
    others = [other for other, has in supports.items() if has]
    return f"{type(model).__name__} does not support it; take {' or '.join(others)}"
