"""Gather the content of a page about one run: text, tables, and figures under their headings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

from fire_llm.evaluation.measurement import all_described
from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.plots import arms as plots
from fire_llm.reporting.plots.base import Figure, Style, palette
from fire_llm.reporting.plots.matrices import Reading, heat_figure, is_matrix, matrices, spectra_figure, values
from fire_llm.reporting.plots.sweep import key_figure
from fire_llm.reporting.plots.transfer import corpora_figure
from fire_llm.reporting.samples import Prompted, samples
from fire_llm.reporting.schema import ResetEntry, Results, Run, Transfer
from fire_llm.reporting.sequence import PhaseSequence, every_table
from fire_llm.reporting.table import DASH, Row, Table
from fire_llm.reporting.waiting import evidence

LOSS = "The axis first shows what follows the first third of training; double-click to see everything."
BAND = "The line is the mean over the seeds, the band their range. "
EMA = " Dotted: the moving average of the weights (EMA)."
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
FORGETTING = "Forgetting: NLL after a phase, less that when the corpus was last trained on; positive is lost"
FORWARD = "Forward transfer: NLL of a corpus before its phase, less that at the start; negative helps"
NORMS = "Frobenius norm of every matrix a reset touched; on the dotted line nothing changes."
MADE = ("parameter slices touched", "optimizer states cleared", "reset took", "training took", "seeds")
PAIRS = (("Steps saved", "Plasticity and retention"), ("Singular values", "Norms"))


@dataclass(frozen=True)
class Drawing:
    """A figure under its caption."""

    title: str
    spec: Figure

    @property
    def height(self) -> int:
        """Return the height in pixels."""
        return int(self.spec["layout"]["height"])


@dataclass(frozen=True)
class Block:
    """A heading of the page with its text, figures and tables."""

    title: str
    text: str
    """A caption, or nothing."""
    figures: list[Drawing]
    switch: str = ""
    """What a reader chooses with a variant, such as `seed`; all figures under a heading switch together."""
    chosen: int = 0
    """Index of the variant shown first."""
    tables: list[Table] = field(default_factory=list)
    """Below the figures."""
    id: str = ""
    half: bool = False
    """Whether it takes half of the page's width, beside another block."""

    @property
    def choices(self) -> list[tuple[str, str]]:
        """Return (group, label) of every variant."""
        variants = self.figures[0].spec["variants"] if self.figures and self.switch else []
        return [(variant["group"], variant["label"]) for variant in variants]


def drawn(*figures: tuple[str, Figure | None]) -> list[Drawing]:
    """Return drawings of (caption, figure) pairs; pairs without a figure are left out."""
    return [Drawing(caption, spec) for caption, spec in figures if spec]


def numbered(blocks: Iterable[Block], prefix: str) -> list[Block]:
    """Drop blocks without a figure, give the rest identifiers unique on the page, and set pairs side by side."""
    kept = [block for block in blocks if block.figures]
    titles = {block.title for block in kept}
    halves = {title for pair in PAIRS if titles.issuperset(pair) for title in pair}
    return [replace(block, id=f"{prefix}-{i}", half=block.title in halves) for i, block in enumerate(kept)]


@dataclass(frozen=True)
class LeftAlone:
    """What the resets of some arms left alone, by reason."""

    arms: list[str]
    reasons: dict[str, list[str]]


@dataclass(frozen=True)
class Section:
    """The content of a page about one run."""

    name: str
    created: str | None
    reading: list[str]
    tables: list[Table]
    legend: str
    agree: bool | None
    """Whether all arms saw the same batches; None where that is not known."""
    note: str
    """The same in a sentence."""
    chips: list[tuple[str, Style]]
    """A button an arm."""
    blocks: list[Block]
    samples: list[Prompted]
    """What the models wrote, by prompt."""
    made: Table
    """How each arm was made."""
    evidence: Table
    """What resets with a condition found."""
    untouched: list[LeftAlone]
    recipe: str
    """YAML."""
    facts: list[tuple[str, str]]
    """Name and value of everything that a repetition of the run needs."""


def section(results: Results, index: int) -> Section:
    """Return the section about one run, the `index`-th of its page."""
    import yaml

    c = Comparison(results)
    reports = {arm: report for arm in c.arms if (report := c.report(arm))}
    agree, note = c.batches()
    looks = palette(list(c.arms), c.bases)
    blocks = [
        *_outcome(c, looks),
        _sequence(PhaseSequence(c), looks),
        *_evaluation(c),
        *_diagnostics(c, looks),
        *_matrices(c, reports, looks),
        *_phases(c),
    ]
    return Section(
        name=results.name or f"run {index + 1}",
        created=results.created,
        reading=c.reading(),
        tables=every_table(c),
        legend=c.legend(),
        agree=agree,
        note=" ".join(filter(None, (note, results.evaluation_note))),
        chips=list(looks.items()),
        blocks=numbered(blocks, f"r{index}"),
        samples=samples(c),
        made=Table("", MADE, tuple(_made(c, arm, reports.get(arm)) for arm in c.arms), ("arm", "reset")),
        evidence=evidence(c),
        untouched=_untouched(reports),
        recipe=yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True) if results.recipe else "",
        facts=_facts(c),
    )


def _outcome(c: Comparison, looks: Mapping[str, Style]) -> list[Block]:
    """Return the blocks about the losses, steps saved and retention of the arms."""
    rivals = [arm for arm in c.ranked() if c.reference(arm, "full_reset") not in (None, arm)]
    saved = {arm: c.saved(arm) for arm in c.arms if arm in rivals}
    points = {arm: c.retention(arm) for arm in c.arms}
    several = any(c.seeds(arm) > 1 for arm in c.arms)
    averaged = any(run.final_ema for arm in c.arms for run in c.runs(arm))
    loss, dots = (BAND + LOSS, " Small markers are seeds.") if several else (LOSS, "")
    held_out = [(corpus, plots.loss_figure(c.arms, corpus, looks)) for corpus in c.corpora]
    retention = plots.retention_figure(points, looks, str(c.new))
    return [
        Block("Loss on held-out text", loss + (EMA if averaged else ""), drawn(*held_out)),
        Block("Training loss", loss, drawn(("", plots.loss_figure(c.arms, None, looks, 300)))),
        Block("Steps saved", STEPS.format(c.new) + dots, drawn(("", plots.steps_figure(saved, looks)))),
        Block("Plasticity and retention", RETENTION.format(c.first) + dots, drawn(("", retention))),
    ]


def _sequence(sequence: PhaseSequence, looks: Mapping[str, Style]) -> Block:
    """Return the block about several phases with arms; it has no figures if only one phase has arms."""
    figures = []
    measures = {"learned, less the base": sequence.against_base, "forgotten at the end": sequence.forgotten}
    for caption, measure in measures.items():
        lines = {
            (arm, ""): [(sequence.name(phase), seeds) for phase, seeds in measure(arm).items() if seeds]
            for arm in sequence.comparison.arms
        }
        figures.append((caption, key_figure(lines, "trained in turn", looks, "nats per token")))
    return Block("The stream", STREAM, drawn(*figures))


def _evaluation(c: Comparison) -> list[Block]:
    """Return the block about the matrix of checkpoints and corpora, where `fire-llm eval` measured it."""
    evaluation = c.results.evaluation
    if not evaluation:
        return []
    text = MATRIX + " · ".join(all_described(row.model_dump() for row in evaluation.rows)) + "."
    transfers = {FORGETTING: evaluation.forgetting, FORWARD: evaluation.forward_transfer}
    tables = [_transfer(caption, entries) for caption, entries in transfers.items() if entries]
    return [Block("Checkpoints and corpora", text, drawn(("", corpora_figure(evaluation.rows))), "seed", tables=tables)]


def _transfer(caption: str, entries: list[Transfer]) -> Table:
    columns = ("seed", "trained in", "nats per byte", f"{entries[0].level:.0%} interval")
    return Table(caption, columns, tuple(map(_transfer_row, entries)), ("corpus", "when"))


def _transfer_row(entry: Transfer) -> Row:
    """Write one forgetting or forward transfer: of which corpus, in which phase, and by how much."""
    when = " / ".join(filter(None, [entry.phase, entry.arm])) + (" (replayed)" if entry.replayed else "")
    if entry.replayed is None:  # forward transfer
        when = f"before {entry.phase}"
    error = "" if entry.se is None else f" ± {entry.se:.4f}"
    known = entry.low is not None and entry.high is not None
    interval = f"{entry.low:+.4f} to {entry.high:+.4f}" if known else DASH
    return Row((entry.data, when), (str(entry.seed), entry.trained_in, f"{entry.mean:+.4f}{error}", interval))


def _diagnostics(c: Comparison, looks: Mapping[str, Style]) -> list[Block]:
    """Return the blocks about plasticity over the steps, where a run measured any."""
    corpus = next((run.diagnosed_on for arm in c.arms for run in c.runs(arm) if run.diagnosed_on), "")
    several = any(c.seeds(arm) > 1 for arm in c.arms)
    text = DIAGNOSED.format(corpus) + (" Means over the seeds." if several else "")
    return [
        Block(
            title,
            text,
            drawn(*((caption, plots.measure_figure(c.arms, key, looks)) for key, caption in measures.items())),
        )
        for title, measures in plots.MEASURES.items()
    ]


def _matrices(c: Comparison, reports: Mapping[str, ResetEntry], looks: Mapping[str, Style]) -> list[Block]:
    """Return the blocks about the matrices that resets changed, in the first run of each arm that changed any."""
    touched = {arm: [entry for entry in report.touched if is_matrix(entry)] for arm, report in reports.items()}
    tables = {arm: matrices(report) for arm, report in reports.items() if touched[arm]}
    entries = {arm: [*table.values()] for arm, table in tables.items()}
    before = {arm: [Reading(e.name, e.role, e.dfi_before) for e in table] for arm, table in entries.items()}
    after = {arm: [Reading(e.name, e.role, e.dfi_after) for e in table] for arm, table in entries.items()}
    moved = {arm: [Reading(e.name, e.role, e.sfe) for e in table] for arm, table in entries.items()}
    maps = drawn(
        ("DfI before", heat_figure(before, log=True, unit="DfI", same_scale=values(after))),
        ("DfI after", heat_figure(after, log=True, unit="DfI", same_scale=values(before))),
        ("SFE: how far it moved", heat_figure(moved, log=True, unit="SFE")),
    )
    shown = next((i for i, arm in enumerate(tables) if "fire" in c.methods(arm)), 0)
    first = " Of the first seed." if any(c.seeds(arm) > 1 for arm in tables) else ""
    norms = plots.norms_figure({arm: touched[arm] for arm in tables}, looks)
    return [
        Block("What the reset did to each matrix", HEAT + first, maps, "arm", shown),
        Block("Singular values", SPECTRA + first, drawn(("", spectra_figure(tables, looks))), "matrix"),
        Block("Norms", NORMS + first, drawn(("", norms))),
    ]


def _phases(c: Comparison) -> list[Block]:
    """Return a block for each phase before the arms that are compared, and for each arm of one that has some."""
    phases: dict[str, list[Run]] = {}
    for run in c.results.phases:
        phases.setdefault(" / ".join(filter(None, (run.phase, run.arm))), []).append(run)
    text = "Before the arms that are compared."
    return [Block(f"Phase “{name}”", text, drawn(("", plots.phase_figure(runs)))) for name, runs in phases.items()]


def _made(c: Comparison, arm: str, report: ResetEntry | None) -> Row:
    """Write how an arm was made: its label, how much its reset touched, and the time it took."""
    runs = c.runs(arm)
    seconds = [run.seconds for run in runs if run.seconds is not None]
    touched = cleared = took = DASH
    if report:
        touched = f"{len(report.touched)} of {len(report.touched) + len(report.untouched)}"
        cleared = DASH if report.optimizer_states_cleared is None else str(report.optimizer_states_cleared)
        took = DASH if report.seconds is None else f"{report.seconds:.2f} s"
    training = f"{fmean(seconds):.1f} s" if seconds else DASH
    label = c.arms[arm].label or ", ".join(c.methods(arm))
    return Row((arm, label), (touched, cleared, took, training, ", ".join(str(run.seed) for run in runs) or DASH))


def _untouched(reports: Mapping[str, ResetEntry]) -> list[LeftAlone]:
    """Return what resets left alone, by reason; arms that left the same parameters alone share an entry."""
    groups: dict[str, LeftAlone] = {}
    for arm, report in reports.items():
        reasons: dict[str, list[str]] = {}
        for entry in report.untouched:
            reasons.setdefault(entry.reason or "no reason given", []).append(entry.name)
        if reasons:
            groups.setdefault(json.dumps(reasons, sort_keys=True), LeftAlone([], reasons)).arms.append(arm)
    return list(groups.values())


def _facts(c: Comparison) -> list[tuple[str, str]]:
    """Return (name, value) of what a repetition of the run needs: model, data, versions, hardware, batches."""
    results, facts = c.results, []
    if results.model:
        facts.append(("model", f"{results.model.description} · {results.model.parameters:,} parameters"))
    for name, sizes in results.corpora.items():
        known = [f"{number:,} {key.replace('_', ' ')}" for key, number in sizes if number is not None]
        facts.append((f"corpus {name}", " · ".join(known)))
    for part in (results.versions, results.hardware):
        facts += [(key, str(value)) for key, value in part if value is not None]
    runs = [run for arm in c.arms for run in c.runs(arm) if run.batches_hash]
    hashes = sorted({f"seed {run.seed}: {run.batches_hash}" for run in runs})
    return [*facts, ("batches hash", ", ".join(hashes))] if hashes else facts
