"""Train our trainer, a bare loop and transformers' Trainer in turns; profile them; change one thing at a time."""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import benchmark_training as racing
import torch
from gpu.kernels import clean

from fire_llm.core.flops import flops_per_token, peak_flops
from fire_llm.models import config_for, model_on_meta

ATTENTION = ("flash", "cudnn", "efficient", "mem_eff", "fmha", "attention", "attn")
"""Parts of the names of kernels that compute attention."""


@contextmanager
def everywhere(name: str, value: Any) -> Iterator[None]:
    """Put a value in place of a name in every module of the package that has it."""
    modules = [m for key, m in [*sys.modules.items()] if key.startswith("fire_llm") and name in vars(m)]
    if not modules:
        raise LookupError(f"no module of fire_llm has '{name}'")
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def masked() -> AbstractContextManager[None]:
    """Give compiled attention the mask that transformers makes."""
    return everywhere("needs_no_mask", lambda *_, **__: False)


def slices(logits: int) -> AbstractContextManager[None]:
    """Hold so many logits at once."""
    return everywhere("logits_at_once", lambda _: logits)


@contextmanager
def kernel(*names: str) -> Iterator[None]:
    """Restrict attention to these kernels, and compile again: a cached graph holds the choice of another kernel."""
    from torch._functorch import config
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with config.patch(enable_autograd_cache=False), sdpa_kernel([getattr(SDPBackend, n) for n in names]):
        yield


ABLATIONS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], dict[str, Any]]] = {
    # name: (what is switched, options of the benchmark that change)
    "parameters read in bf16": (nullcontext, {"precision": "bf16-params"}),
    "attention with a mask": (masked, {}),
    "attention by flash": (functools.partial(kernel, "FLASH_ATTENTION", "MATH"), {}),
    "micro-batches of 32": (nullcontext, {"batch": 32, "accumulation": 2}),
    "slices of 2^27 logits": (functools.partial(slices, 2**27), {}),
    "one slice": (functools.partial(slices, 2**31), {}),
    "micro-batches of 16": (nullcontext, {"batch": 16, "accumulation": 4}),
    "attention by cuDNN": (functools.partial(kernel, "CUDNN_ATTENTION", "MATH"), {}),
}
"""Changes of our own training, by name; one that fails is recorded, and the next is tried."""


def race_of(args: argparse.Namespace) -> SimpleNamespace:
    """Return the options of benchmark_training for this report."""
    common = {"device": args.device, "precision": "bf16"}
    if args.size == "tiny":
        sizes = {"preset": "gpt-tiny", "context": 32, "vocab": 512, "batch": 2, "accumulation": 2}
        return SimpleNamespace(**sizes, steps=1, rounds=1, device=args.device, precision="fp32")
    return SimpleNamespace(
        preset="gpt-0.1b", context=1024, vocab=50304, batch=64, accumulation=1, steps=12, rounds=3, **common
    )


def halved(race: Any) -> Any:
    """Return the same step in micro-batches of half as many sequences."""
    return SimpleNamespace(**{**vars(race), "batch": race.batch // 2, "accumulation": race.accumulation * 2})


def training(stage: Any) -> None:
    """Train our trainer, a bare loop and transformers' Trainer in turns, and profile and change ours."""
    before = torch.backends.fp32_precision
    try:
        _training(stage)
    finally:
        torch.backends.fp32_precision = before  # TrainingArguments(torch_compile=True) turns TF32 on


def _training(stage: Any) -> None:
    args, race = stage.args, race_of(stage.args)
    cuda = args.device == "cuda"
    tokens = race.steps * race.batch * race.accumulation * race.context
    stage.note(model=race.preset, context=race.context, sequences=race.batch, micro_batches=race.accumulation,
               tokens_per_step=race.batch * race.accumulation * race.context, steps_a_round=race.steps,
               precision=race.precision, compiled=cuda)  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], float]] = {}
    trainers: dict[str, Any] = {}

    def begin(name: str, race: Any) -> float:
        rows[name] = {"tokens_per_second": [], "sequences": race.batch}
        if name in racing.TRAINERS:
            trainers[name] = racing.TRAINERS[name](race, race.steps + 1)
            runs[name] = functools.partial(racing.train_for, trainers[name], race)
        else:
            runs[name] = racing.contestant(name, race, race.steps + 1)
        return runs[name]()

    def begin_with_what_fits(name: str) -> float:
        with suppress(torch.OutOfMemoryError):
            return begin(name, race)
        runs.pop(name, None)
        trainers.pop(name, None)
        clean(args)
        return begin(name, halved(race))

    def take(name: str, first: bool) -> None:
        held = _restart_peak(cuda)
        began = time.monotonic()
        seconds = begin_with_what_fits(name) if first else runs[name]()
        if first:
            rows[name] |= {"first_round_seconds": time.monotonic() - began, "first_round_rate": tokens / seconds}
            rows[name]["peak_bytes"] = _peak(cuda) - held  # without what the others hold
        else:
            rows[name]["tokens_per_second"].append(tokens / seconds)
        stage.note(contestants=rows)

    for number in range(race.rounds + 1):
        for name in ("ours", "stock", "bare"):
            if number == 0 or name in runs:
                stage.attempt(f"{name}, round {number}", lambda n=name, f=number == 0: take(n, f))
        _compare(stage, rows, race)
    _tell(stage, rows, race)
    _look_closer(stage, trainers, rows, race)
    runs.clear()
    trainers.clear()
    _change_one_thing(stage, race, max(rows.get("ours", {}).get("first_round_seconds", 0.0), 5.0))


def _tell(stage: Any, rows: dict[str, dict[str, Any]], race: Any) -> None:
    """Add the rates and ratios to the stage's table."""
    for name, row in rows.items():
        rate = f"{row['median']:12,.0f} tokens/s" if "median" in row else "not measured"
        mfu = f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        memory = row.get("peak_bytes", 0) / 2**30
        cut = f"; micro-batches of {row['sequences']}, out of memory before" if row["sequences"] < race.batch else ""
        first = f"first round {row.get('first_round_seconds', 0):.0f} s"
        stage.say(f"{name:6} {rate}{mfu}, {memory:.1f} GiB; {first}{cut}")
    for name, ratio in stage.found.get("ratios", {}).items():
        stage.say(f"{name}: {ratio:.3f}")


def _look_closer(stage: Any, trainers: dict[str, Any], rows: dict[str, dict[str, Any]], race: Any) -> None:
    """Record how ours takes its logits and its attention, and profile both trainers."""
    if trainers.get("ours") is not None:
        stage.attempt("path", lambda: stage.note(**_path(trainers["ours"], race)))
    masked_by = {True: "without a mask", False: "with a mask"}.get(stage.found.get("without_mask"), "unknown")
    stage.say(f"logits: {stage.found.get('path', 'unknown')}; attention: {masked_by}")
    profiles: dict[str, Any] = {}
    for name in ("ours", "stock"):
        if trainers.get(name) is not None and stage.left() > 15:
            whole = rows[name].get("step_milliseconds")
            stage.attempt(f"profile of {name}", lambda n=name, w=whole: _profile(stage, n, trainers[n], w, profiles))


def _change_one_thing(stage: Any, race: Any, took: float) -> None:
    """Train ours with one thing changed at a time, for as long as there is time.

    Args:
        stage: The stage.
        race: Options of the benchmark.
        took: Seconds that the first of these may take.
    """
    ablations: dict[str, Any] = {}
    for name, (switch, changes) in ABLATIONS.items():
        if stage.args.size == "tiny" and "kernel" in str(switch):
            continue
        if stage.left() < 1.2 * took + 5:
            ablations[name] = "no time was left"
            continue
        began = time.monotonic()
        stage.attempt(name, lambda n=name, s=switch, c=changes: _ablate(stage, race, n, s, c, ablations))
        took = time.monotonic() - began
    stage.note(ablations=ablations)


def _compare(stage: Any, rows: dict[str, dict[str, Any]], race: Any) -> None:
    model = model_on_meta(config_for(race.preset, context=race.context, overrides={"vocab_size": race.vocab}))
    flops, peak = flops_per_token(model, race.context), peak_flops(torch.device(race.device), half=True)
    stage.note(flops_per_token=flops, peak_flops=peak)
    for row in rows.values():
        if row["tokens_per_second"]:
            row["median"] = statistics.median(row["tokens_per_second"])
            row["step_milliseconds"] = 1000 * race.batch * race.accumulation * race.context / row["median"]
            row["mfu"] = row["median"] * flops / peak if flops and peak else None
    ratios = {}
    for other in ("bare", "stock"):
        pairs = [(rows.get(name, {}).get("tokens_per_second", [])) for name in ("ours", other)]
        if all(pairs):
            ratios[f"ours / {other}"] = statistics.median(a / b for a, b in zip(*pairs, strict=False))
    stage.note(contestants=rows, ratios=ratios)


def _restart_peak(cuda: bool) -> int:
    if not cuda:
        return 0
    gc.collect()
    torch.cuda.init()  # a process that has done nothing yet has no statistics
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(cuda: bool) -> int:
    return torch.cuda.max_memory_allocated() if cuda else 0


def _path(trainer: Any, race: Any) -> dict[str, Any]:
    """Return how the trainer computes its logits and its attention."""
    ids = torch.zeros(race.batch, race.context, dtype=torch.int64, device=race.device)
    taken = trainer._summed_loss
    path = "in slices" if taken.sliced(trainer.model, ids) else "whole"
    return {"path": path, "without_mask": taken.without_mask({"input_ids": ids})}


def _profile(stage: Any, name: str, trainer: Any, step: float | None, profiles: dict[str, Any]) -> None:
    """Profile two steps: in which kernels their time goes, and which of them compute attention.

    Args:
        stage: The stage.
        name: The contestant.
        trainer: Its trainer.
        step: Milliseconds of a step without the profiler.
        profiles: Gets the result.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = stage.args.device == "cuda"
    steps = trainer.args.max_steps = 2
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        trainer.train()
        if cuda:
            torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if not cuda or e.device_type == DeviceType.CUDA]
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]  # they lie over kernels
    spent = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1000 for e in events}
    counts = {e.key: e.count for e in events}
    total = sum(spent.values())
    top = sorted(spent, key=spent.__getitem__, reverse=True)
    attention = [key for key in top if any(part in key.lower() for part in ATTENTION)]
    profiles[name] = {
        "steps": steps,
        "kernel_milliseconds": total,
        "step_milliseconds": step,
        "kernels_a_step": sum(counts.values()) / steps,
        "attention": {key[:200]: {"milliseconds": spent[key], "calls": counts[key]} for key in attention},
        "top": [
            {"kernel": key[:200], "milliseconds": spent[key], "share": spent[key] / total, "calls": counts[key]}
            for key in top[:20]
        ],
    }
    stage.note(profiles=profiles)
    whole = f" of {step:.1f}" if step else ""
    stage.say(f"{name}: {sum(counts.values()) / steps:,.0f} kernels take {total / steps:.1f}{whole} ms a step")
    for key in top[:12] if name == "ours" else []:
        stage.say(f"  {spent[key] / steps:8.2f} ms {spent[key] / total:6.1%} {counts[key] / steps:6.0f} × {key[:90]}")
    stage.say(f"attention of {name}: " + ("; ".join(key[:70] for key in attention[:4]) or "no kernel is named so"))


def _ablate(stage: Any, race: Any, name: str, switch: Any, changes: dict[str, Any], found: dict[str, Any]) -> None:
    changed = SimpleNamespace(**{**vars(race), **changes})
    if stage.args.size == "tiny":
        changed.batch, changed.accumulation = race.batch, race.accumulation
    steps = min(8, race.steps)
    torch._dynamo.reset()  # another size of a batch would make graphs of all sizes, which are slower
    cuda = stage.args.device == "cuda"
    try:
        with switch():
            held, began = _restart_peak(cuda), time.monotonic()
            run = racing.contestant("ours", changed, steps + 1)
            rate = steps * changed.batch * changed.accumulation * changed.context / run()
        found[name] = {
            "tokens_per_second": rate,
            "seconds": time.monotonic() - began,
            "peak_bytes": _peak(cuda) - held,
        }
        stage.note(ablations=found)
        stage.say(f"ours, {name}: {rate:,.0f} tokens/s")
    finally:
        torch._dynamo.reset()
        clean(stage.args)
