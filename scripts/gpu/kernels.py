"""What the device and single operations give: bytes, FLOP/s, orthogonalisers."""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import benchmark_newton_schulz as solving
import torch
from torch import Tensor

from fire_llm import newton_schulz, polar


def clean(args: argparse.Namespace) -> bool:
    """Release what a stage held, and tell whether the device still answers."""
    gc.collect()
    if args.device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return float(torch.ones(4, device="cuda").sum()) == 4.0
    except RuntimeError:
        return False


def milliseconds(work: Callable[[], Any], repeat: int, device: str, enough: float = 5.0) -> list[float]:
    """Return the times of `repeat` runs after one that is not counted, fewer after `enough` seconds.

    On CUDA by events, which stand between the kernels: the host's waits inside are part of a time, Python's start is
    not.
    """
    work()
    found: list[float] = []
    began = time.monotonic()
    while len(found) < repeat and (not found or time.monotonic() - began < enough):
        if device == "cuda":
            torch.cuda.synchronize()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            torch.cuda.synchronize()
            found.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            work()
            found.append(1000 * (time.perf_counter() - start))
    return found


def spread(times: list[float]) -> dict[str, Any]:
    """Return the median, the range and the number of times."""
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "runs": len(times)}


# ---- the machine


def environment(stage: Any) -> None:
    """Measure what the device gives: bytes copied a second, FLOP/s of one large product."""
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
    times = milliseconds(lambda: target.copy_(source), 1 if tiny else 20, args.device)
    stage.note(copy_terabytes_per_second=2 * source.nbytes / statistics.median(times) / 1e9)
    n = 64 if tiny else 8192
    x = torch.randn(n, n, device=args.device, dtype=torch.bfloat16)
    times = milliseconds(lambda: x @ x, 1 if tiny else 20, args.device)
    stage.note(product_side=n, product_teraflops=2 * n**3 / statistics.median(times) / 1e9)
    stage.say(
        f"{settings['device']}, torch {torch.__version__}: {stage.found['copy_terabytes_per_second']:.2f} TB/s, "
        f"{stage.found['product_teraflops']:.0f} TFLOP/s in bf16"
    )


# ---- Newton-Schulz and polar


def loop64(w: Tensor) -> Tensor:
    """Return what the paper's loop gives, in fp64."""
    return solving.paper_loop(w.double())


def factor64(w: Tensor) -> Tensor:
    """Return the polar factor in fp64, from the eigenvectors of the smaller Gram matrix: for well-conditioned w."""
    x = w.double()
    if x.shape[0] > x.shape[1]:
        return factor64(w.mT).mT
    squares, vectors = torch.linalg.eigh(x @ x.mT)
    return (vectors * squares.rsqrt()) @ vectors.mT @ x


def solvers() -> dict[str, tuple[Any, Callable[[Tensor], Tensor]]]:
    """Return what is timed, each with the fp64 function that it is compared with."""
    each, batched = solving.each, solving.batched
    found: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {}
    for name in ("bfloat16", "float16", "float32"):
        solve = functools.partial(newton_schulz, compute_dtype=getattr(torch, name))
        found[f"newton_schulz, {name}"] = (batched(solve), loop64)
    found["authors' loop, fp32"] = (each(solving.paper_loop), loop64)
    found["torch.optim.Muon"] = (
        each(lambda w: solving.muon_iteration(w, solving.MUON, solving.STEPS, 1e-7)),
        factor64,
    )
    found["polar, 1e-3"] = (batched(polar), factor64)
    found["polar, 1e-5"] = (batched(lambda w: polar(w, 1e-5)), factor64)
    return found


def orthogonalisers(stage: Any) -> None:
    """Time every solver on all matrices of GPT-2's blocks, and two on the largest of Llama-3-8B."""
    args = stage.args
    tiny, cuda = args.size == "tiny", args.device == "cuda"
    torch.manual_seed(0)
    depth, layer = solving.MODELS["gpt2"]
    if tiny:
        depth, layer = 2, tuple(((a // 8, b // 8), count) for (a, b), count in layer)
    stacks = [torch.randn(depth * count, *shape, device=args.device) * 0.02 for shape, count in layer]
    stage.note(matrices=[list(stack.shape) for stack in stacks])
    rows: dict[str, Any] = {}
    wanted: dict[Any, list[Tensor]] = {}
    for name, (solve, reference) in solvers().items():
        if name.endswith("float16") and not cuda and "bfloat16" not in name:
            continue  # CPUs multiply fp16 a hundred times slower than fp32

        def row(name: str = name, solve: Any = solve, reference: Any = reference) -> None:
            if reference not in wanted:
                wanted[reference] = [reference(stack[0]) for stack in stacks]
            rows[name] = spread(milliseconds(lambda: solve(stacks), 1 if tiny else 20, args.device))
            far = [
                float((result[0].double() - right).norm() / right.norm())
                for result, right in zip(solve(stacks), wanted[reference], strict=True)
            ]
            rows[name] |= {"distance": max(far), "against": reference.__name__}
            stage.note(gpt2_milliseconds=rows)
            stage.say(f"{name:24} {rows[name]['median']:9.2f} ms   distance {max(far):.1e}")

        stage.attempt(name, row)
    stage.attempt("Llama-3-8B", lambda: _llama(stage))

    def svd() -> None:
        one = [stack[: len(stack) // depth] for stack in stacks]
        times = milliseconds(lambda: solving.each(solving.svd)(one), 1, args.device)
        stage.note(svd_milliseconds_one_layer=times[0])
        stage.say(f"{'torch.linalg.svd':24} {times[0]:9.2f} ms of one layer")

    stage.attempt("torch.linalg.svd", svd)


def _llama(stage: Any) -> None:
    args = stage.args
    layers, layer = solving.MODELS["llama-3-8b"]
    shape = (112, 32) if args.size == "tiny" else (14336, 4096)
    one = torch.randn(1, *shape, device=args.device) * 0.02

    def operations(out: int, into: int, long: int, square: int) -> float:
        """Return the multiplications of so many products with the matrix and of so many of its smaller side."""
        n, m = sorted((out, into))
        return n**3 * (long * m / n + square)

    # newton_schulz takes a Gram matrix, two squares of it and one product; polar nine steps, two of them cubic.
    costs = {"newton_schulz, bfloat16": (2, 2), "polar, 1e-3": (18, 7)}
    found = {}
    for name, cost in costs.items():
        solve, reference = solvers()[name]
        times = milliseconds(lambda solve=solve: solve([one]), 1 if args.size == "tiny" else 5, args.device)
        right = reference(one[0])
        far = float((solve([one])[0][0].double() - right).norm() / right.norm())
        mine = operations(*shape, *cost)
        every = sum(layers * count * operations(*other, *cost) for other, count in layer)
        elements = sum(layers * count * other[0] * other[1] for other, count in layer)
        median = statistics.median(times)
        found[name] = {
            "one_matrix_milliseconds": median,
            "distance": far,
            "all_224_seconds_by_operations": median / 1000 * every / mine,
            "all_224_seconds_by_elements": median / 1000 * elements / (shape[0] * shape[1]),
        }
        stage.note(llama_3_8b=found, llama_matrix=list(shape))
        stage.say(f"{name:24} {median:9.2f} ms for one {shape[0]} × {shape[1]}; all 224 of Llama-3-8B: "
                  f"{found[name]['all_224_seconds_by_operations']:.2f} s by their operations")  # fmt: skip
