"""The longest text that a model reads at once: one answer for every causal LM type of transformers.

Types with a table of positions (GPT-2, RoBERTa, OPT, GPT-J, Whisper …) cannot read more than it holds. Types without
one (Llama, Falcon with ALiBi, Zamba …) can, but were made for the length in their config, and what they give beyond it
is no measure of them. Both are refused beyond it. Types whose config names no length (BLOOM, Mamba, XLNet …) have no
limit. A sliding window is not a limit: it bounds what a layer sees, not what a model reads.
"""

from __future__ import annotations

from math import prod
from typing import Any

from fire_llm.core.errors import UserError

DEFAULT = 1024
"""Tokens read at once where nobody names a context and the model can read as many."""

_ATTRIBUTES = {"mpt": "max_seq_len", "whisper": "max_target_positions"}
"""What holds the length, where it is not `max_position_embeddings` (which many configs map to another name)."""
FROM_PADDING = {
    "camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
}  # fmt: skip
"""Types whose first token has the position after the padding token's id: of 514 positions, 512 hold tokens."""


def vocabulary_of(model: Any) -> int:
    """Return how many tokens a language model knows.

    Raises:
        UserError: It is none of transformers.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise UserError(
            f"{type(model).__name__} is no language model of transformers: its config has no vocab_size. Perplexity "
            "and diagnose read tokens; diagnose_module measures any network"
        )
    return size


def longest_context(config: Any) -> int | None:
    """Return the most tokens that a model reads at once, or None where it has no limit.

    Args:
        config: The transformers config of a causal LM; of a composite one, its text model counts.
    """
    text = config.get_text_config()
    kind = text.model_type
    longest: int | None = getattr(text, positions_attribute(text), None)
    if longest is None or longest < 0:  # XLNet says -1
        return None
    if kind in FROM_PADDING:
        longest -= (text.pad_token_id or 0) + 1
    if kind == "prophetnet":
        longest -= 1  # its predicting stream reads the position after the last token's
    if kind == "reformer" and text.axial_pos_embds:
        longest = min(longest, prod(text.axial_pos_shape))
    return max(longest, _stretched(text))


def refuse_length(config: Any, length: int) -> None:
    """Refuse a length of sequences that a model cannot be trained with, though it reads texts of that length.

    Raises:
        UserError: A Reformer's positions are laid out for one length in training.
    """
    text = config.get_text_config()
    if text.model_type == "reformer" and text.axial_pos_embds and length != (wanted := prod(text.axial_pos_shape)):
        shape = [*text.axial_pos_shape]
        raise UserError(
            f"model.context: {length} tokens a sequence do not fit axial_pos_shape {shape}: a Reformer with axial "
            f"positions trains on exactly {' x '.join(map(str, shape))} = {wanted} tokens. Set the context to that, or "
            "give an axial_pos_shape whose product is the context"
        )


def positions_attribute(text: Any) -> str:
    """Return the name under which the config of a text model stores its number of positions."""
    name = _ATTRIBUTES.get(text.model_type, "max_position_embeddings")
    return str(text.attribute_map.get(name, name))


def choose_context(config: Any, wanted: int | None, name: str = "context") -> int:
    """Return the tokens to read at once: those wanted, or else as many as the model reads, at most `DEFAULT`.

    Args:
        config: As in `longest_context`.
        wanted: Tokens, None for the default.
        name: What the user calls them.

    Raises:
        UserError: The model does not read as many.
    """
    longest = longest_context(config)
    default = DEFAULT if longest is None else min(longest, DEFAULT)
    context = default if wanted is None else wanted
    if longest is None and context < 1:
        raise UserError(f"{name} {context} must be at least 1")
    if longest is not None and not 1 <= context <= longest:
        raise UserError(
            f"{name} {context} must lie between 1 and {longest}, the most tokens that the model reads at once"
        )
    return context


def _stretched(text: Any) -> int:
    """Return the tokens that YaRN stretches rotary positions to, 0 without it.

    Configs hold that length in `max_position_embeddings` too, but for those where YaRN was added to a finished model:
    Qwen2.5 keeps 32768 there, beside a factor of 4. Other kinds of scaling do not record what was stretched.
    """
    parameters = getattr(text, "rope_parameters", None) or {}
    layers = [parameters] if "rope_type" in parameters else parameters.values()  # one for all, or one a kind of layer
    yarn = [rope for rope in layers if isinstance(rope, dict) and rope.get("rope_type") == "yarn"]
    # Where one is null, transformers takes their product to be `max_position_embeddings`.
    factors = [(rope.get("factor") or 0, rope.get("original_max_position_embeddings") or 0) for rope in yarn]
    return max((int(factor * original) for factor, original in factors), default=0)
