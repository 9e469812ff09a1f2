"""Read a corpus from the Hugging Face Hub through `datasets`: downloaded once, or as a stream; no remote code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from fire_llm.core.errors import UserError, did_you_mean, explained
from fire_llm.core.hub import settle_hub
from fire_llm.data import partition
from fire_llm.data.spec import Corpus, CorpusSpec, in_split, setting

DEFAULT_HOLDOUT = 0.01


def hub_corpus(name: str, spec: CorpusSpec) -> Corpus:
    """Return the corpus of a Hub data set; nothing is downloaded before its documents are read.

    Its validation split is used if it has one and the spec sets no `holdout`. Otherwise documents of its train split
    are held out by hash. A document is a row.
    """
    assert spec.dataset is not None
    if find_spec("datasets") is None:
        raise UserError(
            f"corpus '{name}': data sets of the Hub are read by datasets, which is not installed: pip install datasets"
        )
    parts = HubParts(name, spec)
    identity = f"hub {spec.dataset} {spec.config} {spec.revision} column={spec.text or 'text'} holdout={spec.holdout}"
    return Corpus(name, identity, parts.read, parts=parts)


@dataclass(frozen=True)
class HubParts:
    """The rows of a Hub data set, cut into parts: into its shards if it is streamed, else into runs of rows.

    Attributes:
        name: name of the corpus.
        spec: settings of the corpus.
    """

    name: str
    spec: CorpusSpec

    def settings(self) -> CorpusSpec:
        """Return the settings with the commit that this process reads."""
        return self.spec.model_copy(update={"revision": self._pinned})

    @cached_property
    def _pinned(self) -> str | None:
        """The commit that all parts are read from; the revision in the settings if the Hub cannot tell."""
        given = self.spec.revision
        if Path(str(self.spec.dataset)).exists() or re.fullmatch("[0-9a-f]{40}", given or ""):
            return given
        settle_hub()
        from huggingface_hub import HfApi

        with suppress(Exception):  # a fault is reported when the rows are read
            return HfApi().dataset_info(str(self.spec.dataset), revision=given, timeout=30).sha
        return given

    @cached_property
    def _data(self) -> Any:
        return _load(self.name, self.spec, self._pinned)

    def _rows(self, split: str) -> tuple[Any, bool]:
        """Return the rows that contain a split, and whether all of them belong to it."""
        data, dataset = self._data, self.spec.dataset
        if "train" not in data:
            raise UserError(f"corpus '{self.name}': {dataset} has no 'train' split, only: {', '.join(data)}.")
        published = self.spec.holdout is None and "validation" in data
        return data["validation" if published and split == "validation" else "train"], published

    def plan(self, split: str) -> list[list[int]]:
        """Return the parts of a split: [shard, shards] of a stream, [first row, end] of a table."""
        rows, _ = self._rows(split)
        if self.spec.streaming:
            return [[number, rows.num_shards] for number in range(rows.num_shards)]
        table = getattr(rows, "data", None)
        number = 1 if table is None else min(partition.MOST_PARTS, table.nbytes // partition.PART_BYTES)
        if number < 2:
            return [[0, 0]]
        edges = [len(rows) * n // number for n in range(number + 1)]
        return [[*pair] for pair in pairwise(edges)]

    def read(self, split: str, part: Sequence[int] | None = None) -> Iterator[str]:
        """Yield the documents of a split, or of a part of it."""
        name, dataset, column = self.name, self.spec.dataset, self.spec.text or "text"
        rows, published = self._rows(split)
        holdout = 0.0 if published else DEFAULT_HOLDOUT if self.spec.holdout is None else self.spec.holdout
        if part is not None and self.spec.streaming:
            rows = rows.shard(num_shards=part[1], index=part[0], contiguous=True)
        elif part is not None and part[1]:
            rows = rows.select(range(*part))
        with self._streamed():
            names = rows.column_names or [*next(iter(rows), {column: ""})]
            if column not in names:
                raise UserError(
                    f"corpus '{name}': {dataset} has no column '{column}', only: {', '.join(names)}."
                    f"{did_you_mean(column, names)} Set {setting(name, 'text', '--column')}."
                )
            for batch in rows.select_columns([column]).iter(batch_size=1000):
                for text in batch[column]:
                    if not isinstance(text, str):
                        raise UserError(
                            f"corpus '{name}': column '{column}' of {dataset} holds {type(text).__name__}, not text."
                        )
                    if published or in_split(text, split, holdout):
                        yield text

    @contextmanager
    def _streamed(self) -> Iterator[None]:
        """Report a stream that breaks off, and that finished parts are kept."""
        try:
            yield
        except Exception as error:
            if not self.spec.streaming or isinstance(error, UserError):
                raise
            raise UserError(
                f"corpus '{self.name}': the stream of {self.spec.dataset} broke off ({explained(error)}): the same "
                "command goes on from the finished parts"
            ) from error

    def files(self, part: Sequence[int]) -> list[Path]:
        """Return no files: the text is not in local ones."""
        return []

    def cut(self, part: Sequence[int]) -> list[Any]:
        """Return the limits of a part and the commit."""
        return [*part, self._pinned]


def _load(name: str, spec: CorpusSpec, revision: str | None) -> Any:
    """Return all splits of a Hub data set at a revision.

    Raises:
        UserError: it cannot be loaded: no network, no such data set, a missing configuration.
    """
    settle_hub()
    import datasets

    try:
        streaming = {"streaming": True} if spec.streaming else {}
        return datasets.load_dataset(spec.dataset, spec.config, revision=revision, **streaming)
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
