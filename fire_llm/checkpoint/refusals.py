"""What is refused before anything is read or written: each with the sign it is known by, and what to do instead."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fire_llm.architectures.classes import CAUSAL, first_class
from fire_llm.checkpoint.headers import WRITABLE, StoredTensor
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.manifest import MANIFEST, SHARDED
from fire_llm.core.staging import staging_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file that transformers looks for first, and the one that lists several."""

_UNQUANTISED = "FIRE needs the weights themselves: take the checkpoint that it was quantised from"
_METHODS = {
    "bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors", "finegrained_fp8": "FP8",
}  # fmt: skip
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_CODES = {
    ".quant_state.bitsandbytes__nf4": (".quant_state.bitsandbytes__nf4", "bitsandbytes (4 bit)"),
    ".quant_state.bitsandbytes__fp4": (".quant_state.bitsandbytes__fp4", "bitsandbytes (4 bit)"),
    ".absmax": ("", "bitsandbytes (4 bit)"), ".SCB": (".weight", "bitsandbytes (8 bit)"),
    ".g_idx": (".qweight", "GPTQ"), ".qweight": (".qweight", "GPTQ or AWQ"), "_scales": ("_blocks", "MXFP4"),
    ".weight_packed": (".weight_packed", "compressed-tensors"),
    ".weight_scale_inv": (".weight", "FP8"), ".weight_scale": (".weight", "FP8 or compressed-tensors"),
}  # fmt: skip
"""How a key ends that shows quantised weights, how the key of their codes ends then, and what made them."""
_ADAPTER_KEYS = (".lora_A.", ".lora_B.", ".lora_embedding_")
_ADAPTED, _ADAPTED_MODEL = ".base_layer.", "base_model.model."
"""What PEFT puts into the name of a weight that an adapter is added to, and before all names of such a model."""


def refuse_files(name: str, files: Iterable[str], loader: str = CAUSAL) -> None:
    """Refuse a checkpoint for the files it consists of: adapters, GGUF, pickles, settings of quantisation, no weights.

    Args:
        name: Of the checkpoint, for the message.
        files: Names of its files.
        loader: The class that loads it, for the message.

    Raises:
        UserError: What it is, and how to get something that can be rewritten.
    """
    files = sorted(files)
    if "adapter_config.json" in files:
        raise UserError(
            f"'{name}' is an adapter (adapter_config.json), which holds what to change in another model's weights: "
            "merge first, with peft: AutoPeftModelForCausalLM.from_pretrained(SRC).merge_and_unload()"
            ".save_pretrained(MERGED)"
        )
    for file in _QUANTISED_FILES:
        if file in files:
            raise UserError(f"'{name}' is quantised ({file}). {_UNQUANTISED}")
    if "config.json" not in files and not any(f.endswith(".gguf") for f in files):
        raise UserError(f"'{name}' has no config.json, which a checkpoint of transformers has: name the folder of one")
    if WEIGHTS in files or INDEX in files:
        return
    if {SHARDED, MANIFEST} <= {*files}:
        raise UserError(
            f"'{name}' holds its weights in shards, a file a rank: make an ordinary folder of it first: "
            f"python -c \"from fire_llm.checkpoint import consolidate; consolidate('{name}', 'DST')\""
        )
    by_kind = {Path(f).suffix: f for f in reversed(files) if "/" not in f}
    if gguf := by_kind.get(".gguf"):
        raise UserError(f"'{name}' holds GGUF ('{gguf}'), made for running a model. {_UNQUANTISED}")
    if pickled := next((by_kind[kind] for kind in (".bin", ".pt", ".pth", ".ckpt") if kind in by_kind), None):
        raise UserError(
            f"'{name}' holds pickled weights ('{pickled}'), which can run code when they are read: convert them "
            f"first, where you trust them: {loader}.from_pretrained(SRC).save_pretrained(CONVERTED)"
        )
    if foreign := next((by_kind[kind] for kind in (".h5", ".msgpack", ".onnx") if kind in by_kind), None):
        raise UserError(f"'{name}' holds weights of another framework ('{foreign}'): convert them to safetensors")
    instead = f" but '{other}': rename it, or" if (other := by_kind.get(".safetensors")) else ":"
    raise UserError(f"'{name}' holds neither {WEIGHTS} nor {INDEX}{instead} download or copy what is missing")


def refuse_config(folder: Path, settings: Mapping[str, Any], *, native: bool = False) -> None:
    """Refuse a model for what its config.json says: quantised, remote code, unknown, no causal LM.

    Args:
        folder: For the message.
        settings: What config.json holds.
        native: Whether transformers' own class of that model_type stands for the remote code.

    Raises:
        UserError: With the key at fault.
    """
    for where, part in [("", settings), *((f"{k}.", v) for k, v in settings.items() if isinstance(v, dict))]:
        if quantised := part.get("quantization_config"):
            table = quantised if isinstance(quantised, dict) else {}
            bits = next((f" ({b} bit)" for b in (4, 8) if table.get(f"load_in_{b}bit")), "")
            method = str(table.get("quant_method") or ("bitsandbytes" if bits else "an unnamed method"))
            label = _METHODS.get(method, method)
            sign = f"{where}quantization_config in config.json"
            raise UserError(f"'{folder}' is quantised with {label}{bits} ({sign}). {_UNQUANTISED}")
    if settings.get("auto_map") and not native:
        raise UserError(
            f"'{folder}' brings code of its own (auto_map in config.json), whose weights nobody here has read: only "
            f"classes of transformers are known. If its own model_type '{settings.get('model_type')}' is this "
            "architecture, give --native; else load it yourself, call register_layout for its classes and fire_(model)"
        )
    _refuse_architecture(folder, settings.get("model_type"), settings.get("architectures"))
    first = settings.get("transformers_weights")
    named = isinstance(first, str) and first == Path(first).name
    if first is not None and not (named and first.endswith((".safetensors", ".safetensors.index.json"))):
        raise UserError(
            f"'{folder / 'config.json'}': transformers_weights is {first!r}; it must name a .safetensors file, or an "
            "index of several, in that folder. Correct it, or remove the key"
        )


def _refuse_architecture(folder: Path, kind: Any, classes: Any) -> None:
    """Refuse what neither AutoModelForCausalLM nor a class that a config names loads, by its model_type."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    if not isinstance(kind, str):
        given = "no model_type" if kind is None else f"{kind!r} as model_type"
        raise UserError(f"'{folder / 'config.json'}' has {given}: a name such as 'llama' must name the architecture")
    what, near = "unknown to the installed transformers", did_you_mean(kind, NAMES) or " A newer one may know it."
    if kind in CONFIG_MAPPING:
        if CONFIG_MAPPING[kind] in CAUSAL or first_class(classes, CONFIG_MAPPING[kind]) is not None:
            return
        what, near = "no causal language model", ""
        if classes:
            what += f", and {str(classes)[:60]} in 'architectures' names no model of that type"
    raise UserError(
        f"'{folder}': model_type '{kind}' is {what}.{near} Only what AutoModelForCausalLM loads can be rewritten, or a "
        "class of transformers that config.json names in 'architectures', such as [\"ViTForImageClassification\"]"
    )


def refuse_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a checkpoint for its tensors' names: adapters, and codes (no floating-point numbers) beside their scales.

    Codes that have no such name are found where a reset would read them (`Stored.check_readable`).

    Raises:
        UserError: With the first of them.
    """
    for name in tensors:
        if any(sign in f".{name}" for sign in _ADAPTER_KEYS) or name.startswith(_ADAPTED_MODEL):
            raise _adapter(folder, name)
    for sign, (ending, method) in _CODES.items():
        for name in tensors:
            codes = tensors.get(name.removesuffix(sign) + ending) if name.endswith(sign) else None
            if codes is not None and codes.dtype not in WRITABLE:
                raise UserError(
                    f"'{folder}' is quantised with {method} ('{codes.name}', {codes.dtype}). {_UNQUANTISED}"
                )


def refuse_adapted(tensors: Mapping[str, StoredTensor], unread: Iterable[str], missing: Sequence[str]) -> None:
    """Refuse weights that an adapter was added to: stored as `x.base_layer.weight` where the model has `x.weight`.

    A model may have a module called base_layer itself. Its weights have a parameter, and are not unread.

    Args:
        tensors: The checkpoint's, by key.
        unread: Keys that belong to no parameter of the model.
        missing: Parameters of the model that no key belongs to.

    Raises:
        UserError: With the first of them.
    """
    for key in unread:
        plain = key.replace(_ADAPTED, ".")
        # Keys may lack the prefix of the parameters, or have one that these lack.
        if plain != key and any(plain.endswith(name) or name.endswith(plain) for name in missing):
            raise _adapter(tensors[key].file.path.parent, key)


def _adapter(folder: Path, name: str) -> UserError:
    return UserError(
        f"'{folder}' holds adapter weights ('{name}'): merge them first, with peft: merge_and_unload(), then "
        "save_pretrained"
    )


def refuse_destination(destination: Path, source: Path, needed: int, free: int) -> None:
    """Refuse a place where the result cannot be written.

    Args:
        destination: Folder to make.
        source: Folder to read; never written to.
        needed: Bytes of the result.
        free: Bytes free there.

    Raises:
        UserError: It exists, cannot be, lies inside the source, or there is no room.
    """
    if os.path.lexists(destination):
        raise UserError(f"'{destination}' exists already: name a new folder, or delete that one")
    if destination.resolve().is_relative_to(source.resolve()):
        raise UserError(f"'{destination}' lies inside '{source}', which is never written to: name a folder elsewhere")
    blocked = next((p for p in destination.parents if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise UserError(f"'{destination}' cannot be made: '{blocked}' is a file. Choose another folder")
    try:
        staging_of(destination).lstat()
    except FileNotFoundError:
        pass  # as it should be
    except OSError as error:
        raise UserError(f"'{destination}' cannot be made: {error.strerror}. Choose another folder") from error
    if needed > free:
        raise UserError(
            f"'{destination}': the result takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there. Free "
            "some space, or choose a folder on another disk"
        )


def names(items: Iterable[str], shown: int = 3) -> str:
    """Return a few names, and how many there are beyond them."""
    listed = [f"'{item}'" for item in items]
    rest = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + rest
