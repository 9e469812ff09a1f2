"""Share work among ranks: pure functions of shapes and the number of ranks, which can be tested and simulated."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

BUCKET_BYTES = 1 << 27
"""Bytes of parameters that a rank works on at a time; a larger block is a bucket of its own."""

SPLIT_RATIO = 8
"""Ratio of rows to columns from which a matrix may be split; below it, the Gram matrix on every rank costs too much."""

SPLIT_BYTES = 1 << 26
"""Bytes below which a matrix is never split: one rank alone is faster than the exchange."""

FLOPS_PER_COST = 20
"""Floating-point operations of five cubic steps, for each unit of `cost`: a step has two products of 2 max·min²."""

HARDWARE = {"cpu": (1e11, 1e9, 2e-3), "accelerator": (3e14, 5e10, 2e-4)}
"""Assumed speed of products (FLOP/s), bandwidth between ranks (bytes/s) and latency of a collective (s)."""


def cost(shape: Sequence[int]) -> int:
    """Return the cost of orthogonalising matrices (…, out, in), but for a constant factor: max·min² each."""
    *many, last = shape or (1,)
    across = many.pop() if many else 1
    return math.prod(many) * max(across, last) * min(across, last) ** 2


def assign(costs: Sequence[int], ranks: int) -> list[int]:
    """Return an owner for every job: the longest job first, each to the rank with the least work so far.

    Returns:
        The owner of each job. The makespan is at most 4/3 − 1/(3 ranks) of the best possible one.

    Source: Graham, Bounds on multiprocessing timing anomalies, 1969 (LPT).
    """
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        load, owner = loads[0]
        owners[job] = owner
        heapq.heapreplace(loads, (load + costs[job], owner))
    return owners


def makespan(costs: Sequence[int], owners: Sequence[int], ranks: int) -> int:
    """Return the cost of the rank with the most to do."""
    loads = [0] * ranks
    for job_cost, owner in zip(costs, owners, strict=True):
        loads[owner] += job_cost
    return max(loads)


def buckets(sizes: Sequence[int], owners: Sequence[int], ranks: int, limit: int = BUCKET_BYTES) -> list[list[int]]:
    """Divide the jobs into buckets: in each one every owner has the next of its jobs that together fit `limit`.

    Args:
        sizes: Bytes of each job.
        owners: Owner of each job.
        ranks: Number of ranks.
        limit: Bytes of an owner's jobs in a bucket; a larger job is alone.

    Returns:
        Jobs of each bucket, ascending.
    """
    divided: list[list[int]] = []
    filled = [0] * ranks  # bytes in the owner's current bucket
    current = [0] * ranks
    for job, (size, owner) in enumerate(zip(sizes, owners, strict=True)):
        if filled[owner] and filled[owner] + size > limit:
            current[owner] += 1
            filled[owner] = 0
        filled[owner] += size
        while len(divided) <= current[owner]:
            divided.append([])
        divided[current[owner]].append(job)
    return divided


def splits(shape: Sequence[int], itemsize: int, total_cost: int, ranks: int) -> bool:
    """Return whether all ranks work on a matrix together, each on its own rows, rather than one owner.

    They do where it is much taller than wide, and is more than a fair share of the work or needs too much memory on one
    rank. They sum their parts of the n × n Gram matrix, each maps that, and multiplies its own rows by the result; see
    `split_cost`.

    Args:
        shape: (out, in).
        itemsize: Bytes an element.
        total_cost: Sum of `cost` over all matrices.
        ranks: Number of ranks that could share it.
    """
    rows, columns = shape
    if ranks < 2 or rows < SPLIT_RATIO * columns or rows * columns * itemsize < SPLIT_BYTES:
        return False
    return cost(shape) * ranks > total_cost or rows * columns * itemsize > 4 * SPLIT_BYTES


def split_cost(shape: Sequence[int], ranks: int) -> int:
    """Return the cost of a matrix that is split by rows, on each rank: the share of its rows, and the Gram matrix."""
    return cost(shape) // ranks + min(shape) ** 3


def worthwhile(total_cost: int, total_bytes: int, ranks: int, device: str) -> bool:
    """Return whether replicas that share the work are faster than replicas that each do all of it.

    Args:
        total_cost: Sum of `cost` over the matrices.
        total_bytes: Bytes that every rank receives.
        ranks: Replicas.
        device: Type of the device that computes.
    """
    if ranks < 2:
        return False
    speed, bandwidth, latency = HARDWARE["cpu" if device == "cpu" else "accelerator"]
    saved = FLOPS_PER_COST * total_cost / speed * (1 - 1 / ranks)
    return saved > total_bytes / bandwidth + latency
