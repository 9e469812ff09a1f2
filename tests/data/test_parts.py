"""Corpora in parts: cut where documents begin, made by several processes, resumed, equal to one process's tokens."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.corpora import corpus_of, prose

from fire_llm import UserError
from fire_llm.data import partition, tokenize_corpus, train_tokenizer
from fire_llm.data.corpora import Corpus, CorpusSpec, resolve
from fire_llm.data.tokens import TokenFile

ROWS = [prose(draw % 40 + 1, seed=draw, end="\n \n") for draw in range(600)]
LINES = {"line": "\n", "blank-line": "\n\n", "heading": "\n\n", "file": "\n"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([corpus_of(ROWS)], 400, progress=False)


class Texts:
    """A corpus of parts that are lists; counts how often each is read."""

    def __init__(self, parts: list[list[str]]) -> None:
        self.texts, self.reads = parts, Counter[int]()
        self.before = lambda part: None

    def plan(self, split: str) -> list[int]:
        return [*range(len(self.texts))]

    def read(self, split: str, part: int) -> Iterator[str]:
        self.reads[part] += 1
        self.before(part)
        yield from self.texts[part]

    def files(self, part: int) -> list[Path]:
        return []

    def cut(self, part: int) -> list[int]:
        return [part]

    def corpus(self, name: str = "made") -> Corpus:
        return Corpus(name, "1", lambda split: [text for part in self.texts for text in part], parts=self)


def content(file: TokenFile) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(file.path.iterdir())}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# --- where files are cut


def wild_text(draw: random.Random, lines: int) -> str:
    """Return lines with headings, several kinds of blank ones and of line breaks, and characters of four bytes."""
    kinds = [
        " = Title = ",
        " = = Section = = ",
        "",
        "",
        " \t ",
        "\u3000",
        "words of a line",
        "größer 🙂 学习",
        "x" * 300,
    ]
    return "".join(draw.choice(kinds) + draw.choice(["\n", "\n", "\n", "\r\n"]) for _ in range(lines))


@pytest.mark.parametrize("document", [*LINES])
def test_the_parts_of_a_text_file_hold_its_documents(document, tmp_path, monkeypatch):
    for seed in range(12):
        draw = random.Random(seed)
        path = tmp_path / f"{seed}.txt"
        path.write_bytes(b"\xef\xbb\xbf" * (seed % 2) + wild_text(draw, draw.randrange(1, 400)).encode())
        corpus = resolve("c", CorpusSpec(files=str(path), document=document, holdout=0.3))
        for step in (1, 7, 100, 3000):
            monkeypatch.setattr(partition, "PART_BYTES", step)
            for split in ("train", "validation"):
                plan = corpus.parts.plan(split)
                found = [text for part in plan for text in corpus.parts.read(split, part)]
                assert found == [*corpus.read(split)], (seed, step)
            assert document == "file" or path.stat().st_size < 6 * step or len(plan) > 1
            assert max(len(part) for part in plan) == 1


def test_the_parts_of_every_kind_of_file_hold_its_rows(tmp_path, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [json.dumps({"text": row}, ensure_ascii=n % 2 == 0) for n, row in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:200]))  # no line break at its end
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[200:300]).encode()))
    (tmp_path / "c.json").write_text(f"[{','.join(rows[300:400])}]")
    parquet.write_table(pa.table({"text": ROWS[400:]}), tmp_path / "d.parquet", row_group_size=17)
    for n in range(50):
        (tmp_path / f"e{n:02d}.jsonl").write_text(json.dumps({"text": f"small {n}"}) + "\n")
    monkeypatch.setattr(partition, "PART_BYTES", 4000)
    corpus = resolve("c", CorpusSpec(files=str(tmp_path / "*.*"), holdout=0.2))
    for split in ("train", "validation"):
        plan = corpus.parts.plan(split)
        assert [text for part in plan for text in corpus.parts.read(split, part)] == [*corpus.read(split)]
        assert len(plan) > 15 and max(map(len, plan)) > 10  # cut where they are long, together where they are short
    monkeypatch.setattr(partition, "MOST_PARTS", 8)
    assert len(corpus.parts.plan("train")) <= 12


def test_a_fault_in_a_part_names_the_line_or_row_of_the_file(tmp_path, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(partition, "PART_BYTES", 500)
    lines = [json.dumps({"text": f"line {n}"}) for n in range(1, 301)]
    lines[233] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.txt").write_bytes(b"a line\n\n" * 400 + b"\xff\n" + b"a line\n\n" * 400)
    parquet.write_table(
        pa.table({"text": [None if n == 150 else "text" for n in range(200)]}),
        tmp_path / "c.parquet",
        row_group_size=20,
    )
    for name, said in (
        ("a.jsonl", "line 234: broken JSON"),
        ("b.txt", "line 801: not UTF-8"),
        ("c.parquet", "row 151: "),
    ):
        corpus = resolve("c", CorpusSpec(files=str(tmp_path / name), holdout=0.0))
        with pytest.raises(UserError, match=said):
            [*(text for part in corpus.parts.plan("train") for text in corpus.parts.read("train", part))]


# --- who makes them


def test_tokens_are_the_same_however_many_processes_make_them(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    corpus = resolve("c", CorpusSpec(files=str(path), holdout=0.1))
    one = tokenize_corpus(corpus, tokenizer, "train", cache=tmp_path / "0", progress=False)
    assert one.n_documents > 500
    monkeypatch.setattr(partition, "PART_BYTES", 8000)
    assert len(corpus.parts.plan("train")) > 5
    (tmp_path / "here/fire_llm").mkdir(parents=True)
    for name in ("json.py", "signal.py", "fire_llm/__init__.py"):  # no process takes modules from the current folder
        (tmp_path / "here" / name).write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path / "here")
    for processes in (1, 2):
        cache = tmp_path / str(processes)
        made = tokenize_corpus(corpus, tokenizer, "train", cache=cache, progress=False, processes=processes)
        assert content(made) == content(one) and made.content == one.content
        assert names(cache) == [made.path.name]  # nothing is left of the parts
    path.write_text(path.read_text() + '{"text": 1}\n')
    changed = resolve("c", CorpusSpec(files=str(path), holdout=0.1))
    with pytest.raises(UserError, match=r"line 601: 'text' is int, not text"):  # told by another process
        tokenize_corpus(changed, tokenizer, "train", cache=tmp_path / "2", progress=False, processes=2)
    assert not [p for p in names(tmp_path / "2") if not p.startswith(".") and p != one.path.name]


def test_finished_parts_are_not_made_again(tokenizer, tmp_path):
    parts = Texts([ROWS[n : n + 50] for n in range(0, 300, 50)])

    def fail(part: int) -> None:
        if part == 3:
            raise UserError("the disk went away")

    parts.before = fail
    with pytest.raises(UserError, match="the disk went away"):
        tokenize_corpus(parts.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    (folder,) = tmp_path.glob(".made-train-*.parts")
    assert sorted(p.name for p in folder.glob("part-*")) == ["part-00000", "part-00001", "part-00002"]
    early = TokenFile.open(folder / "part-00001")  # readable before the others are there
    assert early.n_documents == 50 and json.loads((folder / "manifest.json").read_text())["split"] == "train"
    parts.before = lambda part: None
    made = tokenize_corpus(parts.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    assert parts.reads == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1} and names(tmp_path) == [made.path.name]
    whole = Corpus("made", "1", lambda split: ROWS[:300])
    assert content(made) == content(tokenize_corpus(whole, tokenizer, "train", cache=tmp_path / "one", progress=False))


def test_a_part_that_is_damaged_is_made_again(tokenizer, tmp_path):
    parts = Texts([ROWS[:9], ROWS[9:20], ROWS[20:40]])

    def damage(part: int) -> None:
        if part == 2 and parts.reads[2] == 1:
            (tokens,) = tmp_path.glob(".made-train-*.parts/part-00001/tokens.bin")
            tokens.write_bytes(bytes(tokens.stat().st_size))

    parts.before = damage
    with pytest.raises(UserError, match=r"part-00001 was not what was written \(tokens.bin\), and is deleted"):
        tokenize_corpus(parts.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    made = tokenize_corpus(parts.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    assert made.n_documents == 40 and parts.reads == {0: 1, 1: 2, 2: 1}


def test_parts_cut_in_another_way_are_not_mixed(tokenizer, tmp_path):
    first = Texts([ROWS[:9], ROWS[9:20], ROWS[20:40]])

    def fail(part: int) -> None:
        if part == 2:
            raise UserError("stopped")

    first.before = fail
    with pytest.raises(UserError, match="stopped"):
        tokenize_corpus(first.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    second = Texts([ROWS[:20], ROWS[20:40]])
    made = tokenize_corpus(second.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    assert made.n_documents == 40 and second.reads == {0: 1, 1: 1}


def test_no_part_is_added_to_those_of_a_command_that_cuts_in_another_way(tokenizer, tmp_path):
    parts = Texts([ROWS[:9], ROWS[9:20], ROWS[20:40]])

    def other(part: int) -> None:
        if part == 1:
            (manifest,) = tmp_path.glob(".made-train-*.parts/manifest.json")
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"parts": [[0], [1]]}))

    parts.before = other
    with pytest.raises(UserError, match="another command cuts corpus 'made' in another way"):
        tokenize_corpus(parts.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    assert [p.parent.name for p in tmp_path.glob(".made-train-*.parts/part-*/meta.json")] == ["part-00000"]


def test_two_machines_share_the_parts_of_a_corpus(tokenizer, tmp_path):
    """Locks of two open files exclude each other within a process as they do between machines."""
    parts, begun = Texts([ROWS[n : n + 20] for n in range(0, 200, 20)]), threading.Barrier(2, timeout=60)

    def meet(part: int) -> None:
        if part < 2:
            begun.wait()  # which ends only if both are at work, each on a part of its own

    parts.before, found = meet, []

    def machine() -> None:
        made = tokenize_corpus(parts.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
        found.append(content(made))

    threads = [threading.Thread(target=machine) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2 and found[0] == found[1] and set(parts.reads.values()) == {1}
    assert len(parts.reads) == 10


def test_no_part_is_kept_of_text_that_was_changed_meanwhile(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    monkeypatch.setattr(partition, "PART_BYTES", 8000)
    corpus = resolve("c", CorpusSpec(files=str(path), holdout=0.0))

    class Changing(type(corpus.parts)):  # type: ignore[misc]
        def read(self, split: str, part: Any = None) -> Iterator[str]:
            yield from super().read(split, part)
            if part and part[0].start:
                path.write_text(path.read_text() + "\n")

    changing = Changing(**{name: getattr(corpus.parts, name) for name in corpus.parts.__dataclass_fields__})
    with pytest.raises(UserError, match="was changed while it was read"):
        tokenize_corpus(
            replace(corpus, parts=changing), tokenizer, "train", cache=tmp_path, progress=False, processes=1
        )
    (folder,) = tmp_path.glob(".c-train-*.parts")
    assert [p.name for p in folder.glob("part-*")] == ["part-00000"]


def test_a_split_without_documents_in_any_part_is_told(tokenizer, tmp_path):
    parts = Texts([["", " "], ["\n"]])
    with pytest.raises(UserError, match="has no training documents"):
        tokenize_corpus(parts.corpus(), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    sparse = Texts([["", " "], ["one"]])  # a part may be empty
    made = tokenize_corpus(sparse.corpus("sparse"), tokenizer, "train", cache=tmp_path, progress=False, processes=1)
    assert made.n_documents == 1


PROGRAM = """
import sys
from pathlib import Path
from fire_llm.data import partition, tokenize_corpus
from fire_llm.data.corpora import CorpusSpec, resolve
from fire_llm.models import load_tokenizer
partition.PART_BYTES = 200_000
corpus = resolve("c", CorpusSpec(files=sys.argv[1], holdout=0.0))
tokenize_corpus(corpus, load_tokenizer(sys.argv[2]), "train", cache=sys.argv[3], progress=False, processes=2)
"""


@pytest.mark.slow
def test_a_killed_command_takes_its_processes_with_it_and_goes_on(tokenizer, tmp_path):
    path, folder, cache = tmp_path / "c.jsonl", tmp_path / "tokenizer", tmp_path / "cache"
    path.write_text("".join(json.dumps({"text": f"{n} {row}"}) + "\n" for n in range(60) for row in ROWS))
    tokenizer.save_pretrained(folder)
    command = [sys.executable, "-c", PROGRAM, str(path), str(folder), str(cache)]
    with subprocess.Popen(command) as process:
        while len([*cache.glob(".c-train-*.parts/part-*/meta.json")]) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    (parts,) = cache.glob(".c-train-*.parts")
    time.sleep(2)  # the processes that it started notice that it is gone
    finished = {p: p.stat().st_mtime_ns for p in parts.glob("part-*/meta.json")}
    time.sleep(1)
    assert finished == {p: p.stat().st_mtime_ns for p in parts.glob("part-*/meta.json")}
    kept = {p.parent.name: os.stat(p).st_ino for p in finished}
    again = subprocess.Popen(command)
    seen: dict[str, int] = {}
    while again.poll() is None:
        for place in parts.glob("part-*/meta.json"):
            try:
                seen[place.parent.name] = place.stat().st_ino
            except FileNotFoundError:
                continue
        time.sleep(0.01)
    assert again.returncode == 0 and kept.items() <= seen.items()
    corpus = resolve("c", CorpusSpec(files=str(path), holdout=0.0))
    (made,) = (TokenFile.open(p) for p in cache.glob("c-train-*"))
    one = tokenize_corpus(corpus, tokenizer, "train", cache=tmp_path / "one", progress=False)
    assert content(made)["tokens.bin"] == content(one)["tokens.bin"]
    assert content(made)["documents.bin"] == content(one)["documents.bin"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_told(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {row}"}) + "\n" for n in range(60) for row in ROWS))
    monkeypatch.setattr(partition, "PART_BYTES", 200_000)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def kill() -> None:
        while not started:
            time.sleep(0.01)
        started[0].send_signal(signal.SIGKILL)

    threading.Thread(target=kill).start()
    corpus = resolve("c", CorpusSpec(files=str(path), holdout=0.0))
    with pytest.raises(RuntimeError, match="was killed by SIGKILL, most often because the machine ran out of memory"):
        tokenize_corpus(corpus, tokenizer, "train", cache=tmp_path, progress=False, processes=2)
    assert all(process.poll() is not None for process in started)


# --- streams


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a data set of several files, as the Hub has them, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    (tmp_path / "data").mkdir()
    for n in range(6):
        rows = [json.dumps({"text": row}) for row in ROWS[n * 100 : n * 100 + 100]]
        (tmp_path / f"data/train-{n:05d}-of-00006.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def test_a_stream_becomes_the_same_tokens_and_its_text_is_not_stored(shards, tokenizer, tmp_path):
    spec = CorpusSpec(dataset=str(shards), holdout=0.1, streaming=True)
    stream = resolve("h", spec)
    assert len(stream.parts.plan("train")) == 6
    made = [
        tokenize_corpus(stream, tokenizer, split, cache=tmp_path / "s", progress=False, processes=1)
        for split in ("train", "validation")
    ]
    assert not [path for path in (tmp_path / "hub-cache").rglob("*") if path.suffix == ".arrow"]
    table = resolve("h", spec.model_copy(update={"streaming": None}))
    assert table.fingerprint == stream.fingerprint  # how text is fetched is no part of what it is
    for file, split in zip(made, ("train", "validation"), strict=True):
        other = tokenize_corpus(table, tokenizer, split, cache=tmp_path / "t", progress=False)
        assert content(file) == content(other)


def test_a_stream_that_breaks_off_goes_on_from_its_finished_parts(shards, tokenizer, tmp_path):
    corpus = resolve("h", CorpusSpec(dataset=str(shards), holdout=0.0, streaming=True))
    place = shards / "train-00004-of-00006.jsonl"
    whole = place.read_text()
    place.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="goes on from the finished parts"):
        tokenize_corpus(corpus, tokenizer, "train", cache=tmp_path / "s", progress=False, processes=1)
    (folder,) = (tmp_path / "s").glob(".h-train-*.parts")
    assert len([*folder.glob("part-*")]) == 4
    place.write_text(whole)
    corpus = resolve("h", CorpusSpec(dataset=str(shards), holdout=0.0, streaming=True))
    made = tokenize_corpus(corpus, tokenizer, "train", cache=tmp_path / "s", progress=False, processes=1)
    assert made.n_documents == len([row for row in ROWS if row.strip()])


def test_streaming_belongs_to_data_of_the_hub(tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    for name, spec in (("c", CorpusSpec(files="a.txt", streaming=True)), ("python-docs", CorpusSpec(streaming=True))):
        with pytest.raises(UserError, match="streaming does not apply to"):
            resolve(name, spec, tmp_path)
