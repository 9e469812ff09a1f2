"""Time and check the orthogonalisers on the blocks of GPT-2 124M, against the paper's loop in the same run.

    python scripts/benchmark_newton_schulz.py [--full] [--device cuda] [--repeat 5]

Paper-map rows are compared with p(s) = 1.5 s - 0.5 s^3 iterated on an fp64 SVD, the others with the polar factor.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as muon_iteration

from fire_llm.orthogonal import newton_schulz, polar

LAYERS = 12
LAYER = (((768, 768), 4), ((3072, 768), 1), ((768, 3072), 1))  # q, k, v, o; up; down: shape (out, in), count
STEPS = 5
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
    """Return the least time of `repeat` runs after one to warm up, in seconds, and the result."""
    best = float("inf")
    for _ in range(repeat + 1):
        start = time.perf_counter()
        result = solver(stacks)
        if stacks[0].is_cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        best = min(best, taken) if _ else best
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--full", action="store_true", help="all 72 matrices; default: one layer's six")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each solver; the fastest counts")
    args = parser.parse_args()

    torch.manual_seed(0)
    layers = LAYERS if args.full else 1
    stacks = [torch.randn(layers * count, *shape, device=args.device) * 0.02 for shape, count in LAYER]
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
        "newton_schulz": (batched(newton_schulz), mapped),
        "newton_schulz, bf16": (batched(lambda w: newton_schulz(w, compute_dtype=torch.bfloat16)), mapped),
        "torch.optim.Muon": (each(lambda w: muon_iteration(w, MUON, STEPS, 1e-7)), projected),
        "torch.linalg.svd": (each(svd), projected),
        "polar, 1e-3": (batched(polar), projected),
        "polar, 1e-5": (batched(lambda w: polar(w, 1e-5)), projected),
    }
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{6 * layers} matrices, {name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'solver':22}{'seconds':>10}{'speed-up':>10}{'max |ds|':>12}{'distance':>12}")
    baseline = 0.0
    for label, (solver, targets) in solvers.items():
        taken, results = seconds(solver, stacks, args.repeat)
        baseline = baseline or taken
        sigma_error, distance = errors(results, targets)
        print(f"{label:22}{taken:10.4f}{baseline / taken:9.2f}x{sigma_error:12.1e}{distance:12.1e}", flush=True)


if __name__ == "__main__":
    main()
