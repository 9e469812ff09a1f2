"""Measure checkpoints on corpora, and the differences between them with their intervals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import has_magic
from typing import Any

import torch

from fire_llm.architectures.configs import CONFIG
from fire_llm.architectures.context import choose_context
from fire_llm.core.errors import UserError
from fire_llm.data import tokenize_corpus
from fire_llm.data.corpora import CORPORA, Corpus, CorpusSpec, resolve
from fire_llm.data.encode import Encoder
from fire_llm.data.files import file_kind
from fire_llm.evaluation.diagnose import diagnose
from fire_llm.evaluation.measurement import PREFIXES, check_choice, first_token, token_text
from fire_llm.evaluation.precision import LONG
from fire_llm.evaluation.records import (
    CheckpointDiagnostics,
    CheckpointDifference,
    CheckpointEvaluation,
    CheckpointRow,
    CheckpointSettings,
)
from fire_llm.evaluation.statistics import comparable_unit, paired_difference, standard_errors
from fire_llm.evaluation.tasks import find_tasks, refuse_prefix, run_tasks
from fire_llm.evaluation.texts import EvaluationSet, score
from fire_llm.models import check_fits, find_device, load_model, load_tokenizer, pretrained_config

DTYPES = ("stored", "float32", "bfloat16", "float16", "float64")


def score_checkpoints(
    names: list[str],
    data: list[str],
    *,
    split: str = "validation",
    column: str | None = None,
    document: str | None = None,
    max_tokens: int | None = None,
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
    diagnostics: bool = False,
    progress: bool = True,
    titles: Sequence[str] = (),
) -> CheckpointEvaluation:
    """Measure checkpoints on corpora; under torch.distributed ranks share the work, and all return the same.

    Args:
        names: Checkpoint folders or Hub ids; each is read with its own tokenizer.
        data: Names of corpora, whose `split` is read, or local files, which are read whole.
        split: `train` or `validation`.
        column: Column of the files that holds the text; `text` by default.
        document: What a document is in .txt files: line, blank-line, heading or file.
        max_tokens: Read only the first documents of each text, with at most so many tokens together.
        context: As in `perplexity`, like the next three.
        stride: Positions between the starts of windows.
        batch_size: Windows of full length a forward pass.
        per_document: Whether each document is read by itself.
        prefix: Token read first: `bos`, `eos`, `none`, or `auto`, as in `first_token`.
        dtype: Of the weights and their products; `stored` keeps the checkpoint's.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`, as in `find_device`.
        compiled: As in `perplexity`.
        tasks: Also measure these tasks of lm-eval, as in `run_tasks`, with the same `context` and `prefix`.
        limit: As in `run_tasks`.
        num_fewshot: As in `run_tasks`.
        diagnostics: Also diagnose each model on each text, as in `diagnose`, at this `context`.
        progress: Show progress bars.
        titles: Names of the checkpoints in progress bars; `names` by default.

    Returns:
        The evaluation, which `fire-llm eval --json` writes as plain data.

    Raises:
        UserError: For an unknown corpus, an unreadable checkpoint or file, or tokens that do not fit the model.
    """
    check_choice("prefix", prefix, PREFIXES)
    if tasks:
        refuse_prefix(prefix)
    dtype = LONG.get(dtype, dtype)
    check_choice("dtype", dtype, DTYPES)
    where = find_device(device)
    if tasks:
        find_tasks(tasks)  # before texts are scored for hours
    rows: list[CheckpointRow] = []
    diagnosed, answers = [], {}
    corpora, tokenizers = open_checkpoints(
        names, data, split, column, document, max_tokens=max_tokens, context=context, prefix=prefix
    )
    how = {"context": context, "stride": stride, "batch_size": batch_size, "compiled": compiled}
    of_tasks: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size, "prefix": prefix}
    for name, title in zip(names, titles or names, strict=True):
        tokenizer = tokenizers[name]
        model = load_model(name, "auto" if dtype == "stored" else getattr(torch, dtype)).to(where)
        first = first_token(tokenizer, prefix, name)
        prefix_text = token_text(tokenizer, first)
        files = {
            text: tokenize_corpus(corpus, tokenizer, part, progress=progress).first(max_tokens)
            for text, (corpus, part) in corpora.items()
        }
        texts = {text: EvaluationSet.of(file, first, per_document) for text, file in files.items()}
        perplexities = score(model, texts, progress=f"{title} on" if progress else None, **how)
        for text, result in perplexities.items():
            errors = standard_errors(result.scores)
            rows.append(CheckpointRow(name, text, corpora[text][1], prefix_text, **vars(result), se=errors))
        for text, held_out in texts.items() if diagnostics else ():
            measures = diagnose(model, held_out.tokens, context=context)
            diagnosed.append(CheckpointDiagnostics(name, text, **vars(measures)))
        if tasks:
            answers[name] = run_tasks((model, tokenizer), tasks, context=context, **of_tasks)
        del model
    settings = CheckpointSettings(prefix, per_document, str(where), max_tokens=max_tokens)
    return CheckpointEvaluation(settings, rows, _differences(rows), diagnosed, answers)


def open_checkpoints(
    names: Sequence[str],
    data: Sequence[str],
    split: str = "validation",
    column: str | None = None,
    document: str | None = None,
    *,
    max_tokens: int | None = None,
    context: int | None = None,
    prefix: str = "auto",
) -> tuple[dict[str, tuple[Corpus, str]], dict[str, Any]]:
    """Return (corpus, split) by the corpus's name, and each checkpoint's tokenizer.

    Faults that configs and tokenizers show are reported here, before hours of scoring. Arguments are as in
    `score_checkpoints`.

    Raises:
        UserError: As in `score_checkpoints`.
    """
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"--max-tokens {max_tokens}: at least 2 are needed, one to predict and one before it")
    resolved = (_corpus(name, split, column, document) for name in data)
    corpora = {corpus.name: (corpus, part) for corpus, part in resolved}
    for name in names:
        if os.path.isfile(os.path.join(name, CONFIG)):
            pretrained_config(name)  # refuses a model that is no language model, before its tokenizer is missed
    tokenizers = {name: load_tokenizer(name) for name in names}
    for name, tokenizer in tokenizers.items():
        config = pretrained_config(name)
        check_fits(config, tokenizer, None)
        choose_context(config, context)
        first_token(tokenizer, prefix, name)
    tokenised = [name for name, (corpus, _) in corpora.items() if corpus.pretokenized]
    if tokenised and len({Encoder(tokenizer).identity for tokenizer in tokenizers.values()}) > 1:
        raise UserError(
            f"--data {tokenised[0]} holds the tokens of one tokenizer, and these checkpoints have several: measure "
            "them on text, or those of one tokenizer at a time"
        )
    return corpora, tokenizers


def _differences(rows: Sequence[CheckpointRow]) -> list[CheckpointDifference]:
    """Compare every other checkpoint with the first on each text."""
    by_text: dict[str, list[CheckpointRow]] = {}
    for row in rows:
        by_text.setdefault(row.data, []).append(row)
    differences = []
    for text, (first, *others) in by_text.items():
        for row in others:
            unit = comparable_unit(row.scores, first.scores)
            difference = paired_difference(row.scores, first.scores, unit=unit)
            differences.append(CheckpointDifference(row.checkpoint, first.checkpoint, text, **vars(difference)))
    return differences


def _corpus(name: str, split: str, column: str | None, document: str | None) -> tuple[Corpus, str]:
    """Return a corpus and the split to read."""
    if name in CORPORA and (column or document):
        raise UserError(f"--data {name} is a known corpus: --column and --document are for local files and Hub data")
    path = os.path.expanduser(name)
    local = name not in CORPORA and (os.path.exists(path) or has_magic(path) or file_kind(path) != ("", ""))
    if not local:
        return resolve(name, CorpusSpec(text=column) if column else None), split
    # A file named by hand is measured whole: nothing of it is held out.
    settings = {"text": column, "document": document}
    given = {key: value for key, value in settings.items() if value is not None}
    return resolve(name, CorpusSpec(files=name, holdout=0.0, **given)), "train"
