"""Exact perplexity: every token scored once, sums in fp64 a document, one division at the end.

Shapes: N = tokens of the text, D = documents, W = windows, T = positions a window.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fire_llm.architectures.context import choose_context, vocabulary_of
from fire_llm.architectures.names import unwrap
from fire_llm.core.errors import UserError
from fire_llm.core.progress import progress_bar
from fire_llm.distributed import active, fsdp_modules
from fire_llm.evaluation.precision import device_of, evaluating, own_precision, precision_of
from fire_llm.evaluation.scores import DocumentSums, Scores
from fire_llm.evaluation.scoring import PROBE, Scorer
from fire_llm.evaluation.windows import batches, windows

WORTH_COMPILING = 8
"""Least number of batches of one shape for which the trunk is compiled; compiling takes about 20 s."""


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text, and how it was measured."""

    nll: float
    """Mean negative log-likelihood, nats a token."""
    perplexity: float
    """exp(nll), a token."""
    bits_per_byte: float | None
    """Total NLL in bits over the UTF-8 bytes of the text; None if the bytes are not known."""
    byte_perplexity: float | None
    """exp of the total NLL over the bytes."""
    word_perplexity: float | None
    """exp of the total NLL over the words: pieces between runs of white space; None if they are not known."""
    tokens: int
    """Tokens scored; in a stream, the separators of documents among them."""
    bytes: int | None
    words: int | None
    documents: int
    context: int
    """Most tokens read before a scored one."""
    stride: int
    """Tokens between the starts of windows; equal to the context if windows are disjoint."""
    prefix: int | None
    """Token read before the text, or before each document; without one the first token is not scored."""
    per_document: bool
    """Whether each document was read by itself."""
    precision: str | None
    """Precision of the weights and their products: fp32, bf16, fp16 or fp64, or several of them; `mixed` if the model
    kept its mixed precision; None if the likelihoods came from elsewhere."""
    scores: Scores = field(repr=False, compare=False)
    """Sums and counts of each document."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without the documents' scores."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scores"}


def perplexity(
    model: Any,
    tokens: Any,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    prefix: int | None = None,
    n_bytes: Any = None,
    n_words: Any = None,
    documents: Any = None,
    per_document: bool = False,
    compiled: bool = False,
    mixed: bool = False,
    progress: str | None = None,
    share: bool = False,
) -> Perplexity:
    """Measure a model's perplexity on a text, in the precision of its weights.

    Args:
        model: A causal LM, inside DistributedDataParallel or torch.compile's wrapper or not; its mode (train or eval)
            is restored, gradients are off.
        tokens: (N,) token ids: a tensor, an array, a memory map or a list.
        context: Positions a window; the model's longest by default, at most 1024.
        stride: Positions between the starts of windows; `context` (disjoint windows) by default. Smaller gives later
            tokens of a window more to go by and costs context/stride times as much.
        batch_size: Windows of full length a forward pass, as many tokens of shorter ones; it changes speed, not the
            result.
        prefix: A token read before the first, so that all N are scored; without it the first is not.
        n_bytes: UTF-8 bytes of the text behind the tokens, for bits a byte: of the whole, or (D,) of each document.
        n_words: Words of it, likewise.
        documents: (D,) where each document ends in `tokens`, the last at N; one document by default.
        per_document: Read each document by itself, after `prefix`; its last window reaches back to be full, as
            lm-eval's rolling windows do. Otherwise windows run across documents.
        compiled: Compile the model's trunk with torch.compile, where at least 8 batches have one shape. It takes 20 s
            or so, once a process and shape: for long texts, or many models.
        mixed: Keep the mixed precision that is in force (autocast, TF32, what accelerate or FSDP2 put around a model
            for training). By default it is set aside, so that a model in training and its saved checkpoint give the
            same number.
        progress: Title of a progress bar; None for none.
        share: Under torch.distributed, let each rank score a part of the windows; every rank must then call this, and
            all get the same numbers. A model in shards needs every rank to call this either way.

    Raises:
        UserError: For fewer than two tokens, an id outside the vocabulary, a bad context or stride, ends of documents
            that are none, a model that is no causal LM, or logits that are not finite.
    """
    model = unwrap(model)
    ids = np.asarray(tokens).reshape(-1)
    ends = _ends(documents, len(ids), int(prefix is not None))
    context, stride = _window(model, context, stride)
    _check_ids(model, ids, prefix)
    text = _Text(ids, ends, np.concatenate([[0], ends[:-1]]) if per_document else np.asarray([0]), prefix)
    lengths = ends - text.begins if per_document else np.asarray([len(ids)])
    unscored = 0 if prefix is not None else 1
    short = np.flatnonzero(lengths <= unscored)
    if len(short):
        raise UserError(
            f"{text.name(short[0])} has {lengths[short[0]]} token(s): perplexity needs one to predict and one "
            "before it. Leave it out, or give a prefix token"
        )
    spans = windows(lengths - unscored, context, stride, reach_back=per_document)
    counted = np.diff(ends, prepend=0)
    counted -= unscored if per_document else np.eye(1, len(ends), dtype=np.int64)[0] * unscored
    work = [*batches(spans, batch_size * context)]
    nll = _score(model, text, work, compiled, mixed, progress, share)
    n_bytes, n_words = (None if n is None else np.atleast_1d(np.asarray(n, dtype=np.int64)) for n in (n_bytes, n_words))
    by_document = [n if n is not None and len(n) == len(ends) else None for n in (n_bytes, n_words)]
    return summarize(
        Scores(nll, counted, *by_document),
        n_bytes=None if n_bytes is None else int(n_bytes.sum()),
        n_words=None if n_words is None else int(n_words.sum()),
        context=context,
        stride=stride,
        prefix=prefix,
        per_document=per_document,
        precision="mixed" if mixed else precision_of(model),
    )


def summarize(scores: Scores, *, n_bytes: int | None = None, n_words: int | None = None, **how: Any) -> Perplexity:
    """Turn the sums of documents into perplexities.

    Args:
        scores: Of every document; their order does not matter, as the sum is exact.
        n_bytes: Of the whole text; the sum of `scores` by default.
        n_words: Likewise.
        **how: `context`, `stride`, `prefix`, `per_document`, `precision`.
    """
    total, n = math.fsum(scores.nll), int(scores.tokens.sum())
    if n_bytes is None and scores.bytes is not None:
        n_bytes = int(scores.bytes.sum())
    if n_words is None and scores.words is not None:
        n_words = int(scores.words.sum())
    return Perplexity(
        nll=total / n,
        perplexity=_exp(total / n),
        bits_per_byte=total / math.log(2) / n_bytes if n_bytes else None,
        byte_perplexity=_exp(total / n_bytes) if n_bytes else None,
        word_perplexity=_exp(total / n_words) if n_words else None,
        tokens=n,
        bytes=n_bytes,
        words=n_words,
        documents=scores.documents,
        scores=scores,
        **how,
    )


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))


@dataclass(frozen=True)
class _Text:
    """A text with its documents, as windows read it."""

    tokens: np.ndarray
    """(N,) token ids."""
    ends: np.ndarray
    """(D,) where each document ends."""
    begins: np.ndarray
    """Where the positions of windows are counted from: (D,) the begin of each document, or (1,) of the whole text."""
    prefix: int | None

    def tensors(self, batch: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, np.ndarray]:
        """Return the arguments of a scorer for a batch of windows, and where in the text the scored tokens are.

        Shorter windows are filled at their end with token 0, which no position before it sees.

        Returns:
            ids (B, T), targets (S,), their rows (S,) among the B·T or None if all are scored; (S,) places.
        """
        before = int(self.prefix is not None)
        longest = int((batch[:, 2] - batch[:, 1]).max())
        block = np.zeros((len(batch), longest + 1), dtype=np.int64)
        scored = np.zeros((len(batch), longest), dtype=bool)
        places = []
        for row, row_scored, (document, start, end, first) in zip(block, scored, batch, strict=True):
            # Position k of a document reads tokens[origin + k] and predicts the next one; the prefix is position 0.
            origin = self.begins[document] - before
            lead = before if start == 0 else 0
            row[lead : end - start + 1] = self.tokens[origin + start + lead : origin + end + 1]
            if self.prefix is not None and start == 0:
                row[0] = self.prefix
            row_scored[first - start : end - start] = True
            places.append(np.arange(origin + first + 1, origin + end + 1))
        ids, targets = (_to_device(array, device) for array in (block[:, :-1], block[:, 1:][scored]))
        rows = None if scored.all() else _to_device(np.flatnonzero(scored), device)
        return ids, targets, rows, np.concatenate(places)

    def name(self, document: int) -> str:
        """Return a name for a document: its number, counted from 1, and the places of its tokens."""
        if len(self.ends) == 1:
            return "the text"
        begin = self.ends[document - 1] if document else 0
        return f"document {document + 1} of {len(self.ends)} (tokens {begin} to {self.ends[document] - 1})"


def _score(
    model: Any, text: _Text, work: list[np.ndarray], compiled: bool, mixed: bool, progress: str | None, share: bool
) -> np.ndarray:
    """Return (D,) fp64: the sum of the negative log-likelihoods of each document's tokens, in nats.

    `work` is the batches in order of cost, so that ranks that take turns have about the same to do.
    """
    device = device_of(model)
    rank, world = (dist.get_rank(), dist.get_world_size()) if share and active() else (0, 1)
    # What FSDP2 gathers in a forward pass is used again in training, which inference tensors may not be.
    sharded = bool(fsdp_modules(model))
    sums = DocumentSums(text.ends, device)
    sizes = [int((batch[:, 2] - batch[:, 3]).sum()) for batch in work]
    bar = progress_bar(progress, sum(sizes), "tok", shown=progress is not None, delay=2)
    try:
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(torch.no_grad() if sharded else torch.inference_mode())
            sample = torch.from_numpy(np.asarray(text.tokens[:PROBE], dtype=np.int64)).to(device)
            if not mixed:
                stack.enter_context(own_precision(model))
            # The trunk is looked for in the model's own precision, also if the text is then scored in another.
            with own_precision(model) if mixed else nullcontext():
                longest = max(_shape(batch)[1] for batch in work)
                scorer = Scorer(model, sample, context=longest, compiled=_commonest(work) if compiled else None)
            for turn in range(0, len(work), world):
                # A rank without a batch of its own repeats the last: shards are gathered by all ranks or by none.
                own = turn + rank < len(work)
                if own or sharded:
                    ids, targets, rows, places = text.tensors(work[turn + rank if own else -1], device)
                    nll = scorer(ids, targets, rows)
                    if own:
                        sums.add(places, nll)
                        if world == 1 and not sums.finite:
                            break  # the text has no finite perplexity
                bar.update(sum(sizes[turn : turn + world]))
            totals = sums.finish()
    finally:
        bar.close()
    if world > 1:
        shared = torch.from_numpy(totals).to(device)
        dist.all_reduce(shared)
        totals = shared.cpu().numpy()
    wrong = np.flatnonzero(~np.isfinite(totals))
    if len(wrong):
        raise UserError(
            f"the model's logits are not finite on {text.name(wrong[0])}: its weights hold NaN or infinity, or "
            "overflow in this precision. Try fp32; if that does not help, the checkpoint is damaged"
        )
    return totals


def _shape(batch: np.ndarray) -> tuple[int, int]:
    """Return (B, T) of a batch of windows."""
    return len(batch), int((batch[:, 2] - batch[:, 1]).max())


def _commonest(work: list[np.ndarray]) -> tuple[int, int] | None:
    """Return the shape of the most batches, None if they are too few to compile for."""
    shape, count = Counter(map(_shape, work)).most_common(1)[0]
    return shape if count >= WORTH_COMPILING else None


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to a device; the host does not wait for a GPU to receive the copy."""
    if device.type != "cuda":
        return torch.from_numpy(array).to(device)
    return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(device, non_blocking=True)


def _ends(documents: Any, n: int, prefix: int) -> np.ndarray:
    """Check and return (D,) the ends of documents in a text of n tokens."""
    if n + prefix < 2:
        raise UserError(f"perplexity needs a token to predict and one before it; the text has {n} token(s)")
    if documents is None:
        return np.asarray([n], dtype=np.int64)
    ends = np.ascontiguousarray(documents, dtype=np.int64).reshape(-1)
    if not len(ends) or ends[-1] != n or ends[0] < 1 or (np.diff(ends) < 1).any():
        raise UserError(
            f"documents must rise from at least 1 to {n}, the number of tokens: the place where each document ends. "
            "Leave empty documents out"
        )
    return ends


def _window(model: Any, context: int | None, stride: int | None) -> tuple[int, int]:
    """Check and return the context and the stride of a language model."""
    vocabulary_of(model)
    context = choose_context(model.config, context)
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"stride {stride} must lie between 1 and the context, {context}")
    return context, stride


def _check_ids(model: Any, ids: np.ndarray, prefix: int | None) -> None:
    """Refuse tokens that the model cannot read or, the prefix aside, cannot predict."""
    size = vocabulary_of(model)
    largest, smallest = (int(ids.max()), int(ids.min())) if len(ids) else (0, 0)
    for token in (largest, prefix or 0, smallest):
        if not 0 <= token < size:
            raise UserError(
                f"token {token} is outside the model's vocabulary of {size}: "
                "another tokenizer's tokens? Use the one that was saved with the model"
            )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if largest >= (outputs := getattr(head, "out_features", size)):
        raise UserError(
            f"token {largest} is one that the model reads and never predicts: its head has {outputs} outputs. Leave "
            "the documents that hold it out"
        )
