"""What is refused before anything is read or written: each with the sign it is known by, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fire_llm.checkpoint.headers import StoredTensor
from fire_llm.errors import UserError, did_you_mean

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file that transformers looks for first, and the one that tells of several."""

_UNQUANTISED = "FIRE needs the weights themselves: take the checkpoint that it was quantised from"
_METHODS = {
    "bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors", "finegrained_fp8": "FP8",
}  # fmt: skip
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTISED_KEYS = {
    ".quant_state.bitsandbytes__": "bitsandbytes (4 bit)", ".absmax": "bitsandbytes (4 bit)",
    ".SCB": "bitsandbytes (8 bit)",
    ".g_idx": "GPTQ", ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".weight_packed": "compressed-tensors",
    "_blocks": "MXFP4", ".weight_scale_inv": "FP8", ".weight_scale": "FP8 or compressed-tensors",
}  # fmt: skip
_ADAPTER_KEYS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".base_layer.", "base_model.model.")


def refuse_files(name: str, files: Iterable[str]) -> None:
    """Refuse a checkpoint for the files it consists of: adapters, GGUF, pickles, settings of quantisation, no weights.

    Args:
        name: Of the checkpoint, for the message.
        files: Names of its files.

    Raises:
        UserError: What it is, and how to get something that can be rewritten.
    """
    files = sorted(files)
    if "adapter_config.json" in files:
        raise UserError(
            f"'{name}' is an adapter (adapter_config.json), which tells what to change in another model's weights: "
            "merge first, with peft: AutoPeftModelForCausalLM.from_pretrained(SRC).merge_and_unload()"
            ".save_pretrained(MERGED)"
        )
    for file in _QUANTISED_FILES:
        if file in files:
            raise UserError(f"'{name}' is quantised ({file}). {_UNQUANTISED}")
    if "config.json" not in files and not any(f.endswith(".gguf") for f in files):
        raise UserError(f"'{name}' has no config.json: it is no checkpoint of transformers")
    if WEIGHTS in files or INDEX in files:
        return
    by_kind = {Path(f).suffix: f for f in reversed(files) if "/" not in f}
    if gguf := by_kind.get(".gguf"):
        raise UserError(f"'{name}' holds GGUF ('{gguf}'), made for running a model. {_UNQUANTISED}")
    if pickled := next((by_kind[kind] for kind in (".bin", ".pt", ".pth", ".ckpt") if kind in by_kind), None):
        raise UserError(
            f"'{name}' holds pickled weights ('{pickled}'), which can run code when they are read: convert them "
            "first, where you trust them: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(CONVERTED)"
        )
    if foreign := next((by_kind[kind] for kind in (".h5", ".msgpack", ".onnx") if kind in by_kind), None):
        raise UserError(f"'{name}' holds weights of another framework ('{foreign}'): convert them to safetensors")
    beside = f"; '{by_kind['.safetensors']}' is not what transformers reads" if ".safetensors" in by_kind else ""
    raise UserError(f"'{name}' holds neither {WEIGHTS} nor {INDEX}{beside}: download or copy the weights")


def refuse_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a model for what its config.json says: quantised, remote code, unknown, no causal LM.

    Raises:
        UserError: With the key at fault.
    """
    for where, part in [("", settings), *((f"{k}.", v) for k, v in settings.items() if isinstance(v, dict))]:
        if quantised := part.get("quantization_config"):
            given = quantised if isinstance(quantised, dict) else {}
            bits = next((f" ({b} bit)" for b in (4, 8) if given.get(f"load_in_{b}bit")), "")
            method = str(given.get("quant_method") or "an unnamed method")
            label = _METHODS.get(method, method)
            sign = f"{where}quantization_config in config.json"
            raise UserError(f"'{folder}' is quantised with {label}{bits} ({sign}). {_UNQUANTISED}")
    if settings.get("auto_map"):
        raise UserError(
            f"'{folder}' brings code of its own (auto_map in config.json), whose weights nobody here has read: only "
            "classes of transformers are known. If transformers has this architecture by now, remove auto_map and set "
            "model_type to it; else load it yourself, call register_layout for its classes and fire_(model)"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind, classes = settings.get("model_type"), settings.get("architectures") or []
    if kind is None:
        raise UserError(f"'{folder / 'config.json'}' has no model_type, which says what architecture this is")
    if kind not in CAUSAL and not {*classes} & {*CAUSAL.values()}:
        from transformers import CONFIG_MAPPING

        what = "no causal language model" if kind in CONFIG_MAPPING else "unknown to the installed transformers"
        raise UserError(
            f"'{folder}': model_type '{kind}' is {what}.{did_you_mean(str(kind), CAUSAL)} Only what "
            "AutoModelForCausalLM loads can be rewritten"
        )


def refuse_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a checkpoint for the names of its tensors: adapters and codes of quantised weights.

    Raises:
        UserError: With the first of them.
    """
    for name in tensors:
        if any(sign in f".{name}" for sign in _ADAPTER_KEYS[:-1]) or name.startswith(_ADAPTER_KEYS[-1]):
            raise UserError(
                f"'{folder}' holds adapter weights ('{name}'): merge them first, with peft: merge_and_unload(), then "
                "save_pretrained"
            )
    for name, tensor in tensors.items():
        sign = next((s for s in _QUANTISED_KEYS if (s in name if s.endswith("__") else name.endswith(s))), None)
        if sign and (sign != "_blocks" or f"{name.removesuffix('_blocks')}_scales" in tensors):
            raise UserError(
                f"'{folder}' is quantised with {_QUANTISED_KEYS[sign]} ('{name}', {tensor.dtype}). {_UNQUANTISED}"
            )
        if tensor.dtype.startswith(("F8_", "F6_", "F4")):
            raise UserError(f"'{folder}' is quantised ('{name}' is {tensor.dtype}). {_UNQUANTISED}")


def refuse_destination(destination: Path, source: Path, needed: int, free: int) -> None:
    """Refuse a place where the result cannot be written.

    Args:
        destination: Folder to make.
        source: Folder to read; never written to.
        needed: Bytes of the result.
        free: Bytes free there.

    Raises:
        UserError: It exists, lies inside the source, or there is no room.
    """
    if destination.exists() or destination.is_symlink():
        raise UserError(f"'{destination}' exists already: name a new folder, or delete that one")
    if destination.resolve().is_relative_to(source.resolve()):
        raise UserError(f"'{destination}' lies inside '{source}', which is never written to: name a folder elsewhere")
    blocked = next((p for p in destination.parents if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise UserError(f"'{destination}' cannot be made: '{blocked}' is a file. Choose another folder")
    if needed > free:
        raise UserError(
            f"'{destination}': the result takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there. Free "
            "some space, or choose a folder on another disk"
        )


def names(items: Iterable[str], most: int = 3) -> str:
    """List a few names, and say how many there are beyond them."""
    listed = [f"'{item}'" for item in items]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
