"""The scores of each document of a text, from which every perplexity and its uncertainty are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """The scores of D documents, in the order of the text.

    Args:
        nll: (D,) float64, Σ of negative log-likelihoods over the document's scored tokens, nats.
        tokens: (D,) int64, tokens scored.
        bytes: (D,) int64 UTF-8 bytes, or None where the text is not known.
        words: (D,) int64, parts between runs of white space, `count_words`; or None.

    Raises:
        ValueError: A count has another shape than `nll`.
    """

    nll: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray | None = None
    words: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Take lists as well as arrays, and refuse counts that are not one per document."""
        for name, dtype in (("nll", np.float64), ("tokens", np.int64), ("bytes", np.int64), ("words", np.int64)):
            if getattr(self, name) is not None:
                values = np.asarray(getattr(self, name), dtype=dtype)
                object.__setattr__(self, name, values)
                if values.shape != self.nll.shape:
                    raise ValueError(
                        f"{name} has the shape {values.shape}, but there are {self.nll.shape} documents' nll"
                    )

    @property
    def documents(self) -> int:
        """Return D."""
        return len(self.nll)


class DocumentSums:
    """Add up a text's negative log-likelihoods by document, on the host, in the order in which they are given.

    Atomic sums on a GPU would give other last digits every time. A GPU's results are added one batch later, so that it
    computes a batch while the host waits for the previous one.

    Args:
        ends: (D,) where each document ends in the text.
        device: Where the likelihoods are computed.
    """

    finite = True
    """Whether all numbers added so far are finite."""

    def __init__(self, ends: np.ndarray, device: torch.device) -> None:
        self.ends, self.totals = ends, np.zeros(len(ends))
        self._behind = int(device.type == "cuda")
        self._pending: deque[tuple[np.ndarray, Callable[[], np.ndarray]]] = deque()

    def add(self, at: np.ndarray, nll: Tensor) -> None:
        """Take (S,) fp64 likelihoods, nats, of the tokens at (S,) places in the text."""
        self._pending.append((np.searchsorted(self.ends, at, side="right"), _to_host(nll)))
        self._add_up(self._behind)

    def finish(self) -> np.ndarray:
        """Return the sums (D,) over all batches."""
        self._add_up(0)
        return self.totals

    def _add_up(self, most_pending: int) -> None:
        while len(self._pending) > most_pending:
            documents, fetch = self._pending.popleft()
            nll = fetch()
            np.add.at(self.totals, documents, nll)
            self.finite &= bool(np.isfinite(nll).all())


def _to_host(nll: Tensor) -> Callable[[], np.ndarray]:
    """Begin a copy to the host; return a function that waits for this copy alone and gives it."""
    if nll.device.type != "cuda":
        return nll.cpu().numpy
    host = torch.empty(nll.shape, dtype=nll.dtype, pin_memory=True)
    host.copy_(nll, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(nll.device))

    def fetch() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return fetch
