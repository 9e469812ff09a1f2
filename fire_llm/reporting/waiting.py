"""Resets that wait for an overtrained checkpoint: in which phases and seeds they acted, and on what evidence."""

from __future__ import annotations

from collections.abc import Iterator

from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.schema import Overtraining, Run
from fire_llm.reporting.table import DASH, Row, Table
from fire_llm.resets import conditions

CAPTION = "resets that wait: seeds in which they acted, and nats of held-out NLL above the lowest of the phase before"


def waiting_tables(comparison: Comparison) -> list[Table]:
    """Return a table of how often each waiting reset acted, a column a phase; nothing where no reset waits."""
    found: dict[str, dict[str, list[Overtraining]]] = {}
    for name, run, one in _judged(comparison):
        found.setdefault(name, {}).setdefault(run.phase, []).append(one)
    phases = tuple(dict.fromkeys(phase for by_phase in found.values() for phase in by_phase))
    rows = tuple(Row((name,), tuple(_often(by_phase.get(p, [])) for p in phases)) for name, by_phase in found.items())
    return [Table(CAPTION, phases, rows)] if rows else []


def evidence(comparison: Comparison) -> Table:
    """Return a row for each waiting reset of each run: whether it acted, and the numbers that say so."""
    names = ("arm", "phase", "seed", "what the phase before says")
    rows = (
        Row((name, run.phase, str(run.seed), str(conditions.Overtraining(**one.model_dump()))), ())
        for name, run, one in _judged(comparison)
    )
    return Table("", (), tuple(rows), names)


def _judged(comparison: Comparison) -> Iterator[tuple[str, Run, Overtraining]]:
    """Yield the waiting resets of every run, by the arm's name, with the method's where several of an arm wait."""
    arms = comparison.arms.values()
    for run in (*comparison.results.phases, *(run for arm in arms for run in arm.runs)):
        waiting = [one for one in (run.reset.resets if run.reset else []) if one.found]
        for one in waiting:
            if one.found:
                yield f"{run.arm}: {one.method}" if len(waiting) > 1 else str(run.arm), run, one.found


def _often(found: list[Overtraining]) -> str:
    rises = sorted(one.nll - one.lowest for one in found)
    if not rises:
        return DASH
    reach = f"{rises[0]:.2f}" + (f" to {rises[-1]:.2f}" if len(rises) > 1 else "")
    return f"{sum(one.applied for one in found)} of {len(found)}, {reach}"
