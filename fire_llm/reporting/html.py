"""Gather what the page says about one run: its figures under their headings, how its arms were made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from operator import itemgetter
from statistics import fmean
from typing import Any

from fire_llm.evaluation.measurement import all_described
from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.plots import arms as plots
from fire_llm.reporting.plots.base import Style, palette
from fire_llm.reporting.plots.diagnostics import MEASURES, measure_figure
from fire_llm.reporting.plots.matrices import heat_figure, matrices, spectra_figure
from fire_llm.reporting.plots.sweep import key_figure
from fire_llm.reporting.plots.transfer import corpora_figure
from fire_llm.reporting.sequence import Stream, every_table

Json = dict[str, Any]

LOSS = "The axis first shows what follows the first third of training; double-click to see everything."
BAND = "The line is the mean over the seeds, the band their range. "
STEPS = "How much sooner an arm first reaches the loss on {} with which full reset ends."
RETENTION = "Forgetting is the final NLL on {} less that of the checkpoint the arm started from. Positive: lost."
STREAM = (
    "Left: NLL on a phase's own corpus when the phase ended, less the base's. If the base loses plasticity phase by "
    "phase and an arm does not, the arm's line falls. Right: the final NLL on each corpus, less that NLL."
)
HEAT = "Colours are logarithmic, the same for all arms and both DfI maps. Blank: left alone or not measured."
SPECTRA = "Dotted grey: before the reset. Arms that leave the matrix alone are not drawn."
DIAGNOSED = "Measured on held-out text of {}."
MATRIX = (
    "Bits per byte of held-out text. Colours show how far a value is above the best of its column; the brightest is "
    "the worst trained checkpoint and everything beyond. Measured by fire-llm eval: "
)
TRANSFER = {
    "forgetting": "Forgetting: NLL after a phase, less that when the corpus was last trained on; positive is lost",
    "forward_transfer": "Forward transfer: NLL of a corpus before its phase, less that at the start; negative helps",
}
NORMS = "Frobenius norm of every matrix a reset touched; on the dotted line nothing changes."
PAIRS = (("Steps saved", "Plasticity and retention"), ("Singular values", "Norms"))
DASH = "–"


def block(
    title: str,
    text: str,
    figures: Iterable[tuple[str, Json | None]],
    switch: str = "",
    chosen: int = 0,
    tables: Iterable[Json] = (),
) -> Json:
    """Return what the template needs for one heading.

    Args:
        title: the heading.
        text: a caption, or nothing.
        figures: (caption, figure); those that are None are left out.
        switch: what the figures' variants are a choice of; all figures under a heading switch together.
        chosen: index of the variant shown first.
        tables: below the figures, {"caption", "columns", "rows": [cells]}; each row's first cell is its heading.
    """
    found = [{"title": name, "spec": spec, "height": spec["layout"]["height"]} for name, spec in figures if spec]
    choices = [(v["group"], v["label"]) for v in found[0]["spec"]["variants"]] if found and switch else []
    look = {"switch": switch, "choices": choices, "chosen": chosen}
    return {"title": title, "text": text, "figures": found, "tables": [*tables], **look}


def numbered(blocks: Iterable[Json], prefix: str) -> list[Json]:
    """Drop blocks without a figure, give the rest identifiers unique on the page, and set pairs side by side."""
    kept = [b for b in blocks if b["figures"]]
    titles = {b["title"] for b in kept}
    halves = {title for pair in PAIRS if titles.issuperset(pair) for title in pair}
    return [{**b, "id": f"{prefix}-{i}", "half": b["title"] in halves} for i, b in enumerate(kept)]


def section(results: Json, index: int) -> Json:
    """Return everything the template says about one run."""
    import yaml

    c = Comparison(results)
    reports: dict[str, Json] = {
        arm: next((run["reset"] for run in c.runs(arm) if run.get("reset")), {}) for arm in c.arms
    }
    agree, note = c.batches()
    recipe = c.results.get("recipe")
    looks = palette(list(c.arms), [arm for arm in c.arms if c.always(arm, "keep")])
    return {
        "name": c.results.get("name") or f"run {index + 1}",
        "created": c.results.get("created"),
        "reading": c.reading(),
        "tables": every_table(c),
        "legend": c.legend(),
        "agree": agree,
        "note": note,
        "chips": list(looks.items()),
        "blocks": numbered(
            [
                *_outcome(c, looks),
                _stream(Stream(c), looks),
                *_evaluation(c),
                *_diagnostics(c, looks),
                *_matrices(c, reports, looks),
                *_phases(c),
            ],
            f"r{index}",
        ),
        "arms": [_arm(c, arm, reports[arm]) for arm in c.arms],
        "untouched": _untouched(reports),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
        "facts": _facts(c),
    }


def _outcome(c: Comparison, looks: Mapping[str, Style]) -> list[Json]:
    """Return the blocks about what the arms reached."""
    rivals = [arm for arm in c.ranked() if c.reference(arm, "full_reset") not in (None, arm)]
    saved = {arm: c.saved(arm) for arm in c.arms if arm in rivals}
    points = {arm: c.retention(arm) for arm in c.arms}
    several = any(c.seeds(arm) > 1 for arm in c.arms)
    loss, dots = (BAND + LOSS, " Small markers are seeds.") if several else (LOSS, "")
    held_out = [(corpus, plots.loss_figure(c.arms, corpus, looks)) for corpus in c.corpora]
    return [
        block("Loss on held-out text", loss, held_out),
        block("Training loss", loss, [("", plots.loss_figure(c.arms, None, looks, 300))]),
        block("Steps saved", STEPS.format(c.new) + dots, [("", plots.steps_figure(saved, looks))]),
        block(
            "Plasticity and retention",
            RETENTION.format(c.first) + dots,
            [("", plots.retention_figure(points, looks, str(c.new)))],
        ),
    ]


def _stream(stream: Stream, looks: Mapping[str, Style]) -> Json:
    """Return the block about the course of a stream: a block without figures where there is none."""
    figures = []
    for caption, of in (("learned, less the base", stream.against_base), ("forgotten at the end", stream.forgotten)):
        by_arm = {arm: of(arm) for arm in stream.of.arms}
        lines = {(arm, ""): [(stream.name(p), seeds) for p, seeds in by.items() if seeds] for arm, by in by_arm.items()}
        figures.append((caption, key_figure(lines, "trained in turn", looks, "nats per token")))
    return block("The stream", STREAM, figures)


def _evaluation(c: Comparison) -> list[Json]:
    """Return the block about the matrix of checkpoints and corpora, where `fire-llm eval` measured it."""
    evaluation = c.results.get("evaluation")
    if not evaluation:
        return []
    rows = evaluation["rows"]
    text = MATRIX + " · ".join(all_described(rows)) + "."
    tables = [
        {
            "caption": TRANSFER[key],
            "columns": [
                "corpus",
                "when",
                "seed",
                "trained in",
                "nats per byte",
                f"{entries[0]['level']:.0%} interval",
            ],
            "rows": [_transfer_cells(entry) for entry in entries],
        }
        for key in TRANSFER
        if (entries := evaluation.get(key))
    ]
    return [block("Checkpoints and corpora", text, [("", corpora_figure(rows))], "seed", tables=tables)]


def _transfer_cells(entry: Json) -> list[str]:
    """Write one forgetting or forward transfer: of what, when, since when, by how much."""
    when = " / ".join(filter(None, [entry["phase"], entry["arm"]])) + (" (replayed)" if entry.get("replayed") else "")
    if "replayed" not in entry:  # forward transfer
        when = f"before {entry['phase']}"
    sure = "" if entry["se"] is None else f" ± {entry['se']:.4f}"
    interval = DASH if entry["low"] is None else f"{entry['low']:+.4f} to {entry['high']:+.4f}"
    return [entry["data"], when, str(entry["seed"]), entry["trained_in"], f"{entry['mean']:+.4f}{sure}", interval]


def _diagnostics(c: Comparison, looks: Mapping[str, Style]) -> list[Json]:
    """Return the blocks about plasticity over the steps, where a run measured any."""
    corpus = next((run["diagnosed_on"] for arm in c.arms for run in c.runs(arm) if run.get("diagnosed_on")), "")
    several = any(c.seeds(arm) > 1 for arm in c.arms)
    text = DIAGNOSED.format(corpus) + (" Means over the seeds." if several else "")
    return [
        block(title, text, [(caption, measure_figure(c.arms, key, looks)) for key, caption in measures.items()])
        for title, measures in MEASURES.items()
    ]


def _matrices(c: Comparison, reports: Mapping[str, Json], looks: Mapping[str, Style]) -> list[Json]:
    """Return the blocks about what the resets did, by each arm's first run; arms that touch none are left out."""
    tables = {arm: matrices(report) for arm, report in reports.items()}
    changed = {arm: table for arm, table in tables.items() if any(row["touched"] for row in table.values())}

    def heat(title: str, key: str, unit: str, *same: str) -> tuple[str, Json | None]:
        return title, heat_figure(changed, itemgetter(key), log=True, unit=unit, same_scale=[*map(itemgetter, same)])

    maps = [
        heat("DfI before", "dfi_before", "DfI", "dfi_after"),
        heat("DfI after", "dfi_after", "DfI", "dfi_before"),
        heat("SFE: how far it moved", "sfe", "SFE"),
    ]
    shown = next((i for i, arm in enumerate(changed) if "fire" in c.methods(arm)), 0)
    first = " Of the first seed." if any(c.seeds(arm) > 1 for arm in changed) else ""
    return [
        block("What the reset did to each matrix", HEAT + first, maps, "arm", shown),
        block("Singular values", SPECTRA + first, [("", spectra_figure(changed, looks))], "matrix"),
        block("Norms", NORMS + first, [("", plots.norms_figure(changed, looks))]),
    ]


def _phases(c: Comparison) -> list[Json]:
    """Return a block for each phase before the arms that are compared, and for each arm of one that has some."""
    phases: dict[str, list[Json]] = {}
    for entry in c.results.get("phases") or []:
        phases.setdefault(" / ".join(filter(None, (str(entry.get("phase")), entry.get("arm")))), []).append(entry)
    text = "Before the arms that are compared."
    return [block(f"Phase “{name}”", text, [("", plots.phase_figure(runs))]) for name, runs in phases.items()]


def _arm(c: Comparison, arm: str, report: Json) -> Json:
    """Describe how an arm was made: its label, what its reset touched, what it cost."""
    runs = c.runs(arm)
    seconds = [run["seconds"] for run in runs if run.get("seconds") is not None]
    touched, untouched = len(report.get("touched") or []), len(report.get("untouched") or [])
    cleared, took = report.get("optimizer_states_cleared"), report.get("seconds")
    return {
        "arm": arm,
        "label": c.arms[arm].get("label") or ", ".join(c.methods(arm)),
        "touched": f"{touched} of {touched + untouched}" if report else DASH,
        "cleared": DASH if cleared is None else cleared,
        "reset": DASH if took is None else f"{took:.2f} s",
        "training": f"{fmean(seconds):.1f} s" if seconds else DASH,
        "seeds": ", ".join(str(run.get("seed")) for run in runs) or DASH,
    }


def _untouched(reports: Mapping[str, Json]) -> list[Json]:
    """Return what was left alone by reason, arms with the same list together."""
    groups: dict[str, Json] = {}
    for arm, report in reports.items():
        reasons: dict[str, list[str]] = {}
        for row in report.get("untouched") or []:
            reasons.setdefault(str(row.get("reason") or "no reason given"), []).append(row["name"])
        if reasons:
            groups.setdefault(json.dumps(reasons, sort_keys=True), {"arms": [], "reasons": reasons})["arms"].append(arm)
    return list(groups.values())


def _facts(c: Comparison) -> list[tuple[str, str]]:
    """Return (name, value) of what one needs to repeat the run: model, data, versions, hardware, batches."""
    results, facts = c.results, []
    model = results.get("model") or {}
    if model:
        facts.append(("model", f"{model.get('description') or ''} · {model.get('parameters') or 0:,} parameters"))
    for name, sizes in (results.get("corpora") or {}).items():
        known = [f"{number:,} {key.replace('_', ' ')}" for key, number in sizes.items() if number is not None]
        facts.append((f"corpus {name}", " · ".join(known)))
    for part in ("versions", "hardware"):
        facts += [(str(key), str(value)) for key, value in (results.get(part) or {}).items() if value is not None]
    runs = [run for arm in c.arms for run in c.runs(arm) if run.get("batches_hash")]
    hashes = sorted({f"seed {run.get('seed')}: {run['batches_hash']}" for run in runs})
    return [*facts, ("batches hash", ", ".join(hashes))] if hashes else facts
