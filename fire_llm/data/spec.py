"""What a corpus is: named documents in two splits, and the settings a recipe may give for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import pydantic

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.hashing import digest
from fire_llm.data.cache import file_state, refuse_changed, reporting
from fire_llm.data.formats import Pretokenized

Split = Literal["train", "validation"]
SPLITS: tuple[str, ...] = get_args(Split)
DocumentKind = Literal["line", "blank-line", "file", "heading"]
TokenDtype = Literal["uint16", "uint32"]
Files = str | list[str]


class CorpusSpec(pydantic.BaseModel, extra="forbid"):
    """Settings of one corpus in a recipe: `corpora: {name: {...}}`. All are optional for a known name."""

    files: Files | None = pydantic.Field(
        default=None,
        description="Local files: a path or glob, or a list of them, relative to data_root. "
        ".txt, .jsonl, .json (each also .gz or .zst) or .parquet; or already tokenised: .bin of nanoGPT, llm.c or "
        "Megatron-LM (with its .idx), or folders that datasets saved.",
    )
    validation: Files | None = pydantic.Field(
        default=None,
        description="Local files that hold the validation text; all of 'files' is then training text.",
    )
    text: str | None = pydantic.Field(
        default=None,
        min_length=1,
        description="Column that holds the text in .jsonl, .json, .parquet and Hub data ('text'), or the token ids in "
        "a saved data set ('input_ids').",
    )
    document: DocumentKind | None = pydantic.Field(
        default=None,
        description="What a document is in .txt files: 'blank-line' (default) ends one at every empty line, 'line' "
        "makes every line one, 'file' the whole file, 'heading' starts one at every WikiText title line ' = Title = '.",
    )
    holdout: float | None = pydantic.Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="Fraction of the documents held out for validation, chosen by a hash of their text. Default 0.05; "
        "0.01 for Hub data without a validation split of its own; 0.0005 for openwebtext.",
    )
    dtype: TokenDtype | None = pydantic.Field(
        default=None,
        description="Of the tokens in a .bin file without a header; 16 bits up to 65,536 vocabulary entries, else 32.",
    )
    dataset: str | None = pydantic.Field(default=None, description="Hub data set, 'user/dataset'.")
    streaming: bool | None = pydantic.Field(
        default=None,
        description="Read the Hub data set as a stream: its text is made into tokens as it comes and is never stored.",
    )
    config: str | None = pydantic.Field(default=None, description="Configuration (subset) of the Hub data set.")
    revision: str | None = pydantic.Field(
        default=None, description="Commit, tag or branch of the Hub data set; pin a commit to repeat a run exactly."
    )


class Part(NamedTuple):
    """How a corpus reads one of its files."""

    cut: tuple[str | None, str | None]
    """The kind of its documents, and the column of the text."""
    held_out: float
    """Share of its documents that is held out: 1 for a file of validation text."""


class TextParts(Protocol):
    """How a corpus is cut into parts, each of which this process or another one can read by itself."""

    def settings(self) -> CorpusSpec:
        """Return the settings by which another process resolves a corpus of the same name to the same text."""

    def plan(self, split: str) -> list[Any]:
        """Return the parts of a split, which depend only on the text; together they have all documents in order."""

    def read(self, split: str, part: Any) -> Iterator[str]:
        """Yield the documents of a part that belong to a split."""

    def files(self, part: Any) -> Iterable[Path]:
        """Return the local files of a part."""

    def cut(self, part: Any) -> list[Any]:
        """Return the limits of a part, as plain data that is the same wherever the files lie."""


@dataclass(frozen=True)
class Corpus:
    """A named source of documents in two splits.

    Attributes:
        name: the name in the recipe.
        identity: the fingerprint, or a function that computes it.
        read: opens a split again and yields its documents. Called by `documents`.
        approximate_bytes: about how many bytes of text there are, for progress bars; None if that is not known.
        files: local files, and how each is read.
        expected: the fingerprint that the text must have; by default the one it has.
        pretokenized: the files, if they hold tokens and no text.
        parts: how several processes can read it; None if only one can.
    """

    name: str
    identity: str | Callable[[], str] = field(repr=False)
    read: Callable[[str], Iterable[str]] = field(repr=False, compare=False)
    approximate_bytes: int | None = field(default=None, repr=False, compare=False)
    files: Mapping[Path, Part] = field(default_factory=dict, repr=False, compare=False)
    expected: str | None = field(default=None, repr=False)
    pretokenized: Pretokenized | None = field(default=None, repr=False)
    parts: TextParts | None = field(default=None, repr=False, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Return text that is another for other documents; on the first call local files are hashed for it."""
        return self.expected or self._current_fingerprint()

    def _current_fingerprint(self) -> str:
        return self.identity if isinstance(self.identity, str) else self.identity()

    @contextmanager
    def unchanged(self) -> Iterator[Mapping[Path, str]]:
        """Guard a block that reads documents: the text must have the fingerprint before and after it.

        Yields the state (`file_state`) of each file.

        Raises:
            UserError: before the block if the files have another fingerprint; after it if one was written to meanwhile.
        """
        what = f"corpus '{self.name}'"
        states = {}
        for path in self.files:
            with reporting(what, path):
                states[path] = file_state(path)
        if self._current_fingerprint() != self.fingerprint:
            raise UserError(
                f"{what}: its text has changed since this command began. Put it back, or give the command again: "
                "what was begun with the old text is then named."
            )
        yield states
        refuse_changed(what, states)

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of a split, always in the same order, without documents of white space alone.

        Args:
            split: "train" or "validation". No document is in both.

        Raises:
            UserError: for an unknown split, and for any fault of the files or the data set.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split '{split}'; allowed: {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")
        if self.pretokenized:
            raise UserError(
                f"corpus '{self.name}' is tokenised already: it holds no text. Name the tokenizer that it was made "
                "with, and train none on it"
            )
        return not_blank(self.read(split))

    def trains_on_held_out(self, other: Corpus) -> Path | None:
        """Return a file of which this corpus trains on documents that the other corpus holds out; None for none.

        Documents are held out by their hash, so that a larger share contains every smaller one.
        """
        for path, own in self.files.items():
            theirs = other.files.get(path)
            if theirs is None or theirs.held_out == 0 or own.held_out == 1:
                continue
            if own.held_out < theirs.held_out or own.cut != theirs.cut:
                return path
        return None


def not_blank(texts: Iterable[str]) -> Iterator[str]:
    """Leave out texts of white space alone."""
    return (text for text in texts if text and not text.isspace())


def held_out(text: str | bytes, holdout: float) -> bool:
    """Return whether a document belongs to validation: its text's 64-bit hash, as a fraction, is below `holdout`.

    The choice depends only on the text: not on order, files or other documents. Copies of a document are in one split.
    """
    return int(digest(text, 8), 16) / 2**64 < holdout


def setting(name: str, key: str, option: str = "") -> str:
    """Return how to set a setting of a corpus, for messages: in a recipe, and by an option of `fire-llm eval`."""
    return f"corpora.{name}.{key} in a recipe" + (f", {option} with eval" if option else "")


def in_split(text: str, split: str, holdout: float) -> bool:
    """Return whether a document belongs to a split of a corpus that holds out this share."""
    return held_out(text, holdout) == (split == "validation")
