"""Read a corpus from the Hugging Face Hub through `datasets`: downloaded once, memory-mapped, no remote code."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.hub import settle_hub
from fire_llm.data.spec import Corpus, CorpusSpec, held_out, setting

DEFAULT_HOLDOUT = 0.01


def hub_corpus(name: str, spec: CorpusSpec) -> Corpus:
    """Return the corpus of a Hub data set; nothing is downloaded before its documents are asked for.

    Its validation split is used where it has one and the spec sets no `holdout`; otherwise documents are held out of
    its train split by hash. A document is a row.
    """
    assert spec.dataset is not None
    if find_spec("datasets") is None:
        raise UserError(
            f"corpus '{name}': data sets of the Hub are read by datasets, which is not installed: pip install datasets"
        )
    column = spec.text or "text"
    load = functools.lru_cache(maxsize=1)(functools.partial(_load, name, spec))

    def read(split: str) -> Iterator[str]:
        data = load()
        if "train" not in data:
            raise UserError(f"corpus '{name}': {spec.dataset} has no 'train' split, only: {', '.join(data)}.")
        published = spec.holdout is None and "validation" in data
        holdout = 0.0 if published else DEFAULT_HOLDOUT if spec.holdout is None else spec.holdout
        rows = data["validation" if published and split == "validation" else "train"]
        if column not in rows.column_names:
            raise UserError(
                f"corpus '{name}': {spec.dataset} has no column '{column}', only: {', '.join(rows.column_names)}."
                f"{did_you_mean(column, rows.column_names)} Set {setting(name, 'text', '--column')}."
            )
        for batch in rows.select_columns([column]).iter(batch_size=1000):
            for text in batch[column]:
                if not isinstance(text, str):
                    raise UserError(
                        f"corpus '{name}': column '{column}' of {spec.dataset} holds {type(text).__name__}, not text."
                    )
                if published or held_out(text, holdout) == (split == "validation"):
                    yield text

    identity = f"hub {spec.dataset} {spec.config} {spec.revision} column={column} holdout={spec.holdout}"
    return Corpus(name, identity, read)


def _load(name: str, spec: CorpusSpec) -> Any:
    """Return all splits of a Hub data set.

    Raises:
        UserError: for whatever keeps it from being loaded: no network, no such data set, a missing configuration.
    """
    settle_hub()
    import datasets

    try:
        return datasets.load_dataset(spec.dataset, spec.config, revision=spec.revision)
    except Exception as error:  # the Hub's clients raise dozens of kinds; none of them is a fault of this program
        reason = " ".join(str(error).split()) or type(error).__name__
        if "scripts are no longer supported" in reason:
            step = (
                f"It is published as a script; the Hub's own Parquet copy may serve: corpora.{name}.revision: "
                "refs/convert/parquet in a recipe (see on its page that the copy is whole, not 'partial-train')."
            )
        elif "config" in reason.lower():
            step = f"Set {setting(name, 'config')}."
        else:
            step = "Check the name and the network."
        raise UserError(
            f"corpus '{name}': cannot load '{spec.dataset}' from the Hugging Face Hub: {reason}. {step} "
            f"Offline, give local files, {setting(name, 'files', '--data')}: path/to/*.parquet, or use a built-in "
            "corpus: python-docs, library-docs, python-code."
        ) from error
