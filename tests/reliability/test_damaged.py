"""What a disk, a clock or a careless copy does to checkpoints is named, and what was saved before stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support.killing import beside, outcome
from support.tiny_recipe import recipe

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.core.atomic import checkpoints
from fire_llm.core.manifest import MANIFEST, damage, newest_intact, write_manifest
from fire_llm.training import ContinualTrainer, saving

FIRST, SECOND = Path("first") / "seed-1", Path("second") / "fire" / "seed-1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """Run the recipe once with every checkpoint kept; return the recipe's path and the run's folder."""
    folder = tmp_path_factory.mktemp("whole")
    path = recipe(folder)
    path.write_text(path.read_text().replace("save_every_steps: 4", "save_every_steps: 3"))
    run_recipe(load_recipe(path, ["keep_last=6"]), folder / "run", progress=False)
    return path, folder / "run"


@pytest.fixture
def cut(whole, tmp_path) -> Path:
    """Copy the run as it was when its second phase had saved step 6: checkpoints 3 and 6 there."""
    shutil.copytree(whole[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / SECOND / "checkpoint-8")
    (tmp_path / "run" / "results.json").unlink()
    return tmp_path / "run"


def truncate(checkpoint: Path) -> str:
    os.truncate(checkpoint / "model.safetensors", 1000)
    return "model.safetensors has 1000 bytes instead of "


def flip(checkpoint: Path, name: str = "optimizer.pt") -> str:
    data = bytearray((checkpoint / name).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / name).write_bytes(data)
    return f"{name} is not what was written: its hash differs"


def lose(name: str):
    def do(checkpoint: Path) -> str:
        (checkpoint / name).unlink()
        return f"{name} is missing"

    do.__name__ = f"lose-{name}"
    return do


def cut_short(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).write_text((checkpoint / MANIFEST).read_text()[:50])
    return "manifest.json is damaged"


WAYS = [truncate, flip, lose(MANIFEST), lose("scheduler.pt"), lose("continual_state.json"), cut_short]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_damaged_checkpoint_is_named_and_skipped_and_left(way, cut):
    newest = cut / SECOND / "checkpoint-8"
    shutil.copytree(cut / SECOND / "checkpoint-6", newest)
    wrong = way(newest)
    assert damage(newest).startswith(wrong)
    intact, said = newest_intact(cut / SECOND)
    assert intact == cut / SECOND / "checkpoint-6"
    assert len(said) == 1 and said[0].startswith(f"checkpoint-8 is skipped: {wrong}")
    assert newest.is_dir()


def test_a_run_goes_on_from_the_newest_whole_checkpoint_to_the_same_end(whole, cut, capsys):
    truncate(cut / SECOND / "checkpoint-6")
    run_recipe(load_recipe(whole[0], ["keep_last=6"]), cut, progress=False)
    said = capsys.readouterr().err
    assert "second / fire: checkpoint-6 is skipped: model.safetensors has 1000 bytes" in said
    assert outcome(cut) == outcome(whole[1])
    assert damage(cut / SECOND / "checkpoint-6") is None  # written anew when training came by again


def test_a_finished_unit_that_lost_a_file_is_trained_again_from_where_it_can(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    lose("model.safetensors")(tmp_path / "run" / SECOND / "checkpoint-8")
    run_recipe(load_recipe(whole[0]), tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run") == outcome(whole[1])


def test_no_whole_checkpoint_is_an_error_that_names_each_and_deletes_none(whole, cut):
    flip(cut / SECOND / "checkpoint-6")
    lose(MANIFEST)(cut / SECOND / "checkpoint-3")
    with pytest.raises(UserError) as error:
        run_recipe(load_recipe(whole[0]), cut, progress=False)
    message = str(error.value)
    assert "fire/seed-1' has no checkpoint that is whole" in message
    assert "checkpoint-6 is skipped: optimizer.pt is not what was written" in message
    assert "checkpoint-3 is skipped: manifest.json is missing" in message and "delete that folder" in message
    assert {p.name for p in (cut / SECOND).glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_a_damaged_parent_is_refused_and_trained_again_once_deleted(whole, cut):
    shutil.rmtree(cut / SECOND)
    parent = cut / FIRST / "checkpoint-10"
    flip(parent, "model.safetensors")
    with pytest.raises(UserError, match=r"checkpoint-10' is damaged: model.safetensors is not .* or delete it"):
        run_recipe(load_recipe(whole[0]), cut, progress=False)
    shutil.rmtree(parent)
    run_recipe(load_recipe(whole[0]), cut, progress=False)
    assert outcome(cut) == outcome(whole[1])


def test_files_that_others_add_do_not_count(whole, tmp_path):
    shutil.copytree(whole[1] / SECOND / "checkpoint-8", tmp_path / "c")
    (tmp_path / "c" / "README.md").write_text("mine")
    assert damage(tmp_path / "c") is None


def test_the_hash_is_blake2b_over_pieces(tmp_path):
    from hashlib import blake2b

    content = os.urandom(2**24 + 5)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    assert write_manifest(tmp_path) == write_manifest(tmp_path) == len(content)  # it does not list itself
    halves = [blake2b(part, digest_size=32).digest() for part in (content[: 2**24], content[2**24 :])]
    listed = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert listed["file"] == {"bytes": len(content), "blake2b": blake2b(b"".join(halves), digest_size=32).hexdigest()}
    assert set(listed) == {"file", "empty"}


# ---- retention


def steps(folder: Path) -> list[int]:
    return [step for _, step in checkpoints(folder)]


def test_what_is_kept(whole, tmp_path):
    kept = ["keep_last=2", "phases.0.keep=[best,2]", "evaluate.every_steps=3"]
    run_recipe(load_recipe(whole[0], kept), tmp_path / "run", progress=False)
    best = json.loads((tmp_path / "run" / FIRST / "checkpoint-10" / "trainer_state.json").read_text())[
        "best_global_step"
    ]
    assert steps(tmp_path / "run" / FIRST) == sorted({2, best, steps(tmp_path / "run" / FIRST)[-2], 10})
    assert len(steps(tmp_path / "run" / SECOND)) == 2
    assert steps(whole[1] / FIRST) == [3, 5, 6, 9, 10]


def test_older_ones_stay_where_the_new_one_cannot_be_read_back(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "damage", lambda folder, **_: "optimizer.pt is gone" if _ else None)
    with pytest.raises(UserError, match=r"checkpoint-6' cannot be read back as it was written: optimizer.pt is gone"):
        run_recipe(load_recipe(whole[0], ["phases.0.keep=[]"]), tmp_path / "run", progress=False)
    assert steps(tmp_path / "run" / FIRST) == [3, 6]


# ---- the disk


@pytest.fixture(params=["waited for", pytest.param("beside training", marks=pytest.mark.slow)])
def saved(request, monkeypatch) -> None:
    """Save as a CPU does, and as an accelerator does."""
    if request.param == "beside training":
        beside(monkeypatch)


def interrupted_saves(whole, output: Path, monkeypatch, fail) -> str:
    """Let the save of step 6 run into something; return the message, and see that the same command goes on."""
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(UserError) as error:
            run_recipe(load_recipe(whole[0]), output, progress=False)
    assert damage(newest_intact(output / FIRST)[0]) is None
    assert not list(output.rglob("*.partial"))
    run_recipe(load_recipe(whole[0]), output, progress=False)
    assert outcome(output) == outcome(whole[1])
    return str(error.value)


@pytest.mark.parametrize(
    "code", [errno.EDQUOT, *(pytest.param(c, marks=pytest.mark.slow) for c in (errno.ENOSPC, errno.EROFS))]
)
def test_a_disk_that_refuses_leaves_the_previous_checkpoint(code, saved, whole, tmp_path, monkeypatch):
    save = torch.save

    def refuse(data, path, *args, **kwargs):
        if "checkpoint-6" in str(path):
            raise OSError(code, os.strerror(code))
        save(data, path, *args, **kwargs)

    message = interrupted_saves(whole, tmp_path / "run", monkeypatch, lambda p: p.setattr(torch, "save", refuse))
    assert message.startswith("cannot write below") and "Step 6 was not saved. What was saved before stays" in message
    assert ("full" in message, "read-only" in message, "quota" in message).count(True) == 1


def test_room_is_looked_for_before_every_save(whole, tmp_path, monkeypatch):
    def shrink(patch):
        # Each save finds less free: 20 MB, then 0.
        left = iter([2 * 10**7, 2 * 10**7, 10**3])
        patch.setattr(saving, "free_bytes", lambda folder: next(left))

    message = interrupted_saves(whole, tmp_path / "run", monkeypatch, shrink)
    assert "has 1e-06 GB free and a checkpoint takes" in message and "free some space" in message


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 3 MB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", "-R", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_real_disk_that_is_full_or_becomes_read_only(trouble, saved, whole, small_disk, monkeypatch):
    """While step 6 is written: the file system is shrunk to what is on it, or remounted."""
    write, done, unit = saving.write_json, [], small_disk / "run" / FIRST

    def meddle(path, data):
        if "checkpoint-6" in str(path) and not done:
            done.append(1)
            if trouble == "full":
                remount(small_disk, f"size={shutil.disk_usage(small_disk).used}")  # of whole pages: nothing more fits
            else:
                subprocess.run(["mount", "--bind", unit, unit], check=True)
                remount(unit, "bind,ro")
        write(path, data)

    monkeypatch.setattr(saving, "write_json", meddle)
    with pytest.raises(UserError, match=trouble):
        run_recipe(load_recipe(whole[0]), small_disk / "run", progress=False)
    assert done and newest_intact(unit)[0].name == "checkpoint-5"
    remount(small_disk, "size=6m")
    if trouble == "read-only":
        subprocess.run(["umount", unit], check=True)
    run_recipe(load_recipe(whole[0]), small_disk / "run", progress=False)
    assert outcome(small_disk / "run") == outcome(whole[1])


# ---- the clock


def test_a_clock_that_goes_back_does_not_matter(whole, cut, monkeypatch):
    """Files of newer checkpoints are older, and every reading of the clock is before the last."""
    for place, (folder, _) in enumerate([*checkpoints(cut / FIRST), *checkpoints(cut / SECOND)]):
        for path in [*folder.rglob("*"), folder]:
            os.utime(path, (10**9 - 1000 * place, 10**9 - 1000 * place))
    now = iter(range(10**9, 0, -60))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run_recipe(load_recipe(whole[0]), cut, progress=False)
    assert outcome(cut) == outcome(whole[1])


# ---- one trajectory


def interrupt(monkeypatch, at: int) -> None:
    """Interrupt the next run right after it saved a step."""
    save = ContinualTrainer._save_checkpoint

    def once(trainer, *arguments):
        save(trainer, *arguments)
        if trainer.state.global_step == at:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", once)


def test_resumed_twice_and_in_later_epochs(saved, tmp_path, monkeypatch):
    """18 blocks and 8 samples a step: step 4 lies in the second epoch, step 8 in the fourth."""
    path = recipe(tmp_path)
    again = load_recipe(path, ["phases.0.max_corpus_tokens=300", "phases.1.max_corpus_tokens=300"])
    run_recipe(again, tmp_path / "whole", progress=False)
    for at in (4, 8):
        interrupt(monkeypatch, at)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(again, tmp_path / "cut", progress=False)
        assert steps(tmp_path / "cut" / FIRST)[-1] == at
    run_recipe(again, tmp_path / "cut", progress=False)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_ways_to_accumulate_a_batch_give_one_trajectory(whole, tmp_path):
    """1×8, 2×4 and 8×1 sequences: the same batches, and losses that differ by the rounding of fp32 alone."""
    wanted = outcome(whole[1])
    for sequences in (1, 8):
        split = load_recipe(whole[0], [f"batch.sequences_per_device={sequences}"])
        run_recipe(split, tmp_path / str(sequences), progress=False)
        found = outcome(tmp_path / str(sequences))
        for name, one in found.items():
            assert one["batches_hash"] == wanted[name]["batches_hash"]
            mine, theirs = (
                [[e["train_loss"] or 0, *(m["nll"] for m in e["eval"].values())] for e in run["curve"]]
                for run in (one, wanted[name])
            )
            for ours, other in zip(mine, theirs, strict=True):
                assert ours == pytest.approx(other, abs=1e-5)
