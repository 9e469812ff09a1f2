"""Where documents begin inside blocks of tokens, as positions that start again at each of them."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np

from fire_llm.data.tokens import TokenFile


class Boundaries:
    """Positions within documents for any stretch of a token file; pickles as that file does.

    The end-of-text token that stands before a document opens it, at position 0: it is what predicts the document's
    first token. Every label is then predicted from its own document alone, as `perplexity(per_document=True)` does
    with the end-of-text token as prefix. A document that runs on from the stretch before begins again at 0.

    Args:
        source: The token file.
    """

    def __init__(self, source: TokenFile) -> None:
        self._source = source
        # A plain view of the map: nothing is read until it is looked at, and a look costs a tenth of a memmap's.
        self._ends = np.asarray(source.ends)

    def __reduce__(self) -> tuple[Any, ...]:
        return Boundaries, (self._source,)

    def positions(self, start: int, length: int) -> np.ndarray:
        """Return (length,) int64: for each token of [start, start + length) its place in its document, there.

        Args:
            start: First token of the stretch, counted in the file.
            length: Tokens of the stretch.
        """
        # The document after the one that ends before token e is opened by token e − 1. At `start` all begin anyway.
        first = self._first_end(start + 2, 0, len(self._ends))
        last = self._first_end(start + length + 1, first, min(len(self._ends), first + length))
        opened = self._ends[first:last, 0].astype(np.int64) - (start + 1)
        places = np.arange(length, dtype=np.int64)
        begun = np.zeros(length, dtype=np.int64)
        begun[opened] = opened
        return places - np.maximum.accumulate(begun)

    def _first_end(self, token: int, low: int, high: int) -> int:
        """Return the number of the first document that ends at `token` or beyond."""
        return bisect_left(range(len(self._ends)), token, low, high, key=lambda n: int(self._ends[n, 0]))
