"""Turn the JSONs of `gpu_report.py` into a page: each figure with its target, and what was not measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STAGES = ("environment", "tests", "newton-schulz", "training", "perplexity", "evidence")
REPORTED = {"llm.c": 468_000, "PyTorch with torch.compile": 462_000}
"""Tokens a second of GPT-2 124M on one H100 at a context of 1024, as others report them."""
RATE, RATIOS = 460_000, {"ours / bare": 0.98, "ours / stock": 1.3}
SOLVERS = {"newton_schulz, bf16": ("FIRE's five steps", 2.5, 0.85), "polar, 1e-3": ("`polar` to 1e-3", 6.5, 3.0)}
"""Solvers with targets: (name, most milliseconds for GPT-2's matrices, most seconds for Llama-3-8B's)."""
FASTER = 2.0
"""Target of our tokens a second over those of a rolling loop."""

Json = dict[str, Any]


def page(folders: Sequence[Path]) -> str:
    """Return the page on folders of JSONs, as Markdown.

    If several folders hold a stage, the last one that is done is used; if none is done, the last one that began.
    """
    found = {stage: _chosen(folders, stage) for stage in STAGES}
    targets = Targets()
    sections = [
        _machines(folders, found),
        _tests(found["tests"], targets),
        _solvers(found["newton-schulz"], targets),
        _training(found["training"], targets),
        _perplexity(found["perplexity"], targets),
        _evidence(found["evidence"]),
    ]
    short = [f"- {line}" for line in targets.short] or ["Nothing of what was measured."]
    missing = [f"- {name}: {_status(data)}" for name, data in found.items() if _status(data) != "done"]
    missing += [f"- {what}, wanted {wanted}" for what, wanted in targets.unmeasured]
    failures = [
        f"- {name}, {what}: `{_plain(lines[-1]) if lines else 'no message'}`"
        for name, data in found.items()
        for what, lines in data.get("failures", {}).items()
    ]
    lines = ["# Results on one GPU", ""]
    if any(data.get("size") == "tiny" for data in found.values()):
        lines += ["A dry run of small models: its figures mean nothing.", ""]
    lines += ["## What fell short", "", *short, ""]
    lines += ["## What is unmeasured, or measured in part", "", *missing, ""] if missing else []
    lines += ["## What failed", "", *failures, ""] if failures else []
    return "\n".join([*lines, *(line for section in sections for line in [*section, ""])])


class Targets:
    """Compare figures with their targets, and collect those that fall short or are unmeasured."""

    def __init__(self) -> None:
        self.short: list[str] = []
        self.unmeasured: list[tuple[str, str]] = []
        self._rows: list[list[str]] = []

    def add(self, what: str, value: float | None, target: float, *, least: bool, unit: str = "") -> None:
        """Compare a figure, None where it was not measured, with the least or the most that it should be."""
        wanted = f"{'≥' if least else '≤'} {_number(target)}{unit}"
        if value is None:
            verdict, text = "unmeasured", ""
            self.unmeasured.append((what, wanted))
        else:
            met, text = value >= target if least else value <= target, f"{_number(value)}{unit}"
            verdict = "met" if met else "fell short"
            if not met:
                self.short.append(f"{what}: {text}, wanted {wanted}")
        self._rows.append([what, text, wanted, verdict])

    def table(self) -> list[str]:
        """Return a table of the figures that were added since the last table."""
        rows, self._rows = self._rows, []
        return [*_table(("figure", "measured", "wanted", ""), rows), ""] if rows else []


def _chosen(folders: Sequence[Path], stage: str) -> Json:
    chosen: Json = {}
    for folder in folders:
        data = _read(folder / f"{stage}.json")
        begun = bool(data) and not _status(data).startswith("left out")
        if not chosen or (begun and (_status(data) == "done" or _status(chosen) != "done")):
            chosen = data and data | {"on": _device(_read(folder / "environment.json"))}
    return chosen


def _device(environment: Json) -> str:
    smi = environment.get("machine", {}).get("nvidia_smi")
    return str(environment.get("device") or (smi.get("name") if isinstance(smi, dict) else None) or "unknown device")


def _heading(title: str, data: Json) -> list[str]:
    if not data:
        return [f"## {title}", ""]
    seconds = f", {data['seconds']:.0f} s" if "seconds" in data else ""
    return [f"## {title}", "", f"*{data.get('on')}, {str(data.get('date', 'no date'))[:10]}{seconds}.*", ""]


def _read(file: Path) -> Json:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _status(data: Json) -> str:
    return str(data.get("status", "not run"))


def _plain(text: str) -> str:
    """Return a message without folders of its machine, and without characters that break a table."""
    text = re.sub(r"/(?:[\w.+-]+/)*(?=(?:fire_llm|scripts|tests|site-packages)/)", "", text)
    text = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "…/", text)
    return text.replace("`", "'").replace("|", "/").strip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    names = [*head]
    ruled = "|".join(["---", *["---:"] * (len(names) - 1)])
    return [f"| {' | '.join(names)} |", f"|{ruled}|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _machines(folders: Sequence[Path], found: dict[str, Json]) -> list[str]:
    lines = ["## Machine", ""]
    previous = ""
    for data in [_read(folder / "environment.json") for folder in folders] or [{}]:
        machine = data.get("machine", {})
        versions = ", ".join(f"{name} {number}" for name, number in machine.get("versions", {}).items() if number)
        smi, text = machine.get("nvidia_smi", {}), _device(data)
        if isinstance(smi, dict) and smi:
            text += f", {smi.get('memory.total')}, driver {smi.get('driver_version')}, at most {smi.get('power.limit')}"
            text += f" and {smi.get('clocks.max.sm')}"
        text += f"; {machine['cores']} CPU cores" if "cores" in machine else ""
        text += f"; CUDA {data['cuda']}" if data.get("cuda") else ""
        commands = "\n".join(machine.get("commands", ["no command was recorded"]))
        for option, name in (("output", "DIR"), ("data", "FOLDER"), ("cache", "DIR")):
            commands = re.sub(rf"--{option} \S+", f"--{option} {name}", commands)
        text = f"{text}. {versions}." if versions else f"{text}."
        lines += ["The same kind of machine and versions:" if text == previous else text, ""]
        previous = text
        if "product_teraflops" in data:
            copied, made, side = (data[k] for k in ("copy_terabytes_per_second", "product_teraflops", "product_side"))
            lines += [f"A copy in its memory moves {copied:.2f} TB/s; a bf16 product of two square matrices of side "
                      f"{side:,} makes {made:.0f} TFLOP/s.", ""]  # fmt: skip
        lines += ["```", commands, "```", ""]
    return lines[:-1]


def _tests(data: Json, targets: Targets) -> list[str]:
    lines = _heading("Tests", data)
    if "counts" not in data:
        return [*lines, "Unmeasured."]
    counted = ", ".join(f"{count} {word}" for word, count in data["counts"].items()) or "none ended"
    cut = data["exit_code"] is None
    rest = "; the rest was cut off at the limit of the stage" if cut else ""
    lines.append(f"`tests/accelerators/test_gpu.py`: {counted}{rest}.")
    running = ", ".join(f"`{name}`" for name in data.get("running", []))
    lines += [f"Running then: {running}."] if cut and running else []
    for name, lines_of_it in data["failed"].items():
        targets.short.append(f"test `{name}` failed")
        errors = [line for line in lines_of_it if line.startswith("E ")] or lines_of_it[:1]
        lines.append(f"- `{name}`: `{_plain(errors[0]) if errors else ''}`")
    slow = [f"`{name}` {took:.1f} s" for name, took in [*data["slowest_seconds"].items()][:5]]
    return [*lines, *(["", f"The slowest: {', '.join(slow)}."] if slow else [])]


def _solvers(data: Json, targets: Targets) -> list[str]:
    lines = _heading("Newton-Schulz and polar", data)
    rows, llama = data.get("gpt2", {}), data.get("llama_3_8b", {})
    if not rows:
        return [*lines, "Unmeasured."]
    for solver, (what, most, seconds) in SOLVERS.items():
        took = rows.get(solver, {}).get("milliseconds")
        targets.add(f"{what}, all matrices of GPT-2's blocks", took, most, least=False, unit=" ms")
        took = llama.get(solver, {}).get("all_224_seconds")
        targets.add(f"{what}, all 224 matrices of Llama-3-8B", took, seconds, least=False, unit=" s")
    lines += targets.table()
    stacks = ", ".join(f"{count} of {a} × {b}" for count, a, b in data["matrices"])
    lines += [
        f"GPT-2's blocks: {stacks}. Milliseconds are medians of 20 runs. The distance is the largest of "
        "the first matrix of each shape: from the same loop in fp64 for `newton_schulz` and the paper's loop, else "
        "from the polar factor in fp64.",
        "",
    ]
    table = []
    for name, row in rows.items():
        extra = "" if row["extra_megabytes"] is None else f"{row['extra_megabytes']:,.0f}"
        table.append([name, f"{row['milliseconds']:.2f}", f"{row['distance']:.1e}", extra])
    lines += _table(("GPT-2's blocks", "ms", "distance", "MB beside input and result"), table)
    if "svd_milliseconds_one_layer" in data:
        took = data["svd_milliseconds_one_layer"]
        lines += ["", f"`torch.linalg.svd` takes {took:.0f} ms for the matrices of one layer."]
    table = []
    for name, row in llama.items():
        each = "; ".join(f"{shape}: {one['milliseconds']:.1f}" for shape, one in row["one_of_each"].items())
        distance = max(one["distance"] for one in row["one_of_each"].values())
        table.append([name, f"{row['all_224_seconds']:.2f}", f"{distance:.1e}", each])
    if table:
        lines += ["", *_table(("Llama-3-8B", "s for all 224", "distance", "ms of one matrix of each shape"), table)]
        lines += ["", "One matrix of each shape was timed; all 224 are these times by how often a shape occurs."]
    return lines


def _training(data: Json, targets: Targets) -> list[str]:
    lines = _heading("Training", data)
    rows = data.get("contestants", {})
    if not rows:
        return [*lines, "Unmeasured."]
    ours = rows.get("ours", {}).get("median")
    short_before = len(targets.short)
    targets.add("training, tokens a second", ours, RATE, least=True)
    for name, target in RATIOS.items():
        targets.add(f"training, {name}", data.get("ratios", {}).get(name), target, least=True)
    fell_short = len(targets.short) > short_before
    lines += targets.table()
    if ours and data["model"] == "gpt-0.1b":
        beside = " and ".join(f"{ours / rate:.2f} times that of {name} ({rate:,})" for name, rate in REPORTED.items())
        other = "" if "H100" in data["on"] else f" This was measured on another device, an {data['on']}."
        lines += [f"Our rate is {beside}, as others report them for GPT-2 124M on one H100.{other}", ""]
    attention = {True: "without a mask", False: "with a mask"}.get(data.get("without_mask"), "not looked at")
    batches = data["micro_batches"]
    lines += [
        f"`{data['model']}`, context {data['context']}, {data['tokens_per_step']:,} tokens a step in {batches} "
        f"micro-batch{'es' * (batches > 1)} of {data['sequences']} sequences, {data['precision']}, "
        f"{'compiled' if data['compiled'] else 'not compiled'}. Our logits: {data.get('path', 'not looked at')}; our "
        f"attention: {attention}. `ours` is this package's trainer, `bare` a loop in plain PyTorch with the same "
        "kernels, `stock` transformers' Trainer with its own loss. They train in turns, "
        f"{data['steps_a_round']} steps a round; figures are medians, ratios medians of the rounds' ratios.",
        "",
    ]
    table = []
    for name, row in rows.items():
        rate = f"{row['median']:,.0f}" if row.get("median") else "unmeasured"
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") else ""
        held = row.get("sequences", data["sequences"])
        smaller = f" (micro-batches of {held}: out of memory above)" if held < data["sequences"] else ""
        table.append([name + smaller, rate, mfu, f"{row.get('peak_bytes', 0) / 2**30:.1f}",
                      f"{row.get('first_round_seconds', 0):.0f}"])  # fmt: skip
    lines += _table(("", "tokens/s", "MFU", "peak memory, GiB", "first round, with compiling, s"), table)
    if data.get("flops_per_token") and data.get("peak_flops"):
        count, peak = data["flops_per_token"] / 1e6, data["peak_flops"] / 1e12
        lines += ["", f"MFU counts {count:,.0f} MFLOP a token, of {peak:,.0f} TFLOP/s."]
    measured = {name: row for name, row in data.get("ablations", {}).items() if isinstance(row, dict)}
    not_measured = [name for name in data.get("ablations", {}) if name not in measured]
    table = [
        [name, f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / ours:.3f}" if ours else ""]
        for name, row in measured.items()
    ]
    lines += ["", *_table(("ours, one thing changed", "tokens/s", "of ours"), table)] if table else []
    lines += ["", f"No time was left for: {', '.join(not_measured)}."] if not_measured else []
    for name, seen in data.get("profiles", {}).items():
        lines += ["", *_profile(name, seen, rows[name].get("median"), data["tokens_per_step"], fell_short)]
    return lines


def _profile(name: str, profile: Json, rate: float | None, tokens: int, in_detail: bool) -> list[str]:
    """Describe where a contestant's time goes; kernel by kernel if a target was not met."""
    kernels = profile["kernel_milliseconds"] / profile["steps"]
    text = f"`{name}` under the profiler: kernels take {kernels:.1f} ms a step"
    if rate:
        step = 1000 * tokens / rate
        text += (
            f" of {step:.1f} ms without the profiler; the device is idle for {max(0.0, 1 - kernels / step):.1%} of it"
        )
    text += f"; {profile['kernels_a_step']:,.0f} kernels a step" if "kernels_a_step" in profile else ""
    attention = ", ".join(f"`{_plain(key)[:60]}`" for key in [*profile["attention"]][:2]) or "no kernel by its name"
    lines = [f"{text}. Attention: {attention}."]
    if in_detail:
        table = [[f"`{_plain(k['kernel'])[:90]}`", f"{k['milliseconds'] / profile['steps']:.2f}", f"{k['share']:.1%}",
                  f"{k['calls'] / profile['steps']:.0f}"] for k in profile["top"][:12]]  # fmt: skip
        lines += ["", *_table((f"kernel of `{name}`", "ms a step", "share", "calls a step"), table)]
    return lines


def _perplexity(data: Json, targets: Targets) -> list[str]:
    lines = _heading("Perplexity", data)
    rows, ratios = data.get("contestants", {}), data.get("ratios", {})
    if not rows:
        return [*lines, "Unmeasured."]
    wanted = dict.fromkeys(f"ours / rolling loop, batch 1, {precision}" for precision in ("bf16", "bf16 autocast"))
    for name in wanted | {name: None for name in ratios if "batch 1," in name}:
        targets.add(f"perplexity, {name}", ratios.get(name), FASTER, least=True)
    lines += targets.table()
    others = [f"- {name}: {ratio:.2f}" for name, ratio in ratios.items() if "batch 1," not in name]
    lines += ["Without a target:", "", *others, ""] if others else []
    lines += [
        f"{data['tokens']:,} tokens of web text, context {data['context']}, weights as they were drawn; ours in "
        f"batches of {data['batch_size']} windows. The rolling loop does what lm-eval does: whole logits, "
        "log-softmax, one gather a window, by default one window a batch. Each batch size of the loop raced with ours "
        "anew: a ratio is of its own race, the table's rates of ours are of the first.",
        "",
    ]
    table = [[name, f"{row['tokens_per_second']:,.0f}", f"{row['nll']:.6f}"] for name, row in rows.items()]
    return [*lines, *_table(("", "tokens/s", "NLL, nats a token"), table)]


def _evidence(data: Json) -> list[str]:
    lines = _heading("Arms of a quarter of an hour", data)
    rows = data.get("results", {})
    if not rows:
        return [*lines, "Unmeasured."]
    steps = " and ".join(
        f"{mine} of {whole}" for mine, whole in zip(data["steps"], data["steps_of_the_recipe"], strict=True)
    )
    left_out = ", ".join(name for name in [*data["arms"], *data["arms_left_out"]] if name not in rows)
    lines.append(
        f"`recipes/{data['recipe']}.yaml`, seed {data['seed']}, {steps} steps of {data['tokens_per_step']:,} tokens"
        f"{f'; without {left_out}' if left_out else ''}. One seed shows a direction and no more."
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
