"""Dropout, whatever a config calls it: `resid_pdrop`, `attention_dropout` or `hidden_dropout_prob`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from fire_llm.architectures.configs import set_attribute
from fire_llm.core.errors import UserError

_DROPOUT = re.compile(r"(^|_)(dropout(_prob|_p)?|pdrop)$")
_ELSEWHERE = ("activation_", "classifier_", "mlp_", "summary_")
"""Before dropouts inside the MLP, and of heads that no causal LM has."""


def dropout_keys(config: Any) -> list[str]:
    """Return what a config calls the dropouts of its embeddings, its attention and its residual stream."""
    return list(dict.fromkeys(key for _, key in _places(config)))


def set_dropout(config: Any, share: float, given: Iterable[str] = ()) -> None:
    """Set every dropout of embeddings, attention and residual stream.

    Args:
        config: Of a transformers model.
        share: Of the values that are dropped, 0 to 1.
        given: Attributes that are set otherwise.

    Raises:
        UserError: The type has none, refuses the share, or has one of them among those given.
    """
    keys, name = dropout_keys(config), type(config).__name__
    if not keys and share > 0:
        raise UserError(f"model.dropout: {name} has no dropout; remove the key")
    if twice := sorted(set(keys) & set(given)):
        raise UserError(f"model.dropout: model.config gives {', '.join(twice)} too: leave one of them out")
    for owner, key in [*_places(config)]:
        set_attribute(owner, key, share, f"model.dropout: {name} refuses {share} as {key}")


def _places(config: Any) -> Iterator[tuple[Any, str]]:
    text = config.get_text_config()
    for owner in (text, *(part for name in text.sub_configs if (part := getattr(text, name, None)) is not None)):
        for key, value in vars(owner).items():
            if _DROPOUT.search(key) and not key.startswith(_ELSEWHERE) and isinstance(value, int | float):
                yield owner, key
