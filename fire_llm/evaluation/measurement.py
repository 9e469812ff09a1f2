"""How a perplexity is measured: which token is read first, in which precision, and how a table says so.

It is decided here once for a run's own evaluations, `fire-llm eval RUN_DIR` and `fire-llm eval CHECKPOINT`, so that
one checkpoint has one perplexity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fire_llm.core.errors import UserError

PREFIXES = ("auto", "bos", "eos", "none")
"""Choices of the token that is read before a text."""

PRECISIONS = ("fp32", "training")
"""Choices of a run's measuring precision: fp32, or the precision that it trains in."""

WORDS = "pieces between runs of white space"
"""What counts as a word."""


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `UserError` if an option's value is not allowed."""
    if value not in allowed:
        raise UserError(f"--{option} {value}: it must be one of {', '.join(allowed)}")


def first_token(tokenizer: Any, wanted: str = "auto", name: str | None = None) -> int | None:
    """Return the token that is read before a text, so that the text's first token is scored too.

    Args:
        tokenizer: Of transformers.
        wanted: One of `PREFIXES`. `auto` is the beginning-of-text token where the tokenizer has one and the end-of-text
            token otherwise, which is what lm-eval reads.
        name: Of the checkpoint, for the message.

    Returns:
        A token id, or None for `none`.

    Raises:
        UserError: The tokenizer has no such token.
    """
    if wanted == "none":
        return None
    kinds = ("bos", "eos") if wanted == "auto" else (wanted,)
    tokens = [token for kind in kinds if (token := getattr(tokenizer, f"{kind}_token_id")) is not None]
    if not tokens:
        of = f" of '{name}'" if name else ""
        others = ", ".join(prefix for prefix in PREFIXES if prefix != wanted)
        raise UserError(f"--prefix {wanted}: the tokenizer{of} has no such token. Give another: {others}")
    return int(tokens[0])


def token_text(tokenizer: Any, token: int | None) -> str | None:
    """Return a token as its tokenizer writes it: `<|endoftext|>` for 50256."""
    return None if token is None else str(tokenizer.convert_ids_to_tokens(token))


def described(row: Mapping[str, Any]) -> str:
    """Return how a perplexity was measured, for the line below its table.

    Args:
        row: `precision`, `context`, `stride`, `prefix` and `per_document` as in `Perplexity`; `prefix_text` if the
            token's text is known.

    Returns:
        For example `in fp32, context 128, stride 128, windows run across documents, after <|endoftext|>`.
    """
    if row["prefix"] is None:
        first = "the first token not scored"
    else:
        first = f"after {row.get('prefix_text') or 'token ' + str(row['prefix'])}"
    documents = "each document by itself" if row["per_document"] else "windows run across documents"
    # The precision of likelihoods that something else measured is not known.
    precision = f"in {row['precision']}, " if row.get("precision") else ""
    return f"{precision}context {row['context']}, stride {row['stride']}, {documents}, {first}"


def all_described(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return each way in which rows were measured, once; if there are several, with the checkpoints before it.

    Args:
        rows: As in `described`, with `checkpoint`.
    """
    return each_once((row["checkpoint"], described(row)) for row in rows)


def each_once(statements: Iterable[tuple[str, str]]) -> list[str]:
    """Return each statement once: alone if it holds for all names, else after the names for which it holds.

    Args:
        statements: (name, statement about it) pairs.
    """
    names: dict[str, dict[str, None]] = {}
    for name, statement in statements:
        names.setdefault(statement, {})[name] = None
    return [text if len(names) == 1 else f"{', '.join(holders)}: {text}" for text, holders in names.items()]
