"""Measure the device and single operations: bytes a second, FLOP/s, orthogonalisers."""

from __future__ import annotations

import argparse
import gc
from typing import Any

import benchmark_newton_schulz as solving
import torch


def clean(args: argparse.Namespace) -> bool:
    """Release the memory of a stage, and return whether the device still answers."""
    gc.collect()
    if args.device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return float(torch.ones(4, device="cuda").sum()) == 4.0
    except RuntimeError:
        return False


# ---- the machine


def environment(stage: Any) -> None:
    """Measure the device: bytes copied a second, FLOP/s of one large product."""
    args = stage.args
    cuda, tiny = args.device == "cuda", args.size == "tiny"
    settings: dict[str, Any] = {"device": "CPU", "torch": torch.__version__, "threads": torch.get_num_threads()}
    if cuda:
        device = torch.cuda.get_device_properties(0)
        settings |= {"device": device.name, "devices": torch.cuda.device_count(), "cuda": torch.version.cuda}
        settings |= {"memory_gib": device.total_memory / 2**30, "processors": device.multi_processor_count}
        settings |= {"capability": f"{device.major}.{device.minor}", "cudnn": torch.backends.cudnn.version()}
    stage.note(**settings)
    size = 2**20 if tiny else 2**30  # 4 GiB of fp32
    source, target = torch.zeros(2, size, device=args.device)
    taken, _ = solving.milliseconds(lambda _: [target.copy_(source)], [source], 1 if tiny else 20)
    stage.note(copy_terabytes_per_second=2 * source.nbytes / taken / 1e9)
    n = 64 if tiny else 8192
    x = torch.randn(n, n, device=args.device, dtype=torch.bfloat16)
    taken, _ = solving.milliseconds(lambda _: [x @ x], [x], 1 if tiny else 20)
    stage.note(product_side=n, product_teraflops=2 * n**3 / taken / 1e9)
    stage.say(
        f"{settings['device']}, torch {torch.__version__}: {stage.found['copy_terabytes_per_second']:.2f} TB/s, "
        f"{stage.found['product_teraflops']:.0f} TFLOP/s in bf16"
    )


# ---- Newton-Schulz and polar


def orthogonalisers(stage: Any) -> None:
    """Time every solver on all matrices of GPT-2's blocks, and two of them on each shape of Llama-3-8B."""
    args = stage.args
    tiny = args.size == "tiny"
    torch.manual_seed(0)
    depth, layer = solving.MODELS["gpt2"]
    if tiny:
        depth, layer = 2, tuple(((a // 8, b // 8), count) for (a, b), count in layer)
    stacks = [torch.randn(depth * count, *shape, device=args.device) * 0.02 for shape, count in layer]
    contestants = solving.contestants(args.device == "cuda")
    stage.note(matrices=[list(stack.shape) for stack in stacks])
    rows: dict[str, Any] = {}

    def tell(row: dict[str, Any]) -> None:
        rows[row["solver"]] = row
        stage.note(gpt2=rows)
        stage.say(f"{row['solver']:24} {row['milliseconds']:9.2f} ms   distance {row['distance']:.1e}")

    for name in sorted(solving.without(contestants, ["svd"]), key=lambda name: "newton_schulz" not in name):
        one = {name: contestants[name]}
        stage.attempt(name, lambda one=one: solving.measure(stacks, one, 1 if tiny else 20, by_svd=False, tell=tell))
    for name in ("newton_schulz, bf16", "polar, 1e-3"):
        stage.attempt(f"{name} on Llama-3-8B", lambda n=name: _llama(stage, n, contestants[n]))

    def svd() -> None:
        one = [stack[: len(stack) // depth] for stack in stacks]
        taken, _ = solving.milliseconds(contestants["torch.linalg.svd"][0], one, 1)
        stage.note(svd_milliseconds_one_layer=taken)
        stage.say(f"{'torch.linalg.svd':24} {taken:9.2f} ms of one layer")

    stage.attempt("torch.linalg.svd", svd)


def _llama(stage: Any, name: str, contestant: Any) -> None:
    """Time one matrix of each shape, and compute the time of all 224 from how often each shape occurs."""
    layers, layer = solving.MODELS["llama-3-8b"]
    tiny = stage.args.size == "tiny"
    seconds, rows = 0.0, {}
    for shape, count in layer:
        sides = [side // 64 if tiny else side for side in shape]
        one = torch.randn(1, *sides, device=stage.args.device) * 0.02
        (row,) = solving.measure([one], {name: contestant}, 1 if tiny else 5, by_svd=False)
        rows[" × ".join(map(str, sides))] = {k: row[k] for k in ("milliseconds", "distance", "extra_megabytes")}
        seconds += layers * count * row["milliseconds"] / 1000
    found = stage.found.get("llama_3_8b", {}) | {name: {"one_of_each": rows, "all_224_seconds": seconds}}
    stage.note(llama_3_8b=found)
    stage.say(f"{name:24} {seconds:9.2f} s for all 224 matrices of Llama-3-8B, from one of each shape")
