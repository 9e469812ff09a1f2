"""Perplexity by ours and by a rolling loop, in the same precisions."""

from __future__ import annotations

import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu.evidence import tokens_of
from gpu.training import race_of
from torch import Tensor

from fire_llm import perplexity
from fire_llm.models import config_for, fresh_model, load_tokenizer


def rolling_loop(model: Any, tokens: Tensor, context: int, batch_size: int, prefix: int) -> float:
    """Return Σ nll of a text as lm-eval's rolling windows take it: whole logits, log-softmax, a gather a window.

    Args:
        model: A causal LM in evaluation mode.
        tokens: (N,) on the CPU.
        context: Tokens a window; the last reaches back to be full.
        batch_size: Windows a forward pass.
        prefix: Token read before the first.
    """
    device = next(model.parameters()).device
    read = torch.cat([torch.tensor([prefix]), tokens[:-1]])
    windows = []
    for start in range(0, len(tokens), context):
        end = min(start + context, len(tokens))
        begin = max(0, end - context)
        windows.append((read[begin:end], tokens[start:end]))
    total = 0.0
    with torch.no_grad():
        for at in range(0, len(windows), batch_size):
            some = windows[at : at + batch_size]
            longest = max(len(ids) for ids, _ in some)
            batch = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids))) for ids, _ in some])
            log_p = torch.log_softmax(model(batch.to(device)).logits, -1)
            for row, (ids, wanted) in zip(log_p, some, strict=True):
                row = row[len(ids) - len(wanted) : len(ids)]
                wanted = wanted.to(device)
                bool((row.argmax(-1) == wanted).all())  # lm-eval tells whether the text was the likeliest
                total -= float(row.gather(-1, wanted[:, None]).sum())
    return total


def evaluation(stage: Any) -> None:
    """Measure perplexity by ours and by a rolling loop, in the same precisions, on web text."""
    args = stage.args
    tiny = args.size == "tiny"
    with tempfile.TemporaryDirectory() as folder:
        _, held_out = tokens_of(args, Path(folder))
        tokens = torch.from_numpy(held_out.tokens[: 500 if tiny else None].astype("int64"))
    prefix = load_tokenizer(args.data / "gpt2-tokenizer").eos_token_id
    race = race_of(args)
    context = race.context
    config = config_for(race.preset, context=context, overrides={"vocab_size": max(race.vocab, int(tokens.max()) + 1)})
    model = fresh_model(config, args.seed).to(args.device).eval()
    half = copy.deepcopy(model).to(torch.bfloat16)
    stage.note(model=race.preset, tokens=len(tokens), context=context, device=args.device)
    mixed = functools.partial(torch.autocast, args.device, torch.bfloat16)

    def ours(some: Tensor, which: Any = model, **options: Any) -> float:
        # One document, whose last window reaches back to be full, as a rolling window does.
        how = {"context": context, "batch_size": 16, "prefix": prefix, "per_document": True}
        found = perplexity(which, some, **how, **options)
        return found.nll * found.tokens

    def rolling(some: Tensor, which: Any = model, size: int = 16) -> float:
        return rolling_loop(which, some, context, size, prefix)

    contestants: dict[str, tuple[Callable[[Tensor], float], Callable[[], Any]]] = {
        "ours, fp32": (ours, nullcontext),
        "rolling, fp32, batch 16": (rolling, nullcontext),
        "ours, bf16 weights": (functools.partial(ours, which=half), nullcontext),
        "rolling, bf16 weights, batch 16": (functools.partial(rolling, which=half), nullcontext),
        "ours, bf16 autocast": (functools.partial(ours, mixed=True), mixed),
        "rolling, bf16 autocast, batch 16": (rolling, mixed),
        "rolling, bf16 weights, batch 1": (functools.partial(rolling, which=half, size=1), nullcontext),
        "rolling, fp32, batch 1": (functools.partial(rolling, size=1), nullcontext),
    }
    if args.device == "cuda":
        contestants["ours, bf16 weights, compiled"] = (functools.partial(ours, which=half, compiled=True), nullcontext)
        contestants["ours, fp32, compiled"] = (functools.partial(ours, compiled=True), nullcontext)
    rows: dict[str, Any] = {}
    for name, (score, around) in contestants.items():

        def row(name: str = name, score: Any = score, around: Any = around) -> None:
            with around():
                score(tokens if "compiled" in name else tokens[: 2 * context + 5])  # loads kernels, untimed
                times = []
                for _ in range(1 if tiny else 3):
                    began = time.perf_counter()
                    nll = score(tokens)
                    times.append(time.perf_counter() - began)
                    if times[0] > 4:
                        break
            rows[name] = {"tokens_per_second": len(tokens) / statistics.median(times), "nll": nll / len(tokens)}
            stage.note(contestants=rows, ratios=_ratios(rows))
            stage.say(f"{name:34} {rows[name]['tokens_per_second']:12,.0f} tokens/s   nll {rows[name]['nll']:.6f}")

        stage.attempt(name, row)
    for name, ratio in stage.found.get("ratios", {}).items():
        stage.say(f"ours / rolling, {name}: {ratio:.2f}")


def _ratios(rows: dict[str, Any]) -> dict[str, float]:
    """Return the speed of ours over that of the rolling loop, by precision and the loop's batch size."""
    found = {}
    for precision in ("fp32", "bf16 weights", "bf16 autocast"):
        for size in (16, 1):
            ours, rolling = rows.get(f"ours, {precision}"), rows.get(f"rolling, {precision}, batch {size}")
            if ours and rolling:
                found[f"{precision}, batch {size}"] = ours["tokens_per_second"] / rolling["tokens_per_second"]
    return found
