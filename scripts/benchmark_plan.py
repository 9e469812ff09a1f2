"""Simulate from shapes how FIRE's work divides among ranks, and compare the makespan with the ideal.

    python scripts/benchmark_plan.py [--ranks 1 8 64] [--model llama-3-8b] [--lm-head]

Per number of ranks: the makespan over the mean load (1.00 is ideal) by longest-processing-time assignment, by round
robin for comparison, and with the matrices that alone exceed a fair share split by rows. The last column names them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from fire_llm.distributed.balance import assign, cost, makespan, split_cost, splits

Shape = tuple[int, int]
MODELS: dict[str, tuple[int, dict[Shape, int], Shape]] = {
    # layers, {(out, in): matrices a layer}, the head
    "gpt2": (12, {(768, 768): 4, (3072, 768): 1, (768, 3072): 1}, (50257, 768)),
    "llama-3-8b": (32, {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}, (128256, 4096)),
    "llama-3-70b": (80, {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1}, (128256, 8192)),
    # OLMoE-1B-7B: 64 experts of width 1024, gate, up and down each a matrix.
    "moe-64": (16, {(2048, 2048): 4, (1024, 2048): 128, (2048, 1024): 64}, (50304, 2048)),
}
BYTES = 4  # an element of an fp32 parameter


def matrices(model: str, head: bool) -> list[Shape]:
    """Return the shapes of a model's matrices, in order."""
    layers, layer, lm_head = MODELS[model]
    shapes = [shape for _ in range(layers) for shape, count in layer.items() for _ in range(count)]
    return [*shapes, lm_head] if head else shapes


def simulate(shapes: list[Shape], ranks: int) -> tuple[float, float, float, list[Shape], float]:
    """Return makespan over mean by LPT, by round robin and with splitting, what was split, and planning seconds."""
    costs = [cost(shape) for shape in shapes]
    mean = sum(costs) / ranks
    began = time.perf_counter()
    owners = assign(costs, ranks)
    seconds = time.perf_counter() - began
    robin = makespan(costs, [i % ranks for i in range(len(costs))], ranks)
    split = [splits(shape, BYTES, sum(costs), ranks) for shape in shapes]
    whole = [c for c, apart in zip(costs, split, strict=True) if not apart]
    together = sum(split_cost(shape, ranks) for shape, apart in zip(shapes, split, strict=True) if apart)
    with_split = makespan(whole, assign(whole, ranks), ranks) + together
    apart_shapes = [shape for shape, apart in zip(shapes, split, strict=True) if apart]
    return makespan(costs, owners, ranks) / mean, robin / mean, with_split / mean, apart_shapes, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="repeatable; default: all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--lm-head", action="store_true", help="the head too, as the paper's code does")
    parser.add_argument("--json", type=Path, help="write the ratios to this file too")
    args = parser.parse_args()
    ratios = {}
    for model in args.model or MODELS:
        shapes = matrices(model, args.lm_head)
        print(f"\n{model}: {len(shapes)} matrices, {20 * sum(map(cost, shapes)) / 1e12:.3g} TFLOP by the paper's loop")
        print(f"{'ranks':>6}{'LPT':>8}{'robin':>8}{'split':>8}{'plan ms':>9}  split by rows")
        for ranks in args.ranks:
            lpt, robin, split, apart, seconds = simulate(shapes, ranks)
            ratios[f"{model}, {ranks} ranks: ideal / split"] = 1 / split
            named = ", ".join(f"{n} of {o}×{i}" for (o, i), n in Counter(apart).items()) or "-"
            print(f"{ranks:6}{lpt:8.2f}{robin:8.2f}{split:8.2f}{1000 * seconds:9.2f}  {named}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
