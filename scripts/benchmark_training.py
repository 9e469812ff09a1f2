"""Compare training with a bare loop on the same kernels and with transformers' stock Trainer: time and memory.

    python scripts/benchmark_training.py [--preset gpt-small] [--context 256] [--vocab 50304] [--device cuda]
    python scripts/benchmark_training.py --only memory [--vocabularies 50304 131072]

Speed: one model, one block of tokens, in turns, each contestant in a process of its own that waits while the others
run. A round is a few steps of each, after a first one that is not counted. `bare` is a loop in plain PyTorch with our
kernels (the same sliced loss, fused AdamW, clipping, compiled if ours is): the ceiling. `stock` is Trainer with its own
loss on the same tokens, with the settings of a careful user: fused AdamW, SDPA, the precision, compiled if ours is.
Only ours and bare keep freed memory in the process (fire_llm/training/heap.py). Seconds are medians; the ratio of a
pair is the median of the rounds' ratios.

Memory: a narrow Llama takes two steps with each vocabulary, each contestant in a process of its own. On a CPU it is the
peak of resident memory less what was resident before; on a GPU, that of torch's allocator.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fire_llm.core.flops import flops_per_token, peak_flops
from fire_llm.core.hardware import resolve_precision
from fire_llm.models import PRESETS, config_for, describe, fresh_model
from fire_llm.training import ContinualArguments, ContinualTrainer
from fire_llm.training.callbacks import Keeping
from fire_llm.training.heap import keep_freed_memory
from fire_llm.training.loss import SummedLoss
from fire_llm.training.throughput import peak_memory

TOOK = "took "
TARGETS = {"bare": 0.98, "stock": 1.3}
"""Our tokens a second over theirs, at least."""


class Blocks(torch.utils.data.Dataset):
    """Random blocks of tokens; our trainer takes labels that are shifted, transformers shifts them itself."""

    def __init__(self, vocabulary: int, context: int, shifted: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocabulary, (512, context + 1), generator=generator)
        self.shifted = shifted

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        block = self.tokens[i % 512]
        return {"input_ids": block[:-1], "labels": block[1:].clone() if self.shifted else block[:-1].clone()}


def arguments(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Return the settings that every Trainer of this benchmark gets."""
    precision = resolve_precision(args.precision)
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulation,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": precision.startswith("bf16"),
        "torch_compile": args.device == "cuda",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "dataloader_pin_memory": args.device == "cuda",
        "seed": 1,
    }


def model_of(args: argparse.Namespace) -> Any:
    """Build the model, the same for every contestant."""
    overrides = {"vocab_size": args.vocab} if args.vocab else {}
    config = config_for(args.preset, context=args.context, overrides=overrides)
    return fresh_model(config, 1).to(args.device)


def our_trainer(args: argparse.Namespace, steps: int) -> Any:
    """Return the trainer of a run, for `steps` steps."""
    model = model_of(args)
    settings = ContinualArguments(
        **arguments(args, steps),
        accelerator_config={"non_blocking": args.device == "cuda"},
        bf16_params=args.precision == "bf16-params",
    )
    trainer = ContinualTrainer(model, settings, Blocks(model.config.vocab_size, args.context, True))
    trainer.remove_callback(Keeping)  # this callback would write a checkpoint after each round
    return trainer


def stock_trainer(args: argparse.Namespace, steps: int) -> Any:
    """Return transformers' Trainer, for `steps` steps."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    model = model_of(args)
    settings = TrainingArguments(**arguments(args, steps))
    trainer = Trainer(model, settings, train_dataset=Blocks(model.config.vocab_size, args.context, False))
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_for(trainer: Any, args: argparse.Namespace) -> float:
    """Train for the trainer's steps and return the seconds between the first and the last of them."""
    from transformers import TrainerCallback

    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if args.device == "cuda" and len(marks) in (0, trainer.args.max_steps - 1):
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    mark = Marks()
    trainer.add_callback(mark)
    trainer.train()
    trainer.remove_callback(mark)
    return marks[-1] - marks[0]


def bare(args: argparse.Namespace, steps: int) -> Callable[[], float]:
    """Return a function that trains in plain PyTorch with our kernels and returns the seconds of all steps but one."""
    model, device = model_of(args), torch.device(args.device)
    data = Blocks(model.config.vocab_size, args.context, True)
    half = resolve_precision(args.precision).startswith("bf16")
    loss_of = SummedLoss(
        model,
        lambda: torch.autocast(args.device, torch.bfloat16) if half else nullcontext(),
        params=torch.bfloat16 if args.precision == "bf16-params" else None,
        compiling={} if args.device == "cuda" else None,
    )
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    tokens = args.batch * args.accumulation * args.context

    def run() -> float:
        model.train()
        began = 0.0
        for step in range(steps):
            if step == 1:
                if args.device == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
            for micro in range(args.accumulation):
                first = (step * args.accumulation + micro) * args.batch
                rows = data.tokens[[i % 512 for i in range(first, first + args.batch)]]
                rows = rows.pin_memory().to(device, non_blocking=True) if args.device == "cuda" else rows
                with torch.autocast(args.device, torch.bfloat16) if half else nullcontext():
                    loss = loss_of(model, rows[:, 1:].contiguous(), input_ids=rows[:, :-1].contiguous())
                (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return run


TRAINERS: dict[str, Callable[[argparse.Namespace, int], Any]] = {"ours": our_trainer, "stock": stock_trainer}
CONTESTANTS = ("ours", "bare", "stock")


def contestant(name: str, args: argparse.Namespace, steps: int) -> Callable[[], float]:
    """Return a function that trains for `steps` steps and returns the seconds of all steps but the first."""
    return functools.partial(train_for, TRAINERS[name](args, steps), args) if name in TRAINERS else bare(args, steps)


def speed(args: argparse.Namespace) -> dict[str, float]:
    """Time the contestants in turns, print medians and ratios, and return the ratios."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", "turns-of", "--contestant"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    runs = {name: subprocess.Popen([*command, name], **pipes) for name in CONTESTANTS}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            run.stdin.write("go\n")
            took = float(next(line for line in run.stdout if line.startswith(TOOK)).removeprefix(TOOK))
            sys.stderr.write(f"round {number}, {name}: {took:.3f} s\n")
            if number:
                seconds[name].append(took)
    for run in runs.values():
        run.stdin.close()
        run.wait()
    tokens = args.steps * args.batch * args.accumulation * args.context
    model = model_of(args)
    peak = peak_flops(torch.device(args.device), half=resolve_precision(args.precision).startswith("bf16"))
    flops = flops_per_token(model, args.context)
    print(f"{describe(model)}, vocabulary {model.config.vocab_size}, context {args.context}, {args.batch} sequences × ")
    print(f"{args.accumulation} micro-batches a step, {args.steps} steps a round, {args.rounds} rounds, {args.device},")
    print(f"{resolve_precision(args.precision)}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for name, times in seconds.items():
        rate = tokens / statistics.median(times)
        mfu = f", MFU {rate * flops / peak:.1%}" if flops and peak else ""
        print(f"  {name:6} {rate:12,.0f} tokens/s{mfu}")
    found = {}
    for other, target in TARGETS.items():
        ratios = [b / a for a, b in zip(seconds["ours"], seconds[other], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        found[f"speed, ours / {other}"] = statistics.median(ratios)
        print(f"  ours / {other}: {statistics.median(ratios):.3f} ({spread}); wanted ≥ {target}")
    return found


def turns_of(args: argparse.Namespace) -> None:
    """Train a round for each line on standard input, and print its seconds."""
    if args.contestant != "stock":
        keep_freed_memory()
    run = contestant(args.contestant, args, args.steps + 1)  # the first of a round warms up and is not counted
    for _ in sys.stdin:
        print(f"{TOOK}{run()}", flush=True)


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Print the memory that training adds, each contestant in a process of its own; return the ratios."""
    ratios = {}
    for vocabulary in args.vocabularies:
        found = {}
        for name in ("ours", "stock"):
            command = [sys.executable, __file__, "--only", "memory-of", "--contestant", name]
            command += ["--vocab", str(vocabulary), "--device", args.device, "--precision", args.precision]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])["bytes"]
        print(
            f"  vocabulary {vocabulary}: ours {found['ours'] / 2**20:,.0f} MiB, stock {found['stock'] / 2**20:,.0f} "
            f"MiB above the process before it began ({found['stock'] / found['ours']:.2f} times ours)"
        )
        ratios[f"memory, stock / ours, vocabulary {vocabulary}"] = found["stock"] / found["ours"]
    return ratios


def memory_of(args: argparse.Namespace) -> None:
    """Train a narrow Llama for two steps and print, as JSON, the bytes that this added at the peak."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(_: Any) -> Any:
        torch.manual_seed(1)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab, **sizes, max_position_embeddings=1024)).to(
            args.device
        )

    globals()["model_of"] = build
    args.context, args.batch, args.accumulation = 1024, 4, 1
    run = contestant(args.contestant, args, 2)
    before = torch.cuda.memory_allocated() if args.device == "cuda" else psutil.Process().memory_info().rss
    run()
    print(json.dumps({"bytes": peak_memory(torch.device(args.device)) - before}))


def main() -> None:
    """Read the options and run what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt-small", choices=[*PRESETS])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=None, help="vocabulary; the preset's own, or 50304, by default")
    parser.add_argument("--batch", type=int, default=None, help="sequences a micro-batch; 8, on a GPU 32")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "bf16-params"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", choices=["speed", "memory", "memory-of", "turns-of"])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[50304, 131072])
    parser.add_argument("--json", type=Path, help="write the ratios to this file too")
    parser.add_argument("--contestant", choices=[*CONTESTANTS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or (32 if args.device == "cuda" else 8)
    args.vocab = args.vocab or PRESETS[args.preset]["vocab_size"] or 50304
    if args.only == "memory-of":
        memory_of(args)
        return
    if args.only == "turns-of":
        turns_of(args)
        return
    print(platform.processor() or platform.machine(), torch.cuda.get_device_name() if args.device == "cuda" else "CPU")
    ratios = speed(args) if args.only != "memory" else {}
    ratios |= memory(args) if args.only != "speed" else {}
    if args.json:
        args.json.write_text(json.dumps({"ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
