"""Compare `perplexity` with `Trainer.evaluate` and lm_eval: time, and memory above the model's own.

    python scripts/benchmark_evaluation.py [--model gpt-small] [--context 256] [--vocab 50304] [--device cuda]
    python scripts/benchmark_evaluation.py --only memory [--memory-of ours plain lm_eval]
    python scripts/benchmark_evaluation.py --only precisions --device cuda --batch-size 16 --context 1024 --vocab 50304

Speed: one model, one text, one process, in turns. `ours, stream` and Trainer.evaluate get the same tokens in blocks of
the context; `ours, documents`, lm_eval's loglikelihood_rolling and the rolling loop get the same texts, and all but the
loop tokenise them. Seconds are medians; the ratio of a pair is the median of the rounds' ratios. The negative
log-likelihoods are compared as well. lm_eval and Trainer.evaluate are left out where lm_eval and datasets are missing.

Precisions: perplexity and the rolling loop, which scores tokens as lm_eval does, in fp32, in bf16, and in fp32 under
bf16 autocast; the text is one document. On a GPU the clock stops when the GPU has finished.

Memory: a narrow Llama of vocabulary 131,072 reads windows of 4096 tokens, each contestant in a process of its own,
after a short text that loads the libraries. On a CPU it is the peak of resident memory less what was resident before;
on a GPU, that of torch's allocator. `plain` is the model's own loss on one window, as Trainer takes it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rolling_loop import PRECISIONS, in_turns, measure, rolling_loop

from fire_llm import perplexity
from fire_llm.architectures.context import choose_context
from fire_llm.data import train_tokenizer
from fire_llm.data.corpora import resolve
from fire_llm.data.encode import Encoder
from fire_llm.models import PRESETS, config_for, describe, fresh_model, load_model, load_tokenizer

TOKENIZER_ENTRIES = 4096
"""Entries of the tokenizer that is trained for a preset. The model's vocabulary may be larger, as its cost counts."""
PAIRS = (
    ("ours, stream", "Trainer.evaluate", 1.0),
    ("ours, documents", "lm_eval", 2.0),
    ("ours, documents", "rolling loop", 2.0),
)
MEMORY_TARGET_MB = 300


def texts_of(corpus: str, tokenizer: Any, tokens: int) -> tuple[list[str], list[np.ndarray]]:
    """Return documents of about `tokens` tokens together, and their ids."""
    texts, ids, total = [], [], 0
    encode = Encoder(tokenizer)
    for text in resolve(corpus).documents("train"):
        if total >= tokens:
            break
        texts.append(text)
        ids.append(encode([text])[0].astype(np.int64))
        total += len(ids[-1])
    return texts, ids


def contestants(model: Any, tokenizer: Any, texts: list[str], stream: np.ndarray, args: Any) -> dict[str, Callable]:
    """Return functions that score the text and return Σ nll and the number of tokens scored."""
    context, prefix = args.context, tokenizer.eos_token_id
    blocks = stream[: len(stream) // context * context].reshape(-1, context)
    encode = Encoder(tokenizer)

    def ours_stream() -> tuple[float, int]:
        measured = perplexity(model, blocks, context=context, batch_size=args.batch_size)
        return measured.nll * measured.tokens, measured.tokens

    def ours_documents() -> tuple[float, int]:
        ids = encode(texts)
        ends = np.cumsum([len(each) for each in ids])
        how = {"prefix": prefix, "context": context, "batch_size": args.batch_size}
        measured = perplexity(model, np.concatenate(ids), documents=ends, per_document=True, **how)
        return measured.nll * measured.tokens, measured.tokens

    run: dict[str, Callable] = {"ours, stream": ours_stream}
    if installed("datasets"):
        run["Trainer.evaluate"] = trainers(model, blocks, args)
    run["ours, documents"] = ours_documents
    if installed("lm_eval"):
        run["lm_eval"] = lm_evals(model, tokenizer, texts, len(stream), args)
    ends = np.cumsum([len(each) for each in encode(texts)])
    run["rolling loop"] = lambda: rolling_loop(model, stream, context, args.batch_size, prefix, documents=ends)
    return run


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def trainers(model: Any, blocks: np.ndarray, args: Any) -> Callable:
    """Return a function that measures blocks with Trainer.evaluate."""
    from datasets import Dataset
    from transformers import PrinterCallback, Trainer, TrainingArguments

    dataset = Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_eval_batch_size=args.batch_size, prediction_loss_only=True,
        report_to="none", disable_tqdm=True, use_cpu=args.device == "cpu",
    )  # fmt: skip
    trainer = Trainer(model, settings, eval_dataset=dataset)
    trainer.remove_callback(PrinterCallback)

    def evaluated() -> tuple[float, int]:
        scored = blocks.size - len(blocks)  # each block's first token is nobody's label
        return trainer.evaluate()["eval_loss"] * scored, scored

    return evaluated


def lm_evals(model: Any, tokenizer: Any, texts: list[str], tokens: int, args: Any) -> Callable:
    """Return a function that measures texts with lm_eval."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=args.context)

    def rolling() -> tuple[float, int]:
        requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
        with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar for every batch
            return -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True)), tokens

    return rolling


def measured_model(args: Any) -> tuple[Any, Any]:
    """Return a tokenizer and the model, and settle the context."""
    if args.model in PRESETS:
        tokenizer = train_tokenizer([resolve(args.corpus)], TOKENIZER_ENTRIES, progress=False)
        overrides = {"vocab_size": args.vocab} if args.vocab else None
        model = fresh_model(config_for(args.model, tokenizer=tokenizer, context=args.context, overrides=overrides), 0)
    else:
        tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    args.context = choose_context(model.config, args.context)
    return tokenizer, model.to(args.device).eval()


def precisions(args: Any) -> dict[str, Any]:
    """Time perplexity and the rolling loop in each precision and print a table."""
    tokenizer, model = measured_model(args)
    stream = np.concatenate(texts_of(args.corpus, tokenizer, args.tokens)[1])
    print(f"{describe(model)}, on {args.device}; context {args.context}, batch size {args.batch_size}, {len(stream):,} "
          f"tokens of {args.corpus} as one document")  # fmt: skip
    rows = measure(
        model, stream, context=args.context, batch_size=args.batch_size, prefix=tokenizer.eos_token_id,
        precisions=args.precisions, rolling_batch_sizes=args.rolling_batch_sizes, compiled=args.compile,
        repeat=args.repeat,
    )  # fmt: skip
    for row in rows:
        ours = next(each for each in rows if each["precision"] == row["precision"])
        print(f"{row['precision']:14} {row['contestant']:24} {row['tokens_per_second']:12,.0f} tokens/s, "
              f"{row['nll']:.9f} nats, first pass {row['first_seconds']:.1f} s; ours: "
              f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f} times its speed")  # fmt: skip
    return {"settings": vars(args), "rows": rows}


def speed(args: Any) -> dict[str, Any]:
    """Time the contestants in turns and print a table."""
    tokenizer, model = measured_model(args)
    model = model.to(getattr(torch, args.dtype))
    texts, ids = texts_of(args.corpus, tokenizer, args.tokens)
    stream = np.concatenate(ids)
    lengths = sorted(len(each) for each in ids)
    print(f"{describe(model)}, {args.dtype}, on {args.device}; context {args.context}, batch size {args.batch_size}")
    print(f"{args.corpus}: {len(stream):,} tokens of {len(ids)} documents, {lengths[0]} to {lengths[-1]}, "
          f"median {statistics.median(lengths):.0f}")  # fmt: skip
    run = contestants(model, tokenizer, texts, stream, args)
    timed = in_turns(run, args.repeat, torch.device(args.device))
    seconds = {name: each for name, (_, each, _) in timed.items()}
    answers = {name: answer for name, (_, _, answer) in timed.items()}
    rows = {}
    for name, each in seconds.items():
        middle = statistics.median(each)
        nll, n = answers[name]
        rows[name] = {"seconds": each, "tokens_per_second": len(stream) / middle, "nll": nll / n, "tokens": n}
        print(f"{name:18} {middle:8.2f} s ({min(each):.2f} to {max(each):.2f}) {len(stream) / middle:12,.0f} tokens/s, "
              f"{nll / n:.7f} nats over {n:,} tokens")  # fmt: skip
    ratios = {}
    for ours, theirs, target in PAIRS:
        if theirs not in seconds:
            print(f"{theirs} is not installed")
            continue
        each = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        ratios[theirs] = statistics.median(each)
        print(f"{ours}: {ratios[theirs]:.2f} times the speed of {theirs} ({min(each):.2f} to {max(each):.2f}); "
              f"wanted: {target:.0f}")  # fmt: skip
    apart = rows["ours, documents"]["nll"] / rows["rolling loop"]["nll"] - 1
    print(f"ours, documents and the rolling loop: {apart:.1e} apart. Trainer skips each block's first token")
    return {"settings": vars(args), "rows": rows, "ratios": ratios}


def resident_mb(key: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def memory_of(contestant: str, args: Any) -> dict[str, float]:
    """Measure one contestant, in this process: MB above the model's own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, context = args.width, args.memory_context
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=args.memory_vocab, max_position_embeddings=context, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()
    ids = torch.randint(0, args.memory_vocab, (args.memory_windows * context + 1,))

    def measure(some: torch.Tensor) -> None:
        if contestant == "ours":
            perplexity(model, some, context=context, batch_size=args.memory_windows)
        elif contestant == "plain":
            with torch.inference_mode():
                for window in some.split(context):
                    model(input_ids=window[None].to(args.device), labels=window[None].to(args.device), use_cache=False)
        else:
            windows = [((None, None), [int(a[0])], a[1:].tolist()) for a in some.split(context) if len(a) > 1]
            lm._loglikelihood_tokens(windows, disable_tqdm=True)

    if contestant == "lm_eval":
        from lm_eval.models.huggingface import HFLM
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        any_tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="e", pad_token="e")
        lm = HFLM(pretrained=model, tokenizer=any_tokenizer, batch_size=1, max_length=context)
    measure(ids[:33])
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        measure(ids)
        return {"model": before, "above": torch.cuda.max_memory_allocated() / 2**20 - before}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_mb("VmRSS")
    began = time.perf_counter()
    measure(ids)
    return {"model": before, "above": resident_mb("VmHWM") - before, "seconds": time.perf_counter() - began}


def memory(args: Any) -> dict[str, Any]:
    """Measure each contestant in a process of its own and print a table."""
    print(f"vocabulary {args.memory_vocab:,}, context {args.memory_context:,}, width {args.width}, {args.dtype}, on "
          f"{args.device}; {args.memory_windows} windows at once (others 1); wanted: {MEMORY_TARGET_MB}")  # fmt: skip
    rows = {}
    for name in args.memory_of:
        command = [sys.executable, __file__, *args.argv, "--contestant", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:8} {rows[name]['above']:8.0f} MB above the {rows[name]['model']:.0f} MB of process and model")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("speed", "memory", "precisions"), default=("speed", "memory"))
    parser.add_argument("--model", default="gpt-small", help=f"{', '.join(PRESETS)}, a checkpoint folder or a Hub id")
    parser.add_argument("--context", type=int, help="tokens a window; the model's longest, at most 1024")
    parser.add_argument("--vocab", type=int, help="a preset's vocabulary, larger than its tokenizer's")
    parser.add_argument("--corpus", default="python-docs")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rolling-batch-sizes", nargs="+", type=int, default=(16,), help="of the loop; lm_eval: 1")
    parser.add_argument("--compile", action="store_true", help="measure perplexity with a compiled trunk too")
    parser.add_argument("--memory-of", nargs="+", choices=("ours", "plain", "lm_eval"), default=("ours", "plain"))
    parser.add_argument("--memory-vocab", type=int, default=131_072)
    parser.add_argument("--memory-context", type=int, default=4096)
    parser.add_argument("--memory-windows", type=int, default=2, help="windows of the text and of ours' batch")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.argv = sys.argv[1:]
    if args.contestant:
        print(json.dumps(memory_of(args.contestant, args)))
        return
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures = {name: {"speed": speed, "memory": memory, "precisions": precisions}[name](args) for name in args.only}
    ratios = {f"speed, ours / {name}": ratio for name, ratio in figures.get("speed", {}).get("ratios", {}).items()}
    above = {name: row["above"] for name, row in figures.get("memory", {}).items()}
    ratios |= {f"memory, {name} / ours": more / above["ours"] for name, more in above.items() if "ours" in above}
    if args.json:
        args.json.write_text(json.dumps(figures | {"ratios": ratios}, indent=1, default=str))


if __name__ == "__main__":
    main()
