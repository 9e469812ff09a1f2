"""Causal attention without a mask, wherever transformers itself would make none.

transformers leaves out the mask of a plain causal text, and tells the kernel that it is causal. But it decides so by
the values of the positions, which it cannot read while torch.compile traces: a compiled model gets a dense mask, which
flash attention does not take (transformers 5.17 to 5.23). Outside of torch.compile an accelerator is waited for at
every forward pass, for the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fire_llm.evaluation.precision import own_precision

UNMASKED = "fire_llm_causal"
"""Name under which transformers finds its own SDPA attention, with masks that are always left out."""

_LOOK = "fire_llm_look"


def needs_no_mask(model: Any, context: int, part: nn.Module | None = None) -> bool:
    """Tell whether a model attends to plain texts of a length causally and in no other way.

    It reads such a text twice: as it is, to see that transformers makes no mask for any of its layers (a window, a
    chunk or a bias of positions would need one), and without masks, to see that nothing else changed.

    Args:
        model: A causal LM of transformers, in evaluation mode; left as it was found.
        context: Tokens of a text.
        part: Its trunk, where that can be run alone and saves the logits.

    Returns:
        False too where its attention is not SDPA, or where it cannot be looked at.
    """
    if not uses_sdpa(model):
        return False
    configs = _configs(model)
    _register()
    device = next(model.parameters()).device
    ids = torch.arange(context, device=device)[None] % int(model.config.get_text_config().vocab_size)
    _seen.clear()
    try:
        with own_precision(model), torch.no_grad():
            outputs = []
            for name in (_LOOK, UNMASKED):
                with _attention(configs, name):
                    outputs.append((part or model)(input_ids=ids, use_cache=False)[0])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return bool(_seen) and not any(_seen) and torch.equal(*outputs)


def uses_sdpa(model: Any) -> bool:
    """Tell whether all of a model's attention is transformers' SDPA."""
    configs = _configs(model)
    return bool(configs) and all(config._attn_implementation == "sdpa" for config in configs)


@contextmanager
def unmasked(model: Any) -> Iterator[None]:
    """Leave out the masks of a model of which `needs_no_mask` is true, inside the block."""
    with _attention(_configs(model), UNMASKED):
        yield


def _configs(model: nn.Module) -> list[Any]:
    """Return the configs of a model's modules, once each, that say how it attends."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in found.values() if getattr(config, "_attn_implementation", None) is not None]


@contextmanager
def _attention(configs: Sequence[Any], name: str) -> Iterator[None]:
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


_seen: list[bool] = []
"""Whether each attention of a text that was looked at had a mask."""


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if UNMASKED in AttentionInterface._global_mapping:
        return

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        _seen.append(mask is not None or not causal)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    # An attention that masks are not known of gets none, before anything is looked at.
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionInterface.register(_LOOK, look)
    AttentionMaskInterface.register(_LOOK, sdpa_mask)
