"""Corpora of billions of tokens and of hundreds of parts, by arithmetic: sparse files stand in for them."""

from __future__ import annotations

import json
import pickle
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fire_llm.data import Mixture, TokenFile, permute, tokenize_corpus, train_tokenizer
from fire_llm.data.corpora import Corpus, CorpusSpec, resolve
from fire_llm.data.documents import Boundaries
from fire_llm.data.writing import meta_digest, seal

BILLIONS = 6_000_000_000
"""Tokens: more than 32 bits count, and 12 GB of 16 bits each."""
CONTEXT = 1024


def token_file(folder: Path, ends: list[int]) -> Path:
    """Write a small token file."""
    folder.mkdir(parents=True)
    np.arange(ends[-1], dtype=np.uint16).tofile(folder / "tokens.bin")
    np.array([[end, 0, 0] for end in ends], dtype=np.uint64).tofile(folder / "documents.bin")
    seal(folder, {"dtype": "uint16", "n_tokens": ends[-1], "n_bytes": 0, "n_words": 0, "n_documents": len(ends)})
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> TokenFile:
    """Open a token file of holes with known tokens behind the 4,294,967,296th, and a document of a billion and more."""
    folder = tmp_path_factory.mktemp("sparse")
    with (folder / "tokens.bin").open("wb") as file:
        file.truncate(2 * BILLIONS)
        file.seek(2 * 5_000_000_000)
        file.write(np.arange(2000, dtype=np.uint16).tobytes())
    ends = [1_500_000_000, 5_000_000_010, 5_000_000_500, BILLIONS]
    np.array([[end, 4 * end, end] for end in ends], dtype=np.uint64).tofile(folder / "documents.bin")
    sizes = {"tokens.bin": 2 * BILLIONS, "documents.bin": 96}
    meta = {
        "dtype": "uint16", "n_tokens": BILLIONS, "n_bytes": 4 * BILLIONS, "n_words": BILLIONS, "n_documents": 4,
        "files": {name: {"bytes": size, "crc32": "", "blake2b": ""} for name, size in sizes.items()},
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps({**meta, "digest": meta_digest(meta)}))
    return TokenFile.open(folder, verify=False)


def test_a_corpus_of_six_billion_tokens_is_read_by_arithmetic(sparse):
    tracemalloc.start()
    mixture = Mixture({"c": sparse}, {"c": 1}, context=CONTEXT, seed=3, phase="p", document_positions=True)
    n = (BILLIONS - 1) // CONTEXT
    assert mixture.blocks("c") == n and mixture.epoch_tokens == BILLIONS
    for far in (0, n - 1, n, 7 * n + 12345, 10**15):
        corpus, epoch, block = mixture.locate(far)
        assert (corpus, epoch) == ("c", far // n) and 0 <= block < n
        assert mixture[far]["input_ids"].shape == (CONTEXT,)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6  # a permutation of its blocks would take 47 MB, its tokens 12 GB
    places = np.random.default_rng(0).integers(0, n, 5_000)
    found = {permute(int(place), n, (3, "p", "c", 0)) for place in set(places.tolist())}
    assert len(found) == len(set(places.tolist())) and max(found) < n
    # Every quarter of the corpus gives a quarter of the samples: no part is out of reach of the order.
    quarters = np.bincount(np.array([*found]) * 4 // n, minlength=4) / len(found)
    assert abs(quarters - 0.25).max() < 0.03


def test_places_behind_the_four_billionth_token_are_exact(sparse):
    start = 5_000_000_000 // CONTEXT * CONTEXT
    island = 5_000_000_000 - start
    tokens = sparse.tokens[start : start + CONTEXT + 1]
    assert tokens[:island].max(initial=0) == 0 and tokens[island : island + 5].tolist() == [0, 1, 2, 3, 4]
    positions = Boundaries(sparse).positions(5_000_000_000, 1000)
    expected = np.arange(1000)
    expected[9:] -= 9  # opened by the token before the document's first
    expected[499:] = np.arange(501)
    assert positions.tolist() == expected.tolist()
    most = sparse.first(5_000_000_499)
    assert (most.n_tokens, most.n_documents, most.n_bytes) == (5_000_000_010, 2, 20_000_000_040)
    again = pickle.loads(pickle.dumps(most))
    assert len(again.tokens) == 5_000_000_010 and int(again.tokens[5_000_000_009]) == 9


@pytest.mark.slow
def test_a_raw_file_of_a_billion_tokens_is_a_corpus(tmp_path):
    texts = [f"words {n} of a text" for n in range(200)]
    tokenizer = train_tokenizer([Corpus("t", "1", lambda split: texts)], 300, progress=False)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    flat = np.array([i for each in ids for i in each], dtype=np.uint16)
    n, at = 1_200_000_000, 1_100_000_000
    with (tmp_path / "t.bin").open("wb") as file:
        file.truncate(2 * n)
        for place in (0, at):
            file.seek(2 * place)
            file.write(flat.tobytes())
    corpus = resolve("c", CorpusSpec(files=str(tmp_path / "t.bin"), holdout=0.5))
    made = {
        split: tokenize_corpus(corpus, tokenizer, split, cache=tmp_path / "cache", progress=False)
        for split in ("train", "validation")
    }
    assert sum(file.n_tokens for file in made.values()) == n
    assert sum(file.n_documents for file in made.values()) == 2 * len(texts) + 1  # the last one has no end
    held = np.asarray(made["validation"].first(10_000).tokens)
    assert held[-1] == tokenizer.eos_token_id and len(held) < len(flat)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin")) < 50_000


@pytest.mark.parametrize("sampling", ["without-replacement", "with-replacement"])
def test_hundreds_of_parts_are_mixed_whatever_files_a_process_may_hold_open(sampling, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this process may not hold as many files open")
    folders = [token_file(tmp_path / f"{n:03d}", [40, 100 + n]) for n in range(300)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        parts = {f"part-{folder.name}": TokenFile.open(folder) for folder in folders}
        weights = {name: file.n_tokens for name, file in parts.items()}
        mixture = Mixture(parts, weights, context=16, seed=1, phase="p", sampling=sampling, document_positions=True)
        drawn = [mixture.locate(i) for i in range(5_000)]
        total = sum(weights.values())
        for name in (*list(parts)[:3], *list(parts)[-3:]):
            share, got = 5_000 * weights[name] / total, sum(corpus == name for corpus, _, _ in drawn)
            assert abs(got - share) < (2 if sampling == "without-replacement" else 6 * share**0.5)
        for i in (0, 999, 10**12):
            corpus, _, block = mixture.locate(i)
            expected = np.asarray(parts[corpus].tokens[block * 16 : block * 16 + 16], dtype=np.int64)
            assert mixture[i]["input_ids"].tolist() == expected.tolist()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
