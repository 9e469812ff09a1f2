"""Time and check the orthogonalisers on a model's blocks, against the paper's loop and an SVD in the same run.

    python scripts/benchmark_newton_schulz.py [--model gpt2 | llama-3-8b] [--full] [--device cuda] [--repeat 5]
    python scripts/benchmark_newton_schulz.py --device cuda --full --without svd --targets newton-schulz --json ns.json
    python scripts/benchmark_newton_schulz.py --device cuda --shape 14336 4096 --without svd --targets newton-schulz

Paper-map rows are compared with p(s) = 1.5 s - 0.5 s^3 iterated on an fp64 SVD, the others with the polar factor; with
`--targets newton-schulz` both targets are iterated in fp64 on the device, which takes seconds where that SVD takes
minutes. On CUDA times are between events on the stream, the median of the repetitions; elsewhere the least. The FLOPs
that each mode expects come first, with the time they take at 800 TFLOP/s, whatever the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as muon_iteration

from fire_llm import newton_schulz, polar
from fire_llm.linalg.matmul import exact_products

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


def milliseconds(solver: Solver, stacks: list[Tensor], repeat: int) -> tuple[float, list[Tensor]]:
    """Return the time of a run after one to warm up, and the result: on CUDA the median by events, else the least.

    A run of `LONG` seconds or more counts at once, warm or not.
    """
    cuda, times = stacks[0].is_cuda, []
    for number in range(repeat + 1):
        start = time.perf_counter()
        if cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
        result = solver(stacks)
        if cuda:
            events[1].record()
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        if number or taken >= LONG:
            times.append(events[0].elapsed_time(events[1]) if cuda else 1000 * taken)
        if taken >= LONG:
            break
    return statistics.median(times) if cuda else min(times), result


def targets_by_svd(w: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return singular values and matrix of the paper's map and of the polar factor, from an fp64 SVD on the CPU."""
    u, sigma, vh = torch.linalg.svd(w.double().cpu(), full_matrices=False)
    mapped = sigma / sigma.norm()
    for _ in range(STEPS):
        mapped = 1.5 * mapped - 0.5 * mapped**3
    return {"map": (mapped, (u * mapped) @ vh), "polar": (torch.ones_like(sigma), u @ vh)}


def targets_by_iteration(w: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the same from iterations in fp64 on the device of w; nothing of fire_llm is used.

    The polar factor is what cubic steps converge to. Singular values are not known, and stand as ones.
    """
    x = w.double() / w.double().norm()
    x = x if len(x) <= len(x[0]) else x.mT
    mapped = x
    for _ in range(STEPS):
        mapped = 1.5 * mapped - 0.5 * (mapped @ mapped.mT) @ mapped
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(100):
        gram = x @ x.mT
        if (gram - eye).norm() < 1e-10:
            break
        x = (1.5 * eye - 0.5 * gram) @ x
    ones = torch.ones(len(x), dtype=x.dtype, device=x.device)
    if w.shape[0] > w.shape[1]:
        mapped, x = mapped.mT, x.mT
    return {"map": (ones, mapped), "polar": (ones, x)}


def errors(results: list[Tensor], targets: list[tuple[Tensor, Tensor]], sigma: bool) -> tuple[float | None, float]:
    """Return the worst |s - target s| and the worst relative Frobenius distance over the first matrix of each shape."""
    worst = [0.0, 0.0]
    for result, (known, target) in zip(results, targets, strict=True):
        x = result[0].double().to(target.device)
        if sigma:
            found = torch.linalg.svdvals(x)
            worst[0] = max(worst[0], (found - known.sort(descending=True).values).abs().max().item())
        worst[1] = max(worst[1], ((x - target).norm() / target.norm()).item())
    return worst[0] if sigma else None, worst[1]


def contestants(cuda: bool) -> dict[str, tuple[Solver, str]]:
    """Return every solver by its name, with the target that it is compared with: `map` or `polar`."""
    solvers = {
        "paper's loop, fp32": (each(paper_loop), "map"),
        "torch.linalg.svd": (each(svd), "polar"),
        "newton_schulz, fp32": (batched(lambda w: newton_schulz(w, compute_dtype=torch.float32)), "map"),
        "newton_schulz, bf16": (batched(lambda w: newton_schulz(w, compute_dtype=torch.bfloat16)), "map"),
        "newton_schulz, fp16": (batched(lambda w: newton_schulz(w, compute_dtype=torch.float16)), "map"),
        "torch.optim.Muon": (each(lambda w: muon_iteration(w, MUON, STEPS, 1e-7)), "polar"),
        "polar, 1e-3": (batched(polar), "polar"),
        "polar, 1e-5": (batched(lambda w: polar(w, 1e-5)), "polar"),
    }
    if not cuda:
        del solvers["newton_schulz, fp16"]  # CPUs multiply fp16 a hundred times slower than fp32
    return solvers


def measure(
    stacks: list[Tensor],
    solvers: Mapping[str, tuple[Solver, str]],
    repeat: int,
    *,
    by_svd: bool = True,
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Time and check solvers on stacks of matrices, each of one shape.

    Args:
        stacks: (B, out, in) each, fp32.
        solvers: As `contestants` gives them.
        repeat: Timed runs of each.
        by_svd: Whether targets are an fp64 SVD's, on the CPU, or fp64 iterations on the device.
        tell: Is given each row as soon as it is known.

    Returns:
        For each solver `solver`, `milliseconds`, `sigma_error` (None without an SVD), `distance` (relative, Frobenius,
        the worst of the first matrix of each stack) and `extra_megabytes` (None but on CUDA).
    """
    with exact_products(stacks[0].device):
        targets = [(targets_by_svd if by_svd else targets_by_iteration)(stack[0]) for stack in stacks]
    rows = []
    for name, (solver, target) in solvers.items():
        cuda = stacks[0].is_cuda
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        taken, results = milliseconds(solver, stacks, repeat)
        extra = (torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else None
        sigma_error, distance = errors(results, [one[target] for one in targets], by_svd)
        row = {"solver": name, "milliseconds": taken, "sigma_error": sigma_error, "distance": distance}
        rows.append({**row, "extra_megabytes": extra})
        tell(rows[-1])
    return rows


def without(solvers: Mapping[str, tuple[Solver, str]], names: Collection[str]) -> dict[str, tuple[Solver, str]]:
    """Leave out every solver whose name holds one of the given ones."""
    return {label: solver for label, solver in solvers.items() if not any(name in label for name in names)}


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
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each solver")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="one matrix instead of a model")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="solvers to leave out: svd loop Muon 1e-5"
    )
    parser.add_argument("--targets", choices=("svd", "newton-schulz"), default="svd", help="what is compared with")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    depth, layer = (1, ((tuple(args.shape), 1),)) if args.shape else MODELS[args.model]
    layers = depth if args.full else 1
    expected(layers, layer)
    cuda = args.device.startswith("cuda")
    stacks = [torch.randn(layers * count, *shape, device=args.device) * 0.02 for shape, count in layer]
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    count = sum(len(stack) for stack in stacks)
    print(f"{count} matrices, {name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'solver':22}{'ms':>11}{'vs loop':>10}{'vs svd':>10}{'max |ds|':>11}{'distance':>11}{'extra MB':>10}")
    times: dict[str, float] = {}

    def tell(row: dict[str, Any]) -> None:
        times[row["solver"]] = row["milliseconds"]
        ratios = "".join(
            f"{times[other] / row['milliseconds']:9.2f}x" if other in times else f"{'-':>10}"
            for other in ("paper's loop, fp32", "torch.linalg.svd")
        )
        sigma = "-" if row["sigma_error"] is None else f"{row['sigma_error']:.1e}"
        extra = "-" if row["extra_megabytes"] is None else f"{row['extra_megabytes']:.0f}"
        print(
            f"{row['solver']:22}{row['milliseconds']:11.2f}{ratios}{sigma:>11}{row['distance']:11.1e}{extra:>10}",
            flush=True,
        )

    solvers = without(contestants(cuda), args.without)
    rows = measure(stacks, solvers, args.repeat, by_svd=args.targets == "svd", tell=tell)
    if args.json:
        shapes = [list(stack.shape) for stack in stacks]
        machine = {"device": name, "torch": torch.__version__, "matrices": count, "shapes": shapes}
        loop = times.get("paper's loop, fp32", float("nan"))
        ratios = {f"paper's loop / {name}": loop / taken for name, taken in times.items()}
        args.json.write_text(json.dumps({**machine, "rows": rows, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
