"""What a disk, a clock or a careless copy does to checkpoints is named, and what was saved before stays."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support.killing import beside, outcome
from support.tiny_recipe import quick_recipe, recipe

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.core import manifest
from fire_llm.core.atomic import checkpoints
from fire_llm.core.hashing import CHUNK
from fire_llm.core.locks import held
from fire_llm.core.manifest import MANIFEST, damage, newest_intact, write_manifest
from fire_llm.core.staging import staging_of
from fire_llm.experiment.jobs import clear_jobs, jobs_of, lock_for
from fire_llm.experiment.recipe import Trial
from fire_llm.experiment.stages import labelled_checkpoint
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


# ---- every file, every way


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, Path]:
    """Run a recipe of half a second with `keep_last: 2`; return the recipe's path and the run's folder."""
    folder = tmp_path_factory.mktemp("quick")
    path = quick_recipe(folder)
    path.write_text(path.read_text() + "keep_last: 2\n")
    run_recipe(load_recipe(path), folder / "run", progress=False)
    return path, folder / "run"


EMPTY = {"piece_bytes": CHUNK, "files": {}}
DAMAGES = {
    "deleted": None,
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "flipped": lambda data: flipped(data, len(data) // 2),
    "flipped early": lambda data: flipped(data, len(data) // 7),
    "flipped late": lambda data: flipped(data, len(data) - 3),
    "nothing": lambda data: b"null",
    "a list": lambda data: b"[]",
    "an object": lambda data: b"{}",
    "deep": lambda data: b"[" * 100_000,
    "no text": lambda data: b"\xff\xfe{}",
    "no files": lambda data: json.dumps(EMPTY).encode(),
    "entries of another kind": lambda data: data.replace(b'"blake2b"', b'"blake2c"').replace(
        b'"bytes": ', b'"bytes": 1'
    ),
    "a piece of nothing": lambda data: data.replace(b'"piece_bytes": 16777216', b'"piece_bytes": 0'),
    "a piece of text": lambda data: data.replace(b'"piece_bytes": 16777216', b'"piece_bytes": "many"'),
}
OF_MANIFESTS = [*DAMAGES][-4:]
FILES = [
    "config.json", "continual_state.json", "generation_config.json", "manifest.json", "model.safetensors",
    "optimizer.pt", "rng_state.pth", "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
]  # fmt: skip
EVERY = [(f, d) for f, d in itertools.product(FILES, DAMAGES) if f == MANIFEST or d not in OF_MANIFESTS]
SAMPLE = random.Random(3).sample(EVERY, 4)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def spoil(file: Path, way: str) -> None:
    """Damage a file; whatever wrote to it, it was later than the rest."""
    data, change = file.read_bytes(), DAMAGES[way]
    file.unlink() if change is None else file.write_bytes(change(data))


def test_these_are_the_files_of_a_checkpoint(quick):
    assert sorted(path.name for path in (quick[1] / SECOND / "checkpoint-3").iterdir()) == FILES


@pytest.mark.parametrize(
    ("name", "way"), [p if p in SAMPLE else pytest.param(*p, marks=pytest.mark.slow) for p in EVERY]
)
def test_any_damage_to_the_newest_checkpoint_goes_on_from_the_older_one(name, way, quick, tmp_path, capsys):
    """The run was finished, so that nothing but the damage makes it train again; its end is the same bit for bit."""
    path, run = quick
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / SECOND / "checkpoint-3"
    spoil(newest / name, way)
    run_recipe(load_recipe(path), tmp_path / "run", progress=False)
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "skipped" in line)
    assert said.startswith("second / fire: checkpoint-3 is skipped: ")
    assert name in said or name == MANIFEST  # one flipped letter there may be another file's name or hash
    assert outcome(tmp_path / "run") == outcome(run)
    files = [{str(p.relative_to(at)) for p in at.rglob("*")} for at in (run, tmp_path / "run")]
    assert files[0] == files[1] and damage(newest) is None


def test_any_damage_to_all_checkpoints_is_refused_and_nothing_is_lost(quick, tmp_path):
    path, run = quick
    shutil.copytree(run, tmp_path / "run")
    for name, way in random.Random(4).sample(EVERY, 12):
        stage = tmp_path / "run" / SECOND
        shutil.rmtree(stage)
        shutil.copytree(run / SECOND, stage)
        for checkpoint in stage.glob("checkpoint-*"):
            spoil(checkpoint / name, way)
        before = {p: p.read_bytes() for p in stage.rglob("*") if p.is_file()}
        with pytest.raises(
            UserError, match=r"has no checkpoint that is whole:\n  checkpoint-3 is skipped: .*\n  checkpoint-2"
        ):
            run_recipe(load_recipe(path), tmp_path / "run", progress=False)
        assert {p: p.read_bytes() for p in stage.rglob("*") if p.is_file()} == before, (name, way)


@pytest.mark.parametrize("label", ["final", "best"])
def test_what_is_said_of_a_damaged_parent_can_be_done(label, quick, tmp_path):
    """With its old time, as a failing disk leaves it, damage is found before the next stage starts from it."""
    path, run = quick
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / SECOND)
    given = load_recipe(path, [f"phases.1.start_from={{first: [{label}]}}"])
    parent = labelled_checkpoint(tmp_path / "run" / FIRST, label)
    times = (parent / "model.safetensors").stat()
    spoil(parent / "model.safetensors", "flipped")
    os.utime(parent / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"is damaged: model.safetensors .* or delete (it|'[^']*')") as error:
        run_recipe(given, tmp_path / "run", progress=False)
    shutil.rmtree(parent if "delete it" in str(error.value) else str(error.value).split("delete '")[1].split("'")[0])
    run_recipe(given, tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run")["first/seed-1/checkpoint-4"] == outcome(run)["first/seed-1/checkpoint-4"]


@pytest.mark.parametrize(
    "way", ["deep", *(pytest.param(w, marks=pytest.mark.slow) for w in ("cut", "a list", "deleted"))]
)
def test_what_lies_beside_the_checkpoints_is_named_too(way, quick, tmp_path):
    shutil.copytree(quick[1], tmp_path / "run")
    for name, damages in (("unit.json", way), ("reset.json", way)):
        file = tmp_path / "run" / SECOND / name
        before = file.read_bytes()
        spoil(file, damages)
        if damages == "deleted":
            run_recipe(load_recipe(quick[0]), tmp_path / "run", progress=False)
        else:
            with pytest.raises(UserError, match=r"fire/seed-1.*delete"):
                run_recipe(load_recipe(quick[0]), tmp_path / "run", progress=False)
        file.write_bytes(before)
    run_recipe(load_recipe(quick[0]), tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run") == outcome(quick[1])


def test_a_skipped_checkpoint_is_none_of_those_that_stay(quick, tmp_path):
    """It may lie there for good, saved by a signal; `keep_last: 2` means two to go on from."""
    path, run = quick
    shutil.copytree(run, tmp_path / "run")
    stage = tmp_path / "run" / SECOND
    shutil.copytree(stage / "checkpoint-2", stage / "checkpoint-1")
    spoil(stage / "checkpoint-3" / "optimizer.pt", "deleted")
    spoil(stage / "checkpoint-1" / "optimizer.pt", "cut")
    run_recipe(load_recipe(path), tmp_path / "run", progress=False)
    assert {p.name for p in stage.glob("checkpoint-*") if damage(p) is None} == {"checkpoint-2", "checkpoint-3"}
    assert (stage / "checkpoint-1").is_dir()


# ---- what dead processes left


def left_by_a_save(stage: Path) -> Path:
    staging = stage / "checkpoint-2.partial"
    shutil.copytree(stage / "checkpoint-3", staging / "checkpoint-2")
    return staging


def left_by_a_record(stage: Path) -> Path:
    left = stage / "unit.json.partial"
    left.write_text("{")
    return left


def left_by_taking_over(stage: Path) -> Path:
    left = shutil.copytree(stage, staging_of(stage, "0a1b2c3d"))
    stage.with_name(f".{stage.name}.fire_llm.lock").write_text(left.name)
    return left


def left_by_workers(stage: Path) -> Path:
    run = stage.parents[2]
    left = run / ".workers" / "command-0" / "1.step"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    (run / ".locks" / "command-0.lock").touch()
    return left.parent


@pytest.mark.parametrize("leave", [left_by_a_save, left_by_a_record, left_by_taking_over, left_by_workers])
def test_what_dead_processes_left_is_cleared_at_the_next_start(leave, quick, tmp_path):
    shutil.copytree(quick[1], tmp_path / "run")
    stage = tmp_path / "run" / SECOND
    left = leave(stage)
    mine = [stage / "checkpoint-mine.partial", stage / "mine.partial", tmp_path / "run" / ".workers" / "mine"]
    for folder in mine:
        folder.mkdir(parents=True)
    run_recipe(load_recipe(quick[0]), tmp_path / "run", progress=False)
    assert not left.exists() and all(folder.is_dir() for folder in mine)
    assert outcome(tmp_path / "run") == outcome(quick[1])


@pytest.mark.parametrize("asked", [[], ["phases.0.keep=[best,2]"]])
def test_what_a_last_save_did_not_come_to_delete_is_deleted_at_the_next_start(asked, quick, tmp_path, monkeypatch):
    """The kill came between the new name and the end of the older one; what today's recipe keeps stays all the same."""
    path, output = quick[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "prune", lambda *_: None)
        run_recipe(load_recipe(path, ["keep_last=1", "phases.0.keep=[]"]), output, progress=False)
    assert steps(output / FIRST) == [2, 4] and steps(output / SECOND) == [2, 3]
    mine = shutil.copytree(output / FIRST / "checkpoint-2", output / FIRST / "checkpoint-1")
    run_recipe(load_recipe(path, ["keep_last=1", *(asked or ["phases.0.keep=[]"])]), output, progress=False)
    assert steps(output / FIRST) == [1, *([2] if asked else []), 4] and steps(output / SECOND) == [3]
    assert mine.is_dir() and not list(output.rglob("*.partial"))
    assert outcome(output).keys() == outcome(quick[1]).keys()


def test_what_a_last_save_replaced_stays_where_that_is_damaged(quick, tmp_path, monkeypatch):
    path, output = quick[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "prune", lambda *_: None)
        run_recipe(load_recipe(path, ["keep_last=1"]), output, progress=False)
    weights = output / SECOND / "checkpoint-3" / "model.safetensors"
    times = weights.stat()
    weights.write_bytes(flipped(weights.read_bytes(), 2000))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk does
    run_recipe(load_recipe(path, ["keep_last=1"]), output, progress=False)
    assert steps(output / SECOND) == [2, 3]


def test_what_a_living_process_is_writing_stays(quick, tmp_path):
    shutil.copytree(quick[1], tmp_path / "run")
    left = left_by_a_save(tmp_path / "run" / SECOND)
    trial = Trial("", {}, load_recipe(quick[0]))
    jobs = jobs_of([trial], tmp_path / "run")
    with held(lock_for(tmp_path / "run", jobs[1])):
        clear_jobs(jobs, tmp_path / "run")
        assert left.is_dir()
    clear_jobs(jobs, tmp_path / "run")
    assert not left.exists()


@pytest.mark.parametrize("name", ["checkpoint-2.partial", "checkpoint-3", "unit.json.partial"])
def test_links_that_lead_out_of_a_run_are_refused_and_not_followed(name, quick, tmp_path):
    shutil.copytree(quick[1], tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    link = tmp_path / "run" / SECOND / name
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=rf"{name}' leads out of the run's folder, to '.*mine': remove the link"):
        run_recipe(load_recipe(quick[0]), tmp_path / "run", progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years" and link.is_symlink()


# ---- none is whole


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


def test_a_damaged_parent_is_trained_again_before_another_stage_starts_from_it(whole, cut):
    shutil.rmtree(cut / SECOND)
    parent = cut / FIRST / "checkpoint-10"
    flip(parent, "model.safetensors")
    run_recipe(load_recipe(whole[0]), cut, progress=False)
    assert damage(parent) is None
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
    monkeypatch.setattr(
        manifest, "damage", lambda folder, from_disk=False, **_: "optimizer.pt is gone" * from_disk or None
    )
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
