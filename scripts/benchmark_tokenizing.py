"""Time the tokenising of a corpus in parts: two processes against one, and against `datasets.map` with two.

    python scripts/benchmark_tokenizing.py [--mb 48] [--processes 2] [--rounds 3] [--part-mb 2] [--json FILE]

All contestants turn one .jsonl file into tokens in an empty folder, with the same fast tokenizer, and their tokens are
compared. Each process has one thread, except in the contestant named so. Contestants take turns, every other round in
reverse, and each figure is a median over rounds. On a busy machine seconds say little, so CPU seconds are printed too:
of this process and of those that it started. `expected` is the speed-up if every process had a core of its own: the
CPU seconds of one process over those of the busiest of several, which has this process's share (planning, joining,
hashing) and one N-th of the others'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_data import in_turns

from fire_llm.data import partition, tokenize_corpus, train_tokenizer
from fire_llm.data.corpora import CorpusSpec, resolve
from fire_llm.data.spec import Corpus

Figures = dict[str, float]


def texts_of(megabytes: float) -> list[str]:
    """Return documents of the offline corpora, repeated with a number in front where they do not suffice."""
    texts: list[str] = []
    total, repetition = 0, 0
    while total < megabytes * 1e6:
        for text in resolve("library-docs").documents("train"):
            texts.append(f"{repetition} {text}")
            total += len(texts[-1].encode())
            if total >= megabytes * 1e6:
                break
        repetition += 1
    return texts


def measured(work: Callable[[], int]) -> Figures:
    """Return seconds, CPU seconds of this process and of others, and tokens of one turn."""
    before, begun = os.times(), time.perf_counter()
    tokens = work()
    seconds, after = time.perf_counter() - begun, os.times()
    own = after.user + after.system - before.user - before.system
    others = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "own": own, "others": others, "tokens": tokens}


def contestants_of(file: Path, tokenizer: Any, processes: int, folder: Path) -> dict[str, Callable[[], Figures]]:
    """Return what is timed, by name."""
    from datasets import disable_caching, disable_progress_bars, load_dataset

    disable_caching()
    disable_progress_bars()
    corpus = resolve("bench", CorpusSpec(files=str(file), holdout=0.0))
    corpus.fingerprint  # noqa: B018 - the file is hashed once, and here
    found: dict[str, np.ndarray] = {}

    def ours(number: int, threads: bool = False) -> int:
        os.environ["TOKENIZERS_PARALLELISM"] = str(threads).lower()
        made = tokenize_corpus(corpus, tokenizer, "train", cache=folder / "ours", progress=False, processes=number)
        tokens = np.array(made.tokens)
        shutil.rmtree(folder / "ours")
        assert np.array_equal(found.setdefault("ours", tokens), tokens)
        return len(tokens)

    def theirs() -> int:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "theirs"))
        made = rows.map(
            lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]},
            batched=True, num_proc=processes, remove_columns=["text"], new_fingerprint=f"f{time.time_ns()}",
        )  # fmt: skip
        made.save_to_disk(str(folder / "saved"))
        return len(rows)

    def measured_theirs() -> Figures:
        figures = measured(theirs)
        from datasets import load_from_disk

        ids = load_from_disk(str(folder / "saved")).with_format("numpy")["input_ids"]
        end = tokenizer.eos_token_id
        tokens = np.concatenate([np.append(each, end) for each in ids])
        assert np.array_equal(found.setdefault("ours", tokens), tokens)
        shutil.rmtree(folder / "saved")
        shutil.rmtree(folder / "theirs")
        return figures | {"tokens": len(tokens)}

    return {
        "one process": lambda: measured(lambda: ours(1)),
        f"{processes} processes": lambda: measured(lambda: ours(processes)),
        "one process, threads": lambda: measured(lambda: ours(1, threads=True)),
        f"datasets.map, {processes} processes": measured_theirs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=48, help="megabytes of text (48)")
    parser.add_argument("--part-mb", type=float, default=2, help="megabytes of a part (2; 67 in use)")
    parser.add_argument("--processes", type=int, default=2, help="that share the work (2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns each (3)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="entries of the tokenizer (4096)")
    parser.add_argument("--json", metavar="FILE", help="write the figures too")
    args = parser.parse_args()
    import datasets
    import tokenizers

    versions = f"datasets {datasets.__version__}, tokenizers {tokenizers.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    partition.PART_BYTES = int(args.part_mb * 1e6)
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), texts_of(args.mb)
        sample = Corpus("bench", "1", lambda split: texts[:2000])
        tokenizer = train_tokenizer([sample], args.vocabulary, progress=False)
        file = folder / "text.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found = in_turns(contestants_of(file, tokenizer, args.processes, folder), args.rounds)
    rows = {}
    first = found["one process"]
    print(f"{'':<28}{'s':>8}{'CPU s':>8}{'MB/s':>8}{'faster':>8}{'expected':>10}")
    for name, turns in found.items():
        cpu = [turn["own"] + turn["others"] for turn in turns]
        number = args.processes if turns[0]["others"] > 1 else 1
        busiest = [turn["own"] + turn["others"] / number for turn in turns]
        row = {
            "seconds": statistics.median(turn["seconds"] for turn in turns),
            "cpu": statistics.median(cpu),
            "faster": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(first, turns, strict=True)),
            "expected": statistics.median((a["own"] + a["others"]) / b for a, b in zip(first, busiest, strict=True)),
        }
        rows[name] = {**row, "all": turns}
        cells = (row["seconds"], row["cpu"], args.mb / row["seconds"], row["faster"])
        print(f"{name:<28}{''.join(f'{cell:>8.2f}' for cell in cells)}{row['expected']:>10.2f}")
    ratios = {f"{name} / one process": row["faster"] for name, row in rows.items()}
    ratios |= {f"{name} / one process, by CPU seconds": row["expected"] for name, row in rows.items()}
    if args.json:
        figures = {"settings": vars(args), "versions": versions, "rows": rows, "ratios": ratios}
        Path(args.json).write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
