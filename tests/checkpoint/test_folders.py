"""The folders that `apply` reads and writes: changed, linked, shared, odd; nothing is mixed, leaked or lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from fire_llm import UserError, fire_, reset_checkpoint
from fire_llm.architectures.configs import read_config
from fire_llm.checkpoint.inspection import inspect_checkpoint
from fire_llm.models import config_for, load_model, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Save a tiny GPT-2."""
    tiny_gpt2().save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    return tmp_path / "src"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def changed(path: Path, value: object) -> None:
    """Change one key of a JSON file, or take it out."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **dict([value])}))


# ---- a source that changes


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", "config.json"])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_source_that_changes_while_it_is_copied_is_refused(file, replaced, source, tmp_path, monkeypatch):
    """The change comes with the first byte that is copied. What was open by then when it is replaced stays whole."""
    reset_checkpoint(source, tmp_path / "right")
    real, other = os.read, tmp_path / "other"
    data = (source / file).read_bytes()
    other.write_bytes(data[:-1] + b" ")
    began, first = threading.Event(), threading.Lock()

    def read(descriptor: int, size: int) -> bytes:
        with first:  # no other thread is done with the file before the change
            if list(tmp_path.glob(".dst.*.partial")) and not began.is_set():
                began.set()
                if replaced:
                    os.replace(other, source / file)
                else:
                    (source / file).write_bytes(other.read_bytes())
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", read)
    said = ""
    try:
        reset_checkpoint(source, tmp_path / "dst")
    except UserError as error:
        said = str(error)
    if said or not replaced:
        assert f"{file}' was changed while it was read: wait for whoever writes it" in said
        assert set(names(tmp_path)) <= {"src", "other", "right"}
    else:
        assert (tmp_path / "dst" / file).read_bytes() == (tmp_path / "right" / file).read_bytes()
    assert began.is_set()


def test_once_it_is_copied_a_source_may_change(source, tmp_path, monkeypatch):
    reset_checkpoint(source, tmp_path / "right")
    real = os.pwrite

    def write(*arguments: object) -> int:
        shutil.rmtree(source, ignore_errors=True)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", write)
    reset_checkpoint(source, tmp_path / "dst")
    assert not source.exists() and weights(tmp_path / "dst") == weights(tmp_path / "right")


def test_initial_weights_and_inspected_ones_that_change_are_refused(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "start")
    for read in (
        lambda: reset_checkpoint(source, tmp_path / "dst", "full_reset", init=tmp_path / "start"),
        lambda: inspect_checkpoint(tmp_path / "start", progress=False),
    ):
        real, done = os.preadv, []

        def preadv(*arguments: object, real=real, done=done) -> int:
            done.append(1)
            if len(done) == 6:
                (tmp_path / "start" / WEIGHTS).write_bytes(weights(source))
            return real(*arguments)

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(UserError, match=r"start/model\.safetensors' was changed while it was read"):
            read()
        monkeypatch.undo()
    assert names(tmp_path) == ["src", "start"]


# ---- a folder that others want too


def test_of_two_at_once_one_makes_the_folder_and_the_other_is_refused(source, tmp_path):
    methods = ("fire", "rescale")
    for method in methods:
        reset_checkpoint(source, tmp_path / method, method)
    right = {weights(tmp_path / method): method for method in methods}
    for trial in range(3):
        dst, start, said = tmp_path / f"dst{trial}", threading.Barrier(2), {}

        def make(method: str, dst: Path = dst, start: threading.Barrier = start, said: dict = said) -> None:
            start.wait()
            try:
                reset_checkpoint(source, dst, method)
                said[method] = ""
            except UserError as error:
                said[method] = str(error)

        makers = [threading.Thread(target=make, args=(method,)) for method in methods]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        won = [method for method in methods if not said[method]]
        assert won == [right[weights(dst)]], said
        told = json.loads((dst / "fire.json").read_text())
        assert [reset["method"] for reset in told["resets"]] == won
        assert all("is making" in s or "exists already" in s for s in said.values() if s), said
    assert not list(tmp_path.glob(".*"))


def test_folders_of_the_users_with_names_like_ours_stay(source, tmp_path):
    for name in ("dst.partial", ".dst.partial", ".dst.0123abcd.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").touch()
    before = names(tmp_path)
    reset_checkpoint(source, tmp_path / "dst")
    assert names(tmp_path) == sorted([*before, "dst"]) and len(list(tmp_path.glob("*/thesis"))) == 3


def test_more_shards_than_files_may_be_open(tmp_path):
    tiny_llama(num_hidden_layers=8).save_pretrained(tmp_path / "src", max_shard_size="10KB")
    assert len(list((tmp_path / "src").glob("*.safetensors"))) > 30
    reset_checkpoint(tmp_path / "src", tmp_path / "right")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(n) for n in os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, hard))
    try:
        reset_checkpoint(tmp_path / "src", tmp_path / "dst")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    shards = [p.name for p in (tmp_path / "src").glob("*.safetensors")]
    assert all((tmp_path / "dst" / n).read_bytes() == (tmp_path / "right" / n).read_bytes() for n in shards)


# ---- links and odd files


def test_what_lies_outside_is_not_copied_and_is_told(source, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    for name in ("LICENSE", "tokenizer_extra.txt", "generation_config.json", "README.md"):
        (private / name).write_text("---\nlicense: secret\n---\n")
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(private / name)
    (private / "tool.jinja").write_text("secret")
    (source / "additional_chat_templates").symlink_to(private)
    (source / "vocab.txt").write_text("x")
    (source / "NOTICE").symlink_to("vocab.txt")
    (source / "merges.txt").symlink_to("nothing")
    report = reset_checkpoint(source, tmp_path / "dst")
    copied = [p for p in (tmp_path / "dst").rglob("*") if p.is_file()]
    assert sorted(p.name for p in copied) == [
        "NOTICE", "README.md", "config.json", "fire.json", WEIGHTS, "tokenizer.json", "vocab.txt",
    ]  # fmt: skip
    assert not any(b"secret" in p.read_bytes() for p in copied)
    outside = [n.partition(" (")[0] for n in report.not_copied if n.endswith(" (a link that leads out of the folder)")]
    assert outside == ["LICENSE", "generation_config.json", "tokenizer_extra.txt"]


def test_the_hubs_cache_is_copied_from_its_own_blobs(source, tmp_path):
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    source.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert not reset_checkpoint(snapshot, tmp_path / "dst").not_copied
    assert {*names(blobs)} < {*names(tmp_path / "dst")} and not any(
        p.is_symlink() for p in (tmp_path / "dst").iterdir()
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS])
def test_a_pipe_or_socket_in_a_checkpoint_is_waited_for_by_nobody(name, source, tmp_path, monkeypatch):
    (source / name).unlink(missing_ok=True)
    monkeypatch.chdir(source)
    if name == "tokenizer.json":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    else:
        os.mkfifo(name)
    for read in (load_model, load_tokenizer, config_for, lambda f: reset_checkpoint(f, tmp_path / "dst")):
        with pytest.raises(UserError, match=f"{name}' is a (named pipe|socket), not a file"):
            read(str(source))
    assert names(tmp_path) == ["src"]


HEADS = [
    "license:\tmit", "tags: [a, b", "title: a: b", "5: x", "license: [1, 2]", "license: {a: b}", "language: 5",
    "license: 2020-01-01", "language: [en, 3]", "- a", "&a [*a]", "license: !!python/object:os.system x",
    "license: null", "license: &x [*x]", "[" * 1000, "? [a]\n: b", "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
def test_no_card_of_the_source_undoes_the_work(head, source, tmp_path):
    (source / "README.md").write_bytes(f"---\n{head}\n---\nhello\n".encode(errors="surrogateescape"))
    reset_checkpoint(source, tmp_path / "dst")
    assert (tmp_path / "dst" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_names_that_are_no_text_do_not_undo_the_work(source, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    stored = load_file(source / WEIGHTS)
    save_file({**stored, "other\u009b": torch.ones(1)}, source / WEIGHTS, {"format": "pt"})
    changed(source / "config.json", ("_name_or_path", "a" * 5000 + "/b"))
    source.rename(odd)
    reset_checkpoint(odd, tmp_path / "dst")
    assert json.loads((tmp_path / "dst" / "fire.json").read_text())["source"]["name"] == str(odd)


# ---- what is loaded is what is reset


def test_what_shards_hold_counts_and_not_what_the_index_says(tmp_path):
    """An entry that no shard holds and no class wants, and a tensor that the index forgets: both load, and so reset."""
    tiny_llama().save_pretrained(tmp_path / "src", max_shard_size="20KB")
    index = json.loads((tmp_path / "src" / INDEX).read_text())
    index["weight_map"]["model.layers.9.stale"] = index["weight_map"]["model.norm.weight"]
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / "src" / INDEX).write_text(json.dumps(index))
    reset_checkpoint(tmp_path / "src", tmp_path / "dst")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "src")
    fire_(wanted)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), found.parameters(), strict=True))


# ---- configs


@pytest.mark.parametrize(
    ("key", "value"),
    [("attn_implementation", "owner/kernel"), ("_attn_implementation", "owner/kernel@abc:f"),
     ("attn_implementation", {"": "owner/kernel"}), ("attn_implementation", "paged|owner/kernel")],
)  # fmt: skip
def test_an_attention_that_is_code_of_the_hub_is_refused(key, value, source, tmp_path, monkeypatch):
    import transformers.modeling_utils as asked

    monkeypatch.setattr(asked, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("code was asked for"))
    changed(source / "config.json", (key, value))
    for read in (
        lambda: load_model(source),
        lambda: reset_checkpoint(source, tmp_path / "dst"),
        lambda: inspect_checkpoint(source, progress=False),
        lambda: config_for(str(source)),
    ):
        with pytest.raises(UserError, match="names code on the Hub, which is never fetched: take it out of"):
            read()
    with pytest.raises(UserError, match="has no attribute '_attn_implementation'"):
        config_for("gpt-tiny", overrides={"_attn_implementation": "owner/kernel"})


def test_an_attention_that_is_not_here_is_left_out_with_a_word(source, tmp_path, monkeypatch):
    import transformers.modeling_utils as asked

    monkeypatch.setattr(asked, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("code was asked for"))
    plain = load_model(source)
    changed(source / "config.json", ("attn_implementation", "flash_attention_3"))
    text = torch.arange(8)[None]
    with pytest.warns(UserWarning, match="attn_implementation '.*' of its config is left out"):
        model = load_model(source)
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(text).logits, plain(text).logits)
    for read in (
        lambda: reset_checkpoint(source, tmp_path / "dst"),
        lambda: inspect_checkpoint(source, progress=False),
        lambda: config_for(str(source)),
    ):
        with pytest.warns(UserWarning, match="it is no attention of this machine"):
            read()


def test_an_attention_of_this_machine_is_kept(source):
    changed(source / "config.json", ("attn_implementation", "eager"))
    assert read_config(str(source))._attn_implementation == "eager"
    assert load_model(source).config._attn_implementation == "eager"


@pytest.mark.parametrize("key", ["n_layer", "num_labels", "vocab_size", "n_positions"])
def test_sizes_beyond_reason_are_refused_wherever_a_config_is_read(key, source, tmp_path):
    with pytest.raises(UserError, match=rf"model.config: {key} is 10+; at most"):
        config_for("gpt-tiny", overrides={key: 10**11})
    changed(source / "config.json", (key, 10**11))
    for read in (load_model, load_tokenizer, config_for, lambda f: reset_checkpoint(f, tmp_path / "dst")):
        with pytest.raises(UserError, match=rf"config.json': {key} is 10+; at most [\d,]+ is allowed"):
            read(str(source))


@pytest.mark.parametrize("content", ["null", "[]", "1", '"llama"', "[" * 1000 + "]" * 1000, "{", ""])
def test_configs_that_are_none_are_refused_wherever_one_is_read(content, source, tmp_path):
    (source / "config.json").write_text(content)
    for read in (load_model, load_tokenizer, config_for, lambda f: reset_checkpoint(f, tmp_path / "dst")):
        with pytest.raises(UserError, match=r"config\.json' is not (JSON|a JSON object)"):
            read(str(source))
