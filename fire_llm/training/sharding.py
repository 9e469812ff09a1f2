"""FSDP2 under a `Trainer`: which engines are refused, shards on CPUs, checkpoints that are the same as everyone's.

A checkpoint holds whole tensors under the model's own names and the optimizer's own numbers, whatever the number of
processes and whether they were replicas or shards, so that any of these goes on from any other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from fire_llm.architectures.lookup import class_of
from fire_llm.architectures.names import plain_name, unwrap
from fire_llm.core.errors import CHECKPOINTED_ONCE, ENGINES, UserError
from fire_llm.core.manifest import OPTIMIZER_SHARDS, SHARDED, in_shards
from fire_llm.core.ranks import flag, launched_in_shards
from fire_llm.distributed import is_dtensor, is_first, make_current, placed_like
from fire_llm.models import load_model

OPTIMIZER = "optimizer.pt"
"""Name that `Trainer` gives the optimizer's state of one process or of replicas; shards are written under it too."""

REDUCED_IN = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What gradients are added up in over the ranks, by `reduce_precision`."""

_MESH = "ACCELERATE_USE_PARALLELISM_CONFIG"


def refuse_engines(args: Any) -> None:
    """Refuse what a `Trainer` would train under but cannot be reset, before anything is wrapped.

    Args:
        args: `TrainingArguments`.

    Raises:
        UserError: For FSDP1, DeepSpeed and Megatron-LM, with what to use.
    """
    if getattr(args, "deepspeed", None) or flag("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(ENGINES["DEEPSPEED"])
    if flag("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(ENGINES["MEGATRON_LM"])
    given = getattr(args, "fsdp_plugin_args", None)
    if shards_asked(args):
        version = (given or {}).get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")
        if int(version) != 2:
            raise UserError(ENGINES["FSDP1"])


def shards_asked(args: Any = None) -> bool:
    """Return whether the launcher, or a `Trainer`'s arguments, ask for FSDP."""
    return getattr(args, "fsdp_plugin_args", None) is not None or launched_in_shards()


@contextmanager
def sharding(trainer: Any) -> Iterator[None]:
    """Let accelerate's FSDP2 work on CPUs too, and reduce gradients as `reduce_precision` says, whatever passes are in.

    accelerate 1.15 turns FSDP and meshes on for accelerators alone; what it then does needs none.

    Args:
        trainer: A `Trainer` that makes its accelerator inside this block.

    Raises:
        UserError: FSDP is to checkpoint activations itself, or replicas to reduce in bf16.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    on_cpu = trainer.args.device.type == "cpu" and launched_in_shards()
    given = getattr(trainer.args, "fsdp_plugin_args", None) or {}
    asked = launched_in_shards() and flag("FSDP_ACTIVATION_CHECKPOINTING")
    if given.get("activation_checkpointing") or asked:
        raise UserError(f"FSDP's activation_checkpointing {CHECKPOINTED_ONCE}")
    if trainer.args.torch_compile and shards_asked(trainer.args):
        raise UserError(
            "a model in shards (FSDP2) is not compiled here: evaluations read its parts outside of the compiled whole. "
            "Set compile: false in the recipe (torch_compile=False in a Trainer's arguments), or train replicas"
        )
    mesh = os.environ.pop(_MESH, None) if on_cpu else None
    try:
        yield
    finally:
        if mesh is not None:
            os.environ[_MESH] = mesh
    state = trainer.accelerator.state
    if on_cpu:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            # There is no accelerator that pinned memory would be for.
            state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if mesh is not None and flag(_MESH):
            state.parallelism_config = ParallelismConfig()
            state.device_mesh = state.parallelism_config.get_device_mesh("cpu")
    # Of accelerate's own use of torch's meshes; users can do nothing about it.
    warnings.filterwarnings("ignore", message="Slicing a flattened dim", category=UserWarning)
    plugin: Any = getattr(state, "fsdp_plugin", None)
    trainer.is_fsdp_enabled = plugin is not None
    reduce = REDUCED_IN[trainer.args.reduce_precision]
    if plugin is None:
        if trainer.args.reduce_precision != "fp32" and trainer.args.world_size > 1:
            raise UserError(
                "reduce_precision bf16 is FSDP2's, and these processes are replicas: start them with "
                "--accelerate-config fsdp2, or leave the key out"
            )
        return
    policy = plugin.mixed_precision_policy
    if policy is not None or reduce is not torch.float32:
        plugin.mixed_precision_policy = replace(policy or MixedPrecisionPolicy(), reduce_dtype=reduce)


# ---- shards to whole tensors and back


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather every tensor of a sharded model in the main process's memory, one at a time; collective.

    Returns:
        The state dict on rank 0, an empty one elsewhere.
    """
    first, tensors = is_first(), _tensors(model)
    names = [plain_name(name) for name in model.state_dict()]
    gathered = {id(tensors[name]): tensors[name] for name in names}  # tied weights once, and one tensor still
    whole = {key: _whole(tensor, first) for key, tensor in gathered.items()}
    return {name: whole[id(tensors[name])] for name in names} if first else {}


def whole_optimizer(optimizer: Any) -> dict[str, Any]:
    """Gather an optimizer's state in the main process's memory, as `state_dict` gives it unsharded; collective."""
    first, state = is_first(), optimizer.state_dict()
    moments = {
        number: {key: _whole(value, first) if isinstance(value, Tensor) else value for key, value in one.items()}
        for number, one in state["state"].items()
    }
    return {"state": moments, "param_groups": state["param_groups"]}


def named_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a model's state dict, tied ones once, and the name that each of its names stands for."""
    tensors, first = _tensors(model), dict[int, str]()
    names = {name: first.setdefault(id(tensors[name]), name) for name in map(plain_name, model.state_dict())}
    return {name: tensors[name].detach() for name in first.values()}, names


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a model the weights of a checkpoint folder, in shards or whole; collective where the model is in shards.

    Raises:
        UserError: Where the folder cannot be read, or is of another model.
    """
    if in_shards(folder):
        from fire_llm.distributed.shards import read_shards

        return read_shards(named_once(model)[0], folder / SHARDED)
    loaded = load_like(model, folder)
    found = _tensors(loaded)
    own, saved = _tensors(model), [plain_name(name) for name in model.state_dict()]
    named = {plain_name(name) for name in loaded.state_dict()}
    _refuse_another(folder, named - set(saved), set(saved) - named)
    with torch.no_grad():
        for name in {id(own[name]): name for name in saved}.values():  # tied weights once
            own[name].copy_(placed_like(own[name], found[name]))


def load_like(model: nn.Module, folder: Path) -> Any:
    """Load the weights of a checkpoint folder into another model of a model's class, in its finest dtype, fp32 or fp64.

    Raises:
        UserError: Where the folder cannot be read, or holds another model.
    """
    fine = any(p.dtype == torch.float64 for p in model.parameters())
    own = class_of(unwrap(model))
    kind = own if issubclass(own, PreTrainedModel) else None
    return load_model(folder, torch.float64 if fine else torch.float32, kind=kind)


def stored_otherwise(model: nn.Module, folder: Path) -> bool:
    """Return whether a checkpoint folder has tensors under other names than the model itself.

    `save_pretrained` writes many models under the names of their first published checkpoints: the experts of a Mixtral
    one by one, which are a single parameter in the model. `load_state_dict` would take none of these.

    Raises:
        UserError: The checkpoint is of another model.
    """
    files = list(folder.glob("model*.safetensors"))
    if not files:  # an adapter's
        return False
    stored = set[str]()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored |= set(opened.keys())
    own = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    inner = unwrap(model)
    if (others := stored - own.keys()) and isinstance(inner, PreTrainedModel):
        return True
    held = {own[name].data_ptr() for name in stored - others}  # a tied weight is stored under one of its names
    left_out = getattr(inner, "_keys_to_ignore_on_save", None) or ()
    lacking = {name for name, tensor in own.items() if tensor.data_ptr() not in held and name not in left_out}
    _refuse_another(folder, others, lacking)
    return False


def _refuse_another(folder: Path, others: set[str], lacking: set[str]) -> None:
    """Refuse a checkpoint with tensors that the model has not, or without some that it has."""
    for names, said in ((others, "has {}, which the model lacks"), (lacking, "lacks {}, which the model has")):
        if names:
            which = f"{len(names)} tensors, '{min(names)}' among them" if len(names) > 1 else f"'{min(names)}'"
            raise UserError(
                f"checkpoint '{folder}' {said.format(which)}: it is of another model. Give the model that was "
                "trained, or begin a new training"
            )


def load_optimizer(optimizer: Any, folder: Path, *, settings: bool = True) -> None:
    """Give an optimizer the state in a checkpoint folder, each rank its own rows of what is sharded.

    Args:
        optimizer: Of the same kind, for the same parameters.
        folder: The checkpoint.
        settings: Whether to take over rates, decays and the like too.
    """
    state = torch.load(folder / OPTIMIZER, map_location="cpu", mmap=True, weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, one in state["state"].items():
        parameter = parameters[number]
        for key, value in one.items():
            if isinstance(value, Tensor):  # nothing stays mapped: the folder may be deleted while training goes on
                sharded = is_dtensor(parameter) and value.shape == parameter.shape
                one[key] = placed_like(parameter, value) if sharded else value.clone()
    if (folder / OPTIMIZER_SHARDS).is_dir():
        _add_shards(state["state"], parameters, folder / OPTIMIZER_SHARDS)
    if not settings:
        state["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(state)


def _add_shards(state: dict[int, dict[str, Any]], parameters: list[Tensor], folder: Path) -> None:
    """Add to an optimizer's state what lies in shards, placed as the parameters are."""
    from fire_llm.distributed.shards import read_shards, stored_shards

    wanted: dict[str, Tensor] = {}
    for name, (shape, dtype) in stored_shards(folder).items():
        number, _, key = name.partition(".")
        like = parameters[int(number)].detach()
        wanted[name] = torch.empty_like(like, dtype=dtype) if shape == like.shape else torch.empty(shape, dtype=dtype)
        state.setdefault(int(number), {})[key] = wanted[name]
    read_shards(wanted, folder)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, under each of their names, and buffers; those of FSDP2 in shards."""
    make_current(model)
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {plain_name(name): tensor for name, tensor in named.items()}


def _whole(tensor: Tensor, keep: bool) -> Tensor:
    whole = tensor.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()
    return whole.cpu() if keep else torch.empty(0)
