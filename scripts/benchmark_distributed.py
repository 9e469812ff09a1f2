"""Time FIRE on 1, 2 and 4 ranks: replicas that share the work, replicas that each do all of it, and FSDP2's shards.

    python scripts/benchmark_distributed.py [--ranks 1 2 4] [--model gpt2 | small] [--repeat 3]

Ranks are gloo processes on the CPU, one thread each, or NCCL ranks where there are GPUs, one a rank. Seconds are those
of the slowest rank, without measures, the least of `--repeat`; the ratio is to one rank in the same run. `apart` is the
largest difference between any rank's weights and those of one rank, `extra MB` the peak of memory beside the model's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fire_llm.resets.execute as work
from fire_llm import fire_

SMALL = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
SIZES: dict[str, dict[str, int]] = {"gpt2": {}, "small": SMALL}
MODES = ("each does all", "shared", "fsdp2")


def build(size: str, device: str) -> nn.Module:
    """Build a GPT-2 with random weights, the same on every rank."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES[size])).to(device)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    def whole(p: Any) -> torch.Tensor:
        return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu()

    return {name: whole(p) for name, p in model.named_parameters()}


def largest_resident() -> int:
    """Return the most bytes of main memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank_main(rank: int, world: int, size: str, repeat: int, folder: str) -> None:
    """Time every mode on this rank; the first rank writes the results."""
    gpu = torch.cuda.is_available()
    device = f"cuda:{rank}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world
    )
    rows = []
    for mode in MODES if world > 1 else MODES[:1]:
        work.worthwhile = (lambda *_: True) if mode == "shared" else (lambda *_: False)
        best, extra = float("inf"), 0
        for _ in range(repeat):
            model = build(size, device)
            if mode == "fsdp2":
                from torch.distributed.fsdp import fully_shard

                for layer in model.transformer.h:
                    fully_shard(layer)
                fully_shard(model)
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if gpu else largest_resident()
            report = fire_(model)
            extra = max(extra, (torch.cuda.max_memory_allocated() if gpu else largest_resident()) - before)
            slowest = torch.tensor(report.seconds, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            best = min(best, slowest.item())
        file, found = Path(folder) / "alone.pt", weights(model)
        if world == 1:
            torch.save(found, file)
        alone = torch.load(file)
        apart = torch.tensor(max((found[n] - alone[n]).abs().max().item() for n in found), device=device)
        dist.all_reduce(apart, dist.ReduceOp.MAX)
        rows.append((mode if world > 1 else "one rank", best, apart.item(), extra))
    if rank == 0:
        torch.save(rows, Path(folder) / f"rows-{world}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (1 2 4, or as many as there are GPUs)")
    parser.add_argument("--model", choices=SIZES, default="gpt2")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the ratios to this file too")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    ranks = args.ranks or [n for n in (1, 2, 4, 8) if n <= (gpus or 4)]
    name = torch.cuda.get_device_name() if gpus else f"{os.cpu_count()} CPU cores, one thread a rank"
    print(f"FIRE, 5 steps, {args.model}; {name}; torch {torch.__version__}")
    print(f"{'ranks':>5}  {'mode':15}{'seconds':>9}{'speed-up':>10}{'apart':>10}{'extra MB':>10}")
    first, ratios = None, {}
    with tempfile.TemporaryDirectory() as folder:
        for world in dict.fromkeys([1, *ranks]):
            mp.spawn(rank_main, args=(world, args.model, args.repeat, folder), nprocs=world)
            for mode, seconds, apart, extra in torch.load(Path(folder) / f"rows-{world}.pt"):
                first = first or seconds
                ratios[f"{world} ranks, {mode}: one rank / these"] = first / seconds
                print(
                    f"{world:5}  {mode:15}{seconds:9.3f}{first / seconds:9.2f}x{apart:10.1e}{extra / 2**20:10.0f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
