"""Cut texts into windows that score each token once, and group windows into batches.

A text is read at positions: position k reads one token and predicts the next. W = windows, D = documents.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def windows(lengths: np.ndarray, context: int, stride: int, *, reach_back: bool = False) -> np.ndarray:
    """Return the windows over documents; each position is scored in the first window that holds it.

    Args:
        lengths: (D,) positions of each document.
        context: Most positions a window.
        stride: Positions between the starts of a document's windows, 1 to `context`.
        reach_back: Let a document's last window begin earlier, so that it is as long as the others (lm-eval's rolling
            windows); otherwise it is the rest (the loop of transformers' documentation).

    Returns:
        (W, 4) int64: document, first position, the one after the last, first scored position.
    """
    n = np.asarray(lengths, dtype=np.int64)
    count = np.where(n > 0, 1 + np.maximum(0, -(-(n - context) // stride)), 0)
    document = np.repeat(np.arange(len(n)), count)
    turn = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    end = np.minimum(turn * stride + context, n[document])
    start = turn * stride
    if reach_back:
        start = np.maximum(0, np.minimum(start, end - context))
    first = np.where(turn > 0, (turn - 1) * stride + context, 0)
    return np.stack([document, start, end, first], axis=1)


def batches(spans: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Yield the windows in batches of about equal cost, long ones first; none is shorter than half its batch's longest.

    Args:
        spans: (W, 4), of `windows`.
        tokens: Most positions a batch, padding included; a longer window goes alone.

    Returns:
        (B, 4) each.
    """
    length = spans[:, 2] - spans[:, 1]
    order = np.argsort(-length, kind="stable")
    falling = -length[order]
    start = 0
    while start < len(order):
        longest = -int(falling[start])
        similar = int(np.searchsorted(falling, -(longest // 2), side="right"))
        stop = min(start + max(1, tokens // longest), max(similar, start + 1))
        yield spans[order[start:stop]]
        start = stop
