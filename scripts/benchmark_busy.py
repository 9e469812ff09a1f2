"""Run the demo on the machine as it is, then beside processes that keep every core busy; compare times and weights.

    python scripts/benchmark_busy.py                 # an eighth of the demo, each way twice, in turns
    python scripts/benchmark_busy.py --whole         # all of it, each way once
    OMP_NUM_THREADS=2 python scripts/benchmark_busy.py --workers 1    # what two threads in one process do

A burner is `while True: pass` at normal priority. On two cores with two burners, a fair system gives half of each.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from fire_llm.core.launch import cores

SHORT = ("phases.0.steps=60", "phases.1.steps=20", "evaluate.every_steps=20", "save_every_steps=20")


@contextmanager
def burning(number: int):
    """Keep this number of processes busy while the block runs."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def demo(folder: Path, more: list[str]) -> tuple[float, dict[str, str]]:
    """Return the seconds that the demo took, and the hash of each unit's final weights."""
    command = [sys.executable, "-m", "fire_llm", "demo", "--output", str(folder), *more]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    files = sorted(folder.glob("*/**/checkpoint-*/model.safetensors"))
    return seconds, {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--burners", type=int, default=cores(), help="processes that burn a core each (all cores)")
    parser.add_argument("--whole", action="store_true", help="run the whole demo, once each way")
    parser.add_argument("--turns", type=int, help="runs each way (2; 1 of the whole demo)")
    parser.add_argument("--workers", type=int, help="of fire-llm demo")
    args = parser.parse_args()
    more = [] if args.whole else [f"--set={key}" for key in SHORT]
    more += [f"--workers={args.workers}"] if args.workers else []
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"{platform.machine()}, {cores()} cores, torch {torch.__version__}, OMP_NUM_THREADS {threads}")
    best: dict[str, float] = {}
    seen: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="fire-llm-") as folder:
        for turn in range(args.turns or (1 if args.whole else 2)):
            for kind, number in (("as it is", 0), ("busy", args.burners)):
                with burning(number):
                    seconds, weights = demo(Path(folder) / f"{kind}-{turn}", more)
                best[kind] = min(seconds, best.get(kind, seconds))
                seen.append(weights)
                print(f"{kind}: {seconds:.0f} s ({number} burners, load {os.getloadavg()[0]:.1f})", flush=True)
    equal = all(weights == seen[0] for weights in seen)
    print(f"busy / as it is: {best['busy'] / best['as it is']:.2f}")
    print(f"weights of {len(seen[0])} checkpoints: {'equal bit for bit' if equal else 'DIFFERENT'}")
    raise SystemExit(not equal)


if __name__ == "__main__":
    main()
