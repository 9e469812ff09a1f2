"""Causal LMs from presets, architectures, folders and the Hub: their configs, weights and tokenizers.

Adding a preset is one entry in `PRESETS`.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fire_llm.architectures.classes import CAUSAL, causal_class, named_class
from fire_llm.architectures.configs import (
    CONFIG,
    MOST_ENTRIES,
    MOST_LAYERS,
    read_config,
    read_settings,
    refuse_attributes,
    set_attribute,
)
from fire_llm.architectures.context import choose_context, longest_context
from fire_llm.architectures.dropout import set_dropout
from fire_llm.architectures.fresh import IDS, fresh_config, refuse_other_than_text
from fire_llm.architectures.lookup import class_of
from fire_llm.architectures.names import STEPS, unwrap
from fire_llm.core.errors import UserError, did_you_mean, first_line, reading
from fire_llm.core.files import refuse_irregular
from fire_llm.core.hub import no_folder, settle_hub
from fire_llm.core.manifest import SHARDED, in_shards
from fire_llm.data.encode import vocabulary_size
from fire_llm.data.stored_tokenizer import as_stored

_GPT: dict[str, Any] = {
    "model_type": "gpt2",
    # nn.GELU, not GPT-2's tanh form, as in the paper's code. Hugging Face draws N(0, 0.02) and residual projections
    # at 0.02/√(2·layers), which is the paper's initialisation; the biases that these classes carry start at zero.
    "activation_function": "gelu",
    "initializer_range": 0.02,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": True,
}

_ROTARY: dict[str, Any] = {
    # 12·768² parameters a layer, as in GPT-0.1B: 85 M without the embeddings. Models of this size tie them.
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "vocab_size": None,
}

PRESETS: dict[str, dict[str, Any]] = {
    # GPT-0.1B of arXiv 2602.08040: 50257 tokens padded to a multiple of 128.
    "gpt-0.1b": {**_GPT, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50304},
    # A few minutes on a laptop.
    "gpt-small": {**_GPT, "n_layer": 6, "n_head": 6, "n_embd": 192, "n_positions": 256, "vocab_size": None},
    # The demo: seconds a phase.
    "gpt-tiny": {**_GPT, "n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128, "vocab_size": None},
    # Llama's 8/3 of the width in the MLP, and keys and values for every head.
    "llama-0.1b": {**_ROTARY, "model_type": "llama", "intermediate_size": 2048, "rms_norm_eps": 1e-5},
    # Two heads a key and three times the width in the MLP, as in Qwen3-0.6B; its norms of queries and keys.
    "qwen3-0.1b": {
        **_ROTARY, "model_type": "qwen3", "intermediate_size": 2304, "num_key_value_heads": 6, "head_dim": 64,
        "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
"""By preset, attributes of the config of its `model_type`; where `vocab_size` is None, the tokenizer decides."""

WRAPPERS = tuple(f"{step}." for step in (*STEPS, "module"))
"""Parts of tensor names that torch.compile, data parallelism and other wrappers add."""
VOCABULARY = 50257
"""Size of the vocabulary, GPT-2's, that is assumed until the tokenizer is known."""
TRAINED = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
"""The `special_ids` of a tokenizer that a run trains."""


def config_for(
    name: str,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    dropout: float | None = None,
    vocabulary: int | None = None,
) -> Any:
    """Return the transformers config of a preset, a Hub id or a folder.

    Args:
        name: A preset's name, a Hub id or a local folder.
        tokenizer: Its vocabulary must fit; presets without a fixed vocabulary take its size, padded.
        context: Tokens a block; the preset's own by default.
        overrides: Attributes of the config to set; those of a Hub id or folder may not change a tensor's shape.
        dropout: Share that every dropout drops; None: as the config has it.
        vocabulary: Size of a tokenizer that does not exist yet and will have no padding token.

    Raises:
        UserError: For an unknown name or attribute, a context or vocabulary that does not fit.
    """
    if name in PRESETS:
        return new_config(
            None, PRESETS[name], tokenizer=tokenizer, context=context, overrides=overrides, dropout=dropout,
            vocabulary=vocabulary,
        )  # fmt: skip
    config = pretrained_config(name)
    if overrides:
        _override(config, overrides)
    return _finished(config, tokenizer, context, dropout, overrides)


def new_config(
    architecture: str | None,
    preset: Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    dropout: float | None = None,
    vocabulary: int | None = None,
) -> Any:
    """Return the config of a new model of an architecture, made for the tokenizer and the context.

    Args:
        architecture: A causal LM type of transformers, such as `llama`; None: the preset's `model_type`.
        preset: Attributes in the place of transformers' defaults.
        tokenizer: As in `config_for`, as all that follow.
        context: Tokens a block.
        overrides: Attributes of the config.
        dropout: Share that every dropout drops.
        vocabulary: Size of a tokenizer that does not exist yet and will have no padding token.

    Raises:
        UserError: There is no such architecture or attribute, or no model can be built.
    """
    base, overrides = dict(preset or {}), overrides or {}
    kind = base.pop("model_type", architecture)
    size = vocabulary_size(tokenizer) if tokenizer is not None else vocabulary or VOCABULARY
    longest = context or base.get("n_positions") or base.get("max_position_embeddings")
    ids = special_ids(tokenizer) if tokenizer is not None else None if vocabulary is None else TRAINED
    config = fresh_config(kind, base, overrides, vocabulary=size, ids=ids, context=longest)
    if kind == "gpt2":
        config.use_cache = False
    if overrides or preset is None:
        _refuse_unbuildable(config)
    return _finished(config, tokenizer, context, dropout, overrides, vocabulary)


def copied_config(
    place: str | Path, *, tokenizer: Any = None, context: int | None = None, dropout: float | None = None
) -> Any:
    """Return the config in a file, a folder or a Hub id, for new weights: the special tokens are the tokenizer's.

    Args:
        place: A config.json, a folder that holds one, or a Hub id.
        tokenizer: As in `config_for`, as all that follow.
        context: Tokens a block.
        dropout: Share that every dropout drops.

    Raises:
        UserError: There is none; it needs code of its own, has quantised weights, or reads more than text.
    """
    file = os.path.expanduser(place)
    config = read_config(file) if os.path.isfile(file) else pretrained_config(place)
    if getattr(config, "auto_map", None):
        raise UserError(
            f"model.config: '{place}' names code of its own (auto_map), which is never run: take auto_map out, and "
            f"transformers' own {config.model_type} is built"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"model.config: '{place}' is of quantised weights: take quantization_config out of it")
    refuse_other_than_text(type(config), config.model_type)
    for key, value in special_ids(tokenizer).items() if tokenizer is not None else ():
        setattr(config, key, value)
    _refuse_unbuildable(config)
    return _finished(config, tokenizer, context, dropout)


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Return the ids of a tokenizer's special tokens, by their names in a config; all None without a tokenizer.

    A padding token that also begins or ends texts counts as none: models keep the embedding of padding at zero.
    """
    bos, eos, pad = (getattr(tokenizer, key, None) for key in IDS)
    return dict(zip(IDS, (eos if bos is None else bos, eos, None if pad in (bos, eos) else pad), strict=True))


def _finished(
    config: Any,
    tokenizer: Any,
    context: int | None,
    dropout: float | None,
    overrides: Mapping[str, Any] | None = None,
    vocabulary: int | None = None,
) -> Any:
    """Set the dropout of a config, and check that it fits tokenizer and context."""
    if dropout is not None:
        set_dropout(config, dropout, overrides or ())
        _refuse_unbuildable(config)
    check_fits(config, tokenizer, context, vocabulary)
    return config


def _override(config: Any, overrides: Mapping[str, Any]) -> None:
    """Set attributes of a checkpoint's config: only those that it stores and that change no shape of a tensor."""
    name, before = type(config).__name__, _shapes(config)
    refuse_attributes(config, overrides)
    for key, value in overrides.items():
        set_attribute(config, key, value, f"model.config.{key}: {name} refuses {value!r}")
    _refuse_unbuildable(config)
    after = _shapes(config)
    if changed := sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)):
        old, new = (shapes.get(changed[0], "absent") for shapes in (before, after))
        raise UserError(
            f"model.config: {', '.join(overrides)} would change {len(changed)} of the checkpoint's tensors, "
            f"'{changed[0]}' from {old} to {new} among them: set what changes no shape, or begin with new weights "
            "(config: PATH in the place of checkpoint)"
        )


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model_on_meta(config).state_dict().items()}


def _refuse_unbuildable(config: Any) -> None:
    """Refuse a config that cannot be read any more, has impossible sizes, or gives no model."""
    name = type(config).__name__
    try:
        positions = [] if longest_context(config) is None else ["max_position_embeddings"]  # XLNet has none to count
        text = config.get_text_config()
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", *positions)
        values = {size: getattr(text, size) for size in sizes if getattr(text, size, None) is not None}
    except Exception as error:
        raise UserError(f"model.config: {name} can no longer be read: {first_line(error)}") from error
    for size, value in values.items():
        most = MOST_LAYERS if size == "num_hidden_layers" else MOST_ENTRIES
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise UserError(f"model.config: {size} is {value!r}; a whole number from 1 to {most:,} is wanted")
    try:
        model_on_meta(config)
    except UserError as error:
        raise UserError(f"model.config: {error}") from error


def pretrained_config(name: str | Path) -> Any:
    """Return the transformers config of a folder or a Hub id; code that belongs to it is neither run nor fetched.

    Raises:
        UserError: There is none, or none that can be used: it is damaged, belongs to an adapter, or has sizes beyond
            the bounds of `architectures.configs`.
    """
    place = os.path.expanduser(name)
    local = os.path.isdir(place)
    if not local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        raise UserError(
            f"model: '{name}' is neither a preset ({', '.join(PRESETS)}), nor a folder, nor a Hub id (owner/name)."
            + did_you_mean(str(name), PRESETS)
            + (f" {no_folder(place)}" if "/" in place else "")
        )
    if os.path.isfile(os.path.join(place, "adapter_config.json")):
        raise UserError(
            f"model: '{name}' is an adapter (adapter_config.json), which holds what to change in another model's "
            "weights: merge it first, with peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
            ".save_pretrained(MERGED)"
        )
    config = read_config(place)
    if not causal_class(config):
        kind = getattr(named_class(config), "__name__", type(config).__name__)
        raise UserError(
            f"model: '{name}' is no causal language model, but a {kind}: "
            "recipes and eval are for language models that predict the next token. fire_, apply_reset, fire-llm apply "
            "and inspect act on image models, encoders and classifiers too (docs/layouts.md)"
        )
    with reading(f"model: the config of '{name}' gives no length of context"):
        longest_context(config)
    return config


def check_fits(config: Any, tokenizer: Any, context: int | None, vocabulary: int | None = None) -> None:
    """Refuse a tokenizer or a context that the model cannot hold.

    Args:
        config: Of the model.
        tokenizer: None where it does not exist yet.
        context: Tokens a sequence; None: as many as the model reads.
        vocabulary: Size of a tokenizer that does not exist yet.
    """
    text = config.get_text_config()
    size = (vocabulary or 0) if tokenizer is None else vocabulary_size(tokenizer)
    if size > text.vocab_size:
        raise UserError(
            f"model: the tokenizer has {size} tokens and the model's embedding {text.vocab_size} rows. "
            "Take the model's own tokenizer, or a preset whose vocabulary follows the tokenizer's"
        )
    choose_context(config, context, "model.context")


def with_attention(config: Any, attention: str | None) -> Any:
    """Return a copy of a config with another `attn_implementation`; the same config for None."""
    if attention is None:
        return config
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    return config


def fresh_model(config: Any, seed: int, kind: Any = None) -> Any:
    """Build a model with newly drawn fp32 weights, which depend on the config, the class and the seed alone.

    Args:
        config: A transformers config.
        seed: Seeds torch's generator meanwhile; the caller's generator does not change.
        kind: A class of transformers; None: the causal LM.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return _built(config, kind, dtype=torch.float32)


def fresh_like(model: Any, seed: int) -> Any:
    """Build a model of the same class and config as another, with newly drawn weights, as `fresh_model` does.

    Args:
        model: One of transformers, wrapped or not. For another model with such a config, the causal LM is built.
        seed: As in `fresh_model`.
    """
    from transformers import PreTrainedModel

    kind = class_of(unwrap(model))
    config = copy.deepcopy(model.config)  # building sets its dtype
    return fresh_model(config, seed, kind if issubclass(kind, PreTrainedModel) else None)


def model_on_meta(config: Any, kind: Any = None) -> Any:
    """Build the model on the meta device, without memory, to read names and shapes off it.

    Args:
        config: A transformers config.
        kind: As in `fresh_model`.
    """
    try:
        with torch.device("meta"):
            return _built(config, kind)
    except UserError:
        raise
    except Exception as error:  # the classes raise exceptions of any kind
        name = type(config).__name__.removesuffix("Config") if kind is None else kind.__name__
        raise UserError(
            f"transformers cannot build {name} from this config: {type(error).__name__}, {first_line(error)}"
        ) from error


def _built(config: Any, kind: Any = None, **options: Any) -> Any:
    """Build `kind`, else the class of AutoModelForCausalLM, else the causal LM that the config names."""
    if kind is not None:
        return kind._from_config(config, **options)
    import transformers
    from transformers import AutoModelForCausalLM

    if causal := causal_class(config):
        if causal == CAUSAL:
            return AutoModelForCausalLM.from_config(config, **options)
        return getattr(transformers, causal)._from_config(config, **options)
    raise UserError(f"{type(config).__name__} is no causal language model of transformers")


def load_model(
    folder: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    config: Any = None,
    attention: str | None = None,
    kind: Any = None,
) -> Any:
    """Load a causal LM from a folder or a Hub id, by a class of transformers, from safetensors, whole or in shards.

    Args:
        folder: A checkpoint folder or a Hub id.
        dtype: "auto" keeps the checkpoint's; training needs torch.float32.
        config: Instead of the checkpoint's own.
        attention: `attn_implementation`; None: transformers' choice.
        kind: A subclass of `PreTrainedModel`; None: the causal LM of the config.

    Raises:
        UserError: Where the checkpoint is missing, truncated, pickled or not a causal LM.
    """
    from transformers import AutoModelForCausalLM

    place = os.path.expanduser(folder)
    config = with_attention(pretrained_config(place) if config is None else config, attention)
    _refuse_pickles(Path(place))
    # A difference in shape is reported below.
    options = {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading(f"checkpoint '{folder}' cannot be read"):
        if in_shards(Path(place)):
            from fire_llm.distributed.shards import whole_tensors

            weights = whole_tensors(Path(place) / SHARDED)
            model, loading = type(model_on_meta(config)).from_pretrained(None, state_dict=weights, **options)
            model._weight_conversions = None  # the shards have the model's own names; it is saved under the usual ones
        else:
            model, loading = (kind or AutoModelForCausalLM).from_pretrained(
                place, use_safetensors=True, trust_remote_code=False, **options
            )
    if loading["mismatched_keys"]:
        shapes = [f"'{n}' {tuple(stored)}, not {tuple(wanted)}" for n, stored, wanted in loading["mismatched_keys"]]
        more = f" and {len(shapes) - 5} more" if len(shapes) > 5 else ""
        raise UserError(
            f"checkpoint '{folder}' has other shapes than {CONFIG} asks for: {'; '.join(sorted(shapes)[:5])}{more}. "
            f"Correct {CONFIG}, or take the weights that belong to it"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"checkpoint '{folder}' lacks {len(missing)} of the model's tensors, '{missing[0]}' among them: "
            + (wrapper_advice(loading["unexpected_keys"]) or "it is another architecture or incomplete")
        )
    return model


def wrapper_advice(names: Iterable[str]) -> str:
    """Return how to remove a wrapper's part from stored names; an empty string where there is none."""
    name, wrapper = next(((n, w) for n in sorted(names) for w in WRAPPERS if f".{w}" in f".{n}"), ("", ""))
    plain = f"k.removeprefix('{wrapper}')" if name.startswith(wrapper) else f"k.replace('{wrapper}', '')"
    return name and (
        f"its names bear '{wrapper}' ('{name}'), as those of a compiled or wrapped model do. Take it out of each file "
        "with load_file and save_file of safetensors.torch: "
        f"save_file({{{plain}: t for k, t in load_file(FILE).items()}}, FILE, {{'format': 'pt'}})"
    )


def _refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are only pickles, before any of it is read."""
    pickled = sorted(p.name for kind in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*model*.{kind}"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"checkpoint '{folder}' holds its weights as pickles ({pickled[0]}), which can run code when they are "
            "read: convert them to safetensors where you trust them, with save_pretrained"
        )


def load_tokenizer(name: str | Path) -> Any:
    """Load a tokenizer from a folder or a Hub id.

    Raises:
        UserError: Where there is none, or it has no end-of-text token to put between documents.
    """
    from transformers import AutoTokenizer, GPT2TokenizerFast

    place = os.path.expanduser(name)
    local = os.path.isdir(place)
    if not local and place.count("/") > 1:
        raise UserError(f"tokenizer: {no_folder(place)}")
    if local:
        refuse_irregular(Path(place))
        if (Path(place) / CONFIG).is_file():  # AutoTokenizer builds the config, too
            read_settings(Path(place))
    else:
        settle_hub()
    # AutoTokenizer does not recognise GPT-2's two files without a config.
    bare = (Path(place) / "merges.txt").is_file() and not list(Path(place).glob("tokenizer*.json"))
    missing = "" if local else f"{no_folder(place)}, and "
    files = [path for kind in ("tokenizer*", "vocab*", "*.model", "*.tiktoken") for path in Path(place).glob(kind)]
    hint = "" if files or not local else ", which holds no file of one: save the model's own tokenizer there"
    with reading(f"tokenizer: {missing}none could be read from '{name}'{hint}"):
        tokenizer = (GPT2TokenizerFast if bare else AutoTokenizer).from_pretrained(place, trust_remote_code=False)
        tokenizer = as_stored(tokenizer, place)
        size = len(tokenizer)
        tokenizer("a", add_special_tokens=False)  # some faults show only here
    if size < 2:
        raise UserError(f"tokenizer: '{name}' gives an empty vocabulary; the folder should hold tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer: '{name}' has no end-of-text token, which separates documents")
    return tokenizer


def find_device(name: str) -> torch.device:
    """Return the device of a name; without a number, each rank gets its own.

    Args:
        name: `cpu`, `cuda`, `cuda:1`; `auto` is the accelerator, if it has the float64 that measures need (`mps` has
            none), else the CPU.

    Raises:
        UserError: There is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    present = accelerator.type if accelerator is not None else "cpu"
    if name == "auto":
        name = present if present != "mps" else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: '{name}' is none; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != present:
        raise UserError(f"device: '{name}' is not on this machine, which has {present} alone")
    count = torch.accelerator.device_count()
    index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0")) % count
    if index >= count:
        raise UserError(f"device: '{name}' is not on this machine, which has {count} of them: 0 to {count - 1}")
    return torch.device(device.type, index)


def describe(model: Any) -> str:
    """Describe a model: `GPT2LMHeadModel, 4 layers, width 128, vocabulary 2048, 1.07 M parameters`."""
    text = model.config.get_text_config()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    size = f"{text.num_hidden_layers} layers, width {text.hidden_size}, vocabulary {text.vocab_size}"
    return f"{type(model).__name__}, {size}, {count:.2f} M parameters"
