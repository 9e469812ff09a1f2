"""Folders appear whole or not at all, whatever stops the writer and whoever else writes."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fire_llm import UserError
from fire_llm.core.staging import clear_leftovers, staged

KILLED = (
    "import os, sys\nfrom pathlib import Path\nfrom fire_llm.core.staging import staged\n"
    "with staged(Path(sys.argv[1])) as folder:\n"
    "    (folder / 'file').write_text('half')\n    os.kill(os.getpid(), 9)\n"
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_staged_folder_appears_when_the_block_ends(tmp_path):
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "x" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), staged(tmp_path / "a" / "out") as folder:  # noqa: PT012  # the block is tested
        (folder / "file").write_text("x")
        raise error
    assert not names(tmp_path)


def test_what_a_killed_writer_left_is_known_and_cleared(tmp_path):
    for after in (lambda: clear_leftovers(tmp_path / "out"), lambda: None):
        assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")]).returncode == -9
        assert len(names(tmp_path)) == 2 and not (tmp_path / "out").exists()
        after()
        assert len(names(tmp_path)) in (0, 2)
    with staged(tmp_path / "out") as folder:
        assert not names(folder)
        (folder / "file").write_text("whole")
    assert names(tmp_path) == ["out"]


def test_an_existing_folder_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"), staged(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match="appeared meanwhile"), staged(tmp_path / "new"):
        (tmp_path / "new" / "mine").mkdir(parents=True)
    assert names(tmp_path) == ["new", "out"] and names(tmp_path / "new") == ["mine"]


def test_a_second_maker_is_refused_and_disturbs_nothing(tmp_path):
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        for refused in (lambda: staged(tmp_path / "out").__enter__(), lambda: clear_leftovers(tmp_path / "out")):
            with pytest.raises(UserError, match=r"another process is making '.*out': wait for it to end"):
                refused()
        with staged(tmp_path / "other"):
            pass
    assert (tmp_path / "out" / "file").read_text() == "first" and names(tmp_path) == ["other", "out"]


def test_of_many_makers_at_once_one_wins_whole(tmp_path):
    for trial in range(20):
        out, start, said = tmp_path / f"out{trial}", threading.Barrier(6), []

        def make(who: int, out: Path = out, start: threading.Barrier = start, said: list[str] = said) -> None:
            start.wait()
            try:
                with staged(out) as folder:
                    for name in "ab":
                        (folder / name).write_text(str(who))
                said.append("made")
            except UserError as error:
                said.append(str(error))

        makers = [threading.Thread(target=make, args=(who,)) for who in range(6)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        assert said.count("made") == 1 and all("is making" in s or "exists" in s for s in said if s != "made"), said
        assert len({(out / name).read_text() for name in "ab"}) == 1
    assert len(names(tmp_path)) == 20


def test_what_was_not_ours_is_left_alone(tmp_path):
    """A name is no proof: only what the lock's file names, and that in the form of our names, is deleted."""
    mine = ["out.partial", ".out.partial", ".out.0123abcd.partial", "out.tmp"]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("years")
    for said in ("", "out.partial", "../mine", "/", ".out.0123abcd.partial/..", "\0", ".out.xyz.partial"):
        (tmp_path / ".out.fire_llm.lock").write_text(said)
        clear_leftovers(tmp_path / "out")
        assert names(tmp_path) == sorted(mine)
    with staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*mine, "out"]) and all((tmp_path / name / "thesis").exists() for name in mine)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    (tmp_path / ".out.0123abcd.partial").symlink_to("mine")
    (tmp_path / ".out.fire_llm.lock").write_text(".out.0123abcd.partial")
    clear_leftovers(tmp_path / "out")
    (tmp_path / ".out.fire_llm.lock").symlink_to("mine/thesis")
    with pytest.raises(UserError, match=r"cannot write below .*: a link stands"), staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.fire_llm.lock", "mine"] and names(tmp_path / "mine") == ["thesis"]
