"""What each document of a text got: the sums from which every perplexity and its uncertainty follow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """Hold what each of D documents got, in the order of the text.

    Args:
        nll: (D,) float64, Σ of negative log-likelihoods over the document's scored tokens, nats.
        tokens: (D,) int64, tokens scored.
        bytes: (D,) int64 UTF-8 bytes, or None where the text is not known.
        words: (D,) int64, pieces between runs of white space, `len(re.split(r"\\s+", text))`; or None.

    Raises:
        ValueError: A count has another shape than `nll`.
    """

    nll: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray | None = None
    words: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Take lists as well as arrays, and refuse counts that are not one per document."""
        object.__setattr__(self, "nll", np.asarray(self.nll, dtype=np.float64))
        for name in ("tokens", "bytes", "words"):
            counts = getattr(self, name)
            if counts is not None:
                object.__setattr__(self, name, np.asarray(counts, dtype=np.int64))
                if getattr(self, name).shape != self.nll.shape:
                    shape, right = getattr(self, name).shape, self.nll.shape
                    raise ValueError(f"{name} has the shape {shape}, but there are {right} documents' nll")

    @property
    def documents(self) -> int:
        """Return D."""
        return len(self.nll)
