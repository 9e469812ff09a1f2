"""Train a byte-level BPE tokenizer on the corpora of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fire_llm.core.errors import UserError
from fire_llm.data.corpora import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 20_000_000
"""Bytes of UTF-8 text from the start of each corpus's train split, from which the merges are learnt."""
MIN_VOCABULARY = 257
"""Least entries: one token for each byte, so that any text can be encoded, and the end of text."""


def train_tokenizer(corpora: Sequence[Corpus], vocab_size: int, *, progress: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learnt from the train splits; the same corpora give the same tokenizer.

    Text is split as GPT-2 does, no space is put before it, and every string decodes to itself. END_OF_TEXT is its
    beginning, end and padding token.

    Args:
        corpora: each contributes up to `SAMPLE_BYTES` bytes.
        vocab_size: entries at most, END_OF_TEXT included; fewer where the text does not yield as many.
        progress: whether to show progress bars.

    Raises:
        UserError: for a vocabulary below 257 entries, or corpora without any text or whose text changes meanwhile.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCABULARY:
        raise UserError(
            f"vocab_size is {vocab_size}; a byte-level vocabulary has at least {MIN_VOCABULARY} entries: 256 bytes and "
            f"{END_OF_TEXT}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    with ExitStack() as unchanged:
        for corpus in corpora:
            unchanged.enter_context(corpus.unchanged())
        tokenizer.train_from_iterator(_sample(corpora), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _sample(corpora: Sequence[Corpus]) -> Iterator[str]:
    """Yield the first `SAMPLE_BYTES` bytes of each corpus's documents; the last document is cut.

    Raises:
        UserError: for a corpus without training text, or no corpus.
    """
    if not corpora:
        raise UserError("a tokenizer needs at least one corpus to learn from.")
    for corpus in corpora:
        remaining = SAMPLE_BYTES
        for text in corpus.documents("train"):
            if remaining <= 0:
                break
            data = text.encode()
            yield text if len(data) <= remaining else data[:remaining].decode(errors="ignore")
            remaining -= len(data)
        if remaining == SAMPLE_BYTES:
            raise UserError(f"corpus '{corpus.name}' has no training text to learn a tokenizer from.")
