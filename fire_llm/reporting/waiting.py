"""Resets that wait for an overtrained checkpoint: in which phases and seeds they acted, and why."""

from __future__ import annotations

from collections.abc import Iterator

from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.schema import Overtraining, Run
from fire_llm.reporting.table import DASH, Row, Table
from fire_llm.resets import conditions

CAPTION = "resets that wait: seeds in which they acted, and nats of held-out NLL above the lowest of the phase before"


def waiting_tables(comparison: Comparison) -> list[Table]:
    """Return a table of how often each waiting reset acted, a column a phase; nothing if no reset waits."""
    judged: dict[str, dict[str, list[Overtraining]]] = {}
    for name, run, judgement in _judged(comparison):
        judged.setdefault(name, {}).setdefault(run.phase, []).append(judgement)
    phases = tuple(dict.fromkeys(phase for by_phase in judged.values() for phase in by_phase))
    rows = tuple(Row((name,), tuple(_often(by_phase.get(p, [])) for p in phases)) for name, by_phase in judged.items())
    return [Table(CAPTION, phases, rows)] if rows else []


def evidence(comparison: Comparison) -> Table:
    """Return a row for each waiting reset of each run: whether it acted, and the numbers that decided it."""
    names = ("arm", "phase", "seed", "what the phase before says")
    rows = (
        Row((name, run.phase, str(run.seed), str(conditions.Overtraining(**judgement.model_dump()))), ())
        for name, run, judgement in _judged(comparison)
    )
    return Table("", (), tuple(rows), names)


def _judged(comparison: Comparison) -> Iterator[tuple[str, Run, Overtraining]]:
    """Yield (name, run, judgement) of every waiting reset: the arm's name, with the method if several of it wait."""
    arms = comparison.arms.values()
    for run in (*comparison.results.phases, *(run for arm in arms for run in arm.runs)):
        judged = [(reset.method, reset.found) for reset in (run.reset.resets if run.reset else []) if reset.found]
        for method, judgement in judged:
            yield f"{run.arm}: {method}" if len(judged) > 1 else str(run.arm), run, judgement


def _often(judgements: list[Overtraining]) -> str:
    rises = sorted(judgement.nll - judgement.lowest for judgement in judgements)
    if not rises:
        return DASH
    reach = f"{rises[0]:.2f}" + (f" to {rises[-1]:.2f}" if len(rises) > 1 else "")
    return f"{sum(judgement.applied for judgement in judgements)} of {len(judgements)}, {reach}"
