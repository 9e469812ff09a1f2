"""Reset a large synthetic checkpoint on the disk, and compare memory and time with loading it whole and with `cp`.

    python scripts/benchmark_apply.py [--model llama-3-8b] [--folder DIR] [--only apply cp load] [--keep]
    python scripts/benchmark_apply.py --model gpt-0.1b --only apply no-measures before cp --before CLONE --repeat 3

The script writes a sharded bf16 checkpoint of random weights with the model's real shapes. Then it runs in turns, each
in a process of its own: `fire-llm apply`; the same with --no-measures (the difference is the time of measuring);
`fire-llm apply` of another clone of the package; `cp -r` with a flush to the disk; and the baseline from_pretrained +
fire_ + save_pretrained, which needs the memory of the whole model. For each it prints the least seconds of all turns.
At the end it compares every tensor: those that FIRE leaves alone must equal the source to the byte, the others the
baseline. It needs free disk space of three times the checkpoint (48 GB for 8 B parameters).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig

from fire_llm.checkpoint.headers import StoredTensor
from fire_llm.checkpoint.source import Source
from fire_llm.models import model_on_meta

LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
MODELS = {
    "llama-3-8b": ("llama", {**LLAMA, "intermediate_size": 14336, "num_hidden_layers": 32}),
    "llama-3-1b": (
        "llama",
        {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    ),
    "gpt-0.1b": ("gpt2", {"vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}),
    "qwen2-1.5b": (
        "qwen2",
        {
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
    ),
    # Experts lie one by one on the disk and stacked in memory; 36 layers of 32 make 8 B parameters.
    "qwen3-moe-8b": (
        "qwen3_moe",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 40, "num_experts": 40, "num_experts_per_tok": 8, "head_dim": 128,
            "num_attention_heads": 32, "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip

BASELINE = """
import sys, time, torch
from fire_llm import fire_
from fire_llm.models import load_model
began = time.perf_counter()
model = load_model(sys.argv[1])
loaded = time.perf_counter()
report = fire_(model)
fired = time.perf_counter()
model.save_pretrained(sys.argv[2], max_shard_size="4GB")
print(f"load {loaded - began:.0f} s, fire_ {fired - loaded:.0f} s ({report.seconds:.0f} s the resets themselves), "
      f"save {time.perf_counter() - fired:.0f} s")
"""


def stored_shapes(model_type: str, settings: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the keys and shapes of a checkpoint on the disk, where experts are stored one by one."""
    config = AutoConfig.for_model(model_type, **settings)
    for name, parameter in model_on_meta(config).named_parameters():
        shape = tuple(parameter.shape)
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            yield name, shape
            continue
        for expert in range(shape[0]):
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            for part in parts:
                yield f"{stem}.{expert}.{part}.weight", (shape[1] // len(parts), shape[2])


def write_checkpoint(folder: Path, model: str, shard_bytes: int = 4 * 10**9) -> int:
    """Write a sharded bf16 checkpoint of random weights, a tensor at a time; return its parameters."""
    model_type, settings = MODELS[model]
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size, total = 0, 0
    for name, shape in stored_shapes(model_type, settings):
        n_bytes = 2 * torch.Size(shape).numel()
        if size and size + n_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + n_bytes, total + n_bytes
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in tensors.items():
            n_bytes = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n_bytes]}
            at += n_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for shape in tensors.values():
                data = torch.empty(shape, dtype=torch.bfloat16)
                data.normal_(float(len(shape) == 1), 0.02)
                out.write(memoryview(data.view(torch.uint8).numpy()))
        print(f"  {file}", flush=True)
    index = {"metadata": {"total_parameters": total // 2, "total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = AutoConfig.for_model(model_type, **settings)
    config.dtype, config.architectures = torch.bfloat16, [type(model_on_meta(config)).__name__]
    config.save_pretrained(folder)
    return total // 2


def timed(command: list[str], package: Path) -> tuple[int, float, float, float]:
    """Run a command; return exit code, wall and CPU seconds, and the peak resident memory of its processes in GiB."""
    used = os.times()
    # `python -m` looks for packages in its own folder first.
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(package)}, cwd=package)
    peak, watched = [0], psutil.Process(process.pid)

    def watch() -> None:
        while process.poll() is None:
            try:
                family = [watched, *watched.children(recursive=True)]
                peak[0] = max(peak[0], sum(p.memory_info().rss for p in family))
            except psutil.Error:
                pass
            time.sleep(0.02)

    watcher, began = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    code = process.wait()
    watcher.join()
    now = os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return code, time.perf_counter() - began, cpu, peak[0] / 2**30


def compare(source: Path, result: Path, baseline: Path | None) -> None:
    """Compare every tensor with the source, and with the baseline where there is one."""
    before, after = Source.open(source).tensors, Source.open(result).tensors
    assert {n: (t.shape, t.offset) for n, t in before.items()} == {n: (t.shape, t.offset) for n, t in after.items()}
    same = {name for name, tensor in before.items() if tensor.same_bytes(after[name])}
    touched = {row["parameter"] for row in json.loads((result / "fire.json").read_text())["touched"]}
    print(f"{len(same)} of {len(before)} tensors are the source's to the byte, {len(before) - len(same)} were reset")
    print(f"parameters that fire.json says were touched: {len(touched)}")
    if baseline is not None:
        others: dict[str, StoredTensor] = Source.open(baseline).tensors
        equal = sum(after[name].same_bytes(others[name]) for name in before)
        print(f"{equal} of {len(before)} tensors equal the baseline's to the byte")


def compare_times(figures: dict[str, float]) -> None:
    """Print the ratios of the contestants' CPU seconds."""
    if "apply" in figures and "no-measures" in figures:
        measuring = figures["apply"] - figures["no-measures"]
        share = measuring / figures["apply"]
        print(f"of apply's {figures['apply']:.0f} s of CPU, measuring takes {measuring:.0f} ({share:.0%})")
    if "apply" in figures and "before" in figures:
        print(f"apply takes {figures['apply'] / figures['before']:.2f} of the other clone's CPU time")
    if "load" in figures and "apply" in figures:
        print(f"apply takes {figures['apply'] / figures['load']:.2f} of the baseline's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a shorter run")
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    kinds = ("apply", "no-measures", "before", "cp", "load")
    parser.add_argument("--only", nargs="+", choices=kinds, default=("apply", "cp", "load"))
    parser.add_argument("--before", type=Path, help="another clone of the package, for the kind `before`")
    parser.add_argument("--repeat", type=int, default=1, help="turns")
    parser.add_argument("--device", default="cpu", help="for apply")
    parser.add_argument("--num-processes", type=int, default=1, help="for apply")
    parser.add_argument("--json", type=Path, help="write the ratios to this file too")
    parser.add_argument("--keep", action="store_true", help="do not delete what was written")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fire-llm-apply-"))
    if args.layers:
        MODELS[args.model][1]["num_hidden_layers"] = args.layers
    source, results = folder / args.model, {n: folder / f"{args.model}-{n}" for n in kinds}
    if not source.exists():
        print(f"writing {source}")
        print(f"{write_checkpoint(source, args.model) / 1e9:.2f} B parameters")
    if "before" in args.only and args.before is None:
        parser.error("before: name the other clone with --before")
    options = ["--device", args.device]
    options += ["--num-processes", str(args.num_processes)] if args.num_processes > 1 else []
    applied = {
        name: [sys.executable, "-m", "fire_llm", "apply", str(source), str(results[name]), *options] for name in kinds
    }
    commands = {
        "apply": applied["apply"],
        "no-measures": [*applied["no-measures"], "--no-measures"],
        "before": applied["before"],
        "cp": ["sh", "-c", f"cp -r '{source}' '{results['cp']}' && sync"],
        "load": [sys.executable, "-c", BASELINE, str(source), str(results["load"])],
    }  # fmt: skip
    own, figures, peaks = Path(__file__).parents[1], {}, {}
    for name in [*args.only] * args.repeat:
        shutil.rmtree(results[name], ignore_errors=True)
        code, seconds, cpu, peak = timed(commands[name], args.before if name == "before" else own)
        ended = "" if code == 0 else f", ended with {code}"
        print(f"{name}: {seconds:.0f} s, {cpu:.0f} s of CPU, peak resident memory {peak:.2f} GiB{ended}", flush=True)
        if code == 0:
            figures[name] = min(cpu, figures.get(name, cpu))
            peaks[name] = max(peak, peaks.get(name, peak))
        if code == 0 and name in ("apply", "no-measures", "before"):
            took = json.loads((results[name] / "fire.json").read_text())
            parts = {"resets": "seconds", "measuring": "measuring_seconds", "copying": "copying_seconds"}
            known = [f"{part} {took[key]:.1f} s" for part, key in parts.items() if took.get(key) is not None]
            print(f"  {', '.join(known)} (wall)")
        if name not in ("apply", "load"):
            shutil.rmtree(results[name], ignore_errors=True)
    compare_times(figures)
    if args.json:
        each = {"CPU seconds": figures, "peak memory": peaks}
        ratios = {
            f"{unit}, {name} / apply": value / found["apply"]
            for unit, found in each.items() if "apply" in found
            for name, value in found.items()
        }  # fmt: skip
        args.json.write_text(json.dumps({"ratios": ratios}, indent=1))
    if results["apply"].exists():
        compare(source, results["apply"], results["load"] if results["load"].exists() else None)
    if not args.keep and args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
