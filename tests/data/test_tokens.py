"""Data: token files are exact and whole, the tokenizer is lossless, and sample i is arithmetic."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import TEXTS, corpus_of, prose
from support.ranks import PROCESSES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from fire_llm.core.errors import UserError
from fire_llm.data import Mixture, TokenFile, encode, permute, tokenize_corpus, tokens, train_tokenizer
from fire_llm.data import tokenizer as tokenizer_module
from fire_llm.data.corpora import Corpus, CorpusSpec, resolve


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([corpus_of(TEXTS)], 400, progress=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def contents(folder: Path) -> list[str]:
    """Return what lies in a cache, locks aside."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# --- the tokenizer


@pytest.mark.parametrize("text", ["", " ", "a  b\n\n\tc ", "\x00\x7f", "naïve 学习 🙂 \u200d", " leading", *TEXTS[:5]])
def test_a_trained_tokenizer_is_lossless(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_trained_tokenizer_saves_loads_and_repeats(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert 257 < len(tokenizer) <= 400
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) and loaded.eos_token_id == tokenizer.eos_token_id
    for text in TEXTS[:20]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    again = train_tokenizer([corpus_of(TEXTS)], 400, progress=False)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_trained_tokenizer_sees_only_a_bounded_part_of_training_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "SAMPLE_BYTES", 1000)
    texts = ["学" * 200, "ab" * 300, "never reached", *["x"] * 6, "held out held out"]
    sample = list(tokenizer_module._sample([corpus_of(texts), corpus_of(["zz"])]))
    assert sample == ["学" * 200, "ab" * 200, "zz"]
    assert list(tokenizer_module._sample([corpus_of(["学" * 400])])) == ["学" * 333]


def test_tokenizers_that_cannot_be_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"vocab_size is 256.*at least 257"):
        train_tokenizer([corpus_of(TEXTS)], 256)
    with pytest.raises(UserError, match="'made' has no training text"):
        train_tokenizer([corpus_of([])], 300, progress=False)
    with pytest.raises(UserError, match="at least one corpus"):
        train_tokenizer([], 300, progress=False)
    assert len(train_tokenizer([corpus_of(TEXTS)], 257, progress=False)) == 257


# --- token files


def expected_tokens(tokenizer: object, texts: list[str]) -> list[int]:
    """Tokenise document by document, in the plainest way there is."""
    return [
        id for text in texts for id in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tokens_are_those_of_each_document_and_its_end(
    tokenizer: PreTrainedTokenizerFast, cache: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_BYTES", 2000)
    texts = [text for n, text in enumerate(TEXTS) if (n % 10 == 9) == (split == "validation")]
    file = tokenize_corpus(corpus_of(TEXTS), tokenizer, split, cache=cache, progress=False)
    expected = expected_tokens(tokenizer, texts)
    assert file.tokens.tolist() == expected and file.tokens.dtype == np.uint16
    assert (file.n_tokens, file.n_documents) == (len(expected), len(texts))
    assert file.n_bytes == len("".join(texts).encode()) < (file.path / "tokens.bin").stat().st_size * 10
    assert isinstance(file.tokens, np.memmap) and not file.tokens.flags.writeable
    assert contents(cache) == [file.path.name] and file.path.name.startswith(f"made-{split}-")


def test_a_slow_tokenizer_and_one_that_truncates_and_pads(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    file = tokenize_corpus(corpus_of(TEXTS[:30]), slow, "validation", cache=cache, progress=False)
    assert file.tokens.tolist() == expected_tokens(slow, TEXTS[9:30:10])
    before = tokenize_corpus(corpus_of(TEXTS), tokenizer, "validation", cache=cache, progress=False)
    tokenizer(TEXTS[:3], truncation=True, max_length=4, padding="max_length")
    after = tokenize_corpus(corpus_of(TEXTS), tokenizer, "validation", cache=cache, progress=False)
    assert after.path == before.path  # how it was called last is no part of what a tokenizer is
    shutil.rmtree(before.path)
    again = tokenize_corpus(corpus_of(TEXTS), tokenizer, "validation", cache=cache, progress=False)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    assert again.tokens.tolist() == expected_tokens(tokenizer, TEXTS[9::10])


def test_the_leading_documents_know_their_tokens_and_bytes(
    tokenizer: PreTrainedTokenizerFast, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_BYTES", 300)  # the counts go on from lot to lot
    file = tokenize_corpus(corpus_of(TEXTS), tokenizer, "validation", cache=cache, progress=False)
    texts = TEXTS[9::10]
    third = len(expected_tokens(tokenizer, texts[:3]))
    fourth = len(expected_tokens(tokenizer, texts[:4]))
    for limit in (third, fourth - 1):
        leading = file.first(limit)
        assert leading.tokens.tolist() == expected_tokens(tokenizer, texts[:3])
        assert (leading.n_tokens, leading.n_documents) == (third, 3)
        assert leading.n_bytes == len("".join(texts[:3]).encode())
    assert file.first(fourth).n_documents == 4
    assert file.first(None) is file and file.first(file.n_tokens) is file
    again = pickle.loads(pickle.dumps(leading))
    assert again == leading and again.tokens.tolist() == leading.tokens.tolist()
    with pytest.raises(UserError, match=r"more than the limit of 2, and documents stay whole: give at least \d+,"):
        file.first(2)


def large_vocabulary(size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<end>": 0, "[UNK]": 1, **{f"w{n}": n for n in range(2, size)}}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="[UNK]")


@pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_sixteen_bits_are_used_exactly_as_long_as_they_suffice(cache: Path, size: int, dtype: type) -> None:
    file = tokenize_corpus(corpus_of([f"w2 w{size - 1}"]), large_vocabulary(size), "train", cache=cache, progress=False)
    assert file.tokens.dtype == dtype and file.tokens.tolist() == [2, size - 1, 0]


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer as SentencePiece models have it: a normaliser, "▁" before the text, unigram pieces."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_long_documents_in_windows_are_as_if_encoded_whole(
    tokenizer: PreTrainedTokenizerFast, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(encode, "WINDOW", 1000)
    monkeypatch.setattr(encode, "OVERLAP", 400)
    monkeypatch.setattr(encode, "BATCH_BYTES", 3500)
    chosen = tokenizer if kind == "byte-level" else metaspace_tokenizer()
    texts = [
        *(prose(3000, seed, end) for seed, end in enumerate(["", "\n\n  \n", "🙂🙂"])),
        "a" * 5000,
        " " * 2500,
        prose(1001)[:1001],
        "short",
    ]
    windowed = []
    long = encode.Encoder._encode_long
    monkeypatch.setattr(encode.Encoder, "_encode_long", lambda self, text: windowed.append(text) or long(self, text))
    file = tokenize_corpus(corpus_of([f"x{t}" for t in texts]), chosen, "train", cache=cache, progress=False)
    assert file.tokens.tolist() == expected_tokens(chosen, [f"x{t}" for t in texts])
    assert len(windowed) == len(texts) - 1
    assert file.n_documents == len(texts)


@pytest.mark.shared_data
def test_real_text_has_the_tokens_that_others_counted(shared_data: Path, cache: Path) -> None:
    gpt2 = GPT2TokenizerFast.from_pretrained(shared_data / "gpt2-tokenizer")
    corpus = resolve("webtext/valid.jsonl", CorpusSpec(holdout=0), shared_data)
    file = tokenize_corpus(corpus, gpt2, "train", cache=cache, progress=False)
    # Counted by the folder's makers, in thousands, without ends of text.
    assert round((file.n_tokens - file.n_documents) / 1000) == 232
    rows = [json.loads(line)["text"] for line in (shared_data / "webtext" / "valid.jsonl").read_text().splitlines()]
    assert file.n_documents == len(rows) and file.n_bytes == len("".join(rows).encode())


def test_what_changes_the_tokens_changes_the_file_and_nothing_else_does(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TEXTS))

    def tokenise(**settings: object) -> Path:
        corpus = resolve("a.txt", CorpusSpec(**settings), tmp_path)
        return tokenize_corpus(corpus, tokenizer, "train", cache=cache, progress=False).path

    first = tokenise()

    def no_reading(split: str) -> Iterator[str]:
        raise AssertionError("read although it is in the cache")

    monkeypatch.setenv("FIRE_LLM_CACHE", str(cache))
    cached = Corpus("a.txt", resolve("a.txt", CorpusSpec(), tmp_path).fingerprint, no_reading)
    assert tokenize_corpus(cached, tokenizer, "train", progress=False).path == first
    others = {tokenise(holdout=0.3), tokenise(document="line")}
    path.write_text("\n\n".join(TEXTS[:-1]))
    others.add(tokenise())
    others.add(tokenize_corpus(cached_as(cached), ByT5Tokenizer(), "train", cache=cache, progress=False).path)
    tokenizer.eos_token = "!"
    others.add(tokenise())
    tokenizer.eos_token = "<|endoftext|>"
    assert len(others | {first}) == 6


def cached_as(corpus: Corpus) -> Corpus:
    return Corpus(corpus.name, corpus.fingerprint, lambda split: ["text"])


def test_a_failure_on_the_way_leaves_nothing(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    def broken(split: str) -> Iterator[str]:
        yield from TEXTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(Corpus("made", "1", broken), tokenizer, "train", cache=cache, progress=False)
    assert contents(cache) == []
    assert tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False).n_documents == 360


def write(cache: Path, log: Path, end: str) -> None:
    """Be a writer; tell in a log that all was read, and end as asked."""
    encode.BATCH_BYTES = 4000

    def read(split: str) -> Iterator[str]:
        yield from ["some text"] * 2000
        log.touch()
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while not log.with_suffix(".go").exists():
            time.sleep(0.01)

    tokenize_corpus(Corpus("made", "1", read), ByT5Tokenizer(), "train", cache=cache, progress=False)


def start_writer(*arguments: object) -> BaseProcess:
    process = PROCESSES.Process(target=write, args=arguments)
    process.start()
    return process


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(cache: Path, tmp_path: Path) -> None:
    writer = start_writer(cache, tmp_path / "log", "killed")
    writer.join(120)
    assert writer.exitcode == -signal.SIGKILL
    (left,) = contents(cache)
    assert left.startswith(".made-train-") and (cache / left / "tokens.bin").stat().st_size > 0
    # Another corpus's writer clears it too: nobody may ever come back for the first.
    other = tokenize_corpus(corpus_of(["o"], "other"), ByT5Tokenizer(), "train", cache=cache, progress=False)
    assert contents(cache) == [other.path.name]
    assert tokenize_corpus(corpus_of(["whole"] * 5), ByT5Tokenizer(), "train", cache=cache).n_documents == 5


def test_two_processes_do_the_work_once(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    writer = start_writer(cache, log, "whole")
    while not log.exists():
        assert writer.exitcode is None
        time.sleep(0.01)
    tokenize_corpus(corpus_of(["other text"] * 30, "other"), ByT5Tokenizer(), "train", cache=cache, progress=False)
    assert any(name.startswith(".made") for name in contents(cache))  # the living are left alone

    def no_reading(split: str) -> list[str]:
        raise AssertionError("tokenised twice")

    threading.Timer(0.3, (tmp_path / "log.go").touch).start()
    file = tokenize_corpus(Corpus("made", "1", no_reading), ByT5Tokenizer(), "train", cache=cache)
    assert file.n_documents == 2000 and "waiting for the process that is writing" in capsys.readouterr().err
    writer.join(60)
    assert writer.exitcode == 0


def test_what_a_writer_left_that_died_while_this_one_waited_is_cleared(
    tokenizer: PreTrainedTokenizerFast, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    partial = file.path.with_name(f".{file.path.name}.partial")
    file.path.rename(partial)
    monkeypatch.setattr(tokens, "_clear_leftovers", lambda cache: None)
    again = tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    assert again.tokens.tolist() == expected_tokens(tokenizer, [t for n, t in enumerate(TEXTS) if n % 10 != 9])
    assert contents(cache) == [file.path.name]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", lambda data: data[:-2]),
        ("tokens.bin", lambda data: b""),
        ("documents.bin", lambda data: data[:-24]),
        ("meta.json", lambda data: data[:50]),
        ("meta.json", lambda data: b"[]"),
        ("meta.json", lambda data: b"{}"),
    ],
)
def test_a_damaged_file_is_noticed_and_made_anew(
    tokenizer: PreTrainedTokenizerFast, cache: Path, name: str, damage: object
) -> None:
    file = tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    expected = file.tokens.tolist()
    (file.path / name).write_bytes(damage((file.path / name).read_bytes()))
    with pytest.raises(UserError, match=r"no readable token file.*Delete"):
        TokenFile.open(file.path)
    again = tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    assert again.path == file.path and again.tokens.tolist() == expected


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", lambda data: bytes(len(data) // 2) + data[len(data) // 2 :]),
        ("tokens.bin", lambda data: data[::-1]),
        ("tokens.bin", lambda data: b"\xff\xff" + data[2:]),
        ("documents.bin", lambda data: data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]),
        ("meta.json", lambda data: data.replace(b'"n_bytes": ', b'"n_bytes": 1')),
        ("meta.json", lambda data: data.replace(b"uint16", b"int16")),
    ],
)
def test_other_bytes_than_were_written_are_refused(
    tokenizer: PreTrainedTokenizerFast, cache: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    file = tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    data = (file.path / name).read_bytes()
    assert damage(data) != data
    (file.path / name).write_bytes(damage(data))
    with pytest.raises(UserError, match=rf"{name} is not what was written.*Delete the folder"):
        tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    (file.path / name).write_bytes(data)
    assert tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False).content == file.content


def test_the_tokens_of_another_split_are_not_taken_for_these(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    train, other = (
        tokenize_corpus(corpus_of(TEXTS), tokenizer, split, cache=cache, progress=False).path
        for split in ("train", "validation")
    )
    shutil.rmtree(train)
    shutil.copytree(other, train)
    with pytest.raises(UserError, match="it is of another split, 'validation'"):
        tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)


@pytest.mark.parametrize("restored", [False, True])
def test_a_text_that_changes_while_it_is_tokenised_leaves_no_tokens(
    tokenizer: PreTrainedTokenizerFast, cache: Path, tmp_path: Path, restored: bool
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TEXTS))
    whole = path.read_bytes()
    corpus = resolve("a.txt", CorpusSpec(), tmp_path)
    assert corpus.fingerprint.startswith("files ")  # hashed here, as by the command that begins

    def growing(split: str) -> Iterator[str]:
        path.write_bytes(whole + b"\n\nmore")
        yield from corpus.read(split)
        if restored:
            path.write_bytes(whole)

    with pytest.raises(UserError, match=r"a\.txt was changed while it was read"):
        tokenize_corpus(dataclasses.replace(corpus, read=growing), tokenizer, "train", cache=cache, progress=False)
    assert contents(cache) == []
    if not restored:
        with pytest.raises(UserError, match="its text has changed since this command began"):
            tokenize_corpus(corpus, tokenizer, "train", cache=cache, progress=False)
    fresh = tokenize_corpus(resolve("a.txt", CorpusSpec(), tmp_path), tokenizer, "train", cache=cache, progress=False)
    path.write_bytes(whole)
    again = tokenize_corpus(corpus, tokenizer, "train", cache=cache, progress=False)
    assert (again.content == fresh.content) is restored


def test_open_tokens_outlive_their_folder(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    file = tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    ids = file.tokens.tolist()
    shutil.rmtree(file.path)
    part = file.first(file.n_tokens // 2)
    assert part.tokens.tolist() == ids[: part.n_tokens] and part.ends[-1, 0] == part.n_tokens


def test_a_cache_that_cannot_be_written(
    tokenizer: PreTrainedTokenizerFast, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIRE_LLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache: a part of the path is a file.*FIRE_LLM_CACHE"):
        tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", progress=False)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cache: the disk is full.*FIRE_LLM_CACHE"):
        tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    assert contents(cache) == []


def test_corpora_and_tokenizers_that_cannot_be_used(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    def tokenise(texts: list[str], split: str, tokenizer: PreTrainedTokenizerFast = tokenizer) -> None:
        tokenize_corpus(corpus_of(texts), tokenizer, split, cache=cache, progress=False)

    with pytest.raises(UserError, match="'made' has no training documents"):
        tokenise([], "train")
    with pytest.raises(UserError, match=r"'made' has no validation documents.*corpora\.made\.holdout"):
        tokenise(["one"], "validation")
    with pytest.raises(UserError, match="no end-of-text token"):
        tokenise(["one"], "train", PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))
    assert contents(cache) == []


def test_progress_is_shown_only_when_asked_for(
    tokenizer: PreTrainedTokenizerFast,
    cache: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "progress_bar", functools.partial(tokens.progress_bar, delay=0))
    tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    train_tokenizer([corpus_of(TEXTS)], 300, progress=False)
    assert capfd.readouterr() == ("", "")
    tokenize_corpus(corpus_of(TEXTS), tokenizer, "validation", cache=cache, progress=True)
    assert "tokenising made (validation)" in capfd.readouterr().err


# --- permutations


@given(n=st.integers(1, 700), key=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_permutations_are_bijections(n: int, key: int) -> None:
    assert sorted(permute(position, n, (key,)) for position in range(n)) == list(range(n))


def test_small_permutations_are_all_about_equally_likely() -> None:
    for n in (2, 3, 4):
        counts = Counter(tuple(permute(p, n, ("key", k)) for p in range(n)) for k in range(2400))
        expected = 2400 / len(list(itertools.permutations(range(n))))
        assert len(counts) * expected == 2400
        # Chi-squared of up to 23 degrees of freedom: 60 is beyond 1 in 20,000.
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 60


def test_large_permutations_spread_and_do_not_change_between_versions() -> None:
    n = 10**12 + 39
    images = [permute(position, n, (1, "phase", "corpus", 0)) for position in range(2000)]
    assert len(set(images)) == 2000 and all(0 <= image < n for image in images)
    assert abs(np.mean(images) / n - 0.5) < 0.03  # 4.6 standard deviations of a uniform mean
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.1
    # Frozen: a run begun with one version of the program is resumed with another.
    digest = hashlib.sha256(json.dumps(images).encode()).hexdigest()
    assert digest[:16] == "b7d1eb74bb82a2ec"


# --- mixtures


def token_file(n_tokens: int, first: int = 0) -> TokenFile:
    """Make tokens that count up, so that a sample tells where it came from."""
    return TokenFile(Path("none"), np.arange(first, first + n_tokens, dtype=np.uint32), n_tokens, n_tokens, n_tokens, 1)


def mixture(weights: dict[str, float], n_tokens: int = 1001, **changes: object) -> Mixture:
    sources = {name: token_file(n_tokens, 100_000 * k) for k, name in enumerate(weights)}
    return Mixture(sources, weights, **{"context": 10, "seed": 1, "phase": "first", **changes})


def test_a_sample_is_a_block_and_its_next_tokens() -> None:
    mixed = mixture({"a": 1, "b": 2})
    for i in range(300):
        corpus, _, block = mixed.locate(i)
        start = 100_000 * "ab".index(corpus) + 10 * block
        sample = mixed[i]
        assert sample["input_ids"].tolist() == list(range(start, start + 10))
        assert sample["labels"].tolist() == list(range(start + 1, start + 11))
        assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    sample["labels"].fill_(-100)
    assert sample["input_ids"].min() >= 0
    assert mixed.epoch_tokens == 2002 and mixed.blocks("a") == 100
    # One token more than the blocks is needed for the last label, and 1010 tokens leave no room for it.
    assert mixture({"a": 1}, 1010).blocks("a") == 100 and mixture({"a": 1}, 1011).blocks("a") == 101


@given(weights=st.lists(st.one_of(st.floats(1e-3, 1e3), st.integers(1, 9).map(float)), min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_every_prefix_holds_the_corpora_in_proportion(weights: list[float]) -> None:
    named = {f"c{k}": weight for k, weight in enumerate(weights)}
    mixed = mixture(named)
    total = sum(Fraction(str(weight)) for weight in weights)
    bound = 1 if len(weights) <= 3 else 2
    counts = dict.fromkeys(named, 0)
    for i in range(400):
        corpus, epoch, _ = mixed.locate(i)
        assert epoch == counts[corpus] // 100  # samples of a corpus are numbered without a gap
        counts[corpus] += 1
        for name, weight in named.items():
            assert abs(counts[name] - (i + 1) * Fraction(str(weight)) / total) < bound


def test_the_papers_mixture_is_exact() -> None:
    mixed = mixture({"openwebtext": 9.0, "wikitext-103": 0.1})
    counts = Counter(mixed.locate(i)[0] for i in range(910))
    assert counts == {"openwebtext": 900, "wikitext-103": 10}


def test_no_block_comes_again_before_all_have_come_and_epochs_differ() -> None:
    mixed = mixture({"a": 2, "b": 1})
    blocks: dict[tuple[str, int], list[int]] = {}
    for i in range(900):
        corpus, epoch, block = mixed.locate(i)
        blocks.setdefault((corpus, epoch), []).append(block)
    assert len(blocks) == 9
    assert all(sorted(order) == list(range(100)) for order in blocks.values())
    assert len({tuple(order) for order in blocks.values()}) == 9
    assert not any(order == sorted(order) for order in blocks.values())


def test_sample_i_is_the_same_whatever_was_read_before_and_however_far_it_is() -> None:
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    in_turn = mixture(weights)
    order = [in_turn.locate(i) for i in range(500)]
    shuffled = list(range(500))
    random.Random(0).shuffle(shuffled)
    at_random = mixture(dict(reversed(weights.items())), seed=np.int64(1))
    assert {i: mixture(weights).locate(i) for i in shuffled[:50]} == {i: order[i] for i in shuffled[:50]}
    sources = {name: in_turn.sources[name] for name in "cab"}
    at_random = Mixture(sources, weights, context=10, seed=np.int64(1), phase="first")
    assert [at_random.locate(np.int64(i)) for i in shuffled] == [order[i] for i in shuffled]
    far = 10**12
    corpus, epoch, block = in_turn.locate(far)
    assert in_turn.locate(np.int64(far)) == (corpus, epoch, block) and epoch > 10**8 and 0 <= block < 100
    near = Counter(in_turn.locate(far + i)[0] for i in range(1000))
    assert near == {"a": 700, "b": 200, "c": 100}


def test_seed_phase_and_corpus_change_the_order_and_nothing_else_does() -> None:
    def order(weights: dict[str, float] | None = None, **changes: object) -> list[int]:
        mixed = mixture(weights or {"a": 1}, **changes)
        return [block for corpus, _, block in map(mixed.locate, range(100)) if corpus in ("a", "z")]

    orders = [order(), order(seed=2), order(phase="second"), order({"z": 1})]
    assert len({tuple(blocks) for blocks in orders}) == 4
    assert order({"a": 5}) == order()
    mixed = order({"a": 1, "b": 1})
    assert mixed == order()[: len(mixed)]  # another corpus beside it takes turns, it does not reorder


def test_with_replacement_draws_corpora_and_blocks_independently() -> None:
    mixed = mixture({"a": 9.0, "b": 0.1, "c": 0.9}, sampling="with-replacement")
    located = [mixed.locate(i) for i in range(20_000)]
    counts = Counter(corpus for corpus, _, _ in located)
    for name, share in {"a": 0.9, "b": 0.01, "c": 0.09}.items():
        assert abs(counts[name] - 20_000 * share) < 4.5 * (20_000 * share * (1 - share)) ** 0.5
    blocks = Counter(block for corpus, _, block in located if corpus == "a")
    assert set(blocks) == set(range(100))
    expected = counts["a"] / 100
    # Chi-squared of 99 degrees of freedom: mean 99, standard deviation 14.
    assert 40 < sum((count - expected) ** 2 / expected for count in blocks.values()) < 170
    assert [mixture({"a": 9.0, "b": 0.1, "c": 0.9}, sampling="with-replacement").locate(i) for i in (7, 3)] == [
        located[7],
        located[3],
    ]


def test_weight_zero_is_never_drawn_and_needs_no_text() -> None:
    sources = {"a": token_file(101), "b": token_file(3)}
    for sampling in ("with-replacement", "without-replacement"):
        mixed = Mixture(sources, {"a": 1, "b": 0}, context=10, seed=1, phase="x", sampling=sampling)
        assert {mixed.locate(i)[0] for i in range(200)} == {"a"}
        assert mixed.epoch_tokens == 101


def test_mixtures_pickle_by_path_and_serve_workers(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    file = tokenize_corpus(corpus_of(TEXTS), tokenizer, "train", cache=cache, progress=False)
    mixed = Mixture({"a": file}, {"a": 1}, context=32, seed=1, phase="x")
    pickled = pickle.dumps(mixed)
    assert len(pickled) < 2000 < file.n_tokens
    copy = pickle.loads(pickled)
    assert isinstance(copy.sources["a"].tokens, np.memmap)
    loader = torch.utils.data.DataLoader(
        mixed, sampler=range(16), batch_size=4, num_workers=1, multiprocessing_context=PROCESSES
    )
    batches = list(loader)
    for i in range(16):
        for key in ("input_ids", "labels"):
            assert torch.equal(copy[i][key], mixed[i][key])
            assert torch.equal(batches[i // 4][key][i % 4], mixed[i][key])
    plain = pickle.loads(pickle.dumps(token_file(5)))
    assert plain.tokens.tolist() == [0, 1, 2, 3, 4] and plain == token_file(5)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({"a": 1, "c": 1}, {}, "'c', which is none of its corpora: a, b"),
        ({"a": 1}, {}, "no weight for its corpus 'b'"),
        ({"a": 1, "b": -1}, {}, "weight of 'b' is -1"),
        ({"a": 1, "b": float("nan")}, {}, "weight of 'b' is nan"),
        ({"a": 1, "b": float("inf")}, {}, "weight of 'b' is inf"),
        ({"a": 0, "b": 0.0}, {}, "all weights of the mixture are 0"),
        ({"a": 1, "b": 1}, {"context": 101}, "'b' has 100 tokens.*context 101 needs.*102"),
        ({"a": 1, "b": 1}, {"context": 0}, "context must be at least 1"),
        ({"a": 1, "b": 1}, {"sampling": "with_replacement"}, "Did you mean 'with-replacement'"),
    ],
)
def test_mixtures_that_cannot_be(weights: dict[str, float], changes: dict[str, object], message: str) -> None:
    sources = {"a": token_file(1000), "b": token_file(100)}
    with pytest.raises(UserError, match=message):
        Mixture(sources, weights, **{"context": 10, "seed": 1, "phase": "x", **changes})


def test_a_negative_index_is_none() -> None:
    with pytest.raises(IndexError):
        mixture({"a": 1})[-1]
