"""Measure checkpoints on corpora, and how sure the differences are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fire_llm.core.errors import UserError
from fire_llm.data import TokenFile, tokenize_corpus
from fire_llm.data.corpora import CORPORA, Corpus, CorpusSpec, resolve
from fire_llm.evaluation.measurement import PREFIXES, first_token, token_text
from fire_llm.evaluation.perplexity import Perplexity, perplexity
from fire_llm.evaluation.statistics import BOOTSTRAP, paired_difference, standard_errors
from fire_llm.evaluation.tasks import run_tasks
from fire_llm.models import check_fits, find_device, load_model, load_tokenizer

SCHEMA_VERSION = 1
DTYPES = ("stored", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Text:
    """A text as one tokenizer gives it: N tokens of D documents."""

    tokens: np.ndarray
    """(N,)"""
    documents: np.ndarray
    """(D,) where each ends in `tokens`."""
    n_bytes: np.ndarray
    """(D,) UTF-8 bytes."""
    n_words: np.ndarray
    """(D,) pieces between runs of white space."""

    @classmethod
    def of(cls, file: TokenFile, per_document: bool) -> Text:
        """Take the documents of a token file, each with the end-of-text token after it unless they are read alone."""
        ends = np.asarray(file.ends, dtype=np.int64)
        tokens, limits = file.tokens, ends[:, 0]
        if per_document:
            tokens = np.delete(tokens, limits - 1)
            limits = limits - np.arange(1, len(limits) + 1)
        sizes = np.diff(ends[:, 1:], axis=0, prepend=0)
        return cls(tokens, limits, sizes[:, 0], sizes[:, 1])


def score_checkpoints(
    names: list[str],
    data: list[str],
    *,
    split: str = "validation",
    column: str | None = None,
    document: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    per_document: bool = False,
    prefix: str = "auto",
    dtype: str = "float32",
    device: str = "cpu",
    compiled: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    look: Callable[[Any, Text], dict[str, Any]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure checkpoints on corpora; under torch.distributed ranks share the work, and all return the same.

    Args:
        names: Checkpoint folders or Hub ids; each is read with its own tokenizer.
        data: Names of corpora, whose `split` is read, or local files, which are read whole.
        split: `train` or `validation`.
        column: Column of the files that holds the text, where it is not `text`.
        document: What a document is in .txt files: line, blank-line, heading or file.
        context: As in `perplexity`, like the next three.
        stride: Positions between the starts of windows.
        batch_size: Windows of full length a forward pass.
        per_document: Whether each document is read by itself.
        prefix: Token read first: `bos`, `eos`, `none`, or `auto`, as in `first_token`.
        dtype: Of the weights and their products; `stored` keeps the checkpoint's.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`, as in `find_device`.
        compiled: As in `perplexity`.
        tasks: Also tasks of lm-eval, as in `run_tasks`, which get `context` too.
        limit: As in `run_tasks`.
        num_fewshot: As in `run_tasks`.
        look: Also measures something else of a model on a text, such as its plasticity.
        progress: Show progress bars.

    Returns:
        What `fire-llm eval --json` writes (docs/results-schema.md).

    Raises:
        UserError: For an unknown corpus, an unreadable checkpoint or file, or tokens that do not fit the model.
    """
    check_choice("prefix", prefix, PREFIXES)
    check_choice("dtype", dtype, DTYPES)
    where = find_device(device)
    corpora = [_corpus(name, split, column, document) for name in data]
    measured: dict[str, list[Perplexity]] = {}
    rows, looks, answers = [], [], {}
    for name in names:
        tokenizer = load_tokenizer(name)
        model = load_model(name, "auto" if dtype == "stored" else getattr(torch, dtype)).to(where)
        check_fits(model.config, tokenizer, None)
        first = first_token(tokenizer, prefix, name)
        for corpus, part in corpora:
            text = Text.of(tokenize_corpus(corpus, tokenizer, part, progress=progress), per_document)
            result = perplexity(
                model,
                text.tokens,
                context=context,
                stride=stride,
                batch_size=batch_size,
                prefix=first,
                n_bytes=text.n_bytes,
                n_words=text.n_words,
                documents=text.documents,
                per_document=per_document,
                compiled=compiled,
                progress=f"{name} on {corpus.name}" if progress else None,
                share=True,
            )
            measured.setdefault(corpus.name, []).append(result)
            row = {"checkpoint": name, "data": corpus.name, "split": part, "prefix_text": token_text(tokenizer, first)}
            rows.append({**row, **result.to_dict(), "se": standard_errors(result.scores)})
            if look is not None:
                looks.append({"checkpoint": name, "data": corpus.name, **look(model, text)})
        if tasks:
            answers[name] = run_tasks(
                (model, tokenizer),
                tasks,
                context=context,
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
            )
        del model
    evaluation = {
        "schema_version": SCHEMA_VERSION,
        "settings": {
            "prefix": prefix,
            "per_document": per_document,
            "device": str(where),
            "words": "pieces between runs of white space",
            "bootstrap": BOOTSTRAP,
        },
        "rows": rows,
        "differences": [
            {"checkpoint": name, "against": names[0], "data": corpus, **_difference(result, results[0])}
            for corpus, results in measured.items()
            for name, result in zip(names[1:], results[1:], strict=True)
        ],
    }
    return evaluation | ({"diagnostics": looks} if looks else {}) | ({"tasks": answers} if answers else {})


def _difference(a: Perplexity, b: Perplexity) -> dict[str, Any]:
    return paired_difference(a.scores, b.scores, unit="byte").to_dict()


def _corpus(name: str, split: str, column: str | None, document: str | None) -> tuple[Corpus, str]:
    """Return a corpus and the split of it to read."""
    if name in CORPORA and (column or document):
        raise UserError(f"--data {name} is a known corpus: --column and --document are for local files and Hub data")
    local = name not in CORPORA and (Path(name).exists() or has_magic(name) or Path(name).suffix != "")
    if not local:
        return resolve(name, CorpusSpec(text=column) if column else None), split
    # A file named by hand is measured whole; it is no training corpus with a part held out.
    settings = {"text": column, "document": document}
    given = {key: value for key, value in settings.items() if value is not None}
    return resolve(name, CorpusSpec(files=name, holdout=0.0, **given)), "train"


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `UserError` where the value of an option is none of those allowed."""
    if value not in allowed:
        raise UserError(f"--{option} {value}: it must be one of {', '.join(allowed)}")
