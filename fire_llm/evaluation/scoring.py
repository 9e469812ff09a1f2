"""The negative log-likelihood of tokens, without ever holding a batch's logits.

Shapes: B = windows a batch, T = positions a window, D = width, V = vocabulary, S = scored positions of a batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fire_llm.architectures.context import longest_context, vocabulary_of
from fire_llm.architectures.names import unwrap
from fire_llm.core.errors import UserError, reading
from fire_llm.core.hardware import device_memory
from fire_llm.distributed import forward_replaced, fsdp_modules, in_parts
from fire_llm.evaluation import kernels
from fire_llm.evaluation.unmasked import needs_no_mask, unmasked

IGNORE = -100
"""Label of a position that is read but not scored."""

PROBE = 16
"""Tokens of the text on which a model is tried before it is scored."""


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label, in nats.

    Args:
        logits: (B, T, V), any float dtype; the softmax is taken in fp32 (fp64 for fp64).
        labels: (B, T) tokens that follow each position (already shifted); `IGNORE` where none is scored.

    Returns:
        (B, T), zero where ignored.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view_as(labels)


def exact_nll(logits: Tensor, targets: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood of each target in nats, its softmax summed in fp64.

    In fp32 the sum over V = 50,000 terms is off by 1e-7, which shows in the ninth digit of a perplexity.

    Args:
        logits: (S, V), any float dtype; the exponentials are taken in fp32 (fp64 for fp64).
        targets: (S,) int64.
        out: (S,) fp64, where to write it. Then fp32 and fp64 logits may be overwritten too: what is neither made nor
            dropped leaves no holes in the memory.

    Returns:
        (S,) fp64.
    """
    if logits.is_cuda and kernels.usable(logits.device, logits.dtype, logits.shape[-1]):
        return kernels.row_nll(logits, targets, out)
    own, cpu = out is not None, logits.device.type == "cpu"
    nll = torch.empty(len(targets), dtype=torch.float64, device=logits.device) if out is None else out
    # 1 MB at a time stays in a core's cache: 0.11 ms a row of V = 50k, 0.25 in slices of 16 MB, 0.45 in one of 64 MB.
    rows = max(1, min(2**18 // logits.shape[-1] if cpu else len(targets), len(targets)))
    wide = torch.empty(rows if cpu else 0, logits.shape[-1], dtype=torch.float64, device=logits.device)
    for x, target, each in zip(logits.split(rows), targets.split(rows), nll.split(rows), strict=True):
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        elif not own:
            x = x.clone()
        top = x.amax(-1, keepdim=True)
        each.copy_((top - x.gather(-1, target[:, None])).squeeze(-1))
        x.sub_(top).exp_()
        each += (wide[: len(x)].copy_(x).sum(-1) if cpu else x.sum(-1, dtype=torch.float64)).log_()
    return nll


class Scorer:
    """Score windows with a causal LM, its head applied to a slice of the positions at a time.

    The model's own forward does everything. It runs once on a batch, and the output of its trunk (all but the head) is
    kept. It then runs again for each slice, with the trunk replaced by that slice of its output. So whatever a class
    does after its head (soft caps, scales, biases) is done by the class itself. Before a model is first scored, a few
    tokens show whether this gives the logits of an ordinary forward pass. If it does not, or no trunk is found,
    ordinary forward passes score the text. So they do for a model in shards that was not tried when it was whole.

    On an accelerator, or with a compiled trunk, plain causal attention runs without a mask (`unmasked`).

    Args:
        model: A causal LM, in evaluation mode.
        sample: (n,) tokens of the text to be scored.
        context: The most tokens of a window.
        compiled: Shape (B, T) of the batches for which the trunk is compiled with torch.compile, so that one graph is
            made; None for none.

    Raises:
        UserError: The model gives no logits over its vocabulary, or a token changes the logits before it.
    """

    def __init__(
        self, model: Any, sample: Tensor, *, context: int = 0, compiled: tuple[int, int] | None = None
    ) -> None:
        self.sharded = bool(fsdp_modules(model))
        self.root = model
        self.model = model = unwrap(model) if self.sharded else model  # FSDP2's root may be torch.compile's wrapper
        name = _KNOWN.get(model, None if self.sharded else False)
        if name is False:
            with reading(f"{type(model).__name__} fails on the first tokens of the text"):
                name = _KNOWN[model] = _look_at(model, _probe(model, sample)[None])
        self.trunk: torch.nn.Module | None = model.get_submodule(name) if name is not None else None
        self.unmasked = False
        if context and (compiled or sample.device.type != "cpu") and not self.sharded:
            self.unmasked = needs_no_mask(model, context, self.trunk)
        self.compiled = compiled
        # The same code is compiled once in a process, whatever number of models and wrappers there are.
        self.fast = torch.compile(self.trunk.forward) if compiled and self.trunk is not None else None

    def __call__(self, ids: Tensor, targets: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihoods of the scored positions, row after row.

        The host waits for nothing but what the model's own forward pass waits for.

        Args:
            ids: (B, T) tokens to read.
            targets: (S,) the token that follows each scored position.
            rows: (S,) int64, where the scored positions are among the B·T; None where all are scored.

        Returns:
            (S,) fp64, nats.
        """
        score = partial(self._score, ids, targets, rows)
        with unmasked(self.model) if self.unmasked else nullcontext():
            nll: Tensor = in_parts(self.root, self.trunk, score) if self.sharded and self.trunk is not None else score()
            return nll

    def _score(self, ids: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        if self.trunk is None:
            return exact_nll(_taken(self.root(input_ids=ids, use_cache=False).logits, rows), targets)
        size = _slice(len(targets), vocabulary_of(self.model), ids.device)
        forward = self.fast if self.fast is not None and ids.shape == self.compiled else self.trunk.forward
        slices = _logits_in_slices(self.model, self.trunk, forward, ids, rows, size)
        nll = torch.empty(len(targets), dtype=torch.float64, device=ids.device)
        for logits, slice_targets, out in zip(slices, targets.split(size), nll.split(size), strict=True):
            exact_nll(logits, slice_targets, out)
            # transformers' outputs may be part of a reference cycle, and would stay until the next collection.
            logits.untyped_storage().resize_(0)
        return nll


def _slice(scored: int, vocabulary: int, device: torch.device) -> int:
    """Return the positions of a slice: 16 MiB of logits in fp32 on a CPU, 1 GiB on a GPU, a 32nd of its memory at most.

    On a GPU all slices have about the same size, so that the kernels of a few sizes are looked up once.
    """
    if device.type == "cpu":
        return max(64, 2**22 // vocabulary)
    logits = 2**25
    if device.type == "cuda":
        logits = min(2**28, device_memory(device) // 128)
    most = max(64, logits // vocabulary)
    return -(-scored // -(-scored // most))


_KNOWN: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Name of each model's trunk, None if the model must run whole."""


def _logits_in_slices(
    model: Any, trunk: torch.nn.Module, forward: Callable[..., Any], ids: Tensor, rows: Tensor | None, size: int
) -> Any:
    """Yield the logits (≤ size, V) of the positions `rows` of the flattened batch; of all positions if it is None."""
    kept: Any = None
    start, n = 0, ids.numel() if rows is None else len(rows)

    def replay(*args: Any, **kwargs: Any) -> Any:
        nonlocal kept
        if kept is None:
            outputs = forward(*args, **kwargs)
            kept = outputs, _taken(outputs[0], rows)
        outputs, hidden = kept
        return with_hidden(outputs, hidden[None, start : start + size])

    with forward_replaced(trunk, replay):
        while start < n:
            yield model(input_ids=ids, use_cache=False).logits[0]
            start += size


def _taken(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return the `rows` of (B, T, …), as (S, …)."""
    return values.flatten(0, 1).contiguous() if rows is None else values.flatten(0, 1)[rows]


def with_hidden(outputs: Any, hidden: Tensor) -> Any:
    """Return a trunk's outputs with other hidden states in the first place, tuple or `ModelOutput`."""
    if isinstance(outputs, tuple):
        return hidden, *outputs[1:]
    return type(outputs)(**{**outputs, next(iter(outputs)): hidden})


def _probe(model: Any, sample: Tensor) -> Tensor:
    """Return tokens to try a model on: a text that is too short is repeated, and padding is replaced.

    XLM, for example, finds the length of a text by its padding token, wherever that stands.
    """
    n = min(PROBE, longest_context(model.config) or PROBE)
    tokens = sample.repeat(-(-n // len(sample)))[:n]
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return tokens if padding is None else tokens.masked_fill(tokens == padding, (padding + 1) % vocabulary_of(model))


def _look_at(model: Any, ids: Tensor) -> str | None:
    """Return the name of the model's trunk, None if the model must run whole.

    Raises:
        UserError: It is no causal LM.
    """
    called: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and hasattr(module, "get_input_embeddings"):
                hooks.enter_context(module.register_forward_hook(lambda *_, name=name: called.append(name)))
        try:
            outputs = model(input_ids=ids, use_cache=False)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{type(model).__name__} cannot read a text of tokens alone ({type(error).__name__}: {error}). "
                "Perplexity is for causal language models of text"
            ) from error
    logits = getattr(outputs, "logits", None)
    if logits is None or tuple(logits.shape[:2]) != tuple(ids.shape):
        raise UserError(
            f"{type(model).__name__} has no causal head: it gives no logits for each token. "
            "Load the checkpoint with AutoModelForCausalLM"
        )
    _refuse_foresight(model, ids, logits)
    rows = torch.arange(ids.shape[1] // 2, ids.shape[1], device=ids.device)
    # A module's parts end before it does, so that the outermost module is the last in the list.
    for name in reversed(called):
        trunk = model.get_submodule(name)
        try:
            sliced = torch.cat([*_logits_in_slices(model, trunk, trunk.forward, ids, rows, 3)])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            continue
        if sliced.shape == logits[0, rows].shape and _close(sliced, logits[0, rows]):
            return name
    return None


def _refuse_foresight(model: Any, ids: Tensor, logits: Tensor) -> None:
    """Refuse a model whose logits depend on later tokens: it reads what it has to predict."""
    if ids.shape[1] < 2:
        return
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % vocabulary_of(model)
    before, after = logits[0, :-1], model(input_ids=other, use_cache=False).logits[0, :-1]
    # In half precision, rounding may hide a later token's effect on the logits. It hides no gradient: that is zero only
    # if the token has no effect.
    half = torch.finfo(before.dtype).eps > 1e-4
    if not _close(after, before) or (half and _gradient_reaches_back(model, ids)):
        raise UserError(
            f"{type(model).__name__} is non-causal: a token changes the logits of those before it, so that it has no "
            "perplexity. Set is_decoder in its config where it has that, or choose a causal LM"
        )


def _gradient_reaches_back(model: Any, ids: Tensor) -> bool:
    """Return whether logits before the last position have a gradient by the embedding of the last token.

    False if no gradient can be computed.
    """
    embedded: list[Tensor] = []

    def catch(_: Any, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(catch)
    try:
        with hook, torch.inference_mode(False), torch.enable_grad():
            logits = model(input_ids=ids.clone(), use_cache=False).logits
            gradients = torch.autograd.grad(logits[:, :-1].float().square().sum(), embedded, allow_unused=True)
    except Exception:  # kernels without a backward pass, classes that insist on how they are trained
        return False
    return any(bool(g[:, -1].isfinite().all() and g[:, -1].any()) for g in gradients if g is not None)


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether logits differ only by rounding; also True for logits that are not finite: scoring reports them."""
    near = 64 * torch.finfo(b.dtype).eps * float(b.abs().max())
    return bool(not torch.isfinite(b).all() or ((a - b).abs() <= near).all())
