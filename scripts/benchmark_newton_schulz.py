"""Time and check the orthogonalisers on a model's blocks, against the paper's loop and an SVD in the same run.

    python scripts/benchmark_newton_schulz.py [--model gpt2 | llama-3-8b] [--full] [--device cuda] [--repeat 5]

Paper-map rows are compared with p(s) = 1.5 s - 0.5 s^3 iterated on an fp64 SVD, the others with the polar factor. The
FLOPs that each mode expects come first, with the time they take at 800 TFLOP/s, whatever the device.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as muon_iteration

from fire_llm import newton_schulz, polar

MODELS: dict[str, tuple[int, tuple[tuple[tuple[int, int], int], ...]]] = {
    # layers, ((out, in), matrices a layer)
    "gpt2": (12, (((768, 768), 4), ((3072, 768), 1), ((768, 3072), 1))),
    "llama-3-8b": (32, (((4096, 4096), 2), ((1024, 4096), 2), ((14336, 4096), 2), ((4096, 14336), 1))),
}
STEPS = 5
LONG = 30  # seconds
MUON = (3.4445, -4.775, 2.0315)

Solver = Callable[[list[Tensor]], list[Tensor]]


def paper_loop(w: Tensor) -> Tensor:
    """Do what the authors' code does to one matrix, before its scale: fp32, norm included, one product at a time."""
    x = w / w.norm()
    if x.shape[0] < x.shape[1]:
        x = x.T
    for _ in range(STEPS):
        x = 1.5 * x - 0.5 * x @ (x.T @ x)
    return x.T if w.shape[0] < w.shape[1] else x


def svd(w: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    return u @ vh


def each(solve: Callable[[Tensor], Tensor]) -> Solver:
    """Apply a solver to one matrix after another."""
    return lambda stacks: [torch.stack([solve(w) for w in stack]) for stack in stacks]


def batched(solve: Callable[[Tensor], Tensor]) -> Solver:
    """Apply a solver to all matrices of one shape at once."""
    return lambda stacks: [solve(stack) for stack in stacks]


def seconds(solver: Solver, stacks: list[Tensor], repeat: int) -> tuple[float, list[Tensor]]:
    """Return the least time of `repeat` runs after one to warm up, in seconds, and the result.

    A run of `LONG` seconds or more counts at once, warm or not.
    """
    best = float("inf")
    for number in range(repeat + 1):
        start = time.perf_counter()
        result = solver(stacks)
        if stacks[0].is_cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        if number or taken >= LONG:
            best = min(best, taken)
        if taken >= LONG:
            break
    return best, result


def errors(results: list[Tensor], targets: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the worst |s - target s| and the worst relative Frobenius distance over the first matrix of each shape."""
    worst = [0.0, 0.0]
    for result, (sigma, target) in zip(results, targets, strict=True):
        x = result[0].double().cpu()
        found = torch.linalg.svdvals(x)
        worst[0] = max(worst[0], (found - sigma.sort(descending=True).values).abs().max().item())
        worst[1] = max(worst[1], ((x - target).norm() / target.norm()).item())
    return worst[0], worst[1]


def expected(layers: int, layer: tuple[tuple[tuple[int, int], int], ...]) -> None:
    """Print the FLOPs of one run of each mode, for Gaussian matrices."""

    def total(products: Callable[[float], float]) -> float:
        """Sum 2 n^3 times the products of n x n that a matrix takes, given its m / n."""
        return sum(layers * c * 2 * min(s) ** 3 * products(max(s) / min(s)) for s, c in layer)

    for label, products in {
        "paper's loop": lambda ratio: 2 * STEPS * ratio,
        "newton_schulz": lambda ratio: 2 * ratio + 2,  # a polynomial of degree 4 in the Gram matrix
        "polar, composition": lambda ratio: 7 * (2 * ratio + 1) + 2 * 2 * ratio,
    }.items():
        flops = total(products)
        print(f"{label:22}{flops / 1e12:10.3f} TFLOP, {1000 * flops / 8e14:.2f} ms at 800 TFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--full", action="store_true", help="every layer; default: one")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each solver; the fastest counts")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    depth, layer = MODELS[args.model]
    layers = depth if args.full else 1
    expected(layers, layer)
    cuda = args.device.startswith("cuda")
    stacks = [torch.randn(layers * count, *shape, device=args.device) * 0.02 for shape, count in layer]
    mapped, projected = [], []
    for stack in stacks:
        u, sigma, vh = torch.linalg.svd(stack[0].double().cpu(), full_matrices=False)
        projected.append((torch.ones_like(sigma), u @ vh))
        sigma = sigma / sigma.norm()
        for _ in range(STEPS):
            sigma = 1.5 * sigma - 0.5 * sigma**3
        mapped.append((sigma, (u * sigma) @ vh))

    solvers: dict[str, tuple[Solver, list[tuple[Tensor, Tensor]]]] = {
        "paper's loop, fp32": (each(paper_loop), mapped),
        "torch.linalg.svd": (each(svd), projected),
        "newton_schulz, fp32": (batched(lambda w: newton_schulz(w, compute_dtype=torch.float32)), mapped),
        "newton_schulz, bf16": (batched(lambda w: newton_schulz(w, compute_dtype=torch.bfloat16)), mapped),
        "newton_schulz, fp16": (batched(lambda w: newton_schulz(w, compute_dtype=torch.float16)), mapped),
        "torch.optim.Muon": (each(lambda w: muon_iteration(w, MUON, STEPS, 1e-7)), projected),
        "polar, 1e-3": (batched(polar), projected),
        "polar, 1e-5": (batched(lambda w: polar(w, 1e-5)), projected),
    }
    if not cuda:
        del solvers["newton_schulz, fp16"]  # CPUs multiply fp16 a hundred times slower than fp32
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    count = sum(len(stack) for stack in stacks)
    print(f"{count} matrices, {name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'solver':22}{'ms':>11}{'vs loop':>10}{'vs svd':>10}{'max |ds|':>11}{'distance':>11}{'extra MB':>10}")
    times = {}
    for label, (solver, targets) in solvers.items():
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        times[label], results = seconds(solver, stacks, args.repeat)
        extra = f"{(torch.cuda.max_memory_allocated() - held) / 2**20:.0f}" if cuda else "-"
        sigma_error, distance = errors(results, targets)
        ratios = "".join(
            f"{times[other] / times[label]:9.2f}x" if other in times else f"{'-':>10}"
            for other in ("paper's loop, fp32", "torch.linalg.svd")
        )
        print(
            f"{label:22}{1000 * times[label]:11.2f}{ratios}{sigma_error:11.1e}{distance:11.1e}{extra:>10}", flush=True
        )


if __name__ == "__main__":
    main()
