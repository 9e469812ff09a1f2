"""Which class of transformers a checkpoint is loaded as: the one that its config names, of image models too."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

CAUSAL = "AutoModelForCausalLM"

_MOST = 10
"""Names in `architectures` that are looked at; configs have one."""


def model_classes(config: Any) -> tuple[Any, ...]:
    """Return the classes that a checkpoint may be of, in the order they are tried; None: AutoModelForCausalLM's.

    `architectures` in the config names the class. AutoModelForCausalLM chooses where it names nothing that transformers
    has, a causal LM, or a model whose language model is one part of several. A bare trunk of a language model, such as
    GPT2Model, is loaded as one where that lacks nothing: its head is the embedding. Remote code is never asked.

    Args:
        config: A transformers config.
    """
    from transformers.models.auto import modeling_auto as auto

    named = named_class(config)
    if named is None or named.__name__ in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return (None,)
    if type(config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return (named,)
    several = (auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES)
    if any(named.__name__ in names.values() for names in several):
        return (None,)
    trunk = named.__name__ in auto.MODEL_MAPPING_NAMES.values() and not config.is_encoder_decoder
    return (None, named) if trunk else (named,)


def causal_class(config: Any) -> str:
    """Return what builds a config's causal LM: AutoModelForCausalLM, or else a class named there; empty without one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return CAUSAL
    causal_names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return next((name for name in getattr(config, "architectures", None) or () if name in causal_names), "")


def named_class(config: Any) -> Any:
    """Return the first of transformers' own model classes that a config's `architectures` names; None without one."""
    return first_class(getattr(config, "architectures", None), type(config))


def first_class(names: Any, config_class: type) -> Any:
    """Return the first class of transformers, by its name, that is a model of such a config; None where there is none.

    A model computes something: the common bases of a type's models, such as ViTPreTrainedModel, are none.

    Args:
        names: What `architectures` of a config holds; whatever a file may hold.
        config_class: Of the config.
    """
    import transformers

    for name in names[:_MOST] if isinstance(names, list) else ():
        kind: Any = None
        if isinstance(name, str) and not name.startswith("_"):
            with suppress(Exception):  # of a library that the class needs and that is not here
                kind = getattr(transformers, name, None)
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        computes = is_model and kind.forward is not nn.Module.forward
        if computes and kind.config_class is not None and issubclass(config_class, kind.config_class):
            return kind
    return None


def loader(settings: dict[str, Any]) -> str:
    """Return the name of what loads a checkpoint, by its config.json, for messages and cards."""
    names = settings.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else CAUSAL
