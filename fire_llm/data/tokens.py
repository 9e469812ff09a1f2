"""Tokenise a corpus once into a memory map that is fingerprinted, and is either whole or not there."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fire_llm.core.atomic import STAGING_SUFFIX, renamed, sync
from fire_llm.core.errors import UserError, system_reason
from fire_llm.core.hashing import crc32, digest, hash_file
from fire_llm.core.launch import cores
from fire_llm.core.locks import held
from fire_llm.core.progress import progress_bar
from fire_llm.core.ranks import launched
from fire_llm.data.cache import CACHE_VARIABLE, cache_folder, file_state
from fire_llm.data.corpora import Corpus
from fire_llm.data.encode import Encoder
from fire_llm.data.formats import Source, Stretches, files_of, mapped
from fire_llm.data.pretokenized import index
from fire_llm.data.processes import Job, tokenize_parts
from fire_llm.data.spec import TextParts
from fire_llm.data.writing import (
    DOCUMENTS,
    FILES,
    INDEX,
    META,
    SPANS,
    TOKENS,
    count_words,
    meta_digest,
    seal,
    write_index,
    write_joined,
    write_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMAT_VERSION", "ChangedTokens", "TokenFile", "count_words", "seal", "tokenize_corpus"]

FORMAT_VERSION = 4
"""Raised whenever the files below would be laid out or filled differently."""
_PARTS = ".parts"


class ChangedTokens(UserError):
    """Report a token file that has changed since it was written: the disk fails, or somebody wrote there."""


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split of a corpus; pickles as its path and maps the file again when unpickled.

    Attributes:
        path: folder with documents.bin and meta.json, and with tokens.bin or, if the tokens lie elsewhere, spans.bin.
        tokens: (n_tokens,) integers, mapped read-only; every document is followed by the end-of-text token. Tokens of
            several files, or of some documents of one file, are `Stretches`, of which only slices can be read.
        n_tokens: number of tokens, end-of-text tokens included.
        n_bytes: UTF-8 bytes of the documents' text, without end-of-text tokens; None if there are only tokens.
        n_words: words of the documents' text, as `count_words` counts them; None if there are only tokens.
        n_documents: number of documents.
        content: hash of the whole file's tokens and of the ends of its documents; empty if it is not known.
        open_end: whether the last document lacks its end-of-text token, for example because tokens were cut off.
    """

    path: Path
    tokens: np.ndarray | Stretches = field(repr=False, compare=False)
    n_tokens: int
    n_bytes: int | None
    n_words: int | None
    n_documents: int
    content: str = field(default="", compare=False)
    _ends: np.ndarray | None = field(default=None, repr=False, compare=False)
    open_end: bool = field(default=False, compare=False)
    _sources: tuple[Source, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        of: Mapping[str, Any] | None = None,
        verify: bool = True,
        sources: Sequence[Source] = (),
    ) -> TokenFile:
        """Map a token file; the first time in a process, all of it is read and compared with its checksums.

        Args:
            path: its folder.
            of: entries that meta.json must have: the corpus's fingerprint, the split, the tokenizer.
            verify: whether to compare checksums; sizes are always compared.
            sources: where the tokens lie if the folder is only an index of them; they are not read here.

        Raises:
            UserError: the folder is not a whole token file: something is missing or cut short.
            ChangedTokens: the file has changed since it was written, or meta.json has other entries.
        """
        path = Path(path)

        def message(why: object) -> str:
            return f"{path} is no readable token file ({why}). Delete the folder: the same command tokenises again."

        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
            if meta.pop("digest") != meta_digest(meta):
                raise ChangedTokens(message(f"{META} is not what was written"))
            for key, value in (of or {}).items():
                if meta[key] != value:
                    raise ChangedTokens(message(f"it is of another {key}, {meta[key]!r}"))
            for name, written in meta["files"].items():
                if (size := (path / name).stat().st_size) != written["bytes"]:
                    raise ValueError(f"{name} has {size} bytes where {written['bytes']} belong")
                if verify and _checksum(path / name, file_state(path / name)) != written["crc32"]:
                    raise ChangedTokens(message(f"{name} is not what was written"))
            n_tokens, n_documents = int(meta["n_tokens"]), int(meta["n_documents"])
            n_bytes, n_words = (None if meta[n] is None else int(meta[n]) for n in ("n_bytes", "n_words"))
            ends = mapped(path / DOCUMENTS, "uint64", (n_documents, 1 if n_bytes is None else 3))
            hashes = "".join(written["blake2b"] for written in meta["files"].values())
            if not sources:
                tokens: np.ndarray | Stretches = mapped(path / TOKENS, meta["dtype"], (n_tokens,))
            else:
                tokens, hashes = _joined(path / SPANS, sources), f"{meta['fingerprint']} {hashes}"
                if len(tokens) != n_tokens:
                    raise ValueError(f"it is of {n_tokens} tokens, and there are {len(tokens)}")
            content, open_end = digest(hashes, 16), bool(meta.get("open_end", False))
            return cls(path, tokens, n_tokens, n_bytes, n_words, n_documents, content, ends, open_end, tuple(sources))
        except UserError:
            raise
        except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(message(error)) from error

    @property
    def files(self) -> list[Path]:
        """Return the files that are mapped into memory."""
        own = [self.path / name for name in (INDEX if self._sources else FILES)]
        return [*own, *(file for source in self._sources for file in files_of(source.path))]

    @property
    def ends(self) -> np.ndarray:
        """Return (n_documents, 3) uint64: tokens, bytes and words up to each document's end; or (n_documents, 1)."""
        if self._ends is None:
            raise ValueError(f"the token file '{self.path}' was not opened: it has no documents")
        return self._ends[: self.n_documents]

    def first(self, limit: int | None) -> TokenFile:
        """Return the first documents, as many as have at most `limit` tokens together; all of them for None.

        Raises:
            UserError: the first document has more tokens.
        """
        if limit is None or limit >= self.n_tokens:
            return self
        ends = self.ends
        if self.open_end and self.n_documents == 1:  # the file does not say where documents end
            cut = np.asarray([[limit]], dtype=np.uint64)
            return replace(self, tokens=_head(self.tokens, limit), n_tokens=limit, _ends=cut)
        whole = int(np.searchsorted(ends[:, 0], limit, side="right"))
        if not whole:
            raise UserError(
                f"the first document of '{self.path.name}' has {ends[0, 0]} tokens, more than the limit of {limit}, "
                f"and documents stay whole: give at least {ends[0, 0]}, or cut the corpus into smaller documents"
            )
        n_tokens, *text = (int(end) for end in ends[whole - 1])
        n_bytes, n_words = text or (None, None)
        return replace(
            self,
            tokens=_head(self.tokens, n_tokens),
            n_tokens=n_tokens,
            n_bytes=n_bytes,
            n_words=n_words,
            n_documents=whole,
            open_end=False,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memmap is a copy of all its tokens: a DataLoader's workers would each receive the whole corpus.
        if isinstance(self.tokens, np.memmap) or self._sources:
            return _reopen, (self.path, self.n_tokens, self._sources)
        return TokenFile, (self.path, self.tokens, self.n_tokens, self.n_bytes, self.n_words, self.n_documents)


def _reopen(path: Path, n_tokens: int, sources: tuple[Source, ...]) -> TokenFile:
    return TokenFile.open(path, verify=False, sources=sources).first(n_tokens)


def _joined(spans: Path, sources: Sequence[Source]) -> np.ndarray | Stretches:
    """Return the spans of some files' tokens; a view if they are one span of one array."""
    arrays = [array for source in sources for array in source.arrays()]
    joined = Stretches(arrays, mapped(spans, "uint64", (spans.stat().st_size // 16, 2)))
    return joined[:] if len(arrays) == 1 and len(joined.spans) == 1 else joined


def _head(tokens: np.ndarray | Stretches, count: int) -> np.ndarray | Stretches:
    return tokens.head(count) if isinstance(tokens, Stretches) else tokens[:count]


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    *,
    cache: str | Path | None = None,
    progress: bool = True,
    processes: int | None = None,
) -> TokenFile:
    """Return the tokens of a split, made on the first call and found in the cache afterwards.

    The folder's name has a hash of the corpus's fingerprint, the tokenizer and the format, so that a changed corpus or
    tokenizer is tokenised again. The folder is written under another name, synced and renamed, so that a run that dies
    leaves nothing that looks whole. If several processes want the same tokens, one makes them and the others wait. The
    parts of a large corpus they make together, also on several machines, and finished parts are kept.

    Args:
        corpus: where the documents come from.
        tokenizer: a fast one encodes in parallel; text equal to a special token becomes that token, unless the
            tokenizer's `split_special_tokens` is set.
        split: "train" or "validation".
        cache: folder; see `cache_folder`.
        progress: whether to show a progress bar.
        processes: number of processes that tokenise a large corpus, each on one core. By default one for each core; 1
            under a launcher, whose ranks share the parts. The tokens do not depend on it.

    Raises:
        UserError: for a tokenizer without an end-of-text token, a split without documents, a cache folder that cannot
            be written to, cached tokens that have changed, text that changes while it is read, and any fault of the
            corpus.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' has no end-of-text token, which ends every document. "
            "Set its eos_token and save it, or choose another tokenizer."
        )
    if processes is None:
        processes = 1 if launched() else cores()
    encoder = Encoder(tokenizer)
    first = [tokenizer.bos_token_id] if corpus.pretokenized else []  # in files of tokens it may separate documents
    identity = json.dumps([corpus.fingerprint, split, encoder.identity, end, FORMAT_VERSION, *first])
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", corpus.name).strip("-.")[:60]
    folder = cache_folder(cache) / f"{label}-{split}-{digest(identity, 8)}"
    common = {
        "format": FORMAT_VERSION, "corpus": corpus.name, "split": split, "fingerprint": corpus.fingerprint,
        "tokenizer": encoder.identity, "vocab_size": encoder.vocab_size, "end_of_text": end,
    }  # fmt: skip
    if corpus.pretokenized is None:
        return _CachedTokens(folder, corpus, split, tokenizer, encoder, common, progress, processes).open_or_make()
    with corpus.unchanged():
        sources = corpus.pretokenized.sources(split, encoder.vocab_size)
        cached = _CachedTokens(folder, corpus, split, tokenizer, encoder, common, progress, processes, sources)
        return cached.open_or_make()


@dataclass(frozen=True)
class _CachedTokens:
    """A token file of the cache: it is opened or, by the first process that finds no whole one, made.

    Attributes:
        folder: folder of the token file.
        corpus: corpus whose text or tokens are read.
        split: split of the corpus.
        tokenizer: as in `tokenize_corpus`.
        encoder: encoder of the tokenizer.
        common: what meta.json says beside sizes and hashes.
        progress: whether to show progress and to say that this process waits.
        processes: number of processes that tokenise a large corpus.
        sources: where the tokens lie if other programs made them; empty for text.
    """

    folder: Path
    corpus: Corpus
    split: str
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    common: Mapping[str, Any]
    progress: bool
    processes: int
    sources: tuple[Source, ...] = ()

    def open_or_make(self) -> TokenFile:
        """Return the token file, after making it if it is missing or cut short."""
        # A whole file is opened without the lock: a finished cache may be read-only.
        if (file := self._open_if_whole()) is not None:
            return file
        cache = self.folder.parent
        with _writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
            _lock(cache, self.folder.name).open("ab").close()  # reports a cache that cannot be written to
            _clear_leftovers(cache)
        if self.corpus.parts is not None:
            self._make_parts(self.corpus.parts)
        with _locked(self.folder, self.progress):
            if (file := self._open_if_whole()) is not None:
                return file
            partial = self.folder.with_name(f".{self.folder.name}{STAGING_SUFFIX}")
            with _writing(cache), renamed(partial, self.folder), self.corpus.unchanged():
                self._write(partial)
                if self.folder.exists():  # it is damaged
                    shutil.rmtree(self.folder)
            sync(cache, below=False)
            shutil.rmtree(_parts_of(self.folder), ignore_errors=True)
        return self._open()

    def _open(self) -> TokenFile:
        expected = {key: self.common[key] for key in ("fingerprint", "split", "tokenizer", "end_of_text")}
        sources = [replace(source, ends=None) for source in self.sources]  # the ends of documents are in the index
        return TokenFile.open(self.folder, of=expected, sources=sources)

    def _open_if_whole(self) -> TokenFile | None:
        """Return the token file; None if it is missing, lacks files or is cut short.

        Raises:
            ChangedTokens: It has other bytes than were written.
        """
        try:
            return self._open()
        except ChangedTokens:
            raise
        except UserError:
            return None

    def _make_parts(self, parts: TextParts) -> None:
        """Make the parts of a large text, together with other processes at work; nothing if it has one part."""
        if self.folder.exists():  # a whole file would say that no part is left to make
            with _locked(self.folder, self.progress):
                if self._open_if_whole() is None:
                    shutil.rmtree(self.folder)
        with _writing(self.folder.parent), self.corpus.unchanged() as states:
            plan = parts.plan(self.split)
            if len(plan) < 2 and not _parts_of(self.folder).exists():
                return
            job = Job(_parts_of(self.folder), self.folder, parts, self.split, plan, self.common, states)
            with self._bar() as advance:
                tokenize_parts(job, self.encoder, self.processes, advance)

    def _write(self, folder: Path) -> None:
        """Fill the folder of the token file."""
        parts = _parts_of(self.folder)
        if self.corpus.pretokenized:
            known, vocabulary = self.corpus.pretokenized, self.encoder.vocab_size
            spans = index(known, self.sources, self.split, self.tokenizer, vocabulary, self.progress)
            write_index(folder, *spans, self.common)
            return
        if parts.exists():
            n_documents = write_joined(folder, Job.made_in(parts), self.common)
        else:
            with self._bar() as advance:
                texts = self.corpus.documents(self.split)
                n_documents = write_tokens(folder, texts, self.encoder, self.common, advance)
        if not n_documents:
            raise UserError(_empty(self.corpus.name, self.split))

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[[int, int], None]]:
        """Show a progress bar; yield a function that advances it by bytes and tokens."""
        total = self.corpus.approximate_bytes if self.split == "train" else None
        what, begun, n_done = f"tokenising {self.corpus.name} ({self.split})", time.monotonic(), 0
        with progress_bar(what, total, "B", shown=self.progress) as bar:

            def advance(n_bytes: int, n_tokens: int) -> None:
                nonlocal n_done
                n_done += n_tokens
                rate = n_done / (time.monotonic() - begun) / 1e3
                bar.set_postfix_str(f"{n_done / 1e6:.1f}M tokens, {rate:.0f}k/s", refresh=False)
                bar.update(n_bytes)

            yield advance


@cache
def _checksum(path: Path, state: str) -> str:
    """Return the checksum of a file; a process reads the file once for each state (`file_state`)."""
    return hash_file(path, of_chunk=crc32)


def _empty(name: str, split: str) -> str:
    if split == "train":
        return f"corpus '{name}' has no training documents: it is empty, or all of it is held out. Check its files."
    return (
        f"corpus '{name}' has no validation documents: it is empty, or too small. In a recipe, set "
        f"corpora.{name}.holdout to a larger fraction, give corpora.{name}.validation files, or cut .txt files into "
        f"more documents with corpora.{name}.document; with eval, give --split train, or --document."
    )


@contextlib.contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn the errors of a full, read-only or missing disk into a message that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write tokens to the cache folder {cache}: {system_reason(error) or error.strerror or error}. "
            f"Or set {CACHE_VARIABLE} to a folder that can be written to."
        ) from error


def _parts_of(folder: Path) -> Path:
    """Return the folder of the parts of a token file that is being made."""
    return folder.with_name(f".{folder.name}{_PARTS}")


def _lock(cache: Path, name: str) -> Path:
    return cache / f".{name}.lock"


@contextlib.contextmanager
def _locked(folder: Path, progress: bool) -> Iterator[None]:
    """Wait for the lock of a token file, and hold it while the block runs."""
    lock = _lock(folder.parent, folder.name)
    with held(lock) as had:
        if had:
            yield
            return
    if progress:
        print(f"waiting for the process that is writing {folder}", file=sys.stderr)
    with held(lock, wait=True):
        yield


def _clear_leftovers(cache: Path) -> None:
    """Delete the unfinished folders of writers that died; living writers hold their locks."""
    for partial in cache.glob(f".*{STAGING_SUFFIX}"):
        with held(_lock(cache, partial.name[1 : -len(STAGING_SUFFIX)])) as had:
            if had:
                shutil.rmtree(partial, ignore_errors=True)
    for parts in cache.glob(f".*{_PARTS}"):
        if (cache / parts.name[1 : -len(_PARTS)]).exists():
            shutil.rmtree(parts, ignore_errors=True)
