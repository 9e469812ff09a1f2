"""Measure the cost of saving a model in shards: gathered on the first rank, and written in shards.

    python scripts/benchmark_saving.py [--ranks 4] [--width 512] [--layers 8] [--saves 3] [--output FOLDER]

gloo ranks on the CPU, one thread each, train a GPT-2 under FSDP2 and save, in turns: `gathered`, where the first rank
gathers weights and moments and writes them while all wait; `shards, waited for`; and `shards`, written beside
training. The stall is for how long a save stops training on the slowest rank: the least, the median and the largest.
The peak is by how much memory grew during saves, on the first rank and at most on the others. Memory of files that the
system can drop at any time is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fire_llm import ContinualTrainer
from fire_llm.distributed import gather_objects
from fire_llm.training import ContinualArguments

CONTEXT, VOCABULARY = 32, 4096
WAYS = ("gathered", "shards, waited for", "shards")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Give random tokens by their number."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, VOCABULARY, (CONTEXT + 1,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def own_memory() -> int:
    """Return the bytes of this process's memory that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


class Peak:
    """Watch by how much this process's memory grows from the first save on, from a thread."""

    before = largest = grown = 0

    def begin(self) -> None:
        """Count from here on, at the first call."""
        self.before = self.before or own_memory()

    def __enter__(self) -> Peak:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.largest = max(self.largest, own_memory() if self.before else 0)

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self.grown = self.largest - self.before


class Measured(ContinualTrainer):
    """Time each save, and the growth of memory."""

    stalls: list[float]
    peak: Peak

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        dist.barrier()
        self.peak.begin()
        began = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.stalls.append(max(gather_objects(None, time.perf_counter() - began)))


def rank_main(rank: int, world: int, args: argparse.Namespace, folder: str) -> None:
    """Train and save in every way; the first rank prints what was measured."""
    torch.set_num_threads(1)
    os.environ.update(FSDP2, OMP_NUM_THREADS="1")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    sizes = {"n_embd": args.width, "n_layer": args.layers, "n_head": 8, "vocab_size": VOCABULARY, "n_positions": 64}
    base, ratios = 0.0, {}
    for way in WAYS:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        steps = (args.saves + 1) * args.every
        output = Path(args.output or folder) / way.replace(", ", "-").replace(" ", "-")
        arguments = ContinualArguments(
            str(output), max_steps=steps, per_device_train_batch_size=1, save_steps=args.every, logging_steps=1000,
            report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, async_save=way == "shards",
        )  # fmt: skip
        trainer = Measured(model, arguments, Samples())
        trainer.stalls, trainer.peak = [], Peak()
        if way == "gathered":
            trainer.saver._in_shards = lambda: False  # type: ignore[method-assign]
        with trainer.peak:
            trainer.train()
        grown = gather_objects(None, trainer.peak.grown)
        # The last save is an ordinary folder, waited for: how long that takes is not what is compared.
        stalls = sorted(trainer.stalls[: args.saves])
        base = base or median(stalls)
        ratios[f"stall, gathered / {way}"] = base / median(stalls)
        if rank == 0:
            show(way, model.num_parameters(), stalls, base, grown)
        del trainer, model
        dist.barrier()
        if rank == 0:
            shutil.rmtree(output)
    if rank == 0 and args.json:
        args.json.write_text(json.dumps({"ratios": ratios}, indent=1))
    dist.destroy_process_group()


def show(way: str, n: int, stalls: list[float], base: float, grown: list[int]) -> None:
    """Print what was measured of one way."""
    if way == WAYS[0]:
        print(f"{n / 1e6:.1f} M parameters on {len(grown)} ranks, {len(stalls)} saves each")
        print(f"{'':20}{'stall: least':>14}{'median':>10}{'largest':>10}{'ratio':>8}{'first rank':>14}{'others':>12}")
    middle, others = median(stalls), max(grown[1:], default=0)
    print(
        f"{way:20}{stalls[0]:>12.2f} s{middle:>8.2f} s{stalls[-1]:>8.2f} s{base / middle:>8.1f}"
        f"{grown[0] / 1e6:>11.0f} MB{others / 1e6:>9.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="gloo ranks (default 4)")
    parser.add_argument("--width", type=int, default=512, help="of the model, a multiple of 8 (default 512)")
    parser.add_argument("--layers", type=int, default=8, help="of the model (default 8)")
    parser.add_argument("--saves", type=int, default=3, help="timed saves of each way (default 3)")
    parser.add_argument("--every", type=int, default=8, help="steps between saves (default 8)")
    parser.add_argument("--output", metavar="FOLDER", help="where to save (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the ratios to this file too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (args.ranks, args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
