"""Held-out texts as tokens of one tokenizer, and the one loop that scores them."""

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
    """UTF-8 bytes of the text: of the whole, or (D,) of each document."""
    prefix: int | None = None
    """Token read before the first one, so that the first is scored too."""
    n_words: Any = None
    """Pieces between runs of white space: of the whole, or (D,) of each document."""
    documents: np.ndarray | None = None
    """(D,) where each document ends in `tokens`; one document by default."""
    per_document: bool = False
    """Whether each document is read by itself, after `prefix`."""

    @classmethod
    def of(cls, file: TokenFile, prefix: int | None, per_document: bool = False) -> EvaluationSet:
        """Return the documents of a token file.

        If each document is read by itself, its end-of-text token is dropped, and documents without any other token are
        left out, and a line on stderr reports it. Bytes and words are not known of tokens without text.

        Raises:
            UserError: No document has a token.
        """
        sums = np.asarray(file.ends, dtype=np.int64)
        tokens, ends = np.asarray(file.tokens), sums[:, 0]
        sizes = np.diff(sums[:, 1:], axis=0, prepend=0)
        if per_document:
            has_separator = np.ones(len(ends), dtype=np.int64)
            has_separator[-1] -= file.open_end
            tokens = np.delete(tokens, ends[has_separator > 0] - 1)
            ends = ends - np.cumsum(has_separator)
            full = np.diff(ends, prepend=0) > 0
            name = file.path.name
            if not full.any():
                raise UserError(f"'{name}': the tokenizer makes no token of any document: is it the right one?")
            if not full.all() and first_rank():
                left_out = f"{(~full).sum()} of {len(full)} documents of '{name}' have no token and are left out"
                sys.stderr.write(f"fire-llm: {left_out}\n")
            ends, sizes = ends[full], sizes[full]
        n_bytes, n_words = sizes.T if sizes.size else (None, None)
        return cls(tokens, n_bytes, prefix, n_words, ends, per_document)


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
