"""Configs of checkpoints that others made: read in bounds, never a reason to build for hours or to fetch code."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fire_llm.core.errors import UserError, did_you_mean, first_line, reading
from fire_llm.core.files import read_file, refuse_irregular
from fire_llm.core.hub import no_folder, settle_hub

CONFIG = "config.json"
MOST_LAYERS, MOST_PARTS, MOST_ENTRIES = 2_000, 10**5, 10**8
"""Of layers; of what else is counted, experts and labels for example; of rows, columns or positions."""

_BOUNDS = (
    (r"(^|_)(layers?|depths?|blocks?|stages?|repeats)$", MOST_LAYERS),
    (r"^n_(positions|ctx|embd|inner|words|vocab)$|_(size|embeddings|dim)$", MOST_ENTRIES),
    (r"^(n|num)_|(experts|heads|labels|classes)$", MOST_PARTS),
)
_DEEPEST = 50
_NO_ATTRIBUTES = ("auto_map", "model_type", "trust_remote_code")
_ATTENTION = ("eager", "sdpa", "flex_attention")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json, or a file of that kind, as plain data.

    Raises:
        UserError: It is missing, no JSON object, or bears what `refuse_sizes` refuses.
    """
    path = folder if folder.is_file() else folder / CONFIG
    raw = read_file(path)
    try:
        settings = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON ({error}): download or copy it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' is not a JSON object: download or copy it again")
    refuse_sizes(settings, f"'{path}'")
    return settings


def read_config(name: str) -> Any:
    """Return the transformers config of a file, a folder or a Hub id, with an attention that is on this machine.

    Args:
        name: A file, a folder or a Hub id.

    Raises:
        UserError: There is none, or none that transformers can read; or `read_settings`.
    """
    from transformers import AutoConfig, PreTrainedConfig

    folder = Path(name)
    if folder.is_file():
        read_settings(folder)
        unread = f"'{folder}' is no config that transformers can read"
    elif folder.is_dir():
        refuse_irregular(folder)
        read_settings(folder)
        unread = f"'{folder / CONFIG}' is no config that transformers can read"
    else:
        settle_hub()
        unread = f"model: {no_folder(name)}, and no config could be read from '{name}'"
    with reading(unread):
        if not folder.exists():
            refuse_sizes(PreTrainedConfig.get_config_dict(name)[0], f"'{name}'")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    _refuse_kernels(config, name)
    return config


def refuse_sizes(settings: Any, where: str, *, key: str = "", depth: int = 0) -> None:
    """Refuse numbers of layers, labels and the like that would take hours to build, and data without end.

    Args:
        settings: Plain data of a config, or a part of it.
        where: Of the config, for the message.
        key: Under which the part stands.
        depth: How deep it stands.

    Raises:
        UserError: With the key, its value and the most that is allowed.
    """
    if depth > _DEEPEST:
        raise UserError(f"{where} holds data in data, more than {_DEEPEST} deep: no config of transformers does")
    if isinstance(settings, Mapping):
        for name, part in settings.items():
            refuse_sizes(part, where, key=str(name), depth=depth + 1)
    elif isinstance(settings, (list, tuple)):
        for part in settings:
            refuse_sizes(part, where, key=key, depth=depth + 1)
    elif isinstance(settings, (int, float)):
        limit = next((limit for pattern, limit in _BOUNDS if re.search(pattern, key)), None)
        if limit is not None and settings > limit:
            raise UserError(f"{where}: {key} is {str(settings)[:30]}; at most {limit:,} is allowed. Correct it")


def set_attribute(config: Any, key: str, value: Any, refusal: str) -> None:
    """Set an attribute of a config, or of a part of one.

    Raises:
        UserError: The config's class refuses the value: `refusal`, and what the class says.
    """
    try:
        setattr(config, key, value)
    except Exception as error:  # the classes' own checks raise what they like
        raise UserError(f"{refusal}: {first_line(error.__cause__ or error)}") from error


def refuse_attributes(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse what is no attribute that a config stores, what would bring code, and sizes beyond the bounds.

    Args:
        config: Of the type.
        given: Attributes by name.

    Raises:
        UserError: Naming the first of them, and the nearest attribute.
    """
    refuse_sizes(given, "model.config")
    for key in given:
        try:
            is_attribute = not callable(getattr(config, key))
        except AttributeError:
            is_attribute = False
        except Exception:  # of an attribute that layers may have otherwise
            is_attribute = True
        if key in _NO_ATTRIBUTES or key.startswith("_") or not is_attribute:
            attributes = [k for k in config.to_dict() if not k.startswith("_")]
            raise UserError(f"model: {type(config).__name__} has no attribute '{key}'.{did_you_mean(key, attributes)}")


def _refuse_kernels(config: Any, name: str) -> None:
    """Refuse an attention that transformers would fetch from the Hub as code; leave out one that is not here.

    Raises:
        UserError: Naming the attention.
    """
    for part in _parts(config):
        kernel = part._attn_implementation
        if "/" in str(kernel):
            raise UserError(
                f"'{name}': attn_implementation {kernel!r} of its config names code on the Hub, which is never "
                f"fetched: take it out of {CONFIG}, or write one of {', '.join(_ATTENTION)}"
            )
        here = kernel is None or kernel in _ATTENTION or (kernel == "flash_attention_2" and find_spec("flash_attn"))
        if not here:
            part._attn_implementation = None
            warnings.warn(
                f"'{name}': attn_implementation {kernel!r} of its config is left out: it is no attention of this "
                "machine. transformers' own is taken, which differs by rounding alone",
                stacklevel=3,
            )


def _parts(config: Any) -> Iterator[Any]:
    """Yield a config and those inside it, the outer ones first."""
    yield config
    for key in config.sub_configs:
        if (inner := getattr(config, key, None)) is not None:
            yield from _parts(inner)
