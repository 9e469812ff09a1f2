"""Give a model the weights of a checkpoint folder, whatever names they have on the disk."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fire_llm.architectures.names import plain_buffers, plain_name, unwrap
from fire_llm.checkpoint.headers import StoredTensor, read_header
from fire_llm.checkpoint.mapping import places_of
from fire_llm.core.errors import UserError
from fire_llm.training.sharding import load_weights, other_model


def restore_weights(model: nn.Module, folder: Path) -> bool:
    """Give a whole model the weights that `save_pretrained` wrote, or leave it to `Trainer` and return False.

    `save_pretrained` writes many models under the names of their first published checkpoints. Example: the experts of
    a Mixtral one by one, which are a single parameter in the model. `Trainer` loads by the model's own names, warns of
    what it does not find, and trains on with what the model had there. Here transformers' renaming and conversion are
    followed, as `apply` follows them on the disk (`checkpoint.mapping`), one parameter at a time in memory.

    Left to `Trainer` are adapters, quantised and compiled models, and models that are none of transformers. What it
    would only warn of is refused.

    Raises:
        UserError: The checkpoint has or lacks a tensor of the model, or one has another shape: it is another model's.
    """
    stored: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        stored |= read_header(file)
    if not stored:  # an adapter's
        return False
    inner = unwrap(model)
    plain = all(plain_name(name) == name for name in (*inner.state_dict(), *stored))
    if not isinstance(inner, PreTrainedModel) or getattr(inner, "hf_quantizer", None) is not None or not plain:
        _refuse_other_names(folder, inner, stored)
        return False
    unsaved = _unsaved(inner)
    try:
        places = places_of(inner, stored, untie=False, optional=unsaved)
    except UserError as error:
        raise other_model(folder, str(error)) from error
    if places.unmapped:  # a conversion that is not followed here: another model is loaded, and copied from
        load_weights(model, folder)
        return True
    tensors: dict[str, Tensor] = {**dict(inner.named_parameters()), **dict(plain_buffers(inner))}
    lacking = [name for name, _ in plain_buffers(inner) if name not in places.of and name not in unsaved]
    _refuse(folder, places.ignored, lacking)
    with torch.no_grad():
        for name in places.of:
            tensor = tensors[name]
            tensor.copy_(places.read(name, range(tensor.shape[0] if tensor.ndim else 1), tensor.shape).view_as(tensor))
    return True


def _refuse_other_names(folder: Path, model: nn.Module, stored: dict[str, Any]) -> None:
    """Refuse a checkpoint by its names, which are the model's own."""
    own = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    names = {plain_name(name) for name in stored}
    held = {own[name].data_ptr() for name in names & own.keys()}  # a tied weight is stored under one of its names
    lacking = [name for name, tensor in own.items() if tensor.data_ptr() not in held and name not in _unsaved(model)]
    _refuse(folder, sorted(names - own.keys()), lacking)


def _unsaved(model: Any) -> Collection[str]:
    """Return the tensors that `save_pretrained` leaves out of every checkpoint."""
    return getattr(model, "_keys_to_ignore_on_save", None) or ()


def _refuse(folder: Path, others: list[str], lacking: list[str]) -> None:
    """Refuse a checkpoint with tensors that the model has not, or without some that it has."""
    for names, said in ((others, "has {}, which the model lacks"), (lacking, "lacks {}, which the model has")):
        if names:
            which = f"{len(names)} tensors, '{names[0]}' among them" if len(names) > 1 else f"'{names[0]}'"
            raise other_model(folder, f"it {said.format(which)}")
