"""Folders appear whole or not at all, whatever stops the writer."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama

from fire_llm import UserError, fire_, reset_checkpoint
from fire_llm.core.atomic import remove, write_json, writing
from fire_llm.models import load_model


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
        (errno.ENOTDIR, "is a file"),
        (errno.EIO, "the disk, or the network to it, failed"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOTEMPTY, "appeared meanwhile"),
    ],
)
def test_what_the_disk_refuses_is_said_clearly(tmp_path, code, message):
    with pytest.raises(UserError, match=message) as error, writing(tmp_path):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path) in str(error.value)


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "x")
    with pytest.raises(UserError, match="disk is full"), writing(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_a_full_disk_while_saving_leaves_the_source_and_no_result(tmp_path, monkeypatch):
    tiny_gpt2().save_pretrained(tmp_path / "src")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="disk is full"):
        reset_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_json_is_replaced_in_one_step(tmp_path):
    write_json(tmp_path / "a.json", {"σ": 1})
    write_json(tmp_path / "a.json", {"σ": 2})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"σ": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_is_not_written_through_a_link_and_takes_names_that_are_no_text(tmp_path):
    (tmp_path / "mine").write_text("thesis")
    (tmp_path / "a.json.partial").symlink_to(tmp_path / "mine")
    write_json(tmp_path / "a.json", {"name": "\udcff\ud800"})
    assert (tmp_path / "mine").read_text() == "thesis"
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "\udcff\ud800"}


def test_of_a_link_the_link_alone_is_removed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    for name in ("link", "other"):
        (tmp_path / name).symlink_to("folder" if name == "link" else "folder/file")
        remove(tmp_path / name)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["folder", "folder/file"]
    remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reset_checkpoint_keeps_the_dtype_and_equals_the_reset_in_memory(tmp_path, dtype):
    tiny_llama().to(dtype).save_pretrained(tmp_path / "src")
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", "fire", iterations=3)
    wanted = load_model(tmp_path / "src")
    fire_(wanted, iterations=3)
    result = load_model(tmp_path / "dst")
    assert result.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), result.parameters(), strict=True))


def test_lists_of_resets(tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "src")
    tiny_llama(seed=2).save_pretrained(tmp_path / "init")
    pair = [{"method": "fire"}, {"method": "full_reset", "roles": ["embedding", "norm", "lm_head"]}]
    report = reset_checkpoint(tmp_path / "src", tmp_path / "dst", pair, init=tmp_path / "init")
    assert not report.untouched
    result, init = load_model(tmp_path / "dst"), load_model(tmp_path / "init")
    assert torch.equal(result.model.embed_tokens.weight, init.model.embed_tokens.weight)
    assert not torch.equal(result.model.layers[0].mlp.up_proj.weight, init.model.layers[0].mlp.up_proj.weight)
