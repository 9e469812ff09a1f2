"""Run a model in the precision of its weights, whatever mixed precision it trains in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fire_llm.compat import fsdp2_policy, fsdp2_states, set_fsdp2_policy
from fire_llm.distributed import fsdp_modules, make_current
from fire_llm.orthogonal import exact_products

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def precision_of(model: nn.Module) -> str:
    """Return the name of the dtype of a model's weights: fp64, fp32, bf16 or fp16."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Compute with a model in the precision of its weights inside the block; afterwards all is as it was.

    Three things make bf16 or TF32 products of fp32 weights, and each is set aside: torch's own autocast and TF32;
    the `forward` that accelerate lays over a model's own, which turns autocast on; and the policy by which FSDP2
    gathers shards in another dtype. Example: a model that trains under bf16 autocast is evaluated in fp32, and its
    saved checkpoint, loaded in fp32, gives the same logits.

    Args:
        model: On one device; collective where it is sharded.
    """
    device = next(model.parameters()).device
    laid_over = [vars(module) for module in model.modules() if {"forward", "_original_forward"} <= vars(module).keys()]
    overlays = [own["forward"] for own in laid_over]
    with _gathered_as_stored(model), exact_products(device):
        try:
            for own in laid_over:
                own["forward"] = own["_original_forward"]
            yield
        finally:
            for own, overlay in zip(laid_over, overlays, strict=True):
                own["forward"] = overlay


@contextmanager
def _gathered_as_stored(model: nn.Module) -> Iterator[None]:
    """Let FSDP2 gather shards in their own dtype inside the block, and cast neither inputs nor outputs."""
    states = fsdp2_states(fsdp_modules(model))
    policies = [fsdp2_policy(state) for state in states]
    if all(policy.param_dtype is None and policy.output_dtype is None for policy in policies):
        yield
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    try:
        make_current(model)
        for state in states:
            set_fsdp2_policy(state, MixedPrecisionPolicy())
        yield
    finally:
        make_current(model)
        for state, policy in zip(states, policies, strict=True):
            set_fsdp2_policy(state, policy)
