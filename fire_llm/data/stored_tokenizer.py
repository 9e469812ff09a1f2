"""Tokenizers that cut text as the `tokenizer.json` beside them says."""

from __future__ import annotations

import functools
import sys
from itertools import product
from pathlib import Path
from typing import Any

from fire_llm.core.compat import installed
from fire_llm.core.errors import UserError
from fire_llm.core.ranks import first_rank

FILE = "tokenizer.json"

# Kinds of text that ways to cut it treat apart: every three of the first ones in a row are tried, and every two of all.
COMMON = (" ", "  ", "\t", "\n", "\n\n", "the", "Word", "1", "2026", "e\u0301", "日本", "'s", ".", "...", "_")
RARE = (
    *("   ", "\r\n", "\u00a0", "UP", "42", "x1", "\u00e9", "ß", "и", "ह", "ال", "Ａ", "🙂", "'LL", "’t"),
    *(",", "!?", "__", "-", "/", "(", "$", "#", "{}", "<|"),
)
SPECIAL = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TOKENS = 4000
"""Most of a vocabulary's tokens whose own text is tried too."""


def as_stored(tokenizer: Any, place: str) -> Any:
    """Return a tokenizer that cuts text as its `tokenizer.json` does: the given one, or one made of that file alone.

    transformers 5 takes from that file only the vocabulary and the merges where a class of its own is named, and cuts
    text as the class does. Example: a byte-level tokenizer of Llama 3's kind that calls itself GPT2Tokenizer. The ids
    are then not those that the model was trained on.

    Args:
        tokenizer: Loaded by `AutoTokenizer`.
        place: The folder or Hub id that it was loaded from.

    Raises:
        UserError: transformers cannot be made to do as the file says.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = _stored(place)
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if file is None or not isinstance(inner, Tokenizer) or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    if "fast_tokenizer_files" in getattr(tokenizer, "init_kwargs", {}):  # a file for each version of transformers
        return tokenizer
    stored = Tokenizer.from_file(str(file))
    if getattr(stored.model, "dropout", None):  # ids are drawn
        return tokenizer
    # BERT's classes take lower case and accents from tokenizer_config.json, as transformers always did.
    if type(stored.normalizer).__name__ == "BertNormalizer" or same(inner, stored):
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(place)
    version, kind = installed("transformers"), type(tokenizer).__name__
    said = f"tokenizer: transformers {version} makes a {kind} of '{place}', which cuts text otherwise than its {FILE}"
    if not same(plain.backend_tokenizer, stored):
        raise UserError(f"{said}: save the tokenizer again, as it was trained")
    _report(f"{said}; {FILE} is what counts\n")
    plain.padding_side, plain.truncation_side = tokenizer.padding_side, tokenizer.truncation_side
    for name in SPECIAL:  # those that the class has by default, where the settings name none
        token = getattr(tokenizer, name, None)
        if getattr(plain, name, None) is None and token is not None and token in plain.get_vocab():
            setattr(plain, name, token)
    return plain


def same(one: Any, other: Any) -> bool:
    """Return whether two tokenizers give the same ids, whatever they cut off, pad or put at the beginning of a text."""
    texts = ["".join(few) for few in (*product(COMMON, repeat=3), *product(COMMON + RARE, repeat=2))]
    every = max(1, other.get_vocab_size() // TOKENS)
    texts += [other.decode([token]) for token in range(0, other.get_vocab_size(), every)]
    if "ByteLevel" in str(other.pre_tokenizer):  # byte-level classes take a space before a text from their settings
        texts = [" " + text for text in texts]
    one, other = _unlimited(one), _unlimited(other)
    # One by one: tokenizers' threads, which batches start, would not survive a fork.
    return all(
        one.encode(text, add_special_tokens=False).ids == other.encode(text, add_special_tokens=False).ids
        for text in texts
    )


def _stored(place: str) -> Path | None:
    """Return the file of a folder, or of a Hub id that was loaded just now; None where there is none."""
    folder = Path(place)
    if folder.is_dir():
        return folder / FILE if (folder / FILE).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place, FILE)
    return Path(found) if isinstance(found, str) else None


def _unlimited(tokenizer: Any) -> Any:
    """Return a tokenizer that neither cuts off nor pads: itself, or a copy."""
    if tokenizer.truncation or tokenizer.padding:
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


@functools.cache
def _report(line: str) -> None:
    """Write a line to stderr, once a process."""
    if first_rank():
        sys.stderr.write(line)
