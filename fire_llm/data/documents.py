"""The positions of tokens within their documents, for blocks of a token file."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np

from fire_llm.data.tokens import TokenFile


class Boundaries:
    """Positions within documents for any stretch of a token file; pickled without tokens, as the file is.

    The end-of-text token before a document has position 0 in it, because it predicts the document's first token. So
    every label is predicted only from its own document, as `perplexity(per_document=True)` does with the end-of-text
    token as prefix. A document that began before the stretch starts again at 0.

    Args:
        source: The token file.
    """

    def __init__(self, source: TokenFile) -> None:
        self._source = source
        # A plain view of the map: nothing is read yet, and an access costs a tenth of an access to a memmap.
        self._ends = np.asarray(source.ends)

    def __reduce__(self) -> tuple[Any, ...]:
        return Boundaries, (self._source,)

    def positions(self, start: int, length: int) -> np.ndarray:
        """Return (length,) int64: the position of each token of [start, start + length) in its document.

        Args:
            start: First token of the stretch, counted in the file.
            length: Tokens of the stretch.
        """
        # If a document ends before token e, the next one begins with the end-of-text token e − 1.
        first = self._first_end(start + 2, 0, len(self._ends))
        last = self._first_end(start + length + 1, first, min(len(self._ends), first + length))
        begins = self._ends[first:last, 0].astype(np.int64) - (start + 1)
        begin_of = np.zeros(length, dtype=np.int64)
        begin_of[begins] = begins
        return np.arange(length, dtype=np.int64) - np.maximum.accumulate(begin_of)

    def _first_end(self, token: int, low: int, high: int) -> int:
        """Return the number of the first document that ends at `token` or beyond."""
        return bisect_left(range(len(self._ends)), token, low, high, key=lambda n: int(self._ends[n, 0]))
