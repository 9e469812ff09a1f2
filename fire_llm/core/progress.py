"""The progress bar of every long operation."""

from __future__ import annotations

from typing import Any


def progress_bar(what: str | None, total: int | None, unit: str, *, shown: bool = True, delay: float = 1.0) -> Any:
    """Return a bar of tqdm that disappears at the end.

    Args:
        what: Title.
        total: Number of units; None where it is not known.
        unit: What is counted; tensors and matrices one by one, others in thousands and millions.
        shown: Whether there is a bar at all.
        delay: Seconds before it appears; shorter work shows none.
    """
    from tqdm.auto import tqdm

    scaled = unit not in ("tensor", "matrix")
    return tqdm(desc=what, total=total, unit=unit, unit_scale=scaled, leave=False, delay=delay, disable=not shown)
