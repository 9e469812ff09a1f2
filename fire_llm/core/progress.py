"""The one look of a progress bar."""

from __future__ import annotations

from typing import Any


def progress_bar(what: str | None, total: int | None, unit: str, *, shown: bool = True, delay: float = 1.0) -> Any:
    """Return a bar of tqdm's that is gone once it is done.

    Args:
        what: Stands before it.
        total: Of all units; None where nobody knows.
        unit: What is counted; tensors and matrices one by one, others in thousands and millions.
        shown: Whether there is a bar at all.
        delay: Seconds before it shows; what is done by then needs none.
    """
    from tqdm.auto import tqdm

    scaled = unit not in ("tensor", "matrix")
    return tqdm(desc=what, total=total, unit=unit, unit_scale=scaled, leave=False, delay=delay, disable=not shown)
