"""Run a model in the precision of its weights, whatever mixed precision it trains in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fire_llm.core.compat import fsdp2_policy, fsdp2_states, set_fsdp2_policy
from fire_llm.core.errors import UserError
from fire_llm.distributed import fsdp_modules, make_current
from fire_llm.linalg.matmul import exact_products

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

LONG = {short: str(dtype).removeprefix("torch.") for dtype, short in NAMES.items()}
"""torch's names of dtypes, by the short names in recipes and in `apply`."""


def precision_of(model: nn.Module) -> str:
    """Return the names of the dtypes of a model's weights, the commonest first: `fp32`, or `bf16 and fp32`."""
    sizes: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        sizes[p.dtype] += p.numel()
    return " and ".join(NAMES.get(dtype, str(dtype).removeprefix("torch.")) for dtype, _ in sizes.most_common())


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model computes on: its weights' or, if accelerate keeps these elsewhere, accelerate's.

    Raises:
        UserError: It has no weights.
    """
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise UserError(
        f"{type(model).__name__} is on device 'meta', without weights: load them, with from_pretrained for example"
    )


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Compute with a model in the precision of its weights inside the block; then restore everything.

    Three things make bf16 or TF32 products of fp32 weights, and each is suspended: torch's own autocast and TF32;
    accelerate's replacement of a model's `forward`, which turns autocast on; and the policy by which FSDP2 gathers
    shards in another dtype. Attention kernels that do not take fp32 are replaced by torch's. Example: a model that
    trains under bf16 autocast is evaluated in fp32, and its saved checkpoint, loaded in fp32, gives the same logits.

    Args:
        model: On one device. A sharded model needs every rank to call this.
    """
    half = all(p.element_size() < 4 for p in model.parameters())
    wrapped = [vars(module) for module in model.modules() if {"forward", "_original_forward"} <= vars(module).keys()]
    wrappers = [attributes["forward"] for attributes in wrapped]
    attention = nullcontext() if half else attention_among(model, ("eager", "sdpa", "flex_attention"))
    with _gathered_as_stored(model), exact_products(device_of(model)), attention:
        try:
            for attributes in wrapped:
                attributes["forward"] = attributes["_original_forward"]
            yield
        finally:
            for attributes, wrapper in zip(wrapped, wrappers, strict=True):
                attributes["forward"] = wrapper


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block; then restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def attention_configs(model: nn.Module) -> list[Any]:
    """Return the configs of a model's modules, once each, that name an implementation of attention."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None) is not None]


@contextmanager
def attention_kept(configs: Sequence[Any]) -> Iterator[None]:
    """Restore the implementations of attention after the block."""
    before = [config._attn_implementation for config in configs]
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@contextmanager
def attention_among(model: Any, allowed: Collection[str]) -> Iterator[None]:
    """Replace a model's implementation of attention inside the block if it is not among those allowed.

    flash-attention's own package, for example, does not take fp32.

    Args:
        model: A model of transformers; other models are left alone.
        allowed: Names as in `attn_implementation`.
    """
    configs = attention_configs(model)
    with attention_kept(configs):
        if any(config._attn_implementation not in allowed for config in configs):
            fused = "sdpa" in allowed and getattr(model, "_supports_sdpa", False)
            model.set_attn_implementation("sdpa" if fused else "eager")
        yield


@contextmanager
def _gathered_as_stored(model: nn.Module) -> Iterator[None]:
    """Make FSDP2 gather shards in their own dtype inside the block, without casts of inputs and outputs."""
    states = fsdp2_states(fsdp_modules(model))
    policies = [fsdp2_policy(state) for state in states]
    if all(policy.param_dtype is None and policy.output_dtype is None for policy in policies):
        yield
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    make_current(model)
    originals: list[Any] = []
    try:
        for state in states:
            originals.append(set_fsdp2_policy(state, MixedPrecisionPolicy()))
        yield
    finally:
        make_current(model)
        for state, policy, original in zip(states, policies, originals, strict=False):  # fewer if one was refused
            set_fsdp2_policy(state, policy, original)
