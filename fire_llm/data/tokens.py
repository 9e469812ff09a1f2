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
BAR_DELAY = 1.0
"""Seconds before a progress bar shows; what is done by then needs none."""


class ChangedTokens(UserError):
    """Report a token file with other bytes than were written: a disk fails, or somebody wrote there."""


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split of a corpus; pickles as its path and maps the file again when unpickled.

    Attributes:
        path: folder with documents.bin and meta.json, and tokens.bin or, of tokens that lie elsewhere, spans.bin.
        tokens: (n_tokens,) integers, mapped read-only; every document is followed by the end-of-text token. Tokens of
            several files, or of a part of the documents of one, are `Stretches`: slices are read, no single ones.
        n_tokens: tokens, end-of-text tokens included.
        n_bytes: UTF-8 bytes of the documents' text; nothing is counted for the end of text. None: tokens alone are
            known, no text.
        n_words: parts of the documents' text between runs of white space, as `count_words` counts them, or None.
        n_documents: documents.
        content: hash of the whole file's tokens and of where its documents end; empty where that is not known.
        open_end: whether the last document lacks its end-of-text token, as where tokens were cut off by number.
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
        """Map a token file; the first time in a process, all of it is read and found to be what was written.

        Args:
            path: its folder.
            of: what meta.json is to say of it: the corpus's fingerprint, the split, the tokenizer.
            verify: read it; otherwise only sizes are compared.
            sources: where the tokens lie that the folder is the index of; they are not read here.

        Raises:
            UserError: where the folder is not a whole token file: something is missing or cut short.
            ChangedTokens: where it has other bytes than were written, or is of something else.
        """
        path = Path(path)

        def said(why: object) -> str:
            return f"{path} is no readable token file ({why}). Delete the folder: the same command tokenises again."

        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
            if meta.pop("digest") != meta_digest(meta):
                raise ChangedTokens(said(f"{META} is not what was written"))
            for key, value in (of or {}).items():
                if meta[key] != value:
                    raise ChangedTokens(said(f"it is of another {key}, {meta[key]!r}"))
            for name, written in meta["files"].items():
                if (size := (path / name).stat().st_size) != written["bytes"]:
                    raise ValueError(f"{name} has {size} bytes where {written['bytes']} belong")
                if verify and _checksum(path / name, file_state(path / name)) != written["crc32"]:
                    raise ChangedTokens(said(f"{name} is not what was written"))
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
            raise UserError(said(error)) from error

    @property
    def files(self) -> list[Path]:
        """Return the files that are mapped."""
        own = [self.path / name for name in (INDEX if self._sources else FILES)]
        return [*own, *(file for source in self._sources for file in files_of(source.path))]

    @property
    def ends(self) -> np.ndarray:
        """Return (n_documents, 3) uint64, mapped: tokens, bytes and words up to each document's end.

        Without bytes and words, (n_documents, 1).
        """
        if self._ends is None:
            raise ValueError(f"the token file '{self.path}' was not opened: it has no documents")
        return self._ends[: self.n_documents]

    def first(self, limit: int | None) -> TokenFile:
        """Return the leading documents that hold at most `limit` tokens together; all of them for None.

        Raises:
            UserError: where not even the first document fits.
        """
        if limit is None or limit >= self.n_tokens:
            return self
        ends = self.ends
        if self.open_end and self.n_documents == 1:  # nothing says where documents end in it
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
    """Return the spans of some files' tokens: of one array a view, where they lie side by side."""
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

    The folder's name carries a hash of the corpus's fingerprint, the tokenizer and the format, so that a changed file
    or tokenizer is tokenised again. The files are written beside their place, synced and renamed: a run that dies
    leaves nothing that looks whole. Processes that want the same tokens wait for the one that makes them; a corpus of
    several parts (`processes`) they make together, on several machines too, and a part that is finished stays.

    Args:
        corpus: where the documents come from.
        tokenizer: a fast one encodes in parallel; text equal to a special token becomes that token, unless the
            tokenizer's `split_special_tokens` is set.
        split: "train" or "validation".
        cache: folder; see `cache_folder`.
        progress: whether to show a progress bar.
        processes: that tokenise a large corpus, each on one core: by default one a core, and none but this one under
            a launcher, whose ranks share the parts. The tokens do not depend on it.

    Raises:
        UserError: for a tokenizer without an end-of-text token, a split without documents, a cache folder that cannot
            be written to, tokens in it that are not what was written, text that changes while it is read, and whatever
            is wrong with the corpus.
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
    first = [tokenizer.bos_token_id] if corpus.pretokenized else []  # which may separate documents
    identity = json.dumps([corpus.fingerprint, split, encoder.identity, end, FORMAT_VERSION, *first])
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", corpus.name).strip("-.")[:60]
    folder = cache_folder(cache) / f"{label}-{split}-{digest(identity, 8)}"
    of = {"fingerprint": corpus.fingerprint, "split": split, "tokenizer": encoder.identity, "end_of_text": end}
    common = {
        "format": FORMAT_VERSION, "corpus": corpus.name, "split": split, "fingerprint": corpus.fingerprint,
        "tokenizer": encoder.identity, "vocab_size": encoder.vocab_size, "end_of_text": end,
    }  # fmt: skip
    if corpus.pretokenized is None:
        making = _Making(folder, corpus, split, encoder, common, progress, processes)
        return _made(folder, of, (), corpus, progress, making.write, making.parts)
    with corpus.unchanged():  # the tokens are these files'
        known = corpus.pretokenized
        sources = known.sources(split, encoder.vocab_size)

        def write(partial: Path) -> None:
            found = index(known, sources, split, tokenizer, encoder.vocab_size, progress)
            write_index(partial, *found, common)

        bare = [replace(source, ends=None) for source in sources]  # what the index holds
        return _made(folder, of, bare, corpus, progress, write)


def _made(
    folder: Path,
    of: Mapping[str, Any],
    sources: Sequence[Source],
    corpus: Corpus,
    progress: bool,
    write: Callable[[Path], None],
    before: Callable[[], None] | None = None,
) -> TokenFile:
    """Return a token file of the cache, written by the first process that has no whole one.

    Args:
        folder: of the token file.
        of: as in `TokenFile.open`.
        sources: likewise.
        corpus: whose text or tokens are read.
        progress: whether to say that this process waits.
        write: fills the folder.
        before: what several processes do at the same time before one of them writes.
    """
    # Looked for before any lock is taken: a finished cache may well be read-only.
    if (found := _whole(folder, of, sources)) is not None:
        return found
    with _writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _lock(folder.parent, folder.name).open("ab").close()  # a cache that cannot be written to is reported as such
        _clear_leftovers(folder.parent)
    if before is not None:
        if folder.exists():  # a whole one alone says that there is nothing left to do
            with _locked(folder, progress):
                if _whole(folder, of, sources) is None:
                    shutil.rmtree(folder)
        before()
    with _locked(folder, progress):
        if (found := _whole(folder, of, sources)) is not None:
            return found
        partial = folder.with_name(f".{folder.name}{STAGING_SUFFIX}")
        with _writing(folder.parent), renamed(partial, folder), corpus.unchanged():
            write(partial)
            if folder.exists():  # it is damaged
                shutil.rmtree(folder)
        sync(folder.parent, below=False)
        shutil.rmtree(_parts_of(folder), ignore_errors=True)
    return TokenFile.open(folder, of=of, sources=sources)


@dataclass(frozen=True)
class _Making:
    """How a split of a text corpus becomes a token file: in parts where it is large, or comes as a stream."""

    folder: Path
    corpus: Corpus
    split: str
    encoder: Encoder
    common: Mapping[str, Any]
    progress: bool
    processes: int

    @contextlib.contextmanager
    def _advance(self) -> Iterator[Callable[[int, int], None]]:
        total = self.corpus.approximate_bytes if self.split == "train" else None
        what, begun, done = f"tokenising {self.corpus.name} ({self.split})", time.monotonic(), [0]
        with progress_bar(what, total, "B", shown=self.progress, delay=BAR_DELAY) as bar:

            def advance(n_bytes: int, n_tokens: int) -> None:
                done[0] += n_tokens
                rate = done[0] / (time.monotonic() - begun) / 1e3
                bar.set_postfix_str(f"{done[0] / 1e6:.1f}M tokens, {rate:.0f}k/s", refresh=False)
                bar.update(n_bytes)

            yield advance

    def parts(self) -> None:
        """Make the parts, with whoever else is at it; nothing where there is one part."""
        parts = self.corpus.parts
        if parts is None:
            return
        with _writing(self.folder.parent), self.corpus.unchanged() as states:
            plan = parts.plan(self.split)
            if len(plan) < 2 and not _parts_of(self.folder).exists():
                return
            job = Job(_parts_of(self.folder), self.folder, parts, self.split, plan, self.common, states)
            with self._advance() as advance:
                tokenize_parts(job, self.encoder, self.processes, advance)

    def write(self, partial: Path) -> None:
        """Fill the folder of the token file."""
        parts = _parts_of(self.folder)
        if parts.exists():
            n_documents = write_joined(partial, Job.made_in(parts), self.common)
        else:
            with self._advance() as advance:
                texts = self.corpus.documents(self.split)
                n_documents = write_tokens(partial, texts, self.encoder, self.common, advance)
        if not n_documents:
            raise UserError(_empty(self.corpus.name, self.split))


def _whole(folder: Path, of: Mapping[str, Any], sources: Sequence[Source]) -> TokenFile | None:
    """Return a token file, None where it is to be made: there is none, or files of it are missing or cut short.

    Raises:
        ChangedTokens: where it has other bytes than were written.
    """
    try:
        return TokenFile.open(folder, of=of, sources=sources)
    except ChangedTokens:
        raise
    except UserError:
        return None


@cache
def _checksum(path: Path, state: str) -> str:
    """Return the checksum of a file, read once a process for as long as nothing writes to it."""
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
    """Turn what a full, read-only or absent disk raises into a message that names the folder."""
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
    """Delete what writers that died have left, whatever they were writing; the living hold their locks."""
    for partial in cache.glob(f".*{STAGING_SUFFIX}"):
        with held(_lock(cache, partial.name[1 : -len(STAGING_SUFFIX)])) as had:
            if had:
                shutil.rmtree(partial, ignore_errors=True)
    for parts in cache.glob(f".*{_PARTS}"):
        if (cache / parts.name[1 : -len(_PARTS)]).exists():
            shutil.rmtree(parts, ignore_errors=True)
