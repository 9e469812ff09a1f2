"""Time the data path beside Hugging Face's: samples of a mixture, and going on far into a run.

    python scripts/benchmark_data.py [--samples 20000] [--far 1000000] [--only mixture resume]

Mixture: samples/s of two corpora in batches, in this process and through a DataLoader with workers; ours against
`interleave_datasets` of two streams.
Resume: seconds until the batch of a given step is read. Ours is arithmetic. `skip(n)` and `load_state_dict` of an
IterableDataset, and accelerate's `skip_first_batches`, read the samples that they skip. They are timed over `--skip`
samples, and the time is extended in proportion; the output says so.

Contestants take turns in one process; figures are medians over the rounds, ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fire_llm.data import Mixture, TokenFile
from fire_llm.data.tokens import seal

WEIGHTS = {"a": 0.9, "b": 0.1}


def in_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return each contestant's results over rounds in which all take part; every other round is in reverse order."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(contestants[name]())
    return found


def report(title: str, unit: str, found: dict[str, list[float]]) -> dict[str, Any]:
    """Print and return the medians, and the ratio of the first contestant to each other."""
    first = next(iter(found))
    rows = {}
    print(title)
    for name, values in found.items():
        ratio = statistics.median(a / b for a, b in zip(found[first], values, strict=True))
        rows[name] = {"median": statistics.median(values), "all": values, "ratio_of_first": ratio}
        print(f"  {name:<44} {statistics.median(values):>14,.5g} {unit:<10} ours / this: {ratio:.3g}")
    return {"unit": unit, "rows": rows}


# ---- the mixture


def token_files(folder: Path, tokens: int) -> dict[str, TokenFile]:
    """Write two token files of random ids in documents of about 500, and open them."""
    files = {}
    for seed, name in enumerate(WEIGHTS):
        place = folder / name
        place.mkdir(parents=True)
        draw = np.random.default_rng(seed)
        draw.integers(1, 50_000, tokens, dtype=np.uint16).tofile(place / "tokens.bin")
        ends = np.sort(draw.choice(np.arange(1, tokens), tokens // 500, replace=False))
        index = np.zeros((len(ends) + 1, 3), dtype=np.uint64)
        index[:, 0] = [*ends, tokens]
        index.tofile(place / "documents.bin")
        meta = {"dtype": "uint16", "n_tokens": tokens, "n_bytes": 0, "n_words": 0, "n_documents": len(index)}
        seal(place, meta)
        files[name] = TokenFile.open(place)
    return files


class Span(torch.utils.data.Sampler[int]):
    """Yield the indices from a start on."""

    def __init__(self, start: int, count: int) -> None:
        self.start, self.count = start, count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.start + self.count))

    def __len__(self) -> int:
        return self.count


def streams(files: dict[str, TokenFile], context: int) -> Any:
    """Return the same mixture by datasets: the blocks of each corpus as a stream, interleaved by weight."""
    from datasets import Dataset, interleave_datasets

    blocks = []
    for file in files.values():
        rows = file.tokens[: file.n_tokens // context * context].reshape(-1, context).astype(np.int64)
        blocks.append(Dataset.from_dict({"input_ids": rows}).to_iterable_dataset().repeat(None))
    return interleave_datasets(blocks, probabilities=list(WEIGHTS.values()), seed=1)


def mixing(files: dict[str, TokenFile], args: argparse.Namespace) -> dict[str, Any]:
    """Measure samples/s in batches."""
    plain = Mixture(files, WEIGHTS, context=args.context, seed=1, phase="p")
    masked = Mixture(files, WEIGHTS, context=args.context, seed=1, phase="p", document_positions=True)
    stream = streams(files, args.context).with_format("torch")

    def pulled(dataset: Any, workers: int, sampler: Any = None) -> float:
        loader = DataLoader(dataset, args.batch, sampler=sampler, num_workers=workers)
        begun, seen = time.perf_counter(), 0
        for batch in loader:
            seen += len(batch["input_ids"])
            if seen >= args.samples:
                break
        return seen / (time.perf_counter() - begun)

    contestants: dict[str, Callable[[], float]] = {}
    for workers in (0, 2):
        where = f"{workers} workers" if workers else "in this process"
        contestants[f"ours, {where}"] = lambda w=workers: pulled(plain, w, Span(0, args.samples))
        contestants[f"ours, document mask, {where}"] = lambda w=workers: pulled(masked, w, Span(0, args.samples))
    contestants["interleave_datasets, in this process"] = lambda: pulled(stream, 0)
    title = f"mixture, batches of {args.batch} samples of {args.context} tokens"
    return report(title, "samples/s", in_turns(contestants, args.rounds))


# ---- going on


def resuming(files: dict[str, TokenFile], args: argparse.Namespace) -> dict[str, Any]:
    """Measure seconds until the batch of a far step is read."""
    from accelerate import skip_first_batches

    mixture = Mixture(files, WEIGHTS, context=args.context, seed=1, phase="p")
    sample = args.far * args.batch
    share = sample / args.skip

    def first(loader: Any) -> float:
        begun = time.perf_counter()
        next(iter(loader))
        return time.perf_counter() - begun

    def by_state() -> float:
        stream = streams(files, args.context)
        walker = iter(stream)
        for _ in range(args.skip):
            next(walker)
        state, begun = stream.state_dict(), time.perf_counter()
        fresh = streams(files, args.context)
        fresh.load_state_dict(state)
        next(iter(fresh))
        return time.perf_counter() - begun

    def skipping_batches() -> float:
        loader = DataLoader(mixture, args.batch, sampler=Span(0, args.skip + args.batch))
        return first(skip_first_batches(loader, args.skip // args.batch)) * share

    contestants: dict[str, Callable[[], float]] = {
        "ours": lambda: first(DataLoader(mixture, args.batch, sampler=Span(sample, args.batch))),
        "ours, at step 0": lambda: first(DataLoader(mixture, args.batch, sampler=Span(0, args.batch))),
        "IterableDataset.skip, extended": lambda: first(streams(files, args.context).skip(args.skip)) * share,
        "IterableDataset.load_state_dict, not extended": by_state,
        "accelerate.skip_first_batches, extended": skipping_batches,
    }
    found = report(
        f"the batch of step {args.far:,} ({args.batch} samples a step; others timed over {args.skip:,} samples)",
        "s",
        in_turns(contestants, args.rounds),
    )
    return found | {"extended_from_samples": args.skip, "sample": sample}


PARTS = {"mixture": mixing, "resume": resuming}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000, help="samples of the mixture a turn (20000)")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sample (1024)")
    parser.add_argument("--batch", type=int, default=16, help="samples a batch and a step (16)")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of each corpus of the mixture (2e7)")
    parser.add_argument("--far", type=int, default=1_000_000, help="step to go on from (1e6)")
    parser.add_argument("--skip", type=int, default=20_000, help="samples that skipping is timed over (20000)")
    parser.add_argument("--rounds", type=int, default=5, help="turns each (5)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="parts to run")
    parser.add_argument("--json", metavar="FILE", help="write the figures too")
    args = parser.parse_args()
    import datasets

    versions = f"datasets {datasets.__version__}, torch {torch.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    result: dict[str, Any] = {"settings": vars(args), "versions": versions}
    with tempfile.TemporaryDirectory() as name:
        files = token_files(Path(name), args.tokens)
        for part in args.only:
            result[part] = PARTS[part](files, args)
    result["ratios"] = {
        f"{part}, ours / {name}": row["ratio_of_first"] ** (-1 if result[part]["unit"] == "s" else 1)
        for part in args.only
        for name, row in result[part]["rows"].items()
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
