"""Corpora of tokens that other programs wrote: checked against the tokenizer once, indexed, and never copied."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fire_llm.core.errors import UserError
from fire_llm.core.progress import progress_bar
from fire_llm.core.ranks import first_rank
from fire_llm.data.formats import Pretokenized, Source, Stretches
from fire_llm.data.spec import held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = np.ndarray[Any, Any]

AT_A_TIME = 1 << 22
"""Ids checked at once; it bounds the memory of the check."""
_TRIED = 20_000
"""About how many ids are decoded and encoded again."""


def index(
    corpus: Pretokenized,
    sources: Sequence[Source],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    progress: bool,
) -> tuple[Array, Array, bool]:
    """Check all ids of a split, and find its documents.

    A document ends with the end-of-text token; of several in a row, with the last. If the files have no end-of-text
    token, the tokenizer's beginning-of-text token separates documents. Megatron's index has the ends of documents, and
    each of these must be an end-of-text token.

    Args:
        corpus: the corpus.
        sources: the files of the split.
        split: "train" or "validation".
        tokenizer: the tokenizer that made the files, as the recipe says.
        vocabulary: number of its entries.
        progress: whether to show a bar.

    Returns:
        (d, 1) uint64, the tokens up to the end of each document of the split; (k, 2) uint64, [first, end) of each run
        of its tokens, counted through all sources; and whether the last document lacks its end-of-text token.

    Raises:
        UserError: the tokenizer has no token for an id, a document of Megatron's index does not end with the
            end-of-text token, or there is nothing to hold out.
    """
    arrays_of = [(source, source.arrays()) for source in sources]
    arrays = [array for _, own in arrays_of for array in own]
    n = sum(map(len, arrays))
    whole = Stretches(arrays, np.asarray([[0, n]]))
    with progress_bar(f"checking {corpus.name} ({split})", n, "tok", shown=progress) as bar:
        for source, own in arrays_of:
            _check_range(corpus.name, source, own, tokenizer, vocabulary, bar.update)
    separator, begin_of_text = int(tokenizer.eos_token_id), tokenizer.bos_token_id
    indexed = _indexed_ends(corpus.name, arrays_of, tokenizer)
    ends = _ends_by_separator(whole, separator) if indexed is None else indexed
    if not len(ends) and isinstance(begin_of_text, int) and begin_of_text != separator:
        ends, separator = _ends_by_separator(whole, begin_of_text), begin_of_text
    _warn_of_another_tokenizer(corpus.name, whole, ends, tokenizer)
    open_end = not len(ends) or int(ends[-1]) < n
    if open_end:
        ends = np.concatenate([ends, [n]])
    share = corpus.documents_of(split)
    if share is None:
        return ends.astype(np.uint64)[:, None], np.asarray([[0, n]], dtype=np.uint64), open_end
    if len(ends) < 2:
        raise UserError(
            f"corpus '{corpus.name}': its {n:,} tokens are one document, for no end-of-text token "
            f"({tokenizer.eos_token_id}) stands between any, and documents are held out whole. Give "
            f"corpora.{corpus.name}.validation files in a recipe, or holdout: 0 where nothing is measured on it"
        )
    with progress_bar(f"dividing {corpus.name} ({split})", len(ends), "doc", shown=progress) as bar:
        ids = np.asarray(arrays[0]) if len(arrays) == 1 else whole  # slices of a plain view cost little
        chosen = _held_out(ids, ends, separator, share, bar.update) == (split == "validation")
    if not chosen.any():
        raise UserError(
            f"corpus '{corpus.name}': of its {len(ends):,} documents none is in the {split} split. Set "
            f"corpora.{corpus.name}.holdout to another share, or give corpora.{corpus.name}.validation files"
        )
    begins = np.concatenate([[0], ends[:-1]])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    spans = np.stack([begins[edges[::2]], ends[edges[1::2] - 1]], axis=1)
    lengths = (ends - begins)[chosen]
    return np.cumsum(lengths).astype(np.uint64)[:, None], spans.astype(np.uint64), bool(open_end and chosen[-1])


def _check_range(
    name: str,
    source: Source,
    arrays: Sequence[Array],
    tokenizer: Any,
    vocabulary: int,
    advance: Callable[[int], object],
) -> None:
    """Refuse an id that the tokenizer has no token for."""
    before = 0
    for array in arrays:
        for start in range(0, len(array), AT_A_TIME):
            chunk = array[start : start + AT_A_TIME]
            largest, smallest = int(chunk.max()), int(chunk.min())
            if largest >= vocabulary or smallest < 0:
                wrong = largest if largest >= vocabulary else smallest
                place = before + start + int(np.argmax(chunk == wrong))
                raise UserError(
                    f"corpus '{name}': '{source.path}' ({chunk.dtype.name}) holds token {wrong} at place {place:,}, "
                    f"and the ids of the tokenizer '{tokenizer.name_or_path}' are 0 to {vocabulary - 1:,}: it was made "
                    "with another tokenizer, which the recipe should name, or its ids have another dtype, for which "
                    f"there is corpora.{name}.dtype"
                )
            advance(len(chunk))
        before += len(array)


def _ends_by_separator(whole: Stretches, separator: int) -> Array:
    """Return (d,) int64: the places after each run of separators."""
    ends, start, pending = [], 0, False
    for piece in whole.pieces(AT_A_TIME):
        is_end = piece == separator
        last = np.flatnonzero(is_end[:-1] & ~is_end[1:]) + (start + 1)
        if pending and not is_end[0]:
            last = np.concatenate([[start], last])
        ends.append(last.astype(np.int64))
        pending, start = bool(is_end[-1]), start + len(piece)
    return np.concatenate([*ends, np.asarray([start] if pending else [], dtype=np.int64)])


def _indexed_ends(name: str, arrays_of: Sequence[tuple[Source, list[Array]]], tokenizer: Any) -> Array | None:
    """Return the ends of documents in Megatron's indices, counted through all sources; None if a file has no index."""
    ends, before = [], 0
    for source, arrays in arrays_of:
        if source.ends is not None:
            last = arrays[0][source.ends - 1]
            wrong = np.flatnonzero(last != tokenizer.eos_token_id)
            if len(wrong):
                raise UserError(
                    f"corpus '{name}': {len(wrong):,} of the {len(last):,} documents of '{source.path}' do not end "
                    f"with the end-of-text token of the tokenizer '{tokenizer.name_or_path}', "
                    f"{tokenizer.eos_token_id}; number {int(wrong[0]) + 1} ends with {int(last[wrong[0]])}. Make it "
                    "with --append-eod, and with that tokenizer"
                )
            ends.append(source.ends + before)
        before += sum(map(len, arrays))
    return np.concatenate(ends) if len(ends) == len(arrays_of) else None


def _held_out(
    whole: Array | Stretches, ends: Array, separator: int, share: float, advance: Callable[[int], object]
) -> Array:
    """Return (d,) bool: whether each document is held out, by the hash of its ids without the separators."""
    chosen, start = np.zeros(len(ends), dtype=bool), 0
    for number, end in enumerate(ends.tolist()):
        ids = whole[start:end]
        while len(ids) and ids[-1] == separator:
            ids = ids[:-1]
        chosen[number] = held_out(ids.astype("<u4").tobytes(), share)
        start = end
        if number % 1024 == 1023:
            advance(1024)
    return chosen


def _warn_of_another_tokenizer(name: str, whole: Stretches, ends: Array, tokenizer: Any) -> None:
    """Warn if the first documents, decoded and encoded again, give other tokens.

    Then another tokenizer made them, or this one normalises text: so this is no error.
    """
    tried = [*ends[: max(1, int(np.searchsorted(ends, _TRIED)))].tolist()] or [len(whole)]
    same = total = 0
    for begin, end in zip([0, *tried], tried, strict=False):
        ids = whole[begin : min(end, begin + _TRIED)]
        ids = ids[~np.isin(ids, tokenizer.all_special_ids)].tolist()
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        total += len(ids)
        same += next((n for n, pair in enumerate(zip(ids, encoded, strict=False)) if len({*pair}) > 1), len(ids))
    if first_rank() and same < total / 2:
        sys.stderr.write(
            f"fire-llm: corpus '{name}': of its first {total:,} tokens {same / total:.0%} come back when the tokenizer "
            f"'{tokenizer.name_or_path}' decodes and encodes them. Is it the one that made them?\n"
        )
