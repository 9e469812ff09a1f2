"""How far a perplexity may be from that of all text like it: a bootstrap over documents.

Documents are drawn with replacement (multinomial counts), as many as there are, and every ratio of sums, such as
Σnll/Σtokens, is computed again from each draw. Shapes: D = documents, R = resamples.

Source: Efron & Tibshirani, An Introduction to the Bootstrap, chapters 6 and 10.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fire_llm.core.errors import UserError
from fire_llm.evaluation.scores import Scores

RESAMPLES = 1000
"""Number of draws; with 1000 of them a standard error is itself known to 2 %."""
SEED = 0
"""Seed of the draws: the same scores give the same errors."""
MOST_UNITS = 10_000
"""Most documents drawn singly. Beyond it random groups of documents are drawn, which saves a minute and adds 0.7 % to
the 2 %."""
BOOTSTRAP = {"resamples": RESAMPLES, "seed": SEED, "over": "documents"}
"""How standard errors were computed, as files of measurements record it."""
AT_A_TIME = 2**22
"""Documents drawn at a time; it bounds the memory, a few arrays with 8 bytes for each."""


@dataclass(frozen=True)
class Difference:
    """The difference between two checkpoints' NLL on the same documents."""

    mean: float
    """NLL(a) − NLL(b) of the whole text, nats a unit: negative if a is better."""
    se: float | None
    """Standard error of `mean`; None for fewer than two documents."""
    low: float | None
    high: float | None
    unit: str
    """token or byte."""
    level: float
    """Share of such intervals, low to high, that hold the true difference."""
    documents: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def standard_errors(scores: Scores, *, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, float | None]:
    """Return the standard error of every measure that `Scores` give.

    Args:
        scores: What each of D documents got.
        resamples: R, draws of D documents.
        seed: Seeds the draws.

    Returns:
        By name: nll (nats a token), perplexity, bits_per_byte, byte_perplexity, word_perplexity. None where the counts
        are not known, for an error beyond fp64, and for fewer than two documents with scored tokens: one says nothing
        about how documents differ, and its tokens depend on each other too much to stand for documents.
    """
    names = [name for name in ("tokens", "bytes", "words") if getattr(scores, name) is not None]
    scored = scores.tokens > 0
    errors: dict[str, float | None] = dict.fromkeys(
        ("nll", "perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
    )
    if scored.sum() < 2:
        return errors
    columns = [scores.nll[scored], *(getattr(scores, name)[scored] for name in names)]
    sums, units = _resampled(np.stack(columns, axis=1).astype(np.float64), resamples, seed)
    widen = _widening(units)
    for index, name in enumerate(names, 1):
        valid = sums[:, index] > 0  # a draw of nothing but empty documents has no ratio
        ratio = sums[valid, 0] / sums[valid, index]
        if len(ratio) < 2:
            continue
        mean, plain = float(columns[0].sum() / columns[index].sum()), widen * float(ratio.std(ddof=1))
        # Centred and cut before the exponential: a text of one word a page has word perplexities beyond fp64.
        spread = widen * float(np.exp(np.clip(ratio - mean, -300, 300)).std(ddof=1)) * math.exp(min(mean, 700.0))
        measure = {"tokens": "perplexity", "bytes": "byte_perplexity", "words": "word_perplexity"}[name]
        errors[measure] = spread if math.isfinite(spread) else None
        if name == "tokens":
            errors["nll"] = plain
        elif name == "bytes":
            errors["bits_per_byte"] = plain / math.log(2)
    return errors


def paired_difference(
    a: Scores,
    b: Scores,
    *,
    unit: str = "token",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Difference:
    """Return NLL(a) − NLL(b) with its interval, the same documents resampled together.

    What makes a document hard for both cancels, so that the interval is far narrower than the two standard errors
    suggest. It is mean ± t·se, with Student's t of D − 1 degrees of freedom.

    Args:
        a: Scores of D documents.
        b: Scores of the same documents, by another checkpoint.
        unit: token, where both were scored on the same tokens; byte compares tokenizers too.
        level: Share of intervals that hold the true difference, between 0 and 1.
        resamples: As in `standard_errors`.
        seed: As in `standard_errors`.

    Raises:
        UserError: The scores are of different documents, of tokens that differ, or without bytes; or an unknown unit
            or level.
    """
    if unit not in ("token", "byte"):
        raise UserError(f"unit '{unit}' is none: give token or byte")
    if not 0 < level < 1:
        raise UserError(f"level {level} must lie between 0 and 1: 0.95 for intervals of 95 %")
    if a.documents != b.documents:
        raise UserError(
            f"not the same text: {a.documents} documents and {b.documents}. Score both checkpoints on the same data"
        )
    if a.bytes is not None and b.bytes is not None and not np.array_equal(a.bytes, b.bytes):
        first = int(np.flatnonzero(a.bytes != b.bytes)[0])
        raise UserError(
            f"not the same text: document {first + 1} has {a.bytes[first]} bytes and {b.bytes[first]}. "
            "Score both checkpoints on the same data"
        )
    counts = a.tokens if unit == "token" else a.bytes if a.bytes is not None else b.bytes
    if unit == "token" and not np.array_equal(a.tokens, b.tokens):
        raise UserError(
            f"the checkpoints' tokens differ ({a.tokens.sum()} and {b.tokens.sum()}): nats per token of two "
            "tokenizers do not compare. Compare them per byte, with unit='byte'"
        )
    if counts is None or counts.sum() == 0:
        raise UserError(f"a difference per {unit} needs the text's {unit}s, which these scores do not have")
    columns = np.stack([a.nll - b.nll, counts], axis=1).astype(np.float64)
    mean = float(columns[:, 0].sum() / columns[:, 1].sum())
    scored = (a.tokens > 0) | (b.tokens > 0)
    if scored.sum() < 2:
        return Difference(mean, None, None, None, unit, level, a.documents)
    sums, units = _resampled(columns[scored], resamples, seed)
    valid = sums[:, 1] > 0
    error = _widening(units) * float((sums[valid, 0] / sums[valid, 1]).std(ddof=1))
    reach = student_t(level, int(scored.sum()) - 1) * error
    return Difference(mean, error, mean - reach, mean + reach, unit, level, a.documents)


def comparable_unit(a: Scores, b: Scores) -> str:
    """Return the unit of `paired_difference` for two scores: byte, or token if neither knows the bytes."""
    return "token" if a.bytes is None and b.bytes is None else "byte"


def _resampled(columns: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, int]:
    """Return the sums of each draw, and the number of units: documents, or groups of documents.

    Args:
        columns: (D, k) float64.
        resamples: R.
        seed: Seeds the draws.

    Returns:
        (R, k) float64, and D or `MOST_UNITS`.
    """
    rng = np.random.default_rng(seed)
    if len(columns) > MOST_UNITS:
        group = rng.permutation(len(columns)) % MOST_UNITS
        columns = np.stack([np.bincount(group, weights=c) for c in columns.T], axis=1)
    units = len(columns)
    sums = np.empty((resamples, columns.shape[1]))
    step = max(1, AT_A_TIME // units)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        sums[start : start + rows] = counts.astype(np.float64) @ columns
    return sums, units


def _widening(units: int) -> float:
    """Return √(n/(n−1)): draws from n units vary as if their spread had been divided by n, not n − 1."""
    return math.sqrt(units / (units - 1))


def student_t(level: float, freedom: int) -> float:
    """Return the t within ± which lies a share `level` of Student's distribution.

    With t = √ν·tan θ the density becomes cos^(ν−1) θ, smooth on a finite range, which a sum integrates to 8 digits.

    Args:
        level: Between 0 and 1.
        freedom: ν, at least 1.
    """
    theta = np.linspace(0, min(math.pi / 2, 12 / math.sqrt(freedom)), 20_001)
    density = np.cos(theta) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, below / below[-1], theta)))
