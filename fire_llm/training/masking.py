"""Check, on a few tokens, whether a model keeps documents apart that are packed into one block."""

from __future__ import annotations

from typing import Any

import torch

from fire_llm.architectures.context import longest_context
from fire_llm.core.errors import UserError
from fire_llm.evaluation.precision import evaluating

PROBE = (11, 1, 20)
"""Lengths of the documents that a model is checked with: longer than a convolution reaches, and of one token."""


def check_document_mask(model: Any) -> None:
    """Refuse a model in which a document reads the one before it, although its positions begin again at 0.

    transformers masks attention by such positions. States and convolutions run on, and some models count positions
    themselves.

    Args:
        model: A causal LM in fp32, not yet wrapped by an engine; left as it was found.

    Raises:
        UserError: Its logits differ from those of the documents read alone, or it takes no positions.
    """
    name, device, text = type(model).__name__, next(model.parameters()).device, model.config.get_text_config()
    longest = longest_context(model.config) or max(PROBE)
    documents = [torch.arange(min(n, longest), device=device) for n in PROBE]
    ids = [(places * 7 + 3 * len(places))[None] % int(text.vocab_size) for places in documents]
    try:
        with evaluating(model), torch.no_grad():
            alone = torch.cat([model(input_ids=one, use_cache=False).logits for one in ids], dim=1)
            packed = model(
                input_ids=torch.cat(ids, dim=1), position_ids=torch.cat(documents)[None], use_cache=False
            ).logits
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"batch.document_mask: {name} takes no positions of documents ({error}). {_INSTEAD}") from error
    # One long product rounds otherwise than three short ones, but reading a document changes a logit by about its size.
    # Some classes compute their softmax in fp32 in fp64 too.
    tolerance = 256 * torch.finfo(torch.float32).eps * float(alone.abs().max())
    if not bool(((packed - alone).abs() <= tolerance).all()):
        raise UserError(
            f"batch.document_mask: {name} reads across documents, whatever their positions say (a state or a "
            f"convolution runs on, or it counts positions by itself). {_INSTEAD}"
        )


_INSTEAD = (
    "Set it to false, or choose a model whose attention transformers masks by position_ids, such as GPT-2 or Llama"
)
