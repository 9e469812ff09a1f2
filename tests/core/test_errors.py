"""Errors in words: never none, what the system refused, and what to do; and files that are tried before the work."""

from __future__ import annotations

import errno
import os

import pytest

from fire_llm import UserError
from fire_llm.core.atomic import check_file, write_json, writing
from fire_llm.core.errors import explained


def _raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there was not enough memory"),
        (MemoryError("Unable to allocate 3.00 GiB"), "Unable to allocate 3.00 GiB: there was not enough memory"),
        (RuntimeError("DefaultCPUAllocator: (Cannot allocate memory)"), "there was not enough memory"),
        (AssertionError(), "AssertionError without a message at "),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.bin"), "'a.bin': this process may open no more files"),
        (OSError(errno.EIO, "Input/output error"), "the disk, or the network to it, failed"),
        (OSError(errno.ECONNRESET, "Connection reset by peer", "b"), "'b': Connection reset by peer"),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), "'a.b' is not installed: pip install a"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_an_error_is_explained(error, said):
    assert said in explained(_raised(error))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EFBIG, "x"), "`ulimit -f`"),
        (RuntimeError("I/O error: File too large (os error 27)"), "`ulimit -f`"),
        (OSError(errno.EIO, "x"), "the disk, or the network to it, failed"),
        (OSError(errno.EMFILE, "x"), "ulimit -n"),
        (OSError(errno.ENAMETOOLONG, "x"), "the name is too long"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_keeps_a_file_from_being_written_is_told_with_its_folder(error, said, tmp_path):
    with pytest.raises(UserError, match=f"cannot write below '{tmp_path}': .*{said}"), writing(tmp_path):
        raise error


def test_too_little_memory_is_not_taken_for_a_disks_fault(tmp_path):
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"), writing(tmp_path):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory (Cannot allocate memory)")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "is a folder"),
        ("file/x.json", "'.*file' is a file"),
        ("pipe", "is no file but a device or a pipe"),
        ("/proc/fire-llm/x.json", "cannot be written"),
        ("x" * 250 + ".json", "the name is too long"),
        ("new/and/newer/x.json", None),
        ("there.json", None),
    ],
)
def test_an_options_file_is_tried_and_nothing_is_left(name, said, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "there.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    if said is None:
        check_file("--json", str(tmp_path / name))
    else:
        with pytest.raises(UserError, match=f"--json: .*{said}"):
            check_file("--json", str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.json").read_text() == "{}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_one_may_not_write_to_is_told_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"):
        check_file("--json", str(tmp_path / "x.json"))


def test_a_name_that_is_no_utf8_is_written_and_read_back(tmp_path):
    import json

    write_json(tmp_path / "x.json", {"name": "a\udcff\u00e9"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "a\udcff\u00e9"}
