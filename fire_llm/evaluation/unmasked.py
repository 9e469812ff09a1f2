"""Causal attention without a mask, for texts that transformers itself would read without one.

For a plain causal text transformers leaves out the mask and sets the kernel's `is_causal`. But it decides this by
the values of the positions, which it cannot read while torch.compile traces: a compiled model gets a dense mask, which
flash attention does not take (transformers 5.17 to 5.23). Without torch.compile, the host waits for an accelerator at
every forward pass to read the same values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fire_llm.architectures.context import vocabulary_of
from fire_llm.distributed import in_parts
from fire_llm.evaluation.precision import attention_configs, attention_kept, evaluating, own_precision

UNMASKED = "fire_llm_causal"
"""Name under which transformers finds its own SDPA attention, always without a mask."""

_RECORDING = "fire_llm_record_masks"
"""Name under which it finds SDPA attention that records in `_masked` whether it got a mask."""


def needs_no_mask(model: Any, context: int, part: nn.Module | None = None, root: nn.Module | None = None) -> bool:
    """Return whether a model attends to plain texts of a length causally and in no other way.

    The model reads such a text twice. The first time shows whether transformers makes a mask for any layer, which a
    window, a chunk or a bias of positions would need. The second time, without masks, must give the same output. The
    answer is remembered.

    Args:
        model: A causal LM of transformers; it is left as it was.
        context: Tokens of a text.
        part: Its trunk, if that can run alone; this saves the logits.
        root: For a model in shards, the module that FSDP2 gathers first: the model, or torch.compile's wrapper around
            it. Ranks try together, and only the first length that they ask for; for other lengths the answer is False.

    Returns:
        False also if its attention is not SDPA, if its forward pass fails, or for shards without a known trunk.
    """
    configs = attention_configs(model)
    if not configs or any(config._attn_implementation != "sdpa" for config in configs):
        return False
    if root is not None and part is None:
        return False
    known = _KNOWN.setdefault(model, {})
    if context not in known:
        if root is not None and known:  # some ranks would gather shards for a length that others know already
            return False
        with evaluating(model):
            known[context] = _try(model, configs, context, part or model, root)
    return known[context]


def _try(model: Any, configs: Sequence[Any], context: int, part: nn.Module, root: nn.Module | None) -> bool:
    _register()
    device = next(model.parameters()).device
    ids = torch.arange(context, device=device)[None] % vocabulary_of(model)
    _masked.clear()
    try:
        with own_precision(model), torch.no_grad():
            outputs = []
            for name in (_RECORDING, UNMASKED):
                with _attention(configs, name):
                    run = partial(part, input_ids=ids, use_cache=False)
                    outputs.append((run() if root is None else in_parts(root, part, run))[0])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return bool(_masked) and not any(_masked) and torch.equal(*outputs)


@contextmanager
def unmasked(model: Any) -> Iterator[None]:
    """Leave out the masks of a model inside the block; `needs_no_mask` must be true of it."""
    with _attention(attention_configs(model), UNMASKED):
        yield


@contextmanager
def _attention(configs: Sequence[Any], name: str) -> Iterator[None]:
    with attention_kept(configs):
        for config in configs:
            config._attn_implementation = name
        yield


_KNOWN: weakref.WeakKeyDictionary[Any, dict[int, bool]] = weakref.WeakKeyDictionary()
"""By model, for each length of texts, whether it needs no mask."""

_masked: list[bool] = []
"""For each call of attention in `_try`, whether it had a mask or was not causal."""


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if UNMASKED in AttentionInterface._global_mapping:
        return

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        _masked.append(mask is not None or not causal)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    # transformers makes no mask for an attention without a mask function, and does not read the positions first.
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionInterface.register(_RECORDING, note)
    AttentionMaskInterface.register(_RECORDING, sdpa_mask)
