"""Causal attention without a mask, wherever transformers itself would make none.

transformers leaves out the mask of a plain causal text, and sets the kernel's `is_causal`. But it decides so by
the values of the positions, which it cannot read while torch.compile traces: a compiled model gets a dense mask, which
flash attention does not take (transformers 5.17 to 5.23). Outside of torch.compile an accelerator is waited for at
every forward pass, for the same values.
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
"""Name under which transformers finds its own SDPA attention, with masks that are always left out."""

_LOOKING = "fire_llm_look"


def needs_no_mask(model: Any, context: int, part: nn.Module | None = None, root: nn.Module | None = None) -> bool:
    """Return whether a model attends to plain texts of a length causally and in no other way.

    It reads such a text twice: as it is, to see that transformers makes no mask for any of its layers (a window, a
    chunk or a bias of positions would need one), and without masks, to see that nothing else changed. The answer is
    kept.

    Args:
        model: A causal LM of transformers; left as it was found.
        context: Tokens of a text.
        part: Its trunk, where that can be run alone and saves the logits.
        root: Of a model in shards, what FSDP2 gathers first: the model, or torch.compile's wrapper around it. Ranks
            look together, each at the first length that it asks for; of another length the answer is False.

    Returns:
        False too where its attention is not SDPA, where its forward pass fails, or for shards without a known trunk.
    """
    configs = attention_configs(model)
    if not configs or any(config._attn_implementation != "sdpa" for config in configs):
        return False
    if root is not None and part is None:
        return False
    known = _KNOWN.setdefault(model, {})
    if context not in known:
        if root is not None and known:  # ranks would gather shards for lengths that others have seen, or have not
            return False
        with evaluating(model):
            known[context] = _look(model, configs, context, part or model, root)
    return known[context]


def _look(model: Any, configs: Sequence[Any], context: int, part: nn.Module, root: nn.Module | None) -> bool:
    _register()
    device = next(model.parameters()).device
    ids = torch.arange(context, device=device)[None] % vocabulary_of(model)
    _seen.clear()
    try:
        with own_precision(model), torch.no_grad():
            outputs = []
            for name in (_LOOKING, UNMASKED):
                with _attention(configs, name):
                    run = partial(part, input_ids=ids, use_cache=False)
                    outputs.append((run() if root is None else in_parts(root, part, run))[0])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return bool(_seen) and not any(_seen) and torch.equal(*outputs)


@contextmanager
def unmasked(model: Any) -> Iterator[None]:
    """Leave out the masks of a model of which `needs_no_mask` is true, inside the block."""
    with _attention(attention_configs(model), UNMASKED):
        yield


@contextmanager
def _attention(configs: Sequence[Any], name: str) -> Iterator[None]:
    with attention_kept(configs):
        for config in configs:
            config._attn_implementation = name
        yield


_KNOWN: weakref.WeakKeyDictionary[Any, dict[int, bool]] = weakref.WeakKeyDictionary()
"""Whether each model needs no mask, by the length of the texts."""

_seen: list[bool] = []
"""Whether each attention of the text that is read in `_look` had a mask."""


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

    # transformers makes no mask for an attention without a mask function, and does not read the positions first.
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionInterface.register(_LOOKING, look)
    AttentionMaskInterface.register(_LOOKING, sdpa_mask)
