"""Tell from the weights alone where FIRE leaves norms so far from what they were that a model loses what it learned.

Five steps give a matrix a norm that depends on its shape, whatever it was before. Trained weights of a wide model may
be an order of magnitude larger: its norms then fall that far at once, and a tied head repeats the input.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fire_llm.resets.report import ResetReport, TensorReport
from fire_llm.resets.selection import layers_of
from fire_llm.resets.spec import ResetSpec

LEAST, MOST = 0.5, 1.5
"""Bounds of the factor by which the norm of all touched matrices together may change without a word."""

_DRAWN = (0.4, 2.0)
"""Bounds of the root mean square of newly drawn weights over the config's; GPT-2 draws some of its matrices smaller."""


def sets_norms(specs: Sequence[ResetSpec]) -> bool:
    """Return whether resets give matrices the norms of Newton–Schulz steps, and nothing else sets them."""
    return bool(specs) and all(s.method in ("fire", "rescale") and s.options["scale"] != "keep-norm" for s in specs)


def norm_warning(specs: Sequence[ResetSpec], touched: Sequence[TensorReport]) -> str | None:
    """Return the warning about a norm that resets change by more than half; None where they do not.

    Args:
        specs: The resets.
        touched: What they touched, or a sample of it, measured before and after.
    """
    rows = [row for row in touched if row.norm_before and row.norm_after is not None]
    if not rows or not sets_norms(specs) or LEAST <= (factor := _factor(rows)) <= MOST:
        return None
    layers: dict[int | None, list[TensorReport]] = defaultdict(list)
    for row in rows:
        layers[next(iter(layers_of(row.role, row.parameter)), None)].append(row)
    factors = {layer: _factor(members) for layer, members in layers.items()}
    worst = max(factors, key=lambda layer: abs(math.log(max(factors[layer], 1e-30))))
    where = f"{'outside of layers' if worst is None else f'in layer {worst}'}, where it {_times(factors[worst])}"
    return (
        f"{specs[0].method}: the norm of all {len(rows)} matrices together {_times(factor)}, most {where}. Trained "
        "weights then lose what they had learned; scale: keep-norm (on the command line, --scale keep-norm) keeps norms"
    )


def newly_drawn(config: Any, report: ResetReport) -> bool:
    """Return whether weights look as their initialisation drew them, or a little trained: there is little to lose then.

    Their entries are as large as the config says. Where norms fall, as in wide models, whose trained weights may be no
    larger, their spectra are those of noise too: of the squared singular values of a Gaussian (m, n), n ≤ m, the mean
    square is 1 + n/m times the squared mean.
    """
    rows = [row for row in report.touched if row.norm_before and row.dfi_before is not None]
    if not rows:
        return False
    size = math.sqrt(sum((row.norm_before or 0) ** 2 for row in rows) / sum(math.prod(row.shape) for row in rows))
    spread = [_spread(row) / (1 + min(row.shape) / max(row.shape)) for row in rows]
    drawn = size / (getattr(config, "initializer_range", None) or 0.02)
    return _DRAWN[0] < drawn < _DRAWN[1] and (_factor(rows) > 1 or sum(spread) / len(spread) < 1.1)


def _spread(row: TensorReport) -> float:
    """Return the mean square of the squared singular values over their squared mean."""
    n, total = min(row.shape), (row.norm_before or 0) ** 2
    return n * ((row.dfi_before or 0) + 2 * total - n) / total**2


def _factor(rows: Sequence[TensorReport]) -> float:
    before, after = (math.sqrt(sum((getattr(r, key) or 0) ** 2 for r in rows)) for key in ("norm_before", "norm_after"))
    return after / before


def _times(factor: float) -> str:
    return f"falls {1 / factor:.3g}-fold" if 0 < factor < 1 else f"grows {factor:.3g}-fold" if factor else "falls to 0"
