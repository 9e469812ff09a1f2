"""Files that others wrote: what is no regular file, and what changes while it is read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fire_llm import UserError
from fire_llm.core.files import LONGEST, SourceFile, leads_out, read_file, refuse_irregular


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Make one of each kind that is no file."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    Path("device").symlink_to("/dev/zero")
    return {"folder": "a folder", "pipe": "a named pipe", "socket": "a socket", "device": "a device"}


def test_what_is_no_file_is_named_and_not_waited_for(odd):
    for name, kind in odd.items():
        for read in (SourceFile.of, read_file):
            with pytest.raises(UserError, match=f"'{name}' is {kind}, not a file"):
                read(Path(name))
    for name in ("device", "pipe", "socket"):
        with pytest.raises(UserError, match=f"'{name}' is {odd[name]}, not a file"):
            refuse_irregular(Path())
        os.unlink(name)
    Path("to-nothing").symlink_to("x")
    refuse_irregular(Path())
    with pytest.raises(UserError, match="'x' cannot be read: No such file"):
        read_file(Path("x"))


def test_what_is_too_long_is_not_read(tmp_path):
    with (tmp_path / "long").open("wb") as file:
        file.truncate(LONGEST + 1)
    with pytest.raises(UserError, match=r"'.*long' has 100 MB; at most 100 are read"):
        read_file(tmp_path / "long")


@pytest.mark.parametrize("change", ["replaced", "rewritten", "longer", "gone"])
def test_a_change_is_noticed_before_and_while_it_is_read(change, tmp_path):
    def spoil(path: Path) -> None:
        if change == "gone":
            path.unlink()
        elif change == "replaced":
            (tmp_path / "new").write_bytes(b"same size")
            os.replace(tmp_path / "new", path)
        else:
            path.write_bytes(b"same size" if change == "rewritten" else b"longer than it was")
            os.utime(path, (1, 1))

    message = "was changed while it was read|cannot be read: No such file"
    for during in (False, True):
        path = tmp_path / f"file-{during}"
        path.write_bytes(b"it is 9 b")
        file = SourceFile.of(path)
        with file.opened() as reader:
            assert reader.read(100) == b"it is 9 b"
        if during and change in ("replaced", "gone"):  # what was opened stays what it was
            with file.opened() as reader:
                spoil(path)
                assert reader.read(100) == b"it is 9 b"
        elif during:
            with pytest.raises(UserError, match=message), file.opened():
                spoil(path)
        else:
            spoil(path)
        with pytest.raises(UserError, match=message), file.opened():
            pass


def test_links_that_lead_out(tmp_path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    for name in ("private", "model/own", "model/inner/own"):
        (tmp_path / name).touch()
    links = {"a": "../private", "b": "own", "c": "inner/own", "d": str(tmp_path / "private"), "e": "a", "f": "f"}
    for name, to in links.items():
        (folder / name).symlink_to(to)
    assert {name for name in links if leads_out(folder / name, folder)} == {"a", "d", "e"}
    (tmp_path / "linked").symlink_to("model")
    assert not leads_out(tmp_path / "linked" / "b", tmp_path / "linked")
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0a1b"
    for place in (snapshot, tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--other" / "blobs"):
        place.mkdir(parents=True)
        (place / "blob").touch()
    (snapshot / "own").symlink_to("../../blobs/blob")
    (snapshot / "other").symlink_to("../../../models--o--other/blobs/blob")
    assert [leads_out(snapshot / name, snapshot) for name in ("own", "other")] == [False, True]
