"""Measure a text as lm_eval does, without lm_eval, and time `perplexity` against that."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fire_llm import perplexity
from fire_llm.architectures.context import choose_context
from fire_llm.evaluation.precision import evaluating, own_precision

PRECISIONS = ("fp32", "bf16", "bf16 autocast")


def rolling_windows(documents: Sequence[Sequence[int]], context: int, prefix: int) -> Iterator[tuple[list, list]]:
    """Yield for each window the tokens that a model reads and those that are scored, as lm_eval cuts texts.

    Source: lm_eval.utils.get_rolling_token_windows with context_len=1, then make_disjoint_window.
    """
    for tokens in documents:
        stream = [prefix, *tokens]
        for begin in range(0, len(tokens), context):
            end = min(begin + context, len(tokens))
            yield stream[max(0, end - context) : end], stream[begin + 1 : end + 1]


@torch.no_grad()
def rolling_loop(
    model: Any,
    tokens: Any,
    context: int,
    batch_size: int,
    prefix: int,
    *,
    documents: Any = None,
    autocast: torch.dtype | None = None,
    softmax: torch.dtype | None = None,
) -> tuple[float, int]:
    """Score a tokenised text as lm_eval does; return Σ nll in nats and the number of tokens scored.

    Args:
        model: A causal LM, in evaluation mode.
        tokens: (N,) token ids.
        context: Most tokens a window.
        batch_size: Windows a forward pass; 1 is lm_eval's default.
        prefix: The token read before each document.
        documents: (D,) where each document ends in `tokens`; one document by default.
        autocast: The dtype of autocast (lm_eval's `mixed_precision_dtype`); None for none.
        softmax: The dtype of the softmax (lm_eval's `softmax_dtype`); that of the logits by default.

    Source: `HFLM.loglikelihood_rolling` and `_loglikelihood_tokens` of lm_eval 0.4.13.
    """
    device = next(model.parameters()).device
    ends = [len(tokens)] if documents is None else [int(end) for end in documents]
    texts = [np.asarray(tokens[a:b]).tolist() for a, b in zip([0, *ends], ends, strict=False)]
    windows, total = list(rolling_windows(texts, context, prefix)), 0.0
    for at in range(0, len(windows), batch_size):
        chunk = windows[at : at + batch_size]
        inputs = [torch.tensor(read, dtype=torch.long, device=device) for read, _ in chunk]
        longest = max(len(each) for each in inputs)
        batch = torch.stack([F.pad(each, (0, longest - len(each))) for each in inputs])
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(batch).logits
        log_p = F.log_softmax(logits, dim=-1, dtype=softmax)
        for each, read, (_, scored) in zip(log_p, inputs, chunk, strict=True):
            each = each[len(read) - len(scored) : len(read)][None]
            greedy = each.argmax(dim=-1)
            targets = torch.tensor(scored, dtype=torch.long, device=device)[None]
            equal = (greedy == targets).all()
            picked = torch.gather(each, 2, targets[..., None]).squeeze(-1)
            total -= float(picked.sum())
            bool(equal)  # lm_eval reads this too, which waits for the device once more
    return total, ends[-1]


def measure(
    model: Any,
    tokens: Any,
    *,
    context: int | None = None,
    batch_size: int = 16,
    prefix: int = 0,
    precisions: Sequence[str] = PRECISIONS,
    rolling_batch_sizes: Sequence[int] = (16,),
    compiled: bool = False,
    repeat: int = 3,
) -> list[dict[str, Any]]:
    """Time `perplexity` and the rolling loop on one text, in turns, and return a row for each.

    Args:
        model: A causal LM in fp32, on the device to measure on. It stays as it is.
        tokens: (N,) token ids: one document.
        context: Tokens a window; the model's longest, at most 1024, by default.
        batch_size: Of perplexity.
        prefix: The token read first.
        precisions: Of `PRECISIONS`.
        rolling_batch_sizes: Of the loop, each a contestant.
        compiled: Measure perplexity with a compiled trunk too.
        repeat: Timed passes of each contestant, after one that is not timed.

    Returns:
        contestant, precision, tokens_per_second (of the median), seconds (all of them), nll (nats a token), tokens, and
        first_seconds (of the pass that is not timed: kernels and graphs are made in it).
    """
    context, device = choose_context(model.config, context), next(model.parameters()).device
    rows = []
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"precision '{precision}' is none of {', '.join(PRECISIONS)}")
        measured = copy.deepcopy(model).to(torch.bfloat16) if precision == "bf16" else model
        mixed = precision == "bf16 autocast"

        def ours(graph: bool, measured: Any = measured, mixed: bool = mixed) -> tuple[float, int]:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
                found = perplexity(measured, tokens, context=context, batch_size=batch_size, prefix=prefix,
                                   per_document=True, compiled=graph, mixed=mixed)  # fmt: skip
            return found.nll * found.tokens, found.tokens

        def loop(size: int, measured: Any = measured, mixed: bool = mixed) -> tuple[float, int]:
            with own_precision(measured), evaluating(measured):  # no TF32 in fp32, as for ours
                return rolling_loop(measured, tokens, context, size, prefix, autocast=torch.bfloat16 if mixed else None)

        run: dict[str, Callable] = {"ours": lambda ours=ours: ours(False)}
        if compiled:
            run["ours, compiled"] = lambda ours=ours: ours(True)
        run |= {f"rolling loop, batch {n}": lambda loop=loop, n=n: loop(n) for n in rolling_batch_sizes}
        timed = in_turns(run, repeat, device)
        for name, (first, seconds, (nll, n)) in timed.items():
            rows.append(
                {"contestant": name, "precision": precision, "tokens_per_second": n / statistics.median(seconds),
                 "nll": nll / n, "tokens": n, "seconds": seconds, "first_seconds": first}
            )  # fmt: skip
    return rows


def in_turns(
    run: dict[str, Callable], repeat: int, device: torch.device
) -> dict[str, tuple[float, list[float], tuple[float, int]]]:
    """Return for each contestant (seconds of a first pass, seconds of the timed passes, what it measured)."""

    def once(name: str) -> tuple[float, tuple[float, int]]:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        answer = run[name]()
        wait()
        return time.perf_counter() - began, answer

    first = {name: once(name) for name in run}  # loads, compiles, fills caches
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(repeat):
        for name in [*run][turn % len(run) :] + [*run][: turn % len(run)]:
            seconds[name].append(once(name)[0])
    return {name: (first[name][0], seconds[name], first[name][1]) for name in run}
