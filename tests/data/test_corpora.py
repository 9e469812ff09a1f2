"""Corpora: every source gives the documents it should, in two disjoint splits, or one clear message."""

from __future__ import annotations

import ast
import builtins
import gzip
import hashlib
import json
import os
import resource
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from support.ranks import Raised, run_ranks

from fire_llm.core.errors import UserError
from fire_llm.data import builtin, extract
from fire_llm.data.builtin import Builtin
from fire_llm.data.cache import content_hashes
from fire_llm.data.corpora import CORPORA, CorpusSpec, held_out, resolve

ALL = {"holdout": 0.0}


def documents(root: Path, name: str = "corpus", split: str = "train", **settings: object) -> list[str]:
    return list(resolve(name, CorpusSpec(**settings) if settings else None, root).documents(split))


def write_zst(path: Path, data: bytes) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)


# --- local files


def test_blank_lines_end_documents_of_text_files_by_default(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \t\nthree\n\n\nfour")
    assert documents(tmp_path, "a.txt", **ALL) == ["one\ntwo", "three", "four"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("line", [" = A = ", " text a", " = = Part = = ", " more a", " = B = ", " = not a title = ", " text b"]),
        ("file", [" \n = A = \n \n text a\n \n = = Part = = \n \n more a\n \n = B = \n = not a title = \n text b"]),
        (
            "heading",
            ["= A = \n \n text a\n \n = = Part = = \n \n more a", "= B = \n = not a title = \n text b"],
        ),
    ],
)
def test_document_kinds(tmp_path: Path, document: str, expected: list[str]) -> None:
    wiki = " \n = A = \n \n text a\n \n = = Part = = \n \n more a\n \n = B = \n = not a title = \n text b\n"
    (tmp_path / "wiki.txt").write_text(wiki)
    assert documents(tmp_path, "wiki.txt", document=document, **ALL) == expected


def test_json_lines_arrays_parquet_and_compression_give_the_same_documents(tmp_path: Path) -> None:
    texts = ["first", "zweite, größer", "line\nbreak", "  "]
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(lines)
    (tmp_path / "c.json").write_text("\n " + json.dumps(rows, indent=1))
    # Two members, as `cat` of two compressed files leaves them.
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines[:20].encode()) + gzip.compress(lines[20:].encode()))
    write_zst(tmp_path / "e.json.zst", lines.encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert documents(tmp_path, path.name, **ALL) == texts[:3], path.name


def test_globs_and_lists_are_sorted_and_read_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "odd[1].txt").write_text("odd")
    assert documents(tmp_path, files=["*.txt", "b.txt"], **ALL) == ["a.txt", "b.txt", "odd"]
    assert documents(tmp_path, "**/*.txt", **ALL) == ["a.txt", "b.txt", "deep/c.txt", "odd"]
    assert documents(tmp_path, "odd[1].txt", **ALL) == ["odd"]
    assert documents(tmp_path, str(tmp_path / "a.txt"), **ALL) == ["a.txt"]


def test_given_validation_files_leave_all_of_the_others_for_training(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n\n".join(f"train {n}" for n in range(300)))
    (tmp_path / "valid.jsonl").write_text('{"body": "v1"}\n{"body": "v2"}\n')
    settings = {"files": "train.txt", "validation": "valid.jsonl", "text": "body"}
    assert len(documents(tmp_path, **settings)) == 300
    assert documents(tmp_path, split="validation", **settings) == ["v1", "v2"]


def test_held_out_documents_are_disjoint_stable_and_as_many_as_asked(tmp_path: Path) -> None:
    texts = [f"document number {n}" for n in range(4000)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    train = documents(tmp_path, "a.txt", document="line", holdout=0.1)
    validation = documents(tmp_path, "a.txt", split="validation", document="line", holdout=0.1)
    assert sorted(train + validation) == sorted(texts)
    assert 340 < len(validation) < 460  # ±3 standard deviations of a binomial
    # Order, neighbours and file have no say; a larger fraction only adds.
    (tmp_path / "b.txt").write_text("\n".join(reversed(texts[:2000])))
    half = documents(tmp_path, "b.txt", split="validation", document="line", holdout=0.1)
    assert set(half) == set(validation) & set(texts[:2000])
    assert set(validation) < set(documents(tmp_path, "a.txt", split="validation", document="line", holdout=0.2))
    # The 64-bit BLAKE2b of "abc" is 0.84660 of 2**64: the choice must not change between versions.
    assert held_out("abc", 0.847) and not held_out("abc", 0.846)


def test_fingerprint_follows_the_file_and_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")

    def fingerprint(**settings: object) -> str:
        return resolve("a.txt", CorpusSpec(**settings), tmp_path).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert len({first, fingerprint(holdout=0.2), fingerprint(document="line")}) == 3
    os.utime(path, ns=(1, 1))
    assert fingerprint() == first  # unpacked again
    path.write_text("one\n\ntwo\n\nthree")
    os.utime(path, ns=(1, 1))
    longer = fingerprint()
    path.write_text("one\n\ntwo\n\nTHREE")
    os.utime(path, ns=(2, 2))
    assert len({first, longer, fingerprint()}) == 3
    for text in ("one", "two"):  # in place, of the same size, with the time that it had
        path.write_text(text)
        os.utime(path, ns=(3, 3))
        assert fingerprint() == resolve("a.txt", CorpusSpec(), _copied(path)).fingerprint


def _copied(path: Path) -> Path:
    copy = path.parent / path.read_text()
    copy.mkdir()
    (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_corpus_is_what_its_files_hold(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("one\n\ntwo")
        (tmp_path / folder / "b.txt").write_text("three")

    def fingerprint(folder: str, **settings: object) -> str:
        return resolve("mine", CorpusSpec(**settings), tmp_path / folder).fingerprint

    both: dict[str, object] = {"files": ["a.txt", "b.txt"]}
    assert fingerprint("here", **both) == fingerprint("there", **both)
    splits: list[dict[str, object]] = [both, {"files": "a.txt"}, {"files": "a.txt", "validation": "b.txt"}]
    assert len({fingerprint("here", **split) for split in splits}) == 3
    (tmp_path / "there" / "b.txt").rename(tmp_path / "there" / "0.txt")  # now the first to be read
    assert fingerprint("there", files="*.txt") != fingerprint("here", files="*.txt")
    (tmp_path / "here" / "a.json").write_text('["one"]')
    (tmp_path / "here" / "a.txt").write_text('["one"]')
    assert fingerprint("here", files="a.json") != fingerprint("here", files="a.txt")


def test_a_hash_is_remembered_and_a_spoiled_note_is_not_believed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FIRE_LLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc" * 700_000)
    piece = hashlib.blake2b(path.read_bytes(), digest_size=32).digest()
    wanted = [hashlib.blake2b(piece, digest_size=32).hexdigest()]
    assert content_hashes("a", [path]) == wanted
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    written = note.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("fire_llm.data.cache.hash_file", lambda *_, **__: pytest.fail("hashed again"))
        assert content_hashes("a", [path]) == wanted
    for spoiled in ("0" * 64, "0" * 64 + written[64:], written[:-1], ""):
        note.write_text(spoiled)
        assert content_hashes("a", [path]) == wanted and note.read_text() == written
    monkeypatch.setenv("FIRE_LLM_CACHE", str(path / "no-folder"))
    assert content_hashes("a", [path]) == wanted


def wrong_files(root: Path) -> None:
    (root / "good.txt").write_text("good\n\n" * 3)
    (root / "table.csv").write_text("a,b")
    (root / "latin.txt").write_bytes("fine\n\nschön".encode("latin1"))
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (root / "list.jsonl").write_text('{"text": "a"}\n\n["b"]\n')
    (root / "column.jsonl").write_text('{"texts": "a"}\n')
    (root / "null.jsonl").write_text('{"text": null}\n')
    (root / "surrogate.jsonl").write_text('{"text": "a\\ud800"}\n')
    (root / "array.json").write_text('[{"text": "a"}, 3]')
    (root / "half.json").write_text('[{"text": "a"}')
    (root / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-200])
    (root / "fake.txt.gz").write_bytes(b"not compressed")
    write_zst(root / "whole.txt.zst", os.urandom(5000).hex().encode())
    (root / "cut.txt.zst").write_bytes((root / "whole.txt.zst").read_bytes()[:-200])
    (root / "fake.parquet").write_bytes(b"PAR1 not really")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "n": [1]}), root / "other.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), root / "null.parquet")


@pytest.mark.parametrize(
    ("name", "settings", "parts"),
    [
        ("good.text", {}, ["unknown corpus 'good.text'", "python-docs", ".jsonl", "corpora.good.text.files"]),
        ("pyhton-docs", {}, ["Did you mean 'python-docs'?"]),
        ("god.txt", {}, ["there is no file 'god.txt'", "Did you mean 'good.txt'?"]),
        ("none/*.txt", {}, ["no file matches 'none/*.txt'"]),
        ("folder", {}, ["is a folder", "folder/*.jsonl"]),
        ("x", {"files": "folder/"}, ["'folder/' is a folder", "folder/*.jsonl"]),
        ("table.csv", {}, ["table.csv", ".parquet", "Convert"]),
        ("x", {"files": ["good.txt", "*.csv"]}, ["cannot read 'table.csv'", ".parquet"]),
        ("x", {"files": []}, ["'files' is an empty list"]),
        ("x", {"holdout": 0.5}, ["unknown corpus 'x'", "corpora.x.files"]),
        ("x", {"files": "good.txt", "dataset": "a/b"}, ["corpora.x", "exclude each other"]),
        ("x", {"files": "good.txt", "validation": "good.txt"}, ["good.txt", "Leave it out of 'files'"]),
        ("x", {"files": "good.txt", "validation": "latin.txt", "holdout": 0.1}, ["'validation' and 'holdout' exclude"]),
        ("x", {"files": "good.txt", "revision": "main"}, ["corpora.x.revision does not apply to local files"]),
        ("x", {"files": "good.txt", "text": "body"}, ["'text' names a column"]),
        ("x", {"files": "null.jsonl", "document": "line"}, ["'document' is for .txt files"]),
        ("python-docs", {"document": "line"}, ["corpora.python-docs.document does not apply to a built-in corpus"]),
        ("wikitext-103", {"document": "line"}, ["corpora.wikitext-103.document does not apply to a Hub data set"]),
        ("latin.txt", {}, ["latin.txt, line 3: not UTF-8", "iconv"]),
        ("broken.jsonl", {}, ["broken.jsonl, line 2: broken JSON", "one JSON object a line"]),
        ("list.jsonl", {}, ["list.jsonl, line 3: a list"]),
        ("column.jsonl", {}, ["column.jsonl, line 1: no 'text'", "Did you mean 'texts'?", ".text"]),
        ("null.jsonl", {}, ["null.jsonl, line 1: 'text' is NoneType"]),
        ("surrogate.jsonl", {}, ["surrogate.jsonl, line 1", "surrogate"]),
        ("array.json", {}, ["array.json, element 2: a int"]),
        ("half.json", {}, ["half.json: broken JSON", "one array of objects"]),
        ("cut.txt.gz", {}, ["cut.txt.gz", "truncated"]),
        ("fake.txt.gz", {}, ["fake.txt.gz", "damaged"]),
        ("cut.txt.zst", {}, ["cut.txt.zst", "truncated"]),
        ("fake.parquet", {}, ["fake.parquet is no readable Parquet file"]),
        ("other.parquet", {}, ["no column 'text', only: content, n", "corpora.other.parquet.text"]),
        ("other.parquet", {"text": "n"}, ["row 1: 'n' is int64, not text"]),
        ("null.parquet", {}, ["row 2: 'text' is null"]),
    ],
)
def test_every_mistake_has_its_message(
    tmp_path: Path, name: str, settings: dict[str, object], parts: list[str]
) -> None:
    wrong_files(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        documents(tmp_path, name, **settings)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.json", "t.txt.gz"])
def test_text_of_two_or_four_bytes_a_character_is_told_with_the_right_advice(
    tmp_path: Path, name: str, encoding: str
) -> None:
    text = json.dumps([{"text": "eins, zwei"}]) if "json" in name else "eins\r\n\r\nzwei"
    raw = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(
        UserError, match=rf"iconv -f {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')} -t UTF-8"
    ):
        documents(tmp_path, name)


def test_text_with_a_few_nuls_or_a_mark_is_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfa\x00b\n\nc")
    assert sorted(documents(tmp_path, "t.txt", holdout=0.0)) == ["a\x00b", "c"]


@pytest.mark.parametrize("name", ["e.txt", "e.jsonl", "e.json", "e.txt.gz", "e.parquet"])
def test_an_empty_file_has_no_documents(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert documents(tmp_path, name) == []


def test_a_missing_column_names_both_ways_to_give_it(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=r"corpora\.t\.jsonl\.text in a recipe, --column with eval"):
        documents(tmp_path, "t.jsonl")


def test_the_home_folder_is_known_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("eins\n\nzwei")
    assert [*resolve("~/t.txt", CorpusSpec(holdout=0.0)).documents("train")] == ["eins", "zwei"]
    assert [*resolve("t.txt", CorpusSpec(holdout=0.0), Path("~")).documents("train")] == ["eins", "zwei"]
    with pytest.raises(UserError, match=r"there is no file '~nobody-here/t\.txt'"):
        resolve("~nobody-here/t.txt")


def test_text_that_one_corpus_trains_on_and_another_holds_out_is_found(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("eins\n\nzwei")
    tenth, fifth, whole, lines, given, other = (
        resolve("x", CorpusSpec(**{"files": "a.txt"} | settings), tmp_path)
        for settings in (
            {"holdout": 0.1}, {"holdout": 0.2}, {"holdout": 0.0}, {"holdout": 0.2, "document": "line"},
            {"files": "b.txt", "validation": "a.txt"}, {"files": "b.txt"},
        )
    )  # fmt: skip
    for own, measured in ((tenth, fifth), (whole, tenth), (lines, fifth), (tenth, given)):
        assert own.trains_on_held_out(measured) == (tmp_path / "a.txt").resolve()
    for own, measured in ((fifth, tenth), (fifth, fifth), (fifth, whole), (given, tenth), (other, tenth)):
        assert own.trains_on_held_out(measured) is None


def test_an_unknown_split_and_an_unknown_setting_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"unknown split 'valid'.*Did you mean 'validation'"):
        documents(tmp_path, "a.txt", split="valid")
    with pytest.raises(ValueError, match="hold_out"):
        CorpusSpec(hold_out=0.1)
    with pytest.raises(ValueError, match="holdout"):
        CorpusSpec(holdout=1.0)


def test_every_setting_is_described_in_the_schema() -> None:
    assert all(setting["description"] for setting in CorpusSpec.model_json_schema()["properties"].values())


# --- the Hub, without a network


class FakeRows:
    def __init__(self, **columns: list[object]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def select_columns(self, names: list[str]) -> FakeRows:
        return FakeRows(**{name: self.columns[name] for name in names})

    def iter(self, batch_size: int) -> list[dict[str, list[object]]]:
        return [{name: values[half::2] for name, values in self.columns.items()} for half in (0, 1)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace datasets.load_dataset; what it returns or raises is `result`, its calls are `calls`."""
    import datasets

    fake = SimpleNamespace(calls=[], result={})

    def load_dataset(*args: object, **kwargs: object) -> object:
        fake.calls.append((args, kwargs))
        if isinstance(fake.result, Exception):
            raise fake.result
        return fake.result

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return fake


def test_wikitext_uses_its_published_split_and_leaves_empty_rows_out(hub: SimpleNamespace) -> None:
    hub.result = {"train": FakeRows(text=["", " = A = \n", "text\n"]), "validation": FakeRows(text=["v\n", ""])}
    corpus = resolve("wikitext-103")
    assert hub.calls == []  # a fingerprint must not cost a download
    assert sorted(corpus.documents("train")) == [" = A = \n", "text\n"]
    assert list(corpus.documents("validation")) == ["v\n"]
    assert hub.calls == [(("Salesforce/wikitext", "wikitext-103-raw-v1"), {"revision": None})]


def test_every_process_reads_the_commit_that_the_first_one_saw(hub: SimpleNamespace, monkeypatch) -> None:
    """The Hub moves on between two processes: the second is told the commit and asks for nothing."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=commits.pop()))
    hub.result = {"train": FakeRows(text=["one", "two"])}
    for streaming in (None, True):
        commits = ["a" * 40]
        first = resolve("user/data", CorpusSpec(revision="main", holdout=0, streaming=streaming))
        assert list(first.documents("train")) and list(first.documents("validation")) == []
        second = resolve("user/data", first.parts.settings())
        assert list(second.documents("train"))
        options = {"streaming": True} if streaming else {}
        assert hub.calls == 2 * [(("user/data", None), {"revision": "a" * 40, **options})]
        hub.calls.clear()


def test_openwebtext_and_a_set_holdout_hold_out_by_hash(hub: SimpleNamespace) -> None:
    texts = [f"page {n}" for n in range(20000)]
    hub.result = {"train": FakeRows(text=list(texts))}
    corpus = resolve("openwebtext")
    held = list(corpus.documents("validation"))
    assert sorted(held) == sorted(text for text in texts if held_out(text, 0.0005)) and 1 <= len(held) <= 25
    assert len(list(corpus.documents("train"))) == 20000 - len(held)
    hub.result = {"train": FakeRows(text=list(texts)), "validation": FakeRows(text=["published"])}
    assert len(list(resolve("wikitext-103", CorpusSpec(holdout=0.5)).documents("validation"))) > 9000


def test_any_hub_id_with_its_settings(hub: SimpleNamespace) -> None:
    hub.result = {"train": FakeRows(body=["a"] * 4, text=[1] * 4)}
    spec = CorpusSpec(dataset="user/data", config="en", revision="abc", text="body", holdout=0)
    assert list(resolve("mine", spec).documents("train")) == ["a"] * 4
    assert hub.calls == [(("user/data", "en"), {"revision": "abc"})]
    assert resolve("mine", spec).fingerprint != resolve("mine", spec.model_copy(update={"revision": "d"})).fingerprint
    with pytest.raises(UserError, match="'text' of user/data holds int"):
        list(resolve("user/data").documents("train"))
    with pytest.raises(UserError, match=r"no column 'bdy', only: body, text. Did you mean 'body'"):
        list(resolve("user/data", CorpusSpec(text="bdy")).documents("train"))
    hub.result = {"test": FakeRows(text=["a"])}
    with pytest.raises(UserError, match="no 'train' split, only: test"):
        list(resolve("user/data").documents("train"))


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ConnectionError("Couldn't reach the Hub"), "Check the name and the network"),
        (ValueError("Config name is missing. Pick one of: ['a', 'b']"), "Set corpora.user/data.config in a recipe"),
        (RuntimeError("Dataset scripts are no longer supported, but found data.py"), "refs/convert/parquet"),
    ],
)
def test_hub_failures_say_what_to_do_offline(hub: SimpleNamespace, error: Exception, part: str) -> None:
    hub.result = error
    with pytest.raises(UserError) as caught:
        list(resolve("user/data").documents("train"))
    for expected in (part, str(error), "corpora.user/data.files", "python-docs"):
        assert expected in str(caught.value)


# --- what every installation has

SOURCE = '''\
# Copyright 2020 Somebody. All rights reserved, and so on for quite a few words.
"""Say what the module does.

Licensed under some terms.

    indented
"""
# A comment that is long enough to count as prose
# because it goes on in a second line.
# short one

class A:
    """Document the class."""

    def f(self):
        """Document the method."""
        text = """
# not a comment at all, although it starts like one and is long
"""
        if text:
            async def g(): "Document the inner function."
        return 1  # trailing remarks are left out, however many words they have
'''


def read_bomb(rank: int, world: int, folder: Path) -> None:
    """Read a text with 256 MiB of memory left."""
    list(resolve("small", CorpusSpec(files="small.txt.gz"), folder).documents("train"))
    lines = Path("/proc/self/status").read_text().splitlines()
    used = 1024 * int(next(line for line in lines if line.startswith("VmSize")).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
    list(resolve("bomb", CorpusSpec(files="bomb.txt.gz", holdout=0.0), folder).documents("train"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads how much memory is used from /proc")
def test_a_line_that_memory_does_not_hold_is_a_message(tmp_path: Path) -> None:
    """Half a megabyte holds a line of 512 MiB; 256 MiB are left."""
    (tmp_path / "small.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(2**25).replace(b"\0", b"a"), 1) * 16)
    (told,) = run_ranks(1, read_bomb, tmp_path, tmp_path)
    assert isinstance(told, Raised) and told.startswith("UserError: ")
    assert "bomb.txt.gz holds a line, a document or an array that there is not enough memory for" in told


def test_a_line_longer_than_any_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fire_llm.data.files.LONGEST_LINE", 10)
    (tmp_path / "fits.txt").write_text("0123456789")
    (tmp_path / "long.txt").write_text("short\n0123456789\n")
    assert [*resolve("fits", CorpusSpec(files="fits.txt", holdout=0.0), tmp_path).documents("train")] == ["0123456789"]
    with pytest.raises(UserError, match=r"long.txt, line 2: longer than 10 bytes"):
        [*resolve("long", CorpusSpec(files="long.txt", holdout=0.0), tmp_path).documents("train")]


def test_hub_data_without_datasets_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        resolve("wikitext-103")


def test_docstrings_and_comments_come_in_order_without_legal_text(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    module = "Say what the module does.\n\n    indented"
    comment = "A comment that is long enough to count as prose\nbecause it goes on in a second line.\nshort one"
    inner = ["Document the class.", "Document the method.", "Document the inner function."]
    assert extract.extract_blocks(str(path), "docstrings") == [module, *inner]
    assert extract.extract_blocks(str(path), "docstrings+comments") == [module, comment, *inner]
    assert extract.extract_blocks(str(path), "source") == ["\n".join(SOURCE.split("\n")[1:])]


def test_comments_agree_with_the_tokenizer_of_python() -> None:
    """Every comment taken from a large real module is one by Python's own tokenizer, and none of it is code."""
    path = ast.__file__
    with open(path, encoding="utf-8") as file:
        real = {
            t.string.lstrip("#").strip() for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT
        }
    docstrings = extract.extract_blocks(path, "docstrings")
    comments = [block for block in extract.extract_blocks(path, "docstrings+comments") if block not in docstrings]
    assert comments
    assert all(line.strip() in real or not line.strip() for block in comments for line in block.split("\n"))


@pytest.mark.parametrize(
    "content", [b"def broken(:\n", b"\xff\xfe\x00", b"# coding: nonsense\n", b"x = '\\0'\0", b"(" * 5000, b""]
)
def test_strange_files_cost_nothing_but_themselves(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.py").write_bytes(content)
    assert "".join(extract.extract_blocks(str(tmp_path / "odd.py"), "docstrings+comments")) == ""


@pytest.fixture
def fresh() -> Iterator[None]:
    builtin.documents.cache_clear()
    yield
    builtin.documents.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_repeated_blocks_and_stubs_are_dropped_and_long_files_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, long = "A block of documentation that two files have in common. " * 2, "x" * builtin.MAX_CHARACTERS
    (tmp_path / "a.py").write_text(f'"""{shared}"""\ndef f():\n    """{long}1"""\ndef g():\n    """Own."""\n')
    (tmp_path / "b.py").write_text(f'"""{shared}"""\ndef f():\n    """{long}2"""\n')
    (tmp_path / "c.py").write_text('"""A stub."""')
    monkeypatch.setattr(builtin, "_files", lambda _: sorted(map(str, tmp_path.glob("*.py"))))
    expected = (shared.strip(), f"{long}1", f"{long}2")
    assert builtin.documents(Builtin("docstrings")) == expected


@pytest.mark.usefixtures("fresh")
def test_the_documents_do_not_depend_on_how_they_are_extracted(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Builtin("docstrings+comments", packages=("filelock", "tqdm"))
    monkeypatch.setattr(builtin, "_FILES_A_WORKER", 4)
    parallel = builtin.documents(small)
    assert len(parallel) > 20 and len(set(parallel)) == len(parallel)

    def no_subprocess(*args: object, **kwargs: object) -> None:
        raise OSError("no interpreter")

    builtin.documents.cache_clear()
    monkeypatch.setattr(subprocess, "run", no_subprocess)
    assert builtin.documents(small) == parallel


def test_a_share_is_a_fixed_part_of_the_files() -> None:
    everything = builtin._files(Builtin("source"))
    some = builtin._files(Builtin("source", share=0.3))
    assert set(some) < set(everything) and 0.2 < len(some) / len(everything) < 0.4
    assert not any("site-packages" in path or "/test/" in path for path in everything)


def test_builtin_fingerprints_follow_versions_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve("library-docs").fingerprint
    assert "torch=" in first and "transformers=" in first
    assert resolve("library-docs", CorpusSpec(holdout=0.1)).fingerprint != first
    monkeypatch.setattr(builtin.importlib.metadata, "version", lambda package: "0.0")
    assert resolve("library-docs").fingerprint != first
    monkeypatch.undo()
    monkeypatch.setitem(
        CORPORA, "library-docs", type(CORPORA["library-docs"])("", builtin=Builtin("source", ("no-such",)))
    )
    with pytest.raises(UserError, match="pip install no-such"):
        resolve("library-docs")


def test_a_python_without_topics_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("pydoc_data"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="comes without pydoc_data"):
        builtin._topics(Builtin("docstrings", topics=True))


def test_python_docs() -> None:
    corpus = resolve("python-docs")
    train, validation = list(corpus.documents("train")), list(corpus.documents("validation"))
    size = sum(map(len, train))
    assert size > 1_000_000 and 0.01 < sum(map(len, validation)) / size < 0.12
    assert not set(train) & set(validation)
    assert any('The "with" statement' in text for text in train + validation)
    assert list(resolve("python-docs").documents("train")) == train


def test_the_extraction_works_in_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from fire_llm.data.corpora import builtin\n"
        "print(len(builtin.documents(builtin.Builtin('docstrings', packages=('tqdm',)))))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and int(done.stdout) > 5
