"""Configs of models that begin with new weights: any causal LM type of transformers, made for a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fire_llm.architectures.configs import refuse_attributes
from fire_llm.architectures.context import DEFAULT, FROM_PADDING, longest_context, positions_attribute
from fire_llm.core.errors import UserError, did_you_mean, first_line

VOCABULARY_MULTIPLE = 64
"""A vocabulary that nobody fixes is padded to a multiple of this, which GEMM kernels like."""

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Attributes of a config that are a tokenizer's."""

_FOLLOWING = ("unpadded_vocab_size", "vocab_size_per_layer_input")
"""Attributes that are the vocabulary's size too: of Inkling's head, of a table in each layer of Gemma 3n and 4."""

_BESIDE_TEXT = {"audio_config", "audio_encoder", "audio_encoder_config", "text_config", "vision_config", "vq_config"}
"""Parts of configs of models that read more than tokens of text."""

_DECODER = ("is_decoder", "causal")
"""Attributes without which encoders, listed as causal LMs too, would read ahead."""


_PADDING = {*FROM_PADDING, "modernbert-decoder", "xlm"}
"""Types that find positions by their padding token, or insist on one."""

_UNFIT = {
    "blt": "reads bytes, and not the tokens of a tokenizer",
    "cpmant": "lets a token see those after it",
    "xlnet": "lets a token see those after it",
}
"""Types that transformers lists as causal LMs and that plain text cannot be learned with."""


def causal_types() -> list[str]:
    """Return the model types whose causal LM transformers can build."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def architecture_fault(architecture: str) -> str | None:
    """Return why no new model of a type can be had, None where it can."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = causal_types()
    if architecture in known:
        return f"'{architecture}' {_UNFIT[architecture]}; take another" if architecture in _UNFIT else None
    near = did_you_mean(architecture, known)
    what = "is no causal language model" if architecture in CONFIG_MAPPING_NAMES else "is no model type of transformers"
    return (
        f"'{architecture}' {what}.{near} Known are transformers' causal LM types, such as llama, qwen3, gpt2, mixtral"
    )


def fresh_config(
    architecture: str,
    preset: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    vocabulary: int,
    ids: Mapping[str, int | None] | None,
    context: int | None = None,
) -> Any:
    """Return the config of a new model.

    The vocabulary, the ids of the tokenizer's special tokens and the longest text are those of the run, unless `given`
    has others. transformers' own default would be another tokenizer's, and a padding id of another tokenizer would
    keep an embedding of this one at zero.

    Args:
        architecture: A causal LM type.
        preset: Attributes in place of transformers' own defaults.
        given: Attributes that a user gives, before all others.
        vocabulary: Tokens of the tokenizer; padded to a multiple of `VOCABULARY_MULTIPLE`.
        ids: The tokenizer's, by the names in `IDS`; None where it is not known yet.
        context: Tokens a sequence; by default as many as the preset or the type reads, at most `DEFAULT`.

    Raises:
        UserError: There is no such causal LM, or it reads more than text; the type has no such attribute, or refuses
            a value; it needs a padding token, and the tokenizer has none.
    """
    from transformers import CONFIG_MAPPING

    if fault := architecture_fault(architecture):
        raise UserError(f"model.architecture: {fault}")
    kind = CONFIG_MAPPING[architecture]
    refuse_other_than_text(kind, architecture)
    standard = kind()
    refuse_attributes(standard, given)
    chosen = _real_names(kind, given)
    padded = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if ids is None:
        ids = _replaced_ids(standard, architecture, given.get("vocab_size", preset.get("vocab_size") or padded))
    elif architecture in _PADDING and ids["pad_token_id"] is None and given.get("pad_token_id") is None:
        raise UserError(
            f"model: {kind.__name__} needs a padding token, and the tokenizer has none: give a tokenizer that has one, "
            "or the id of a token that no text holds as pad_token_id of model.config"
        )
    settings = _rename(kind, {**ids, "vocab_size": padded})
    settings |= {key: True for key in _DECODER if getattr(standard, key, None) is False}
    named = _rename(kind, {**preset, **given})
    settings |= {key: value for key, value in named.items() if value is not None or key in chosen}
    for key in _FOLLOWING:
        if hasattr(standard, key):
            settings.setdefault(key, settings["vocab_size"])
    heads, shared = (settings.get(key) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and shared > 0 and heads % shared:
        raise UserError(
            f"model.config: {heads} attention heads cannot share {shared} heads of keys and values "
            "(num_key_value_heads): give a divisor"
        )
    try:
        config = kind(**settings)
        longest, positions = longest_context(config), positions_attribute(config)
        if longest is not None and not {positions, "rope_parameters", "rope_scaling"} & chosen:
            wanted = context or min(longest, DEFAULT)
            # Some types count positions from their padding token's id on.
            config = kind(**{**settings, positions: getattr(config, positions) + wanted - longest})
    except UserError:
        raise
    except Exception as error:  # the classes' own checks raise what they like
        raise UserError(
            f"model.config: {kind.__name__} refuses {given or settings}: {first_line(error.__cause__ or error)}"
        ) from error
    return config


def _rename(kind: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes under the names that the class of a config stores them under."""
    return {kind.attribute_map.get(key, key): value for key, value in settings.items()}


def _real_names(kind: Any, given: Mapping[str, Any]) -> set[str]:
    """Return the names under which a class of configs stores what is given.

    Raises:
        UserError: Two of the attributes are one.
    """
    names: dict[str, list[str]] = {}
    for key in given:
        names.setdefault(kind.attribute_map.get(key, key), []).append(key)
    twice = "; ".join(" and ".join(keys) for keys in names.values() if len(keys) > 1)
    if twice:
        raise UserError(f"model.config: {kind.__name__} has one attribute for {twice}: leave one of them out")
    return set(names)


def _replaced_ids(standard: Any, architecture: str, vocabulary: Any) -> dict[str, int | None]:
    """Return ids in place of a type's own that a vocabulary does not hold; the others stay."""
    own = {key: getattr(standard, key, None) for key in IDS}
    beyond = [k for k, i in own.items() if isinstance(i, int) and isinstance(vocabulary, int) and i >= vocabulary]
    return {key: None if key == "pad_token_id" and architecture not in _PADDING else 0 for key in beyond}


def refuse_other_than_text(kind: type, name: str) -> None:
    """Refuse a type that reads images or sound, or whose config is of several models.

    Args:
        kind: The class of a config.
        name: Its model type.

    Raises:
        UserError: Naming the type of its text model, where there is one.
    """
    parts: Mapping[str, Any] = getattr(kind, "sub_configs", {})
    if not _BESIDE_TEXT & parts.keys():
        return
    text = getattr(parts.get("text_config"), "model_type", None)
    alternatives = [other for other in causal_types() if other.startswith(f"{name}_text") or other == text]
    advice = f"'{alternatives[0]}'" if alternatives else "a causal LM of text, such as llama"
    raise UserError(f"model: '{name}' is no model of text alone, and new weights are for those; take {advice}")
