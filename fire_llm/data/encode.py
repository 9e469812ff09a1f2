"""Encode documents with any Hugging Face tokenizer, in parallel where it is a fast one, however long they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fire_llm.core.errors import reading
from fire_llm.core.hashing import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_BYTES = 4_000_000
"""Bytes of text encoded at once: enough to occupy every core, and little memory."""
WINDOW = 1 << 19
"""Characters of a window. A longer document is encoded in overlapping windows, because encoding takes about a hundred
bytes of memory for each token."""
OVERLAP = 1 << 12
"""Characters that neighbouring windows share."""
AGREEMENT = 16
"""Tokens on either side of a seam that must be the same in both windows."""


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest token id there can be, plus one; ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


class Encoder:
    """A private copy of a tokenizer that neither truncates, pads nor adds special tokens.

    Attributes:
        identity: hash of everything the encoding depends on.
        vocab_size: see `vocabulary_size`.
        is_fast: whether the tokenizer is one of the library tokenizers, and not Python code.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocab_size = vocabulary_size(tokenizer)
        self.is_fast = bool(getattr(tokenizer, "is_fast", False))
        self._failed = f"the tokenizer '{tokenizer.name_or_path}' fails on a document"
        self._split_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        self._tokenizer: Any = tokenizer
        if self.is_fast:
            from tokenizers import Tokenizer

            # A copy: the caller may set its own tokenizer to truncate or pad, even while this encoder is at work.
            self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = self._split_special_tokens
            description = f"{self._tokenizer.to_str()} {self._split_special_tokens}"
        else:
            settings = {key: str(value) for key, value in getattr(tokenizer, "init_kwargs", {}).items()}
            description = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), settings], sort_keys=True)
        self.identity = digest(description, 16)

    def state(self) -> dict[str, Any]:
        """Return the encoder of a fast tokenizer as plain data, for `restored`."""
        return {**vars(self), "_tokenizer": self._tokenizer.to_str()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Encoder:
        """Return the encoder that has this state."""
        from tokenizers import Tokenizer

        encoder = cls.__new__(cls)
        vars(encoder).update(state, _tokenizer=Tokenizer.from_str(state["_tokenizer"]))
        encoder._tokenizer.encode_special_tokens = encoder._split_special_tokens
        return encoder

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, as `tokenizer(text, add_special_tokens=False)` gives them.

        Raises:
            UserError: The tokenizer fails; its files are damaged or of another one.
        """
        with reading(self._failed):
            if not self.is_fast:
                encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
                return [np.asarray(ids, dtype=np.uint32) for ids in encoded]
            if len(texts) == 1 and len(texts[0]) > WINDOW:
                return [self._encode_long(texts[0])]
            return [_ids(encoding) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_long(self, text: str) -> np.ndarray:
        """Return the ids of a long text from overlapping windows, joined where neighbours agree.

        A window's first and last tokens may differ from those of the whole text. Tokens in the middle of an overlap do
        not, because a tokenizer looks only a few words ahead and back. If two windows agree nowhere (text without a
        single boundary), the whole text is encoded at once.
        """
        starts = range(0, max(1, len(text) - OVERLAP), WINDOW - OVERLAP)
        done: list[np.ndarray] = []
        previous: tuple[np.ndarray, np.ndarray] | None = None
        group = max(1, BATCH_BYTES // WINDOW)
        for first in range(0, len(starts), group):
            chosen = starts[first : first + group]
            windows = self._tokenizer.encode_batch([text[s : s + WINDOW] for s in chosen], add_special_tokens=False)
            for start, encoding in zip(chosen, windows, strict=True):
                ids = _ids(encoding)
                spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start
                if previous is not None:
                    seam = _seam(*previous, ids, spans, start + OVERLAP // 2)
                    if seam is None:
                        return _ids(self._tokenizer.encode(text, add_special_tokens=False))
                    done.append(previous[0][: seam[0]])
                    ids, spans = ids[seam[1] :], spans[seam[1] :]
                previous = ids, spans
        assert previous is not None
        return np.concatenate([*done, previous[0]])


def _ids(encoding: Any) -> np.ndarray:
    return np.asarray(encoding.ids, dtype=np.uint32)


def _seam(
    left: np.ndarray, left_spans: np.ndarray, right: np.ndarray, right_spans: np.ndarray, middle: int
) -> tuple[int, int] | None:
    """Return (i, j) such that left[:i] and right[j:] are the ids of the joined text, or None.

    Args:
        left: ids of a window.
        left_spans: (n, 2), each token's first character and the one after its last, in the whole text.
        right: ids of the next window.
        right_spans: (n, 2), likewise.
        middle: character near which to look.
    """
    centre = int(np.searchsorted(left_spans[:, 0], middle))
    for i in sorted(
        range(max(AGREEMENT, centre - 256), min(len(left) - AGREEMENT, centre + 256)), key=lambda i: abs(i - centre)
    ):
        boundary = left_spans[i, 0]
        j = int(np.searchsorted(right_spans[:, 0], boundary))
        if (
            AGREEMENT <= j <= len(right) - AGREEMENT
            and right_spans[j, 0] == boundary
            # The tokens of one character share its span: no seam may lie between them.
            and left_spans[i - 1, 1] <= boundary
            and right_spans[j - 1, 1] <= boundary
            and np.array_equal(left[i - AGREEMENT : i + AGREEMENT], right[j - AGREEMENT : j + AGREEMENT])
        ):
            return i, j
    return None


def batches(documents: Iterable[str]) -> Iterator[tuple[list[str], list[int]]]:
    """Yield (documents, bytes of each) in batches of about `BATCH_BYTES`; a text longer than `WINDOW` comes alone."""
    batch: list[str] = []
    sizes: list[int] = []
    total = 0
    for text in documents:
        size = len(text.encode())
        if batch and (total + size > BATCH_BYTES or len(text) > WINDOW or len(batch[-1]) > WINDOW):
            yield batch, sizes
            batch, sizes, total = [], [], 0
        batch.append(text)
        sizes.append(size)
        total += size
    if batch:
        yield batch, sizes
