"""Exact perplexity: every token scored once, sums in fp64, one division at the end.

Shapes: B = windows a batch, T = tokens a window, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fire_llm.distributed import active, fsdp_modules
from fire_llm.errors import UserError

IGNORE = -100
"""Label of a position that is read but not scored."""


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


def total_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return Σ of the labels' negative log-likelihoods in nats, summed in fp64 within the softmax and over tokens.

    Args:
        logits: (B, T, V), any float dtype; the exponentials are taken in fp32 (fp64 for fp64).
        labels: (B, T), already shifted; `IGNORE` where none is scored.

    Returns:
        () fp64.
    """
    rows, targets = logits.flatten(0, 1), labels.flatten()
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    # 2²² logits at a time stay in a cache; whole batches measured three times slower at V = 50k.
    for some in (targets != IGNORE).nonzero().squeeze(-1).split(max(1, 2**22 // rows.shape[-1])):
        x = rows[some]
        x = x if x.dtype == torch.float64 else x.float()
        top = x.amax(-1, keepdim=True)
        log_sum = (x - top).exp_().sum(-1, dtype=torch.float64).log()
        total += (log_sum + (top - x.gather(-1, targets[some, None])).squeeze(-1)).sum()
    return total


@dataclass(frozen=True)
class Perplexity:
    """Hold what was measured and how."""

    nll: float
    """Mean negative log-likelihood, nats a token."""
    perplexity: float
    """exp(nll)."""
    bits_per_byte: float | None
    """Total NLL in bits over the UTF-8 bytes of the text; None where the bytes are not known."""
    tokens: int
    """Tokens scored, document separators included."""
    bytes: int | None
    context: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def windows(n: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first scored) of the windows that cover n positions, each scored in exactly one."""
    scored = 0
    for start in range(0, n, stride):
        end = min(start + context, n)
        yield start, end, scored
        scored = end
        if end == n:
            return


def perplexity(
    model: Any,
    tokens: Any,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    prefix: int | None = None,
    n_bytes: int | None = None,
    progress: str | None = None,
    share: bool = False,
) -> Perplexity:
    """Measure a model's perplexity on one stream of tokens.

    Args:
        model: A causal LM; its mode (train or eval) is restored, gradients are off.
        tokens: (N,) token ids: a tensor, an array, a memory map or a list.
        context: Tokens a window; the model's longest by default, at most 1024.
        stride: Tokens between the starts of windows; `context` (disjoint windows) by default. Smaller gives later
            tokens of a window more to go by and costs context/stride times as much.
        batch_size: Windows a forward pass; it changes speed, not the result.
        prefix: A token read before the first, so that all N are scored; without it the first is not.
        n_bytes: UTF-8 bytes of the text behind the tokens, for bits per byte.
        progress: Title of a progress bar; None for none.
        share: Under torch.distributed, let each rank score a part of the windows; every rank must then call this, and
            all get the same numbers. A model in shards needs every rank to call this either way.

    Raises:
        UserError: For fewer than two tokens, an id outside the vocabulary, a bad context or stride, or logits that
            are not finite.
    """
    stream = np.asarray(tokens).reshape(-1)
    if prefix is not None:
        stream = np.concatenate([np.asarray([prefix], dtype=stream.dtype), stream])
    if len(stream) < 2:
        raise UserError(f"perplexity needs a token to predict and one before it; the text has {len(stream)} token(s)")
    text = model.config.get_text_config()
    top = int(stream.max())
    if top >= text.vocab_size:
        raise UserError(
            f"token {top} is outside the model's vocabulary of {text.vocab_size}: another tokenizer's tokens?"
        )
    longest = getattr(text, "max_position_embeddings", None)
    context = context or min(longest or 1024, 1024)
    if longest and context > longest:
        raise UserError(f"context {context} is longer than the model's {longest} positions")
    stride = stride or context
    if not 1 <= stride <= context:
        raise UserError(f"stride {stride} must lie between 1 and the context, {context}")

    n = len(stream) - 1
    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if share and active() else (0, 1)
    batches = [*_batches(windows(n, context, stride), batch_size)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    bar = _bar(n, progress)
    try:
        # What FSDP2 gathers in a forward pass is used again in training, which inference tensors may not be.
        with torch.no_grad() if fsdp_modules(model) else torch.inference_mode():
            for turn in range(0, len(batches), world):
                # A rank without a batch of its own repeats the last: shards are gathered by all ranks or by none.
                batch = batches[min(turn + rank, len(batches) - 1)]
                ids = torch.stack([torch.from_numpy(stream[a : b + 1].astype(np.int64)) for a, b, _ in batch])
                labels = ids[:, 1:].clone()
                for row, (a, _, first) in zip(labels, batch, strict=True):
                    row[: first - a] = IGNORE
                logits = model(input_ids=ids[:, :-1].to(device), use_cache=False).logits
                if turn + rank < len(batches):
                    total += total_nll(logits, labels.to(device))
                bar.update(sum(b - first for each in batches[turn : turn + world] for _, b, first in each))
    finally:
        model.train(was_training)
        bar.close()
    if world > 1:
        dist.all_reduce(total)
    nll = float(total) / n
    if not math.isfinite(nll):
        raise UserError("the model's logits are not finite on this text: its weights hold NaN or infinity, or overflow")
    bits = float(total) / math.log(2) / n_bytes if n_bytes else None
    return Perplexity(nll, math.exp(min(nll, 700.0)), bits, n, n_bytes, context, stride)


def _batches(spans: Iterator[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Group windows of equal length; the ragged last one goes alone, so that nothing is ever padded."""
    batch: list[tuple[int, int, int]] = []
    for span in spans:
        if batch and (len(batch) == size or span[1] - span[0] != batch[0][1] - batch[0][0]):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


def _bar(total: int, title: str | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="tok", unit_scale=True, leave=False, disable=title is None, delay=2)


def score_checkpoints(
    names: list[str],
    data: list[str],
    *,
    split: str = "validation",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure checkpoints on corpora: one row each pair.

    Args:
        names: Checkpoint folders or Hub ids; each is read with its own tokenizer.
        data: Names of corpora, whose `split` is read, or local files, which are read whole.
        split: `train` or `validation`.
        context, stride, batch_size: As in `perplexity`.
        progress: Show progress bars.

    Raises:
        UserError: For an unknown corpus, an unreadable checkpoint or file, or tokens that do not fit the model.
    """
    from glob import has_magic

    from fire_llm.corpora import CORPORA, CorpusSpec, resolve
    from fire_llm.data import tokenize_corpus
    from fire_llm.models import load_model, load_tokenizer

    corpora = []
    for name in data:
        # A file named by hand is measured whole; it is no training corpus with a part held out.
        local = name not in CORPORA and (Path(name).exists() or has_magic(name) or Path(name).suffix != "")
        corpora.append(
            (resolve(name, CorpusSpec(files=name, holdout=0.0)), "train") if local else (resolve(name), split)
        )
    rows = []
    for checkpoint in names:
        tokenizer = load_tokenizer(checkpoint)
        model = load_model(checkpoint)
        for corpus, part in corpora:
            tokens = tokenize_corpus(corpus, tokenizer, part, progress=progress)
            measured = perplexity(
                model,
                tokens.tokens,
                context=context,
                stride=stride,
                batch_size=batch_size,
                prefix=tokenizer.eos_token_id,
                n_bytes=tokens.n_bytes,
                progress=f"{checkpoint} on {corpus.name}" if progress else None,
            )
            rows.append({"checkpoint": checkpoint, "data": corpus.name, "split": part, **measured.to_dict()})
    return rows


def print_scores(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `score_checkpoints` as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("checkpoint", "data"):
        table.add_column(column, overflow="fold")
    for column in ("nll (nats/token)", "perplexity", "bits/byte", "tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        table.add_row(
            row["checkpoint"], row["data"], f"{row['nll']:.6f}", f"{row['perplexity']:.4f}", bits, f"{row['tokens']:,}"
        )
    Console().print(table)
    first = rows[0]
    print(f"context {first['context']}, stride {first['stride']}; each token scored once, after an end-of-text token")
