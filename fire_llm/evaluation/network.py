"""Run a model to measure it, without a change to the model.

Shapes: B = sequences a pass, T = tokens a sequence, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fire_llm.architectures.context import choose_context, vocabulary_of
from fire_llm.core.errors import UserError
from fire_llm.distributed import fsdp_modules, is_dtensor
from fire_llm.evaluation.precision import attention_among, evaluating, own_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOSS_TOKENS = 2048
"""Tokens of one pass for the Hessian: a double backward keeps several times the activations of a training step."""


class Network:
    """Run an unwrapped causal LM in fp32 (fp64 for fp64 weights), whatever it is stored or trained in.

    It runs with other tensors in place of the model's parameters: views of the same memory, or fp32 copies of 16-bit
    parameters. So no gradient, hook or flag of a parameter is touched. Shards are used as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sharded = bool(fsdp_modules(model)) or any(map(is_dtensor, model.parameters()))
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._tensors = {} if self.sharded else {name: _in_fp32(tensor) for name, tensor in named.items()}
        self.trained = [tensor for tensor in self._tensors.values() if tensor.requires_grad]

    def logits(self, ids: Tensor) -> Tensor:
        """Return (B, T, V) for (B, T) token ids.

        Raises:
            UserError: The model is no causal LM.
        """
        inputs = {"input_ids": ids, "use_cache": False}
        out = self.model(**inputs) if self.sharded else functional_call(self.model, self._tensors, (), inputs)
        logits: Tensor | None = getattr(out, "logits", None)
        if logits is None or logits.shape[:2] != ids.shape:
            raise UserError(
                f"{type(self.model).__name__} gives no logits a token: load it as a causal LM, with its head"
            )
        return logits

    def losses(self, sequences: Tensor) -> Iterator[Tensor]:
        """Yield parts that sum to the mean NLL of the sequences, in nats per token.

        Args:
            sequences: (n, T + 1) tokens, the first of each only read.
        """
        for ids in sequences.split(max(1, LOSS_TOKENS // (sequences.shape[1] - 1))):
            nll = F.cross_entropy(self.logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            yield nll / sequences[:, 1:].numel()


def _in_fp32(tensor: Tensor) -> Tensor:
    half = tensor.is_floating_point() and tensor.element_size() < 4
    detached = tensor.detach().float() if half else tensor.detach()
    return detached.requires_grad_(tensor.requires_grad)


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation, in full precision and with plain attention; then restore everything.

    Fused attention has no second derivative.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device.index] if device.type == "cuda" else []))
        if not fsdp_modules(model):
            stack.enter_context(own_precision(model))
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(evaluating(model))
        stack.enter_context(attention_among(model, ("eager", "sdpa")))
        yield


def sample(model: nn.Module, tokens: Any, context: int | None, sequences: int) -> Tensor:
    """Cut evenly spaced sequences of one length out of a text; neighbours share one token at most.

    Args:
        model: Its config has the vocabulary and the longest context.
        tokens: (N,) ids.
        context: Tokens read in each; by default the model's longest, at most 1024 and N - 1.
        sequences: Most sequences to cut.

    Returns:
        (n, context + 1) int64.

    Raises:
        UserError: For fewer than context + 1 tokens, a bad context, or an id outside the vocabulary.
    """
    stream = np.asarray(tokens).reshape(-1)
    size = vocabulary_of(model)
    length = choose_context(model.config, context)
    if context is None:
        length = max(1, min(length, len(stream) - 1))
    if len(stream) <= length:
        raise UserError(
            f"diagnostics read {length} tokens and predict the one after; the text has {len(stream)}: "
            "give more text or a shorter context"
        )
    count = (len(stream) - 1) // length
    chosen = min(sequences, count)
    starts = [i * count // chosen * length for i in range(chosen)]
    ids = torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64))
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise UserError(
            f"tokens {int(ids.min())} to {int(ids.max())} do not fit the model's vocabulary of {size}: "
            "another tokenizer's tokens?"
        )
    return ids
