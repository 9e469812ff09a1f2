"""Held-out text as one tokenizer gives it, and the one loop that scores such texts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fire_llm.core.errors import UserError
from fire_llm.core.ranks import first_rank
from fire_llm.data import TokenFile
from fire_llm.evaluation.perplexity import Perplexity, perplexity


@dataclass(frozen=True)
class EvaluationSet:
    """A held-out text of N tokens and D documents; its fields are arguments of `perplexity`, by their names."""

    tokens: Any
    """(N,) token ids."""
    n_bytes: Any = None
    """UTF-8 bytes of the text behind them: of the whole, or (D,) of each document."""
    prefix: int | None = None
    """Token read before the first, so that the first is scored too."""
    n_words: Any = None
    """Pieces between runs of white space, likewise."""
    documents: np.ndarray | None = None
    """(D,) where each ends in `tokens`; one document by default."""
    per_document: bool = False
    """Whether each document is read by itself, after `prefix`."""

    @classmethod
    def of(cls, file: TokenFile, prefix: int | None, per_document: bool = False) -> EvaluationSet:
        """Return the documents of a token file, each with the end-of-text token after it unless they are read alone.

        Of tokens without text neither bytes nor words are known.

        Read alone, a document of which the tokenizer makes no token has nothing to score: it is left out, and told.

        Raises:
            UserError: No document has a token.
        """
        ends = np.asarray(file.ends, dtype=np.int64)
        tokens, limits = np.asarray(file.tokens), ends[:, 0]
        sizes = np.diff(ends[:, 1:], axis=0, prepend=0)
        if per_document:
            closed = np.ones(len(limits), dtype=np.int64)
            closed[-1] -= file.open_end
            tokens = np.delete(tokens, limits[closed > 0] - 1)
            limits = limits - np.cumsum(closed)
            full = np.diff(limits, prepend=0) > 0
            if not full.any():
                raise UserError(
                    f"'{file.path.name}': the tokenizer makes no token of any document: is it the right one?"
                )
            if not full.all() and first_rank():
                said = f"{(~full).sum()} of {len(full)} documents of '{file.path.name}' have no token and are left out"
                sys.stderr.write(f"fire-llm: {said}\n")
            limits, sizes = limits[full], sizes[full]
        n_bytes, n_words = sizes.T if sizes.size else (None, None)
        return cls(tokens, n_bytes, prefix, n_words, limits, per_document)


def score(
    model: Any, texts: Mapping[str, EvaluationSet], *, progress: str | None = None, **how: Any
) -> dict[str, Perplexity]:
    """Measure a model's perplexity on texts; under torch.distributed ranks share the windows, and all return the same.

    Args:
        model: As in `perplexity`.
        texts: By name.
        progress: Title of the progress bars, before the name of a text; None for no bars.
        **how: `context`, `stride`, `batch_size`, `compiled` and `mixed`, as in `perplexity`.

    Raises:
        UserError: As in `perplexity`.
    """
    return {
        name: perplexity(model, **vars(text), progress=progress and f"{progress} {name}", share=True, **how)
        for name, text in texts.items()
    }
