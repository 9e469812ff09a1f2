"""The report against hand-computed numbers, and its page against odd, hostile and missing input."""

from __future__ import annotations

import io
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from rich.console import Console
from support.edits import edited

from fire_llm.cli import main
from fire_llm.core.errors import UserError
from fire_llm.reporting.comparison import Comparison, steps_saved
from fire_llm.reporting.inspection import inspect_page
from fire_llm.reporting.load import upgraded
from fire_llm.reporting.plots.arms import measure_figure
from fire_llm.reporting.plots.base import palette
from fire_llm.reporting.plots.matrices import parse_name
from fire_llm.reporting.schema import CurveEntry, EvaluationRow, Results
from fire_llm.reporting.table import Row, Table
from fire_llm.reporting.tables import (
    load_results,
    markdown_table,
    print_table,
    render_table,
    write_report,
)

Json = dict[str, Any]
NEW, FIRST = "library-docs", "python-docs"
STEPS, TOKENS_PER_STEP, EVERY = 300, 8192, 15

# name: (resets, final NLL on the new corpus, on the first, NLL at step 0, fraction of the way gone at half time)
ARMS: dict[str, tuple[list[Json], float, float, float, float]] = {
    "base": ([{"method": "keep"}], 4.353, 4.061, 5.1, 0.9),
    "full-reset": ([{"method": "full_reset"}], 4.671, 4.702, 9.01, 0.93),
    "s-and-p": ([{"method": "shrink_perturb", "shrink": 0.5}], 4.297, 4.208, 7.9, 0.95),
    "fire": ([{"method": "fire", "iterations": 5, "roles": ["attention", "mlp"]}], 4.363, 4.095, 6.0, 0.92),
    "fire+head": ([{"method": "fire", "roles": ["attention", "mlp", "lm_head"]}], 4.302, 4.122, 7.2, 0.95),
    "fire-polar": ([{"method": "fire", "solver": "polar", "tolerance": 0.001}], 4.475, 4.301, 8.2, 0.92),
    "rescale": ([{"method": "rescale", "roles": ["attention", "mlp"]}], 4.351, 4.083, 5.6, 0.91),
}
PARTS = {
    "attn.c_attn.weight[q]": ("attention", (128, 128)),
    "attn.c_attn.weight[k]": ("attention", (128, 128)),
    "attn.c_attn.weight[v]": ("attention", (128, 128)),
    "attn.c_proj.weight": ("attention", (128, 128)),
    "mlp.c_fc.weight": ("mlp", (512, 128)),
    "mlp.c_proj.weight": ("mlp", (128, 512)),
}


def measured(nll: float) -> Json:
    return {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / math.log(2) / 3.9}


def curve_of(start: float, new: float, first: float, half: float, wobble: float) -> list[Json]:
    """Fall exponentially from `start` at step 0 to the ends; a training loss every 5 steps, an evaluation every 15."""
    rate = -math.log(1 - half) / 0.5
    entries = []
    for step in range(0, STEPS + 1, 5):
        t = step / STEPS
        left = (math.exp(-rate * t) - math.exp(-rate)) / (1 - math.exp(-rate))
        noise = 0.05 * math.sin(12.9 * step + 40 * wobble)
        ends = {NEW: new + wobble + (start - new) * left, FIRST: first + wobble + (max(start, first) - first) * left}
        entry: Json = {
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "learning_rate": 6e-4 * (1 - t),
            "train_loss": None,
            "eval": {},
        }
        if step:
            entry["train_loss"] = ends[NEW] * 0.97 + noise
        if step % EVERY == 0:
            entry["eval"] = {corpus: measured(nll) for corpus, nll in ends.items()}
        entries.append(entry)
    return entries


def sigmas(top: float, decay: float, count: int = 64) -> list[float]:
    return [top * (1 - i / count) * (1 + i) ** -decay + 1e-4 for i in range(count)]


def row_of(name: str, role: str, shape: tuple[int, int], index: int, arm: str) -> Json:
    n = min(shape)
    sigma = sigmas(1.6 + 0.2 * index % 1.3, 0.25 + 0.02 * index)
    gain = math.sqrt(shape[0] / shape[1])
    after = {
        "full-reset": sigmas(0.4, 0.05),
        "s-and-p": [0.55 * s for s in sigma],
        "fire-polar": [gain] * 64,
        "rescale": [s * 0.3 for s in sigma],
    }.get(arm, [gain * 0.4 * math.tanh(2 * s) for s in sigma])

    def energy(values: list[float], power: int, shift: float) -> float:
        return sum((v * v - shift) ** power for v in values) * n / len(values)

    return {
        "name": name,
        "parameter": name.partition("[")[0],
        "part": name.partition("[")[2].rstrip("]"),
        "role": role,
        "shape": list(shape),
        "sfe": sum((a - b) ** 2 for a, b in zip(sigma, after, strict=True)) * n / 64,
        "dfi_before": energy(sigma, 2, 1),
        "dfi_after": energy(after, 2, 1),
        "norm_before": math.sqrt(energy(sigma, 1, 0)),
        "norm_after": math.sqrt(energy(after, 1, 0)),
        "sigma_before": sigma,
        "sigma_after": after,
    }


def reset_of(arm: str) -> Json:
    touched, untouched = [], []
    names = [(f"transformer.h.{layer}.{part}", *kind) for layer in range(4) for part, kind in PARTS.items()]
    names.append(("lm_head.weight", "lm_head", (4096, 128)))
    for index, (name, role, shape) in enumerate(names):
        row = row_of(name, role, shape, index, arm)
        if arm == "base" or (role == "lm_head" and arm not in ("full-reset", "s-and-p", "fire+head")):
            reason = "keep leaves everything" if arm == "base" else "role lm_head is not among attention, mlp"
            gone = {"sfe": 0.0, "dfi_after": None, "norm_after": row["norm_before"], "sigma_after": None}
            untouched.append({**row, **gone, "reason": reason})
        else:
            touched.append(row)
    norms = [f"transformer.h.{layer}.ln_{i}.weight" for layer in range(4) for i in (1, 2)]
    for name in norms:
        row = {
            "name": name,
            "parameter": name,
            "part": "",
            "role": "norm",
            "shape": [128],
            "sfe": 0.0,
            "dfi_before": None,
        }
        row |= {"dfi_after": None, "norm_before": 11.3, "norm_after": 11.3, "sigma_before": None, "sigma_after": None}
        untouched.append({**row, "reason": "role norm is not among attention, mlp"})
    return {
        "resets": [setting(reset) for reset in ARMS[arm][0]],
        "seconds": 0.137,
        "optimizer_states_cleared": len(touched),
        "touched": touched,
        "untouched": untouched,
    }


def setting(reset: Json) -> Json:
    options = {key: value for key, value in reset.items() if key not in ("method", "roles")}
    return {"method": reset["method"], "options": options, "roles": reset.get("roles", ["attention", "mlp"])}


def mean_curve(curves: list[list[Json]]) -> list[Json]:
    result = []
    for entries in zip(*curves, strict=False):
        losses = [e["train_loss"] for e in entries if e["train_loss"] is not None]
        corpora = entries[0]["eval"]
        mean = {c: measured(fmean(e["eval"][c]["nll"] for e in entries)) for c in corpora}
        result.append({**entries[0], "train_loss": fmean(losses) if losses else None, "eval": mean})
    return result


def fake_results(seeds: tuple[int, ...] = (1,), arms: tuple[str, ...] = tuple(ARMS)) -> Json:
    """Return results as a demo run would write them: falling curves, one report a run, a shared hash a seed."""
    entries: Json = {}
    for number, arm in enumerate(arms):
        resets, new, first, start, half = ARMS[arm]
        runs = []
        for seed in seeds:
            wobble = 0.012 * math.sin(7 * seed + 1.7 * number) if len(seeds) > 1 else 0.0
            curve = curve_of(start, new, first, half, wobble)
            final = {c: {**e, "tokens": 131072} for c, e in curve[-1]["eval"].items()}
            runs.append(
                {
                    "phase": "second",
                    "seed": seed,
                    "start": {"phase": "first", "checkpoint": "final", "step": STEPS},
                    "steps": STEPS,
                    "tokens_per_step": TOKENS_PER_STEP,
                    "seconds": 61.3 + number,
                    "batches_hash": f"9f2c{seed:04d}",
                    "curve": curve,
                    "final": final,
                    "reset": reset_of(arm),
                }
            )
        final = {}
        for corpus in (NEW, FIRST):
            values = [run["final"][corpus]["nll"] for run in runs]
            spread = stdev(values) if len(values) > 1 else None
            final[corpus] = {**measured(fmean(values)), "tokens": 131072, "nll_std": spread}
        label = ", ".join(f"{r['method']} {' '.join(map(str, r.get('roles', [])))}".strip() for r in resets)
        entries[arm] = {"label": label, "final": final, "curve": mean_curve([r["curve"] for r in runs]), "runs": runs}
    phases = [
        {
            "phase": "first",
            "seed": seed,
            "start": None,
            "steps": STEPS,
            "tokens_per_step": TOKENS_PER_STEP,
            "seconds": 80.1,
            "batches_hash": "77aa",
            "curve": curve_of(9.01, 5.1, 3.98, 0.93, 0.0),
            "final": {},
        }
        for seed in seeds
    ]
    plans = {arm: resets[0] for arm, (resets, *_) in ARMS.items() if arm in arms}
    return {
        "schema_version": 1,
        "name": "demo",
        "created": "2026-11-20T12:00:00Z",
        "recipe": {
            "seed": list(seeds),
            "model": {"preset": "gpt-tiny", "context": 256},
            "phases": [
                {"name": "first", "data": {FIRST: 1.0}},
                {"name": "second", "arms": plans, "data": {NEW: 9.0, FIRST: 1.0}},
            ],
        },
        "versions": {"fire_llm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9", "git": None},
        "hardware": {"cpu": "x86_64", "cores": 2, "memory_gib": 15.6, "accelerator": None},
        "model": {
            "parameters": 1118976,
            "description": "GPT2LMHeadModel, 4 layers, width 128, 4 heads, vocabulary 4096",
        },
        "corpora": {
            c: {"train_tokens": 812345, "validation_tokens": 131072, "validation_bytes": 511180} for c in (NEW, FIRST)
        },
        "phases": phases,
        "arms_phase": "second",
        "first_corpus": FIRST,
        "new_corpus": NEW,
        "arms": entries,
    }


def typed(results: Json) -> Results:
    return Results.model_validate(upgraded(results))


def compared(results: Json) -> Comparison:
    return Comparison(typed(results))


def points(*pairs: tuple[int, float | None], corpus: str = NEW) -> list[CurveEntry]:
    return [
        CurveEntry.model_validate({"step": step, "tokens": step * 10, "eval": {corpus: {"nll": nll}}})
        for step, nll in pairs
    ]


def test_steps_saved_is_linear_between_evaluations() -> None:
    reference = points((0, 9.0), (50, 5.0), (100, 4.0))
    # From 5 at step 20 to 3 at step 60 the loss 4 lies half way, at step 40: 60 of 100 steps are saved.
    assert steps_saved(points((0, 6.0), (20, 5.0), (60, 3.0), (100, 2.0)), reference, NEW) == pytest.approx(0.6)
    assert steps_saved(points((0, 6.0), (100, 4.0)), reference, NEW) == pytest.approx(0.0)
    assert steps_saved(points((0, 3.5), (100, 3.0)), reference, NEW) == 1.0
    assert steps_saved(points((0, 6.0), (40, 4.0), (80, 4.5)), reference, NEW) == pytest.approx(0.6)
    assert steps_saved(points((0, 6.0), (100, 4.1)), reference, NEW) is None


def test_steps_saved_skips_what_was_not_measured() -> None:
    reference = points((100, 4.0), (0, 9.0), (200, None), (300, math.nan))
    assert steps_saved(points((0, 6.0), (20, math.inf), (30, None), (50, 2.0)), reference, NEW) == pytest.approx(0.75)
    assert steps_saved(points((0, 6.0), (50, 2.0)), [], NEW) is None
    assert steps_saved([], reference, NEW) is None
    assert steps_saved(points((0, 6.0), (50, 2.0)), reference, "elsewhere") is None
    assert steps_saved([CurveEntry(step=3, tokens=30, train_loss=2.0)], reference, NEW) is None
    assert steps_saved(points((0, 6.0)), points((0, 9.0)), NEW) is None


def cells(results: Json, corpus: str, arm: str) -> dict[str, str]:
    table = next(t for t in compared(results).tables() if t.caption == corpus)
    return dict(zip(table.columns, next(row.cells for row in table.rows if row.name == arm), strict=True))


def test_table_of_one_seed() -> None:
    row = cells(fake_results(), NEW, "fire")
    assert row["perplexity"] == f"{math.exp(4.363):.2f}"
    assert row["NLL"] == "4.3630"
    assert row["vs base"] == "+0.0100"  # 4.363 - 4.353
    assert row["vs full reset"] == "-0.3080"  # 4.363 - 4.671
    assert cells(fake_results(), NEW, "base")["vs base"] == "–"
    assert cells(fake_results(), NEW, "full-reset")["steps saved"] == "–"
    # The parent ends the first phase at 3.98 on the first corpus; fire ends the second at 4.095.
    assert cells(fake_results(), FIRST, "fire")["forgetting"] == "+0.1150"


def test_table_of_several_seeds_pairs_them() -> None:
    results = fake_results((1, 2, 3))
    for seed, (base, fire) in enumerate([(4.0, 3.9), (5.0, 4.8), (6.0, 5.7)]):
        results["arms"]["base"]["runs"][seed]["final"][NEW]["nll"] = base
        results["arms"]["fire"]["runs"][seed]["final"][NEW]["nll"] = fire
    results["arms"]["fire"]["final"][NEW] |= {"nll": 4.8, "nll_std": 0.9}
    # Paired differences -0.1, -0.2, -0.3: s = 0.1, and t(0.975; 2) = 4.3027 from a table, so 4.3027 · 0.1 / √3.
    # Unpaired the spread of about 1 would drown them.
    assert cells(results, NEW, "fire")["vs base"] == "-0.2000 ± 0.2484"
    assert cells(results, NEW, "fire")["NLL"] == "4.8000 ± 0.9000"
    del results["arms"]["base"]["runs"][2]
    assert cells(results, NEW, "fire")["vs base"] == "-0.1500 ± 0.6353"  # t(0.975; 1) = 12.7062


def test_an_arm_that_lacks_seeds_is_not_called_the_best() -> None:
    results = fake_results((1, 2, 3))
    results["arms"]["base"]["final"][NEW]["nll"] = 0.5
    assert compared(results).ranked()[0] == "base"
    del results["arms"]["base"]["runs"][1:]
    comparison = compared(results)
    assert comparison.ranked()[-1] == "base" and "Of fewer seeds than the others: base." in comparison.legend()
    rows = {row.name: row.best for row in comparison.tables()[0].rows}
    assert not rows["base"] and sum(rows.values()) == 1


@pytest.mark.parametrize("arms", [tuple(ARMS), ("base", "full-reset", "fire")])
def test_arms_are_compared_within_their_warm_start(arms: tuple[str, ...]) -> None:
    results = fake_results(arms=arms)
    late = fake_results(arms=("base", "full-reset", "fire"))["arms"]
    for arm, entry in late.items():
        entry["runs"][0]["start"]["checkpoint"] = "30000"
        for corpus in (NEW, FIRST):
            entry["runs"][0]["final"][corpus]["nll"] += {"base": 1.0, "fire": 0.5}.get(arm, 0.0)
        results["arms"][f"{arm}@30000"] = entry
    assert compared(results).reference("fire@30000", "none") == "base@30000"
    assert compared(results).reference("fire", "none") == "base"
    assert cells(results, NEW, "fire@30000")["vs base"] == "-0.4900"  # 0.010 + 0.5 - 1.0
    assert compared(results).ranked()[0] in ("s-and-p", "base")
    assert "No reset did better" not in " ".join(compared(results).reading())


def test_steps_saved_of_seeds_that_stopped_at_different_steps_is_their_mean() -> None:
    results = fake_results((1, 2), arms=("base", "full-reset"))
    for entry in results["arms"].values():
        late = entry["runs"][1]
        late |= {
            "steps": STEPS // 2,
            "planned_steps": STEPS,
            "curve": [e for e in late["curve"] if e["step"] <= STEPS // 2],
        }
        entry["curve"] = mean_curve([run["curve"] for run in entry["runs"]])
    mean, seeds = compared(results).saved("base")
    assert len(seeds) == 2 and mean == pytest.approx(sum(seeds) / 2)
    unlike = steps_saved(*(typed(results).arms[arm].curve for arm in ("base", "full-reset")), NEW)
    assert unlike is not None and abs(unlike - mean) > 0.01  # the mean curves end in the middle of the first seed


def test_methods_come_from_the_recipe_where_no_report_was_written() -> None:
    results = fake_results()
    for entry in results["arms"].values():
        entry["runs"][0]["reset"] = None
    comparison = compared(results)
    assert comparison.methods("s-and-p") == ["shrink_perturb"]
    assert comparison.reference("fire", "full_reset") == "full-reset"


def test_reading_claims_what_the_numbers_say() -> None:
    one = compared(fake_results()).reading()
    assert one[0].startswith("s-and-p ends lowest on library-docs, at 4.297 nats per token")
    assert "0.056 below base and 0.374 below full reset" in one[0]
    assert any("One seed: no spread is known" in sentence for sentence in one)
    three = " ".join(compared(fake_results((1, 2, 3))).reading())
    assert "of 3 seeds" in three and "One seed" not in three
    base = " ".join(compared(fake_results(arms=("base", "full-reset", "fire-polar"))).reading())
    assert "No reset did better than leaving the weights alone." in base
    assert "no other arm" in compared(fake_results(arms=("fire",))).reading()[0]
    assert compared({"arms": {}}).reading() == ["No arm was run."]
    assert compared({"arms": {}}).batches() == (None, "No arms: there are no batches to compare.")


def test_batches_that_differ_are_told() -> None:
    results = fake_results((1, 2))
    assert compared(results).batches()[0] is True
    results["arms"]["fire"]["runs"][1]["batches_hash"] = "other"
    agree, note = compared(results).batches()
    assert agree is False and "seed 2" in note and "seed 1" not in note and "≠ fire" in note
    for entry in results["arms"].values():
        for run in entry["runs"]:
            del run["batches_hash"]
    assert compared(results).batches()[0] is None


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_terminal_table_is_whole_at_100_columns(seeds: tuple[int, ...]) -> None:
    from rich.console import Console

    results = fake_results(seeds)
    results["arms"]["fire [bold] + shrink-perturb @ step 60000 of the first phase"] = results["arms"].pop("fire")
    out = io.StringIO()
    print_table(typed(results), Console(file=out, width=100))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text and "[bold]" in text
    final = results["arms"]["s-and-p"]["final"][NEW]
    spread = f"±{final['nll_std']:.4f}" if len(seeds) > 1 else ""
    assert f"{final['nll']:.4f}{spread}" in text
    assert "the hashes of their token ids agree" in " ".join(text.split())
    assert len(render_table(typed(results))) == 2


def test_markdown_escapes_its_own_syntax() -> None:
    results = fake_results(arms=("base", "full-reset"))
    results["arms"]["a|b*c"] = results["arms"].pop("base")
    lines = markdown_table(typed(results)).splitlines()
    row = next(line for line in lines if "a\\|b\\*c" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"\|", lines[2]))
    assert "| **4.3530** |" in row


def test_load_results(tmp_path: Path) -> None:
    results = fake_results(arms=("base", "fire"))
    results["arms"]["fire"]["final"][NEW]["nll"] = math.nan
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for path in (tmp_path, tmp_path / "results.json"):
        assert load_results(path).arms["fire"].final[NEW].nll is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no results there"),
        ("{", "not JSON"),
        ("[]", "schema_version None"),
        ('{"schema_version": 3, "arms": {}}', "schema_version 3 .* reads .1 to 2.*Install the fire_llm that wrote"),
        ('{"schema_version": 1, "arms": []}', r"arms: \[\] is not allowed; it must be a mapping"),
        ('{"schema_version": 2}', "arms: missing"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_load_results_refuses_clearly(tmp_path: Path, text: str | bytes | None, told: str) -> None:
    file = tmp_path / "results.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=told) as caught:
        load_results(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


class Page(HTMLParser):
    """Collect what a page loads, its scripts' data, and whether tags that must close do."""

    VOID = frozenset({"meta", "br", "input", "link", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.data: list[Any] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.json = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if found.get("id") else []
        self.loads += [
            v for k, v in attrs if v and (k in ("src", "srcset", "data", "action") or (k == "href" and v[0] != "#"))
        ]
        self.json = found.get("type") == "application/json"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.json:
                self.data.append(json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} in the page")))
        elif not self.open or self.open[-1] != "style":
            self.text += data


def page_of(results: Json | list[Json], folder: Path) -> Page:
    runs = [typed(run) for run in results] if isinstance(results, list) else typed(results)
    return Page(write_report(runs, folder / "report.html").read_text(encoding="utf-8"))


def test_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    page = page_of(fake_results((1, 2, 3)), tmp_path)
    assert page.open == [] and page.loads == []
    assert len(set(page.ids)) == len(page.ids)
    for heading in (
        "Loss on held-out text",
        "Training loss",
        "Steps saved",
        "Plasticity and retention",
        "What the reset did to each matrix",
        "Singular values",
        "Norms",
        "Phase “first”",
        "How each arm was made",
        "What the resets left alone, and why",
        "The recipe",
        "preset: gpt-tiny",
        "role norm is not among attention, mlp",
        "transformers",
        "9f2c0002",
    ):
        assert heading in page.text
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and text.count("plotly.js v") == 1
    assert len(text) < 6_000_000


def test_page_shows_a_band_only_for_several_seeds(tmp_path: Path) -> None:
    for seeds, bands in (((1,), 0), ((1, 2, 3), 7)):
        loss = page_of(fake_results(seeds), tmp_path).data[0]
        assert sum("fill" in trace for trace in loss["data"]) == bands
        fire = next(t for t in loss["data"] if t.get("name") == "fire")
        assert fire["y"][-1] == pytest.approx(fake_results(seeds)["arms"]["fire"]["final"][NEW]["nll"], abs=1e-5)


def test_page_heat_maps_hold_the_reports_numbers(tmp_path: Path) -> None:
    results = fake_results()
    maps = [spec for spec in page_of(results, tmp_path).data if spec["data"][0]["type"] == "heatmap"]
    before, after, _ = maps
    assert before["layout"]["coloraxis"]["cmin"] == after["layout"]["coloraxis"]["cmin"]
    variant = next(v for v in after["variants"] if v["label"] == "fire-polar")
    row = next(r for r in reset_of("fire-polar")["touched"] if r["name"] == "transformer.h.2.mlp.c_fc.weight")
    column = after["layout"]["xaxis"]["ticktext"].index("fc")
    assert variant["data"][0]["z"][2][column] == pytest.approx(math.log10(row["dfi_after"]), rel=1e-3)
    assert "base" not in [v["label"] for v in after["variants"]]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    results = fake_results(arms=("base", "full-reset", "fire"))
    name = "</script><script>alert(1)</script><img src=x onerror=alert(2)>%{y}"
    results["arms"][name] = results["arms"].pop("fire")
    results["name"] = name
    results["arms"][name]["runs"][0]["reset"]["touched"][0]["name"] = name
    page = page_of(results, tmp_path)
    assert "img" not in page.tags and page.loads == []
    assert name in page.text
    assert page.tags.count("script") == len(page.data) + 2
    for spec in page.data:
        for trace in spec["data"]:
            for key in ("name", "hovertemplate"):
                assert "<script" not in (trace.get(key) or "") and "onerror=alert(2)>%{y}" not in (trace.get(key) or "")


def odd_results() -> dict[str, Json]:
    """Return results that lack what a page would like to have."""
    infinite = fake_results((1, 2))
    infinite["arms"]["fire"]["final"][NEW] = {
        "nll": math.nan,
        "perplexity": math.inf,
        "bits_per_byte": None,
        "nll_std": math.nan,
    }
    for entry in infinite["arms"]["fire"]["curve"] + infinite["arms"]["fire"]["runs"][0]["curve"]:
        entry["train_loss"] = math.nan
        entry["eval"] = {NEW: {"nll": math.inf, "perplexity": math.nan, "bits_per_byte": math.nan}}
    for row in infinite["arms"]["s-and-p"]["runs"][0]["reset"]["touched"]:
        row |= {
            "dfi_before": None,
            "dfi_after": math.nan,
            "sigma_before": None,
            "sigma_after": None,
            "sfe": 0.0,
            "norm_before": 0.0,
        }
    bare = fake_results(arms=("base", "fire"))
    for entry in bare["arms"].values():
        entry["runs"][0] |= {"reset": None, "start": None}
    one_corpus = fake_results(arms=("base", "full-reset", "fire")) | {"first_corpus": NEW}
    numbers = fake_results(arms=("base", "full-reset", "fire"))
    numbers["arms"] = {str(i): entry for i, entry in enumerate(numbers["arms"].values())}
    overflow = fake_results(arms=("base", "fire"))
    overflow["arms"]["fire"]["curve"][-1]["eval"][NEW]["nll"] = 900.0
    nothing_left: Json = {
        "schema_version": 1,
        "arms": {"a": {}},
        "phases": [{"phase": "first", "seed": 1}],
        "recipe": None,
    }
    return {
        "not finite": infinite,
        "one arm": fake_results(arms=("fire",)),
        "no full reset": fake_results(arms=("base", "fire")),
        "no reset report": bare,
        "one corpus": one_corpus,
        "arms named by numbers": numbers,
        "overflow": overflow,
        "no arms": fake_results(arms=()),
        "almost nothing": nothing_left,
    }


@pytest.mark.parametrize("kind", list(odd_results()))
def test_odd_results_still_make_a_page(kind: str, tmp_path: Path) -> None:
    from rich.console import Console

    results = odd_results()[kind]
    page = page_of(results, tmp_path)
    assert page.open == [] and page.loads == []
    assert "nan" not in page.text.lower().split() and "None" not in page.text.split()
    print_table(typed(results), Console(file=io.StringIO(), width=100))
    assert "nan" not in markdown_table(typed(results))


def test_many_arms_keep_distinct_looks() -> None:
    arms = [f"arm {i}" for i in range(21)]
    looks = palette(arms, neutral=["arm 0"])
    assert len(set(looks.values())) == len(arms)
    assert [a for a in arms if looks[a].colour == looks["arm 0"].colour] == ["arm 0"]


def test_several_runs_share_one_page(tmp_path: Path) -> None:
    page = page_of([fake_results(), fake_results((1, 2)) | {"name": "second run"}], tmp_path)
    assert {"run-0", "run-1"} <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    assert page.loads == [] and "second run" in page.text


def test_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = typed(fake_results(arms=("base",)))
    assert write_report(results, tmp_path) == tmp_path / "report.html"
    assert write_report(results, tmp_path / "new" / "page.html").exists()
    old = (tmp_path / "report.html").read_bytes()
    whole = Path.write_text

    def full_disk(self: Path, text: str, **options: Any) -> int:
        whole(self, text[:100], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        write_report(results, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "report.html"]


def test_page_in_an_impossible_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(typed(fake_results(arms=("base",))), tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("name", "role", "expected"),
    [
        ("transformer.h.3.attn.c_attn.weight[q]", "attention", (3, "q")),
        ("h.11.attn.c_proj.weight", "attention", (11, "o")),
        ("h.11.mlp.c_proj.weight", "mlp", (11, "proj")),
        ("transformer.h.0.mlp.c_fc.weight", "mlp", (0, "fc")),
        ("model.layers.0.self_attn.q_proj.weight", "attention", (0, "q")),
        ("model.layers.10.self_attn.o_proj.weight", "attention", (10, "o")),
        ("model.decoder.layers.2.self_attn.out_proj.weight", "attention", (2, "o")),
        ("model.layers.1.mlp.gate_up_proj.weight[gate]", "mlp", (1, "gate")),
        ("gpt_neox.layers.5.mlp.dense_h_to_4h.weight", "mlp", (5, "dense_h_to_4h")),
        ("model.layers.4.mlp.experts.17.down_proj.weight", "mlp", (4, "expert down")),
        ("model.layers.4.mlp.experts.gate_up_proj[3, up]", "mlp", (4, "expert up")),
        ("model.layers.4.mlp.shared_expert.up_proj.weight", "mlp", (4, "up")),
        ("lm_head.weight", "lm_head", (None, "lm_head")),
    ],
)
def test_names_are_split_into_layer_and_part(name: str, role: str, expected: tuple[int | None, str]) -> None:
    assert parse_name(name, role) == expected


def inspect_rows(layers: int = 3, **extra: Any) -> list[Json]:
    rows = []
    for layer in range(layers):
        for index, (part, (role, shape)) in enumerate(PARTS.items()):
            sigma = sigmas(1.4 + 0.1 * layer, 0.2 + 0.03 * index)
            row = {"name": f"transformer.h.{layer}.{part}", "role": role, "shape": shape, "sigma": sigma}
            row |= {
                "sigma_min": sigma[-1],
                "sigma_median": sigma[32],
                "sigma_max": sigma[0],
                "dfi": 10.0 ** (layer + 1),
            }
            rows.append({**row, "effective_rank": 90.5, "norm": 7.0 + layer, **extra})
    return rows


def test_inspect_page(tmp_path: Path) -> None:
    head = {
        "name": "lm_head.weight",
        "role": "lm_head",
        "shape": [4096, 128],
        "dfi": math.nan,
        "sigma": None,
        "norm": 12.5,
    }
    file = inspect_page(
        [*inspect_rows(sfe=1.5, cosine=0.97), head], tmp_path / "inspect.html", title="<b>checkpoint</b>"
    )
    page = Page(file.read_text(encoding="utf-8"))
    assert page.open == [] and page.loads == [] and "<b>checkpoint</b>" in page.text
    metrics, spectra = page.data
    dfi = next(v for v in metrics["variants"] if v["label"] == "DfI")
    assert dfi["data"][0]["z"][2][0] == pytest.approx(3.0)  # log10(1000)
    assert dfi["data"][1]["z"] == [[None]]
    assert {v["label"] for v in metrics["variants"]} >= {"SFE", "cosine with the other checkpoint", "effective rank"}
    assert [v["label"] for v in spectra["variants"]] == ["q", "k", "v", "o", "fc", "proj"]
    assert "4096 × 128" in page.text
    assert Page(inspect_page([], tmp_path / "none.html", title="nothing").read_text(encoding="utf-8")).data == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to draw the page")
@pytest.mark.parametrize("kind", ["report", "inspect"])
def test_browser_draws_every_plot(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    if kind == "report":
        runs = [fake_results((1, 2, 3)) | {"evaluation": evaluation()}, fake_results(arms=("fire",))]
        write_report([typed(run) for run in runs], file)
    else:
        inspect_page(inspect_rows(), file, title="checkpoint")
    script = """<script>
    const all = (selector) => [...document.querySelectorAll(selector)];
    addEventListener("error", (event) => { document.title = "failed: " + event.message; });
    addEventListener("load", () => setTimeout(() => {
      const lines = all(".trace.scatter").length;
      all("select").forEach((s) => { s.value = s.options.length - 1; s.dispatchEvent(new Event("change")); });
      all(".chips button").forEach((b) => b.click());
      const drawn = all(".plot").filter((plot) => plot.querySelector("svg.main-svg")).length;
      document.title = `drawn ${drawn}, lines ${lines}, after switching all arms off ${all(".trace.scatter").length}`;
    }, 3000));
    </script>"""
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("<title>", script + "<title>", 1), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *flags.split(), "--virtual-time-budget=10000", profile, "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.findall(r"<title>(.*?)</title>", dom)[0]
    drawn, lines, left = (int(n) for n in re.findall(r"\d+", title))
    assert drawn == len(Page(text).data) > 0, title
    # Without arms only what belongs to none stays: the lines before a reset, the phases, the spectra of inspect.
    assert (left < lines / 2) if kind == "report" else (left == lines), title


def evaluation(seeds: tuple[int, ...] = (1, 2)) -> Json:
    """Return an evaluation.json: step-0 weights, a first phase, an arm with a hostile name; bits by hand."""
    how = {"context": 128, "stride": 64, "prefix": 0, "per_document": False, "perplexity": 20.0}
    bits = {"init": (9.0, 8.0), "first": (2.0, 4.0), HOSTILE_ARM: (2.5, 3.0)}
    rows = []
    for seed in seeds:
        for name, pair in bits.items():
            arm, phase = (name, "second") if name == HOSTILE_ARM else (None, None if name == "init" else name)
            own = {"phase": phase, "arm": arm, "seed": seed, "step": 0 if phase is None else 300}
            own |= {"labels": ["final"] if phase else ["init"], "checkpoint": f"{name}/seed-{seed}"}
            for corpus, value in zip((FIRST, NEW), pair, strict=True):
                measured = {"bits_per_byte": value + seed / 100, "se": {"bits_per_byte": 0.01}}
                rows.append({**own, "data": corpus, **how, **measured})
    found = {"unit": "byte", "level": 0.95, "documents": 9, "after": "x", "before": "y"}
    sure = {"mean": 0.25, "se": 0.01, "low": 0.23, "high": 0.27}
    alone = {"mean": -0.5, "se": None, "low": None, "high": None}
    lost = {"data": FIRST, "phase": "second", "arm": HOSTILE_ARM, "seed": 1, "trained_in": "first", "replayed": True}
    helped = {"data": NEW, "phase": "second", "arm": None, "seed": 1, "trained_in": "second"}
    return {
        "schema_version": 1,
        "rows": rows,
        "forgetting": [{**lost, **found, **sure}],
        "forward_transfer": [{**helped, **found, **alone}],
    }


HOSTILE_ARM = "<b>%{x}</b>"


def test_the_matrix_of_a_run_joins_its_page(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(fake_results(arms=("fire",))))
    plain = Page(write_report(load_results(tmp_path), tmp_path).read_text(encoding="utf-8"))
    assert "Checkpoints and corpora" not in plain.text
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    page = Page(write_report(load_results(tmp_path), tmp_path).read_text(encoding="utf-8"))
    assert page.open == [] and page.loads == [] and len(page.data) == len(plain.data) + 1
    heat = next(figure for figure in page.data if figure["data"][0]["type"] == "heatmap" and "z" in figure["data"][0]
                and [v["label"] for v in figure["variants"]] == ["1", "2"])  # fmt: skip
    # Rows: the step-0 weights, the first phase, the arm; each less the best of its column, 2.01 and 3.01.
    assert heat["variants"][0]["data"][0]["z"] == [[7.0, 5.0], [0.0, 1.0], [0.5, 0.0]]
    assert heat["variants"][1]["data"][0]["text"][1] == ["2.0200", "4.0200"]
    assert heat["layout"]["coloraxis"]["cmax"] == 1.0  # of the trained ones
    assert heat["layout"]["xaxis"]["ticktext"] == [FIRST, NEW]
    assert heat["layout"]["yaxis"]["ticktext"][:2] == ["init", "first"]
    assert heat["layout"]["yaxis"]["ticktext"][2] == "second / &lt;b&gt;&#37;{x}&lt;/b&gt;"
    assert "2.51000 ± 0.01000 bits per byte, 0.50000 above" in heat["variants"][0]["data"][0]["customdata"][2][0]
    text = page.text
    lost = f"{FIRST}|second / {HOSTILE_ARM} (replayed)|1|first|+0.2500 ± 0.0100|+0.2300 to +0.2700"
    for cells in (lost, f"{NEW}|before second|1|second|-0.5000|–"):
        assert re.search(r"\s*".join(map(re.escape, cells.split("|"))), text)
    assert "positive is lost" in text and "negative helps" in text
    assert "context 128, stride 64, windows run across documents, after token 0." in text


def test_a_matrix_without_bytes_or_seeds_is_drawn_as_far_as_it_goes() -> None:
    from fire_llm.reporting.plots.transfer import corpora_figure, row_name

    def row_of(row: Json) -> EvaluationRow:
        return EvaluationRow.model_validate(row)

    rows = evaluation((1,))["rows"]
    assert corpora_figure([row_of({**row, "bits_per_byte": None}) for row in rows]) is None
    start = {"phase": None, "arm": None, "labels": ["start"], "checkpoint": "user/model", "seed": None}
    drawn = corpora_figure([row_of(row) for row in ({**rows[0], **start}, *rows[2:4])])
    assert drawn and [v["label"] for v in drawn["variants"]] == ["1"]
    assert drawn["layout"]["yaxis"]["ticktext"] == ["user/model", "first"]
    assert drawn["variants"][0]["data"][0]["z"] == [[7.0, None], [0.0, 0.0]]
    kept = {"phase": "first", "arm": None, "labels": ["30", "best"], "step": 30}
    assert row_name(row_of({**rows[0], **kept})) == "first, step 30 (best)"


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 2}', "{}"])
def test_a_damaged_evaluation_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(fake_results(arms=("fire",))))
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json: not what 'fire-llm eval' writes"):
        load_results(tmp_path)


def test_diagnostics_are_drawn_where_a_run_has_any(tmp_path: Path) -> None:
    """An arm without a measure has no line, a measure that no arm has no figure, a run without any no heading."""
    results = fake_results(arms=("base", "full-reset", "fire"))
    assert "Features and units" not in write_report(typed(results), tmp_path).read_text()
    for number, arm in enumerate(("base", "fire")):
        entry = results["arms"][arm]
        entry["runs"][0]["diagnosed_on"] = NEW
        for e in entry["curve"][::10]:
            e["diagnostics"] = {"srank": 100 - 9 * number + e["step"] // 50, "hessian_eigenvalue": -3.0 - e["step"]}
        entry["curve"][10]["diagnostics"]["srank"] = None
    arms = typed(results).arms
    figure = measure_figure(arms, "srank", palette(["base", "full-reset", "fire"]))
    assert figure is not None
    assert [(t["legendgroup"], t["x"][:3], t["y"][:3]) for t in figure["data"]] == [
        ("base", [0, 100, 150], [100, 102, 103]),
        ("fire", [0, 100, 150], [91, 93, 94]),
    ]
    assert measure_figure(arms, "gradient_norm", palette(["base", "full-reset", "fire"])) is None
    page = write_report(typed(results), tmp_path).read_text()
    assert "Features and units" in page and f"Measured on held-out text of {NEW}." in page
    assert "norm of the gradient" not in page and "Hessian eigenvalue of the largest magnitude" in page


# ---- one table


def test_a_table_is_the_same_in_a_terminal_and_in_markdown() -> None:
    from rich.console import Console

    rows = (Row(("a*b", "lr=1"), ("1.0 ± 0.1", "–", "x"), best=True), Row(("c", "[bold]"), ("2.0", "3", "y")))
    table = Table("on <b>", ("NLL", "left out", "vs base"), rows, ("arm", "trial")).only(("vs base", "NLL"))
    assert table.columns == ("NLL", "vs base") and table.rows[0] == Row(("a*b", "lr=1"), ("1.0 ± 0.1", "x"), True)
    assert table.markdown().splitlines() == [
        "### on \\<b>", "", "| arm | trial | NLL | vs base |", "|---|---|---:|---:|",
        "| **a\\*b** | **lr=1** | **1.0 ± 0.1** | **x** |", "| c | \\[bold] | 2.0 | y |",
    ]  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=80).print(table.rich({"trial": 8, "arm": 3}))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["on", "<b>"] and lines[1] == ["trial", "arm", "NLL", "vs", "base"]
    assert lines[3:] == [["lr=1", "a*b", "1.0±0.1", "x"], ["[bold]", "c", "2.0", "y"]]


# ---- files of the first schema version, and damaged ones

V1 = Path(__file__).parent / "v1"
"""A tiny run as the last fire_llm with schema version 1 wrote it, and its report as that version printed it."""


def test_results_of_version_1_give_the_report_they_gave(tmp_path: Path) -> None:
    results = load_results(V1)
    assert results.schema_version == 2 and results.evaluation is not None
    assert markdown_table(results) == (V1 / "report.md").read_text(encoding="utf-8")
    text = Page(write_report(results, tmp_path).read_text(encoding="utf-8")).text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines == (V1 / "report.txt").read_text(encoding="utf-8").splitlines()


def test_what_version_1_called_otherwise_is_kept() -> None:
    old = json.loads((V1 / "results.json").read_text(encoding="utf-8"))
    results = load_results(V1 / "results.json")
    assert results.measurement is not None and results.measurement.model_dump() == old["measured"]
    assert results.phase_corpus == {"first": "a", "second": "b"}
    for name, arm in old["arms"].items():
        assert results.arms[name].methods == {"full-reset": ["full_reset"], "base": ["none"]}.get(name, [name])
        for run, was in zip(results.arms[name].runs, arm["runs"], strict=True):
            assert {corpus: jump.model_dump() for corpus, jump in run.loss_jump.items()} == was["spike"]
            assert [entry.model_dump() for entry in run.throughput] == was["speed"]
            assert run.recycled_units == was["recycled"]
            for entry, before in zip(run.curve, was["curve"], strict=True):
                measured = entry.diagnostics.model_dump() if entry.diagnostics else None
                assert measured == before.get("diagnostics")


def test_what_is_written_is_read_as_it_was(tmp_path: Path) -> None:
    results = load_results(V1)
    (tmp_path / "results.json").write_text(json.dumps(results.model_dump(mode="json"), allow_nan=False))
    assert load_results(tmp_path) == results.model_copy(update={"evaluation": None})
    (tmp_path / "evaluation.json").write_text((V1 / "evaluation.json").read_text(encoding="utf-8"))
    assert load_results(tmp_path) == results


def set_at(data: Any, path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        data = data[int(part)] if isinstance(data, list) else data[part]
    if value is ...:
        del data[last]
    else:
        data[int(last) if isinstance(data, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("arms.fire.runs.0.seed", "1", r'arms\.fire\.runs\[0\]\.seed: "1" is not allowed; it must be a whole number'),
        ("arms.fire.runs.1.seed", ..., r"arms\.fire\.runs\[1\]\.seed: missing"),
        ("arms.fire.final.b.nll", "x", r'arms\.fire\.final\.b\.nll: "x" is not allowed; it must be a number'),
        ("arms.fire.final.b.nl", 1.0, r"arms\.fire\.final\.b\.nl: unknown key\. Did you mean 'nll'\? Known: nll, perp"),
        ("arms.fire.curve.0", None, r"arms\.fire\.curve\[0\]: null is not allowed; it must be a mapping"),
        ("arms.fire.curve.0.step", 1.5, r"arms\.fire\.curve\[0\]\.step: 1.5 is not allowed; it must be a whole number"),
        ("arms.fire", 3, r"arms\.fire: 3 is not allowed; it must be a mapping"),
        ("arms", [], r"arms: \[\] is not allowed; it must be a mapping"),
        ("phases", "none", r'phases: "none" is not allowed; it must be a list'),
        ("phases.0.phase", 7, r"phases\[0\]\.phase: 7 is not allowed; it must be text"),
        ("recipe", [1], r"recipe: \[1\] is not allowed; it must be a mapping"),
        ("hardware.coers", 2, r"hardware\.coers: unknown key\. Did you mean 'cores'\? Known: cpu, cores, memory_gib"),
        ("corpora.a.train_tokens", True, r"corpora\.a\.train_tokens: true is not allowed; it must be a whole number"),
        ("arms.fire.runs.0.reset.touched.0.shape.0", "8", r"touched\[0\]\.shape\[0\]: \"8\" is not allowed"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_damaged_field_is_named(version: int, path: str, value: Any, told: str, tmp_path: Path) -> None:
    results = load_results(V1 / "results.json").model_dump(mode="json")
    data = results if version == 2 else json.loads((V1 / "results.json").read_text(encoding="utf-8"))
    set_at(data, path, value)
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=told) as caught:
        load_results(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'results.json'}: not what 'fire-llm run' writes (")
    assert "Run the recipe again with 'fire-llm run'" in message and "\n" not in message


def test_of_many_damaged_fields_the_first_are_named(tmp_path: Path) -> None:
    data = json.loads((V1 / "results.json").read_text(encoding="utf-8"))
    for entry in data["arms"]["fire"]["curve"] + data["arms"]["base"]["curve"]:
        entry["step"] = None
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"curve\[1\]\.step: null is not .* and \d+ more\)\."):
        load_results(tmp_path)


def test_a_results_file_of_damaged_structure_never_ends_in_a_traceback(tmp_path: Path) -> None:
    """Every kind of mapping, list and value of the file in turn becomes something else."""
    whole = json.loads((V1 / "results.json").read_text(encoding="utf-8"))
    text = json.dumps({**whole, "arms": {"fire": whole["arms"]["fire"]}})
    places: list[tuple[int | str, ...]] = []

    def walk(value: Any, path: tuple[int | str, ...]) -> None:
        places.append(path)
        inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
        for key, one in inner:
            walk(one, (*path, key))

    walk(json.loads(text), ())
    one_of_a_kind = {(len(place), place[-1]): place for place in places if place}
    for number, place in enumerate(one_of_a_kind.values()):
        data = json.loads(text)
        at = data
        for part in place[:-1]:
            at = at[part]
        at[place[-1]] = ("x", [1], None)[number % 3]
        (tmp_path / "results.json").write_text(json.dumps(data))
        try:
            load_results(tmp_path)
        except UserError as error:
            assert "results.json" in str(error)  # noqa: PT017  some changes are allowed


@pytest.mark.parametrize("number", [20, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["results.json", "evaluation.json"])
def test_files_edited_by_chance_give_one_sentence_or_a_whole_page(name: str, number: int, tmp_path: Path) -> None:
    files = {one: json.loads((V1 / one).read_text(encoding="utf-8")) for one in ("results.json", "evaluation.json")}
    newer = load_results(V1).model_dump(mode="json")
    told = 0
    for seed in range(number):
        chance = random.Random(seed)
        content = files | ({"results.json": newer} if seed % 2 else {})
        content[name] = edited(content[name], chance)
        for one, data in content.items():
            (tmp_path / one).write_text(json.dumps(data))
        try:
            results = load_results(tmp_path)
        except UserError as error:
            told += 1
            assert name in str(error) and "\n" not in str(error), seed  # noqa: PT017
            continue
        said = io.StringIO()
        print_table(results, Console(file=said, width=100))
        assert said.getvalue() and markdown_table(results), seed
        if seed % 10 == 0 or number > 100:
            assert "</html>" in write_report(results, tmp_path / "page.html").read_text(encoding="utf-8")
    assert 0.1 < told / number < 0.95


# ---- one phase from a checkpoint


def test_one_phase_from_a_checkpoint_forgets_since_its_base_was_measured_at_step_0() -> None:
    results = fake_results(arms=("base", "fire"))
    results |= {"phases": [], "arms_phase": "second", "first_corpus": NEW, "new_corpus": NEW}
    results["recipe"]["model"] = {"checkpoint": "some/model"}
    for number, arm in enumerate(("base", "fire")):
        entry = results["arms"][arm]
        entry["runs"][0]["start"] = None
        for step, nll in ((0, 4.0 + number), (STEPS, 4.5 + number)):  # after the reset, step 0 is not the checkpoint's
            for curve in (entry["curve"], entry["runs"][0]["curve"]):
                at = next(e for e in curve if e["step"] == step)
                at["eval"][FIRST] = {"nll": nll}
                at["eval"]["third"] = {"nll": nll - 1}
        for final in (entry["final"], entry["runs"][0]["final"]):
            final |= {FIRST: {"nll": 4.5 + number}, "third": {"nll": 3.5 + number}}
    comparison = compared(results)
    assert [comparison.retention(arm)[0][1] for arm in ("base", "fire")] == pytest.approx([0.5, 1.5])
    assert comparison.forgotten("fire", "third") == {1: pytest.approx(1.5)}
    assert "forgetting" in cells(results, FIRST, "fire") and cells(results, FIRST, "fire")["forgetting"] == "+1.5000"
    assert cells(results, "third", "base")["forgetting"] == "+0.5000"
    assert "steps saved" in cells(results, NEW, "base")
    assert f"On {FIRST}, the first of the other texts, it ends" in " ".join(comparison.reading())
    results["recipe"]["model"] = {"preset": "gpt-tiny"}  # began with random weights: nothing to forget
    assert compared(results).retention("base") == []


def test_what_is_unfinished_is_told_first() -> None:
    results = typed(fake_results()).model_copy(update={"unfinished": {f"second/x/seed-{n}": "to do" for n in range(7)}})
    said = Comparison(results).reading()
    assert said[0].startswith("Unfinished, what follows is of the rest: second/x/seed-0 (to do), ")
    assert said[0].endswith("and 2 more.") and len(said) > 1


# ---- the verb


def test_the_verb_reads_both_versions_and_prints_the_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(load_results(V1).model_dump(mode="json")))
    printed = []
    for folder in (V1, tmp_path):
        assert main(["report", "--markdown", str(folder), "--output", str(tmp_path / "page.html")]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and (V1 / "report.md").read_text(encoding="utf-8") in printed[0]
    assert main(["report", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {name for name, field in Results.model_fields.items() if not field.exclude}
    assert main(["report"]) == 2 and "name the folder of a finished run" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"schema_version": 3}')
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "schema_version 3" in error and "Traceback" not in error and error.count("\n") == 1
