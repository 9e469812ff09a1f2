"""Corpora whose tokens other programs wrote: checked against the tokenizer once, indexed, and read where they lie."""

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
"""Ids looked at at once: what the check takes of memory."""
_TRIED = 20_000
"""Ids, about, that are decoded and encoded again."""


def index(
    corpus: Pretokenized,
    sources: Sequence[Source],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    progress: bool,
) -> tuple[Array, Array, bool]:
    """Check all ids of a split, and find its documents.

    A document ends with the end-of-text token; of several in a row, with the last. Where the files hold none of these
    but the token that the tokenizer begins texts with, that one separates documents. Megatron's index says itself
    where documents end, and each has to end with such a token.

    Args:
        corpus: whose split it is.
        sources: of the split.
        split: "train" or "validation".
        tokenizer: the one that the files are said to be made with.
        vocabulary: its entries.
        progress: whether to show a bar.

    Returns:
        (d, 1) uint64, the tokens up to the end of each document of the split; (k, 2) uint64, [first, end) of each run
        of its tokens, counted through all sources; and whether the last document lacks its end-of-text token.

    Raises:
        UserError: an id is none of the tokenizer's, a document ends with another token than the end of text, or there
            is nothing to hold out.
    """
    parts = [(source, source.arrays()) for source in sources]
    arrays = [array for _, own in parts for array in own]
    n = sum(map(len, arrays))
    whole = Stretches(arrays, np.asarray([[0, n]]))
    what = f"checking {corpus.name} ({split})"
    with progress_bar(what, n, "tok", shown=progress) as bar:
        for source, own in parts:
            _check_range(corpus.name, source, own, tokenizer, vocabulary, bar.update)
    indexed = _indexed_ends(corpus.name, parts, tokenizer)
    separator, first = int(tokenizer.eos_token_id), tokenizer.bos_token_id
    ends = _marks(whole, separator) if indexed is None else indexed
    if not len(ends) and isinstance(first, int) and first != separator:
        ends, separator = _marks(whole, first), first
    _doubt(corpus.name, whole, ends, tokenizer)
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
        ids = np.asarray(arrays[0]) if len(arrays) == 1 else whole  # a plain view, of which slices cost little
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
    at = 0
    for array in arrays:
        for start in range(0, len(array), AT_A_TIME):
            chunk = array[start : start + AT_A_TIME]
            top, least = int(chunk.max()), int(chunk.min())
            if top >= vocabulary or least < 0:
                wrong = top if top >= vocabulary else least
                place = at + start + int(np.argmax(chunk == wrong))
                raise UserError(
                    f"corpus '{name}': '{source.path}' ({chunk.dtype.name}) holds token {wrong} at place {place:,}, "
                    f"and the ids of the tokenizer '{tokenizer.name_or_path}' are 0 to {vocabulary - 1:,}: it was made "
                    "with another tokenizer, which the recipe should name, or its ids have another dtype, for which "
                    f"there is corpora.{name}.dtype"
                )
            advance(len(chunk))
        at += len(array)


def _marks(whole: Stretches, separator: int) -> Array:
    """Return (d,) int64: the places behind each end-of-text token that no other follows."""
    found, at, pending = [], 0, False
    for piece in whole.pieces(AT_A_TIME):
        is_end = piece == separator
        last = np.flatnonzero(is_end[:-1] & ~is_end[1:]) + (at + 1)
        if pending and not is_end[0]:
            last = np.concatenate([[at], last])
        found.append(last.astype(np.int64))
        pending, at = bool(is_end[-1]), at + len(piece)
    return np.concatenate([*found, np.asarray([at] if pending else [], dtype=np.int64)])


def _indexed_ends(name: str, parts: Sequence[tuple[Source, list[Array]]], tokenizer: Any) -> Array | None:
    """Return where documents end by Megatron's indices, each with an end-of-text token; None where a file has none."""
    found, at = [], 0
    for source, arrays in parts:
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
            found.append(source.ends + at)
        at += sum(map(len, arrays))
    return np.concatenate(found) if len(found) == len(parts) else None


def _held_out(
    whole: Array | Stretches, ends: Array, separator: int, share: float, advance: Callable[[int], object]
) -> Array:
    """Return (d,) bool: whether a document is held out, by the hash of its ids without the end of text."""
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


def _doubt(name: str, whole: Array | Stretches, ends: Array, tokenizer: Any) -> None:
    """Say so where documents, decoded and encoded again, come back as other tokens: another tokenizer made them.

    A tokenizer that normalises text gives others too, which is why this is no fault.
    """
    limits = [*ends[: max(1, int(np.searchsorted(ends, _TRIED)))].tolist()] or [len(whole)]
    same = total = 0
    for begin, end in zip([0, *limits], limits, strict=False):
        ids = whole[begin : min(end, begin + _TRIED)]
        ids = ids[~np.isin(ids, tokenizer.all_special_ids)].tolist()
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        total += len(ids)
        same += next((n for n, pair in enumerate(zip(ids, again, strict=False)) if len({*pair}) > 1), len(ids))
    if first_rank() and same < total / 2:
        sys.stderr.write(
            f"fire-llm: corpus '{name}': of its first {total:,} tokens {same / total:.0%} come back when the tokenizer "
            f"'{tokenizer.name_or_path}' decodes and encodes them. Is it the one that made them?\n"
        )
