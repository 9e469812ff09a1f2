"""Train one tiny model on one text by transformers' run_clm.py and by `fire-llm run`, and compare what each gives.

    python scripts/compare_run_clm.py --run-clm RUN_CLM.py --train train.txt --validation valid.txt [--steps 300]

run_clm.py is transformers' examples/pytorch/language-modeling/run_clm.py, of any version that the installed
transformers accepts. A byte-level tokenizer and a GPT-2 of 1.1 M parameters are made once; both programs start from
that folder, in turns, once a seed, with the same batch, optimizer, schedule and precision. The seeds order the text.
Both final models are then measured twice: by run_clm.py's own --do_eval and by `fire-llm eval`, so that neither is
judged by its own count alone. The accuracy that run_clm.py wants to fetch is put beside it as a local file.

Printed: the mean negative log-likelihoods (nats a token) with their spread over seeds, seconds of wall and CPU time,
the files that are left, and the first and last lines of each log.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from fire_llm.data.corpora import Corpus, resolve
from fire_llm.data.spec import CorpusSpec
from fire_llm.data.tokenizer import train_tokenizer
from fire_llm.models import config_for, fresh_model

CONTEXT, SEQUENCES, VOCABULARY = 128, 16, 2048
LR, MIN_LR, WARMUP = 2e-3, 2e-4, 0.1
ACCURACY = """import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(predictions)}
"""


def timed(command: list[str], log: Path, folder: Path) -> dict[str, float]:
    """Run a command in a folder, its output in a file; return seconds of wall and CPU time."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as out:
        ended = subprocess.run(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(
            f"{' '.join(command)}\nended with {ended.returncode}:\n" + "\n".join(log.read_text().splitlines()[-20:])
        )
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - began, "cpu": cpu}


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    # One thread: two in a model as small as this wait for each other wherever the machine has other work.
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def start(folder: Path, corpus: Corpus) -> None:
    """Write the tokenizer and the weights that both programs begin with."""
    tokenizer = train_tokenizer([corpus], VOCABULARY, progress=False)
    tokenizer.model_max_length = CONTEXT
    model = fresh_model(config_for("gpt-tiny", tokenizer=tokenizer, context=CONTEXT), 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def by_run_clm(args: argparse.Namespace, work: Path, seed: int) -> dict[str, Any]:
    out = work / f"run_clm-{seed}"
    data = ["--train_file", args.train, "--validation_file", args.validation, "--block_size", str(CONTEXT)]
    command = [
        sys.executable, args.run_clm, "--model_name_or_path", str(work / "start"), *data,
        "--cache_dir", str(work / "cache"), "--output_dir", str(out), "--do_train", "--use_cpu", "--seed", str(seed),
        "--max_steps", str(args.steps), "--per_device_train_batch_size", str(SEQUENCES), "--learning_rate", str(LR),
        "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", json.dumps({"min_lr": MIN_LR}),
        "--warmup_steps", str(int(WARMUP * args.steps)), "--weight_decay", "0.1", "--adam_beta1", "0.9",
        "--adam_beta2", "0.95", "--max_grad_norm", "1.0", "--logging_steps", "10", "--save_steps", str(args.steps),
        "--report_to", "none",
    ]  # fmt: skip
    took = timed(command, work / f"run_clm-{seed}.log", work)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {**took, "train": next(h["loss"] for h in reversed(history) if "loss" in h), "model": out}


def by_fire_llm(args: argparse.Namespace, work: Path, seed: int) -> dict[str, Any]:
    recipe = {
        "name": "compare",
        "seed": seed,
        "model": str(work / "start"),
        "corpora": {"text": {"files": args.train, "validation": str(work / "watched.txt"), "document": "file"}},
        "optimizer": {"lr": LR, "min_lr": MIN_LR, "warmup": WARMUP, "weight_decay": 0.1, "betas": [0.9, 0.95]},
        "batch": {"tokens_per_step": SEQUENCES * CONTEXT, "sequences_per_device": SEQUENCES},
        "precision": "fp32",
        "phases": [{"name": "text", "data": {"text": 1.0}, "steps": args.steps}],
        "evaluate": {"every_steps": args.steps},
        "save_every_steps": args.steps,
    }
    path, out = work / f"recipe-{seed}.yaml", work / f"fire-llm-{seed}"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "fire_llm", "run", str(path), "--output", str(out), "--workers", "1"]
    took = timed(command, work / f"fire-llm-{seed}.log", work)
    state = next(out.glob(f"text/seed-{seed}/checkpoint-*/trainer_state.json"))
    history = json.loads(state.read_text())["log_history"]
    return {**took, "train": next(h["loss"] for h in reversed(history) if "loss" in h), "model": state.parent}


def measured(args: argparse.Namespace, work: Path, model: Path) -> dict[str, float]:
    """Return a model's held-out NLL by each program's count."""
    out = work / "measured"
    data = ["--train_file", args.train, "--validation_file", args.validation, "--block_size", str(CONTEXT)]
    command = [sys.executable, args.run_clm, "--model_name_or_path", str(model)]
    command += ["--tokenizer_name", str(work / "start"), *data, "--cache_dir", str(work / "cache")]
    command += ["--output_dir", str(out), "--do_eval", "--use_cpu"]
    timed([*command, "--report_to", "none", "--per_device_eval_batch_size", "32"], work / "measured.log", work)
    theirs = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    command = [sys.executable, "-m", "fire_llm", "eval", str(model), "--data", args.validation, "--document", "file"]
    timed([*command, "--json", "own.json", "--context", str(CONTEXT)], work / "measured.log", work)
    (row,) = json.loads((work / "own.json").read_text())["rows"]
    shutil.rmtree(out)
    return {"run_clm": theirs, "fire-llm": row["nll"]}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def files(folder: Path) -> str:
    sizes = [(p.relative_to(folder), p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()]
    return "\n".join(f"  {size / 1e3:9.1f} kB  {path}" for path, size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-clm", required=True, type=os.path.abspath)
    parser.add_argument("--train", required=True, type=os.path.abspath, help="text file (.txt)")
    parser.add_argument("--validation", required=True, type=os.path.abspath, help="text file (.txt)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, help="keep everything here")
    args = parser.parse_args()
    work = (args.output or Path(tempfile.mkdtemp())).absolute()
    (work / "accuracy").mkdir(parents=True, exist_ok=True)
    (work / "accuracy" / "accuracy.py").write_text(ACCURACY)
    # A run measures before and after; run_clm.py as called here does not, so that a run is given little to measure.
    (work / "watched.txt").write_text(Path(args.validation).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    start(work / "start", resolve("text", CorpusSpec(files=[args.train], document="file", holdout=0.0), Path()))
    programs = {"run_clm.py": by_run_clm, "fire-llm run": by_fire_llm}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for seed in args.seeds:
        for name, train in programs.items():
            result = train(args, work, seed)
            found[name].append({**result, **measured(args, work, result["model"])})
            print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr)
    print("| | " + " | ".join(programs) + " |\n|---|" + "---|" * len(programs))
    for what, key in {
        "loss of the last 10 steps": "train",
        "held-out NLL, run_clm.py's count": "run_clm",
        "held-out NLL, `fire-llm eval`": "fire-llm",
    }.items():
        print(f"| {what} | " + " | ".join(spread([r[key] for r in runs]) for runs in found.values()) + " |")
    for what, key in {"seconds": "wall", "CPU seconds": "cpu"}.items():
        medians = [f"{statistics.median(r[key] for r in runs):.0f}" for runs in found.values()]
        print(f"| {what} | {' | '.join(medians)} |")
    for name in ("run_clm", "fire-llm"):
        seed = args.seeds[0]
        print(f"\nfiles of {name}-{seed}:\n{files(work / f'{name}-{seed}')}")
        lines = (work / f"{name}-{seed}.log").read_text(errors="replace").splitlines()
        print(f"log of {name}-{seed}, {len(lines)} lines:\n  " + "\n  ".join([*lines[:8], "…", *lines[-12:]]))


if __name__ == "__main__":
    main()
