"""FSDP2 under a `Trainer`: which engines are refused, shards on CPUs, and states that move between shards and files.

A checkpoint names weights as the model does and numbers moments as the optimizer does, however many processes wrote it
and whether they were replicas or shards. Any number of either can go on from it.
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

_MESH = "ACCELERATE_USE_PARALLELISM_CONFIG"


def refuse_launched_engines(args: Any) -> None:
    """Refuse the engines under which a `Trainer` can train a model but no reset can reach it."""
    if getattr(args, "deepspeed", None) or flag("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(ENGINES["DEEPSPEED"])
    if flag("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(ENGINES["MEGATRON_LM"])
    if shards_asked(args):
        plugin_args = getattr(args, "fsdp_plugin_args", None) or {}
        version = plugin_args.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")
        if int(version) != 2:
            raise UserError(ENGINES["FSDP1"])


def shards_asked(args: Any) -> bool:
    """Return whether a `Trainer`'s arguments, or the launcher, ask for FSDP."""
    return getattr(args, "fsdp_plugin_args", None) is not None or launched_in_shards()


@contextmanager
def sharding(trainer: Any) -> Iterator[None]:
    """Let accelerate's FSDP2 work on CPUs too, and reduce gradients in `reduce_precision`.

    accelerate 1.15 turns FSDP and meshes on for accelerators alone; what it then does needs none.

    Args:
        trainer: A `Trainer` that makes its accelerator inside this block.

    Raises:
        UserError: FSDP is to checkpoint activations itself, a model in shards is to be compiled, or replicas are to
            reduce in bf16.
    """
    args = trainer.args
    plugin_args = getattr(args, "fsdp_plugin_args", None) or {}
    asked = launched_in_shards() and flag("FSDP_ACTIVATION_CHECKPOINTING")
    if plugin_args.get("activation_checkpointing") or asked:
        raise UserError(f"FSDP's activation_checkpointing {CHECKPOINTED_ONCE}")
    if args.torch_compile and shards_asked(args):
        raise UserError(
            "a model in shards (FSDP2) is not compiled here: evaluations read its parts outside of the compiled whole. "
            "Set compile: false in the recipe (torch_compile=False in a Trainer's arguments), or train replicas"
        )
    on_cpu = args.device.type == "cpu" and launched_in_shards()
    mesh = os.environ.pop(_MESH, None) if on_cpu else None
    try:
        yield
    finally:
        if mesh is not None:
            os.environ[_MESH] = mesh
    state = trainer.accelerator.state
    if on_cpu:
        _shard_on_cpus(state)
    # Of accelerate's own use of torch's meshes; users can do nothing about it.
    warnings.filterwarnings("ignore", message="Slicing a flattened dim", category=UserWarning)
    plugin: Any = getattr(state, "fsdp_plugin", None)
    trainer.is_fsdp_enabled = plugin is not None
    if plugin is not None:
        _set_reduce_dtype(plugin, args.reduce_precision)
    elif args.reduce_precision != "fp32" and args.world_size > 1:
        raise UserError(
            "reduce_precision bf16 is FSDP2's, and these processes are replicas: start them with "
            "--accelerate-config fsdp2, or leave the key out"
        )


def _shard_on_cpus(state: Any) -> None:
    """Give accelerate's state the FSDP plugin and the mesh that the launcher asks for."""
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
    from torch.distributed.fsdp import CPUOffloadPolicy

    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        # There is no accelerator that pinned memory would be for.
        state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
    if state.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if flag(_MESH):
        state.parallelism_config = ParallelismConfig()
        state.device_mesh = state.parallelism_config.get_device_mesh("cpu")


def _set_reduce_dtype(plugin: Any, precision: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy, dtype = plugin.mixed_precision_policy, torch.bfloat16 if precision == "bf16" else torch.float32
    if policy is not None or dtype is not torch.float32:
        plugin.mixed_precision_policy = replace(policy or MixedPrecisionPolicy(), reduce_dtype=dtype)


# ---- shards to whole tensors and back


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather every tensor of a sharded model in the first rank's memory, one at a time; collective.

    Returns:
        The state dict on the first rank, tied weights as one tensor; an empty one elsewhere.
    """
    tensors, first_names = named_once(model)
    whole = {name: _whole(tensor, is_first()) for name, tensor in tensors.items()}
    return {name: whole[first] for name, first in first_names.items()} if is_first() else {}


def whole_optimizer(optimizer: Any) -> dict[str, Any]:
    """Gather an optimizer's state in the first rank's memory, as `state_dict` gives it unsharded; collective."""
    first, state = is_first(), optimizer.state_dict()
    moments = {
        number: {key: _whole(value, first) if isinstance(value, Tensor) else value for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {"state": moments, "param_groups": state["param_groups"]}


def named_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a model's state dict, tied ones under their first name; and that name for each name."""
    tensors, first = _tensors(model), dict[int, str]()
    names = {name: first.setdefault(id(tensors[name]), name) for name in map(plain_name, model.state_dict())}
    return {name: tensors[name].detach() for name in first.values()}, names


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a model the weights of a checkpoint folder, in shards or whole; collective where the model is in shards.

    A whole folder is read in fp32, or in fp64 where the model has parameters in it.

    Raises:
        UserError: The folder cannot be read, or is of another model.
    """
    if in_shards(folder):
        from fire_llm.distributed.shards import read_shards

        return read_shards(named_once(model)[0], folder / SHARDED)
    double = any(p.dtype == torch.float64 for p in model.parameters())
    own_class = class_of(unwrap(model))
    kind = own_class if issubclass(own_class, PreTrainedModel) else None
    loaded = load_model(folder, torch.float64 if double else torch.float32, kind=kind)
    own, saved = ({plain_name(name) for name in of.state_dict()} for of in (model, loaded))
    if own != saved:
        raise other_model(folder, f"'{min(own ^ saved)}' is in one of them alone")
    tensors = _tensors(loaded)
    with torch.no_grad():
        for name, tensor in named_once(model)[0].items():
            tensor.copy_(placed_like(tensor, tensors[name]))


def other_model(folder: Path, difference: str) -> UserError:
    """Return the error for a checkpoint that training cannot go on from with this model."""
    return UserError(
        f"'{folder}' is of another model than the one that is trained: {difference}. Give the model that was trained, "
        "or begin a new training"
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
    for number, values in state["state"].items():
        parameter = parameters[number]
        for key, value in values.items():
            if isinstance(value, Tensor):  # copied, because the mapped file may be deleted while training goes on
                sharded = is_dtensor(parameter) and value.shape == parameter.shape
                values[key] = placed_like(parameter, value) if sharded else value.clone()
    if (folder / OPTIMIZER_SHARDS).is_dir():
        _add_shards(state["state"], parameters, folder / OPTIMIZER_SHARDS)
    if not settings:
        state["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(state)


def _add_shards(state: dict[int, dict[str, Any]], parameters: list[Tensor], folder: Path) -> None:
    """Add what is stored in shards to an optimizer's state, placed as the parameters are."""
    from fire_llm.distributed.shards import read_shards, stored_shards

    wanted: dict[str, Tensor] = {}
    for name, (shape, dtype) in stored_shards(folder).items():
        number, _, key = name.partition(".")
        like = parameters[int(number)].detach()
        wanted[name] = torch.empty_like(like, dtype=dtype) if shape == like.shape else torch.empty(shape, dtype=dtype)
        state.setdefault(int(number), {})[key] = wanted[name]
    read_shards(wanted, folder)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters, under each of their names, and its buffers; FSDP2's parameters in shards."""
    make_current(model)
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {plain_name(name): tensor for name, tensor in named.items()}


def _whole(tensor: Tensor, keep: bool) -> Tensor:
    """Gather a tensor; return it in host memory, or an empty one where it is not kept."""
    whole = tensor.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()
    return whole.cpu() if keep else torch.empty(0)
