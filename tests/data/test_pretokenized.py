"""Files of tokens that other programs wrote: read where they lie, held against the tokenizer, divided by documents."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.tiny_recipe import recipe

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.data import Mixture, TokenFile, tokenize_corpus, train_tokenizer
from fire_llm.data.corpora import Corpus, CorpusSpec, held_out, resolve
from fire_llm.data.documents import Boundaries
from fire_llm.evaluation import perplexity
from fire_llm.evaluation.checkpoints import score_checkpoints
from fire_llm.evaluation.texts import EvaluationSet
from fire_llm.experiment.estimate import plan

TEXTS = [f"Resets of {n} weights let a model learn again, {'so that ' * (n % 7)}it may." for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a tokenizer whose end-of-text token is not 0, as GPT-2's, saved in its `name_or_path`."""
    made = train_tokenizer([Corpus("t", "1", lambda split: TEXTS)], 300, progress=False)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.add_special_tokens({"eos_token": "<|end|>"})
    made.save_pretrained(folder)
    from fire_llm.models import load_tokenizer

    return load_tokenizer(folder)


def ordinary(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stream(tokenizer, texts=TEXTS) -> np.ndarray:
    """Return what nanoGPT's prepare.py writes: the ids of each document, and the end of text behind it."""
    return np.concatenate([[*ordinary(tokenizer, text), tokenizer.eos_token_id] for text in texts]).astype(np.uint16)


def llm_c(ids: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + ids.tobytes()


def megatron(folder: Path, texts: list[np.ndarray], **changes: bytes) -> Path:
    """Write documents as Megatron's IndexedDatasetBuilder does; each is cut into two sequences."""
    pieces = [piece for ids in texts for piece in (ids[: len(ids) // 2], ids[len(ids) // 2 :])]
    lengths = np.array([len(piece) for piece in pieces], dtype="<i4")
    width = pieces[0].itemsize
    parts = {
        "magic": b"MMIDIDX\x00\x00", "version": struct.pack("<Q", 1), "code": b"\x08",
        "counts": struct.pack("<QQ", len(pieces), len(texts) + 1), "lengths": lengths.tobytes(),
        "pointers": (np.concatenate([[0], np.cumsum(lengths)[:-1]]) * width).astype("<i8").tobytes(),
        "documents": np.arange(0, 2 * len(texts) + 1, 2, dtype="<i8").tobytes(),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "m.bin").write_bytes(b"".join(piece.tobytes() for piece in pieces))
    (folder / "m.idx").write_bytes(b"".join({**parts, **changes}.values()))
    return folder / "m.bin"


def opened(path: Path, tokenizer, split: str = "train", **settings) -> TokenFile:
    corpus = resolve("c", CorpusSpec(files=str(path), **({"holdout": 0.0} | settings)))
    return tokenize_corpus(corpus, tokenizer, split, progress=False)


def same(file: TokenFile, ids: np.ndarray) -> bool:
    return file.n_tokens == len(ids) == len(file.tokens) and np.array_equal(np.asarray(file.tokens), ids)


def test_every_format_holds_the_same_tokens_and_documents(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    ids = stream(tokenizer)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id)[:-1] + 1)
    ids.tofile(tmp_path / "nano.bin")
    (tmp_path / "llmc.bin").write_bytes(llm_c(ids))
    ids.astype(np.uint32).tofile(tmp_path / "wide.bin")
    (tmp_path / "llama.bin").write_bytes(llm_c(ids.astype(np.uint32), 20240801, 7))
    datasets.Dataset.from_dict({"input_ids": documents}).save_to_disk(tmp_path / "saved")
    half = len(ids) // 2  # in the middle of a document, as llm.c cuts its shards
    (tmp_path / "shards").mkdir()
    for n, part in enumerate((ids[:half], ids[half:])):
        (tmp_path / f"shards/{n}.bin").write_bytes(llm_c(part))
    files = [
        opened(tmp_path / "nano.bin", tokenizer),
        opened(tmp_path / "wide.bin", tokenizer, dtype="uint32"),
        *(opened(tmp_path / name, tokenizer) for name in ("llmc.bin", "llama.bin", "saved", "shards/*.bin")),
        opened(megatron(tmp_path, documents), tokenizer),
        opened(megatron(tmp_path / "wide", [d.astype("<i4") for d in documents], code=b"\x04"), tokenizer),
    ]
    for file in files:
        assert same(file, ids) and file.n_documents == len(TEXTS) and not file.open_end
        assert np.array_equal(file.ends[:, 0], np.cumsum([len(d) for d in documents]))
        assert file.n_bytes is file.n_words is None  # nobody knows the text
        again = pickle.loads(pickle.dumps(file.first(1000)))
        assert same(again, ids[: again.n_tokens]) and again.n_documents == file.first(1000).n_documents
    mixtures = [
        Mixture({"c": file}, {"c": 1}, context=32, seed=1, phase="p", document_positions=True) for file in files
    ]
    for i in (0, 7, 1000):
        for mixture in mixtures[1:]:
            assert all(torch.equal(mixture[i][key], mixtures[0][i][key]) for key in ("input_ids", "position_ids"))
    cache = [path.name for path in files[0].path.iterdir()]
    assert sorted(cache) == ["documents.bin", "meta.json", "spans.bin"]  # no token was copied


def test_tokens_of_text_and_tokens_of_a_file_train_and_mask_alike(tokenizer, tmp_path):
    text = tokenize_corpus(Corpus("t", "2", lambda split: TEXTS), tokenizer, "train", progress=False)
    stream(tokenizer).tofile(tmp_path / "nano.bin")
    file = opened(tmp_path / "nano.bin", tokenizer)
    assert same(file, np.asarray(text.tokens)) and np.array_equal(file.ends[:, 0], text.ends[:, 0])
    whole = [EvaluationSet.of(each, tokenizer.eos_token_id, per_document=True) for each in (file, text)]
    assert np.array_equal(whole[0].tokens, whole[1].tokens) and np.array_equal(whole[0].documents, whole[1].documents)
    assert whole[0].n_bytes is None and whole[0].n_words is None


def test_documents_are_held_out_by_their_tokens(tokenizer, tmp_path):
    ids = stream(tokenizer)
    ids.tofile(tmp_path / "nano.bin")
    documents = [ordinary(tokenizer, text) for text in TEXTS]
    chosen = [held_out(np.array(d, dtype="<u4").tobytes(), 0.2) for d in documents]
    assert 20 < sum(chosen) < 120
    for split in ("train", "validation"):
        expected = stream(tokenizer, [t for t, c in zip(TEXTS, chosen, strict=True) if c == (split == "validation")])
        assert same(opened(tmp_path / "nano.bin", tokenizer, split, holdout=0.2), expected)
    # The same documents in another order and dtype are held out.
    wide = stream(tokenizer, TEXTS[::-1]).astype(np.uint32)
    wide.tofile(tmp_path / "wide.bin")
    held = opened(tmp_path / "wide.bin", tokenizer, "validation", holdout=0.2, dtype="uint32")
    assert same(held, stream(tokenizer, [t for t, c in zip(TEXTS, chosen, strict=True) if c][::-1]))


def test_a_separator_may_stand_before_documents_or_run_on_and_the_last_may_lack_one(tokenizer, tmp_path):
    end = tokenizer.eos_token_id
    for name, ids, ends, open_end in (
        ("before", [end, 5, 6, end, 7, 8, 9], [1, 4, 7], True),
        ("runs", [5, 6, end, end, end, 7, 8, end, end], [5, 9], False),
        ("none", [5, 6, 7, 8], [4], True),
    ):
        np.array(ids, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
        file = opened(tmp_path / f"{name}.bin", tokenizer)
        assert file.ends[:, 0].tolist() == ends and file.open_end == open_end
    read = EvaluationSet.of(opened(tmp_path / "before.bin", tokenizer), end, per_document=True)
    assert read.tokens.tolist() == [5, 6, 7, 8, 9] and read.documents.tolist() == [2, 5]
    alone = opened(tmp_path / "none.bin", tokenizer)
    assert np.asarray(alone.first(3).tokens).tolist() == [5, 6, 7] and alone.first(3).ends.tolist() == [[3]]
    with pytest.raises(UserError, match="no end-of-text token, so that nobody knows"):
        Mixture({"c": alone}, {"c": 1}, context=2, seed=1, phase="p", document_positions=True)


def test_llama_files_of_llm_c_begin_documents_with_the_beginning_of_text(tokenizer, tmp_path):
    begin = tokenizer.bos_token_id  # another token than the end of text
    assert begin != tokenizer.eos_token_id
    np.array([begin, 5, 6, begin, 7, 8], dtype=np.uint16).tofile(tmp_path / "b.bin")
    file = opened(tmp_path / "b.bin", tokenizer)
    assert file.ends[:, 0].tolist() == [1, 4, 6]
    assert Boundaries(file).positions(0, 5).tolist() == [0, 1, 2, 0, 1]


def hostile(folder: Path, ids: np.ndarray) -> dict[str, tuple[Path, dict, str]]:
    """Return by name: the file, its settings, and what is said of it."""
    odd, cut, wide, magic, short = (folder / f"{name}.bin" for name in ("odd", "cut", "wide", "magic", "short"))
    odd.write_bytes(ids.tobytes()[:-1])
    cut.write_bytes(llm_c(ids)[:-20])
    short.write_bytes(llm_c(ids)[:600])
    ids.astype(np.uint32).tofile(wide)
    magic.write_bytes(llm_c(ids, magic=20240521))
    (folder / "empty.bin").touch()
    (folder / "examples.bin").write_bytes(llm_c(ids, magic=20240522))
    (folder / "lies.bin").write_bytes(llm_c(ids, count=len(ids) + 1))
    (folder / "negative.bin").write_bytes(llm_c(ids, count=-1))
    (folder / "version.bin").write_bytes(llm_c(ids, version=2))
    (folder / "whole.bin").write_bytes(llm_c(ids))
    (folder / "beyond.bin").write_bytes(np.append(ids, 60_000).astype(np.uint16).tobytes())
    return {
        "odd number of bytes": (odd, {}, "no whole number of uint16"),
        "cut short": (cut, {}, "says that it holds .* tokens"),
        "cut short in its header": (short, {}, "says that it holds .* and 0 bytes follow"),
        "32 bits as 16": (wide, {}, "Set dtype: uint32"),
        "16 bits as 32": (folder / "beyond.bin", {"dtype": "uint32"}, "made with another tokenizer|no whole number"),
        "wrong magic": (magic, {}, "magic number 20240521"),
        "empty": (folder / "empty.bin", {}, "is empty"),
        "examples": (folder / "examples.bin", {}, "examples of an evaluation"),
        "more than there are": (folder / "lies.bin", {}, "says that it holds"),
        "fewer than none": (folder / "negative.bin", {}, "says that it holds"),
        "version": (folder / "version.bin", {}, "of version 2; version 1"),
        "another dtype than it says": (folder / "whole.bin", {"dtype": "uint32"}, "are uint16, and 'dtype' is uint32"),
        "beyond the vocabulary": (folder / "beyond.bin", {}, f"holds token 60000 at place {len(ids):,}"),
    }


def test_what_a_file_says_wrongly_is_refused_and_nothing_is_written(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("FIRE_LLM_CACHE", str(tmp_path / "cache"))
    for name, (path, settings, said) in hostile(tmp_path, stream(tokenizer)).items():
        with pytest.raises(UserError, match=said) as caught:
            opened(path, tokenizer, **settings)
        assert str(path) in str(caught.value) and "corpus 'c'" in str(caught.value), name
    assert not [*(tmp_path / "cache").glob("c-*")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, "does not begin with"),
        ({"version": struct.pack("<Q", 2)}, "version 2"),
        ({"code": b"\x06"}, "dtype is number 6"),
        ({"code": b"\x04"}, "do not follow one another"),
        ({"counts": struct.pack("<QQ", 2**60, 3)}, "sequences and 3 documents"),
        ({"lengths": np.array([4, -4, 4, 3], dtype="<i4").tobytes()}, "negative length"),
        ({"pointers": bytes(32)}, "do not follow one another"),
        ({"documents": np.array([0, 4, 2], dtype="<i8").tobytes()}, "do not rise"),
        ({"documents": np.array([0, 2, 3], dtype="<i8").tobytes()}, "do not rise"),
        ({"documents": np.array([0, 1, 4], dtype="<i8").tobytes()}, "do not end with the end-of-text token"),
    ],
)
def test_indices_of_megatron_that_lie_are_refused(changes, said, tokenizer, tmp_path):
    documents = [np.array([5, 6, 7, tokenizer.eos_token_id], dtype=np.uint16)] * 2
    opened(megatron(tmp_path, documents), tokenizer)
    with pytest.raises(UserError, match=said):
        opened(megatron(tmp_path, documents, **changes), tokenizer)


def test_megatron_cut_short_without_its_half_or_without_ends_of_text(tokenizer, tmp_path):
    documents = [np.array([5, 6, 7, tokenizer.eos_token_id], dtype=np.uint16)] * 2
    path = megatron(tmp_path, documents)
    assert opened(path.with_suffix(".idx"), tokenizer).n_documents == 2  # either name stands for both
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"says 8 tokens of 2 bytes, and 'm.bin' has 14 bytes"):
        opened(path, tokenizer)
    path.unlink()
    with pytest.raises(UserError, match=r"no 'm.bin' beside 'm.idx'"):
        opened(path.with_suffix(".idx"), tokenizer)
    with pytest.raises(UserError, match=r"2 of the 2 documents .* number 1 ends with 6. Make it with --append-eod"):
        opened(megatron(tmp_path, [np.array([5, 6], dtype=np.uint16)] * 2), tokenizer)


def test_saved_data_sets_have_splits_columns_and_faults(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [[5, 6, tokenizer.eos_token_id], [7, tokenizer.eos_token_id]]
    splits = {
        "train": datasets.Dataset.from_dict({"ids": rows}),
        "validation": datasets.Dataset.from_dict({"ids": rows[:1]}),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    spec = CorpusSpec(files=str(tmp_path / "both"), text="ids")
    for split, n in (("train", 5), ("validation", 3)):
        assert tokenize_corpus(resolve("c", spec), tokenizer, split, progress=False).n_tokens == n
    with pytest.raises(UserError, match=r"no column 'input_ids', only: ids"):
        opened(tmp_path / "both/train", tokenizer)
    with pytest.raises(UserError, match="Name one of its folders"):
        opened(tmp_path / "both", tokenizer, holdout=0.5)
    for values, said in (([[5], None], "missing"), ([[0.5]], "where lists of token ids belong"), ([[]], "no token")):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        kind = {"input_ids": datasets.List(datasets.Value("float32" if values == [[0.5]] else "int32"))}
        datasets.Dataset.from_dict({"input_ids": values}, features=datasets.Features(kind)).save_to_disk(
            tmp_path / "bad"
        )
        with pytest.raises(UserError, match=said):
            opened(tmp_path / "bad", tokenizer)
    arrow = next((tmp_path / "both/train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(UserError, match="no readable data set"):
        opened(tmp_path / "both/train", tokenizer, text="ids")
    arrow.unlink()
    os.mkfifo(arrow)
    with pytest.raises(UserError, match="a named pipe"):
        opened(tmp_path / "both/train", tokenizer, text="ids")


def test_pipes_links_folders_and_settings_are_told_as_with_text(tokenizer, tmp_path):
    stream(tokenizer).tofile(tmp_path / "a.bin")
    (tmp_path / "link.bin").symlink_to("a.bin")
    assert same(opened(tmp_path / "link.bin", tokenizer), stream(tokenizer))
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "t.txt").write_text("text\n")
    for settings, said in (
        ({"files": "pipe.bin"}, r"there is no file 'pipe.bin'(?!.*mean 'pipe.bin')"),
        ({"files": "."}, "is a folder"),
        ({"files": ["a.bin", "t.txt"]}, "'t.txt' holds text, and other files hold tokens"),
        ({"files": "a.bin", "text": "ids"}, "'text' names a column"),
        ({"files": "a.bin", "document": "line"}, "'document' is for .txt files"),
        ({"files": "t.txt", "dtype": "uint16"}, "'dtype' is of .bin files"),
        ({"files": "a.bin", "validation": "a.bin"}, "is in 'files' and in 'validation'"),
    ):
        with pytest.raises(UserError, match=said):
            resolve("c", CorpusSpec(**settings), tmp_path)
    with pytest.raises(UserError, match="tokenised already: it holds no text"):
        resolve("c", CorpusSpec(files="a.bin"), tmp_path).documents("train")
    np.arange(5, 50, dtype=np.uint16).tofile(tmp_path / "one.bin")
    with pytest.raises(UserError, match=r"are one document.*corpora.c.validation"):
        opened(tmp_path / "one.bin", tokenizer, holdout=0.1)


def test_an_index_that_is_no_file_or_lies_elsewhere_is_refused_and_found_in_capitals(tokenizer, tmp_path):
    documents = [np.array([5, 6, 7, tokenizer.eos_token_id], dtype=np.uint16)] * 2
    for name, make, said in (
        ("pipe", os.mkfifo, "'.*m.idx' is a named pipe"),
        ("folder", Path.mkdir, "'.*m.idx' is a folder"),
        ("nowhere", lambda index: index.symlink_to("nowhere"), "not lie side by side"),
    ):
        path = megatron(tmp_path / name, documents)
        path.with_suffix(".idx").unlink()
        make(path.with_suffix(".idx"))
        with pytest.raises(UserError, match=said):
            opened(path, tokenizer)
    path = megatron(tmp_path / "real", documents)
    path.with_suffix(".idx").rename(tmp_path / "real/other.idx")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/m.bin").symlink_to(path)
    (tmp_path / "links/m.idx").symlink_to(tmp_path / "real/other.idx")
    with pytest.raises(UserError, match="links to files that do not lie side by side"):  # and not: no index, one text
        opened(tmp_path / "links/m.bin", tokenizer)
    path = megatron(tmp_path / "big", [d[:-1] for d in documents])
    for half in (path, path.with_suffix(".idx")):
        half.rename(half.with_name(half.name.upper()))
    for name in ("M.BIN", "M.IDX", "*"):
        with pytest.raises(UserError, match="Make it with --append-eod"):  # its index is looked at
            opened(tmp_path / "big" / name, tokenizer)


def test_a_saved_data_set_is_read_from_its_own_folder_alone(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": [[5, tokenizer.eos_token_id]]}).save_to_disk(tmp_path / "a")
    (tmp_path / "a/dataset_dict.json").write_text('{"splits": ["../a"]}')
    with pytest.raises(UserError, match=r"dataset_dict.json' is damaged"):
        resolve("c", CorpusSpec(files=str(tmp_path / "a")))
    (tmp_path / "a/dataset_dict.json").unlink()
    state = (tmp_path / "a/state.json").read_text()
    (tmp_path / "a/state.json").write_text(state.replace("data-00000", "../a/data-00000"))
    with pytest.raises(UserError, match=r"state.json' is damaged"):  # what is read is what is hashed
        resolve("c", CorpusSpec(files=str(tmp_path / "a")))


def test_data_sets_of_several_integers_are_one_corpus_of_integers(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [[5, 6, tokenizer.eos_token_id], [7, tokenizer.eos_token_id]]
    for kind in ("uint64", "int32"):
        features = datasets.Features({"input_ids": datasets.List(datasets.Value(kind))})
        datasets.Dataset.from_dict({"input_ids": rows}, features=features).save_to_disk(tmp_path / kind)
    file = opened(tmp_path / "*", tokenizer)
    assert file.tokens.dtype == np.int64 and same(file, np.array([i for row in rows * 2 for i in row]))


def test_an_index_is_of_the_token_that_begins_texts(tokenizer, tmp_path):
    np.array([9, 5, 6, 9, 7, 8, 8], dtype=np.uint16).tofile(tmp_path / "b.bin")
    other = copy.deepcopy(tokenizer)
    for separator, n_documents in ((9, 3), (8, 1)):
        other.bos_token = tokenizer.convert_ids_to_tokens(separator)
        assert opened(tmp_path / "b.bin", other).n_documents == n_documents


def test_tokens_of_another_tokenizer_are_doubted(tokenizer, tmp_path, capsys):
    stream(tokenizer).tofile(tmp_path / "right.bin")
    opened(tmp_path / "right.bin", tokenizer)
    assert capsys.readouterr().err == ""
    other = train_tokenizer(
        [Corpus("o", "1", lambda split: ["entirely other words were here"] * 9)], 280, progress=False
    )
    other.add_special_tokens({"eos_token": "<|end|>"})
    stream(other).tofile(tmp_path / "wrong.bin")
    opened(tmp_path / "wrong.bin", tokenizer)
    assert "Is it the one that made them?" in capsys.readouterr().err


def test_a_file_that_changes_is_another_corpus_and_one_that_moves_is_not(tokenizer, tmp_path):
    ids = stream(tokenizer)
    ids.tofile(tmp_path / "a.bin")
    first = opened(tmp_path / "a.bin", tokenizer)
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    moved = opened(tmp_path / "b.bin", tokenizer)
    assert (moved.path, moved.content) == (first.path, first.content) and same(moved, ids)
    changed = ids.copy()
    changed[3] = 7
    changed.tofile(tmp_path / "b.bin")
    again = opened(tmp_path / "b.bin", tokenizer)
    assert again.content != first.content and same(again, changed)
    old = resolve("c", CorpusSpec(files=str(tmp_path / "b.bin"), holdout=0.0))
    known = Corpus(old.name, old.identity, old.read, None, old.files, "tokens of before", old.pretokenized)
    with pytest.raises(UserError, match="its text has changed since this command began"):
        tokenize_corpus(known, tokenizer, "train", progress=False)


def test_output_of_nanogpt_trains_in_a_recipe_and_its_perplexity_is_that_of_the_tokens(tokenizer, tmp_path):
    stream(tokenizer, TEXTS[:250]).tofile(tmp_path / "train.bin")
    stream(tokenizer, TEXTS[250:]).tofile(tmp_path / "val.bin")
    path = recipe(
        tmp_path,
        corpora={"nano": {"files": "train.bin", "validation": "val.bin"}},
        tokenizer=tokenizer.name_or_path,
        phases=[
            {"name": "first", "data": {"nano": 1.0}, "steps": 4},
            {"name": "second", "data": {"nano": 1.0}, "epochs": 1},
        ],
        batch={"tokens_per_step": 512, "sequences_per_device": 4, "document_mask": True},
        evaluate={"every_steps": 2},
    )
    loaded = load_recipe(path)
    assert plan(loaded)["stages"][1]["steps"] == len(stream(tokenizer, TEXTS[:250])) // 512
    results = run_recipe(loaded, tmp_path / "run", progress=False)
    final = results["phases"][0]["final"]["nano"]
    checkpoint = next((tmp_path / "run/first/seed-1").glob("checkpoint-*"))
    from fire_llm.models import load_model

    told = perplexity(
        load_model(checkpoint, torch.float32), stream(tokenizer, TEXTS[250:]), context=16, prefix=tokenizer.bos_token_id
    )
    assert final["nll"] == pytest.approx(told.nll, abs=1e-6) and final["tokens"] == told.tokens
    assert final["bits_per_byte"] is None and final["bytes"] is None
    assert results["corpora"]["nano"]["validation_bytes"] is None
    names = [str(checkpoint), str(next((tmp_path / "run/second/seed-1").glob("checkpoint-*")))]
    found = score_checkpoints(names, [str(tmp_path / "val.bin")], context=16, progress=False)
    assert found.rows[0].nll == pytest.approx(told.nll, abs=1e-6)
    assert found.rows[0].bits_per_byte is found.rows[0].word_perplexity is None and found.rows[0].documents == 50
    assert found.differences[0].unit == "token"
    shutil.copytree(names[1], tmp_path / "other")
    train_tokenizer([Corpus("o", "1", lambda split: TEXTS)], 290, progress=False).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="holds the tokens of one tokenizer, and these checkpoints have several"):
        score_checkpoints([names[0], str(tmp_path / "other")], [str(tmp_path / "val.bin")], progress=False)
    data = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(data | {"tokenizer": {"train": 300}}))
    with pytest.raises(UserError, match=r"'nano' is tokenised already, and tokenizer.train makes another"):
        load_recipe(path)
    (tmp_path / "val.bin").write_bytes((tmp_path / "val.bin").read_bytes()[:-1])
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=r"val.bin' has .* bytes, which is no whole number of uint16"):
        plan(load_recipe(path))
    path.write_text(yaml.safe_dump(data | {"corpora": {"nano": {"files": "val.bin", "holdout": 0.1}}}))
    with pytest.raises(UserError, match=r"^corpus 'nano': .*no whole number of uint16"):  # told once, of both splits
        plan(load_recipe(path))
