"""Turn the JSONs of `gpu_report.py` into a page: every figure beside its target, and what was not measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STAGES = ("environment", "tests", "newton-schulz", "training", "perplexity", "evidence")
FASTEST = {"llm.c": 468_000, "PyTorch with torch.compile": 462_000}
"""Tokens a second of GPT-2 124M on one H100 at a context of 1024, as others report them."""

Json = dict[str, Any]


def page(folder: Path) -> str:
    """Return the page, as Markdown, on what a folder of JSONs holds."""
    found = {stage: _read(folder / f"{stage}.json") for stage in STAGES}
    short: list[str] = []
    sections = [
        _machine(found["environment"], found),
        _tests(found["tests"], short),
        _solvers(found["newton-schulz"], short),
        _training(found["training"], short),
        _perplexity(found["perplexity"], short),
        _evidence(found["evidence"]),
    ]
    fell = ["## What fell short", "", *(f"- {line}" for line in short or ["Nothing of what was measured."])]
    missing = [f"- {name}: {_status(data)}" for name, data in found.items() if _status(data) != "done"]
    told = ["", "## What is unmeasured, or measured in part", "", *missing] if missing else []
    failures = [
        f"- {name}, {what}: `{_plain(lines[-1]) if lines else 'no message'}`"
        for name, data in found.items()
        for what, lines in data.get("failures", {}).items()
    ]
    failed = ["", "## What failed", "", *failures] if failures else []
    body = "\n".join(line for section in sections for line in [*section, ""])
    return "\n".join(["# Results on one GPU", "", body, *fell, *told, *failed, ""])


def _read(file: Path) -> Json:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _status(data: Json) -> str:
    return str(data.get("status", "not run"))


def _plain(text: str) -> str:
    return text.replace("`", "'").replace("|", "/").strip()


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    names = [*head]
    ruled = "|".join(["---", *["---:"] * (len(names) - 1)])
    return [f"| {' | '.join(names)} |", f"|{ruled}|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _verdict(short: list[str], what: str, value: float | None, target: float, *, least: bool, unit: str = "") -> str:
    """Say what a figure should be; where it is not, note that it fell short."""
    sign = "≥" if least else "≤"
    if value is not None and (value < target if least else value > target):
        short.append(f"{what}: {value:,.4g}{unit}, wanted {sign} {target:,.4g}{unit}")
    return f"{sign} {target:,.4g}{unit}"


def _machine(data: Json, found: dict[str, Json]) -> list[str]:
    machine = data.get("machine", {})
    versions = ", ".join(f"{name} {number}" for name, number in machine.get("versions", {}).items() if number)
    smi = machine.get("nvidia_smi", {})
    told = ", ".join(f"{key} {value}" for key, value in smi.items()) if isinstance(smi, dict) else str(smi)
    dates = sorted(str(stage["date"]) for stage in found.values() if "date" in stage)
    lines = [
        f"{data.get('device', 'An unknown device')}, {dates[0][:10] if dates else 'no date'}; {told}. {versions}.",
        "",
        "```",
        str(machine.get("command", "no command was recorded")),
        "```",
    ]
    if "product_teraflops" in data:
        copied, made, side = (data[key] for key in ("copy_terabytes_per_second", "product_teraflops", "product_side"))
        lines += [
            "",
            f"A copy in its memory moves {copied:.2f} TB/s, a bf16 product of side {side} {made:.0f} TFLOP/s.",
        ]
    return lines


def _tests(data: Json, short: list[str]) -> list[str]:
    lines = ["## Tests", ""]
    if "counts" not in data:
        return [*lines, "Unmeasured."]
    lines.append(", ".join(f"{count} {word}" for word, count in data["counts"].items()) + ".")
    for name, said in data["failed"].items():
        short.append(f"test `{name}` failed")
        errors = [line for line in said if line.startswith("E ")] or said[:1]
        lines.append(f"- `{name}`: `{_plain(errors[0]) if errors else ''}`")
    return lines


def _solvers(data: Json, short: list[str]) -> list[str]:
    lines = ["## Newton-Schulz and polar", ""]
    rows = data.get("gpt2", {})
    if not rows:
        return [*lines, "Unmeasured."]
    table = []
    for name, row in rows.items():
        wanted = ""
        if name == "newton_schulz, bf16":
            what = "FIRE's five steps on GPT-2's blocks"
            wanted = _verdict(short, what, row["milliseconds"], 2.5, least=False, unit=" ms")
        extra = f"{row['extra_megabytes']:.0f}" if row["extra_megabytes"] is not None else ""
        table.append([name, f"{row['milliseconds']:.2f}", wanted, f"{row['distance']:.1e}", extra])
    head = ("all of GPT-2's matrices", "ms, median of 20", "wanted", "distance", "MB beside them")
    lines += _table(head, table)
    lines += [
        "",
        "Distances are from fp64 iterations: the loop for it and `newton_schulz`, else the polar factor.",
    ]
    if "svd_milliseconds_one_layer" in data:
        lines += ["", f"`torch.linalg.svd` takes {data['svd_milliseconds_one_layer']:.0f} ms for one layer's."]
    table = []
    for name, row in data.get("llama_3_8b", {}).items():
        seconds, wanted = row["all_224_seconds"], ""
        if name.startswith("polar"):
            wanted = _verdict(short, "polar to 1e-3 on Llama-3-8B", seconds, 2.4, least=False, unit=" s")
        each = ", ".join(f"{shape}: {one['milliseconds']:.1f}" for shape, one in row["one_of_each"].items())
        far = max(one["distance"] for one in row["one_of_each"].values())
        table.append([name, f"{seconds:.2f}", wanted, f"{far:.1e}", each])
    if table:
        head = ("all 224 of Llama-3-8B", "s", "wanted", "distance", "ms of one of each shape")
        lines += ["", *_table(head, table), "", "All 224 are the times of one of each shape by their numbers."]
    return lines


def _training(data: Json, short: list[str]) -> list[str]:
    lines = ["## Training", ""]
    rows = data.get("contestants", {})
    if not rows:
        return [*lines, "Unmeasured."]
    lines.append(
        f"{data['model']}, context {data['context']}, {data['tokens_per_step']:,} tokens a step in micro-batches of "
        f"{data['sequences']}, {data['precision']}, {'compiled' if data['compiled'] else 'not compiled'}; "
        f"{data['steps_a_round']} steps a round, in turns; medians. "
        f"Logits: {data.get('path', 'not known')}. Attention "
        f"{ {True: 'without a mask', False: 'with a mask'}.get(data.get('without_mask'), 'is not known') }."
    )
    table = []
    for name, row in rows.items():
        rate = row.get("median")
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") else ""
        memory = f"{row.get('peak_bytes', 0) / 2**30:.1f}"
        table.append([name, f"{rate:,.0f}" if rate else "unmeasured", mfu, memory,
                      f"{row.get('first_round_seconds', 0):.0f}"])  # fmt: skip
    ours = rows.get("ours", {}).get("median")
    for name, rate in FASTEST.items():
        if ours is not None and data.get("model") == "gpt-0.1b":
            _verdict(short, f"training beside {name}, tokens/s", ours, rate, least=True)
        table.append([f"{name}, reported", f"{rate:,}", "", "", ""])
    head = ("", "tokens/s", "MFU", "GiB at most", "first round with compiling, s")
    lines += ["", *_table(head, table), ""]
    for name, ratio in data.get("ratios", {}).items():
        target = {"ours / bare": 0.95, "ours / stock": 1.15}[name]
        lines.append(f"- {name}: {ratio:.3f}, wanted {_verdict(short, name, ratio, target, least=True)}")
    table = [
        [name, f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / ours:.3f}" if ours else ""]
        for name, row in data.get("ablations", {}).items()
        if isinstance(row, dict)
    ]
    if table:
        lines += ["", *_table(("one thing changed", "tokens/s", "of ours"), table)]
    for name, seen in data.get("profiles", {}).items():
        kernels = "; ".join(f"`{_plain(key)[:80]}`" for key in [*seen["attention"]][:4]) or "none by its name"
        lines += ["", f"Attention of {name}: {kernels}. Kernels take {seen['kernel_milliseconds']:.0f} of "
                  f"{seen['wall_milliseconds']:.0f} ms of two steps under the profiler."]  # fmt: skip
        table = [[f"`{_plain(k['kernel'])[:90]}`", f"{k['milliseconds']:.1f}", f"{k['share']:.1%}", k["calls"]]
                 for k in seen["top"][:12]]  # fmt: skip
        lines += ["", *_table((f"kernel of {name}", "ms", "share", "calls"), table)]
    return lines


def _perplexity(data: Json, short: list[str]) -> list[str]:
    lines = ["## Perplexity", ""]
    rows = data.get("contestants", {})
    if not rows:
        return [*lines, "Unmeasured."]
    lines.append(
        f"{data['tokens']:,} tokens of web text, context {data['context']}, weights as they were drawn. The rolling "
        "loop does what lm-eval does: whole logits, log-softmax, one gather a window."
    )
    table = [[name, f"{row['tokens_per_second']:,.0f}", f"{row['nll']:.6f}"] for name, row in rows.items()]
    lines += ["", *_table(("", "tokens/s", "NLL"), table), ""]
    for name, ratio in data.get("ratios", {}).items():
        told = f"- {name}: {ratio:.2f}"
        if name.startswith("ours / "):
            told += f", wanted {_verdict(short, f'perplexity, {name}', ratio, 2.0, least=True)}"
        lines.append(told)
    return lines


def _evidence(data: Json) -> list[str]:
    lines = ["## Arms of a quarter of an hour", ""]
    rows = data.get("results", {})
    if not rows:
        return [*lines, "Unmeasured."]
    steps = " and ".join(
        f"{mine} of {whole}" for mine, whole in zip(data["steps"], data["steps_of_the_recipe"], strict=True)
    )
    left = ", ".join(name for name in [*data["arms"], *data["arms_left_out"]] if name not in rows)
    lines.append(
        f"`recipes/{data['recipe']}.yaml`, seed {data['seed']}, {steps} steps of {data['tokens_per_step']:,} tokens"
        f"{f'; without {left}' if left else ''}. One seed shows a direction and no more."
    )
    corpora = [*next(iter(rows.values()))["nll"]]
    base = rows.get("base", {}).get("nll", {})
    table = []
    for name, row in rows.items():
        cells = [f"{row['nll'][c]:.4f}" + (f" ({row['nll'][c] - base[c]:+.4f})" if name != "base" and c in base else "")
                 for c in corpora]  # fmt: skip
        rate = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else ""
        table.append([name, *cells, f"{row['seconds']:.0f}", rate])
    head = ("arm", *(f"NLL on {c} (less base)" for c in corpora), "s", "tokens/s")
    return [*lines, "", *_table(head, table)]
