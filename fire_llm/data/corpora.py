"""Corpora by name: known corpora, local files, Hub data sets and offline corpora.

To add a corpus, add an entry to `CORPORA`: a summary and the place of its text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.data import builtin
from fire_llm.data.builtin import Builtin
from fire_llm.data.files import ALLOWED, DEFAULT_HOLDOUT, file_corpus, file_kind
from fire_llm.data.formats import holds_ids
from fire_llm.data.hub import hub_corpus
from fire_llm.data.spec import SPLITS, Corpus, CorpusSpec, held_out, in_split

__all__ = ["CORPORA", "SPLITS", "Corpus", "CorpusSpec", "Entry", "held_out", "resolve"]


@dataclass(frozen=True)
class Entry:
    """A known corpus: a summary in one line, and the place of its text in `builtin` or `spec`."""

    summary: str
    spec: CorpusSpec = field(default_factory=CorpusSpec)
    builtin: Builtin | None = None


CORPORA: dict[str, Entry] = {
    "wikitext-103": Entry(
        "Wikipedia's good and featured articles, 0.12 B GPT-2 tokens; a row a document; published validation split",
        CorpusSpec(dataset="Salesforce/wikitext", config="wikitext-103-raw-v1"),
    ),
    "openwebtext": Entry(
        "Web pages linked from Reddit, 9.04 B GPT-2 tokens; 0.05 % held out",
        CorpusSpec(dataset="Skylion007/openwebtext", holdout=0.0005),
    ),
    "python-docs": Entry(
        "The Python language reference and the standard library's docstrings; offline, about 2 MB",
        builtin=Builtin("docstrings", topics=True),
    ),
    "library-docs": Entry(
        "Docstrings and comments of torch and transformers, two files in five; offline, about 7 MB",
        builtin=Builtin("docstrings+comments", packages=("torch", "transformers"), share=0.4),
    ),
    "python-code": Entry(
        "The standard library's source; offline, about 9 MB",
        builtin=Builtin("source"),
    ),
}


def resolve(name: str, spec: CorpusSpec | None = None, root: Path | None = None) -> Corpus:
    """Return the corpus that a name in a recipe means. Local files must exist; their text is not read yet.

    A name means, in this order: files or a data set in the recipe's settings; an entry of `CORPORA`, changed by
    the settings; a file or glob; a Hub data set "user/dataset".

    Args:
        name: key under `data` in a recipe.
        spec: the settings under `corpora` in the recipe, if any.
        root: folder that relative paths start from; default: the current one.

    Raises:
        UserError: for a name that is none of these, and for settings that do not belong together.
    """
    root = Path(os.path.expanduser(root)) if root else Path.cwd()
    given = spec.model_dump(exclude_unset=True, exclude_none=True) if spec else {}
    known = CORPORA.get(name)
    if known and not given.keys() & {"files", "dataset"}:
        merged = known.spec.model_copy(update=given)
    else:
        merged, known = CorpusSpec(**given), None
        if merged.files is None and merged.dataset is None:
            merged = merged.model_copy(update=_guess(name, root))
    _refuse_contradictions(name, merged)
    if merged.files is not None:
        return file_corpus(name, merged, root)
    if merged.dataset is not None:
        return hub_corpus(name, merged)
    assert known and known.builtin
    source, holdout = known.builtin, DEFAULT_HOLDOUT if merged.holdout is None else merged.holdout

    def read(split: str) -> Iterator[str]:
        return (text for text in builtin.documents(source) if in_split(text, split, holdout))

    return Corpus(name, f"{builtin.fingerprint(source)} holdout={holdout}", read)


def _guess(name: str, root: Path) -> dict[str, str]:
    """Return the setting for a name that is itself a path, a glob or a Hub id."""
    path = root / os.path.expanduser(name)
    if file_kind(name)[0] or holds_ids(path):
        return {"files": name}
    if path.is_dir():
        raise UserError(f"corpus '{name}' is a folder. Name its files: {name.rstrip('/')}/*.jsonl")
    if path.exists():
        raise UserError(f"corpus '{name}': cannot read this kind of file; allowed are {ALLOWED}. Convert it.")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return {"dataset": name}
    raise UserError(
        f"unknown corpus '{name}'.{did_you_mean(name, CORPORA)} Known: {', '.join(CORPORA)}; also a file or glob "
        f"({ALLOWED}), a Hub data set 'user/dataset', or a name with its own settings: corpora.{name}.files."
    )


def _refuse_contradictions(name: str, spec: CorpusSpec) -> None:
    """Refuse settings that would be ignored or that exclude each other."""
    place = f"corpora.{name}"
    if spec.files is not None and spec.dataset is not None:
        raise UserError(f"{place}: 'files' and 'dataset' exclude each other. Keep one.")
    if spec.validation is not None and spec.holdout is not None:
        raise UserError(f"{place}: 'validation' and 'holdout' exclude each other. Keep one.")
    foreign: tuple[str, ...] = ("validation", "document", "text", "dtype", "config", "revision", "streaming")
    kind = "a built-in corpus"
    if spec.files is not None:
        foreign, kind = ("config", "revision", "streaming"), "local files"
    elif spec.dataset is not None:
        foreign, kind = ("validation", "document", "dtype"), "a Hub data set"
    for setting in foreign:
        if getattr(spec, setting) is not None:
            raise UserError(f"{place}.{setting} does not apply to {kind}. Remove it.")
