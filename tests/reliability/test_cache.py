"""What becomes of token files before and while they are used: continued, refused or made anew, never another result."""

from __future__ import annotations

import itertools
import random
import re
import shutil
from pathlib import Path

import pytest
from support.killing import outcome
from support.tiny_recipe import quick_recipe

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.data.cache import CACHE_VARIABLE
from fire_llm.training import ContinualTrainer

FILES = ("tokens.bin", "documents.bin", "meta.json")
FOLDERS = [f"{corpus}-{split}" for corpus in "ab" for split in ("train", "validation")]
WAYS = {
    "deleted": None,
    "cut": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
}
EVERY = [*itertools.product(FOLDERS, FILES, WAYS), *itertools.product(["hashes"], ["*"], WAYS)]
SAMPLE = random.Random(5).sample(EVERY, 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Run a recipe of half a second; return the recipe's path, the cache and the run's folder."""
    folder = tmp_path_factory.mktemp("whole")
    path = quick_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder / "cache"))
        run_recipe(load_recipe(path), folder / "run", progress=False)
    return path, folder / "cache", folder / "run"


@pytest.fixture
def cache(whole, tmp_path, monkeypatch) -> Path:
    """Copy the cache, and use the copy."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return shutil.copytree(whole[1], tmp_path / "cache")


def spoil(cache: Path, folder: str, name: str, way: str) -> None:
    files = [*cache.glob(f"{folder}*/{name}" if folder != "hashes" else "hashes/*")]
    assert files
    for file in files:
        data, change = file.read_bytes(), WAYS[way]
        file.unlink() if change is None else file.write_bytes(change(data))


def finish(recipe: Path, output: Path) -> str | None:
    """Run a recipe, and do once what is said where that is refused; return what is said."""
    try:
        run_recipe(load_recipe(recipe), output, progress=False)
    except UserError as error:
        said = str(error)
        (folder,) = {
            Path(part).parent if part.endswith(".bin") else Path(part) for part in re.findall(r"/[\w/.-]+", said)
        }
        assert "Delete the folder" in said
        shutil.rmtree(folder)
        run_recipe(load_recipe(recipe), output, progress=False)
        return said
    return None


@pytest.mark.parametrize(
    ("folder", "name", "way"), [p if p in SAMPLE else pytest.param(*p, marks=pytest.mark.slow) for p in EVERY]
)
def test_a_damaged_cache_does_not_change_what_a_run_ends_with(folder, name, way, whole, cache, tmp_path):
    spoil(cache, folder, name, way)
    finish(whole[0], tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole[2])


def while_training(monkeypatch, do) -> None:
    """Do something in the evaluation after step 2 of the first phase, once."""
    measure, done = ContinualTrainer.evaluate, []

    def evaluate(trainer, *args, **kwargs):
        if trainer.state.global_step == 2 and not done:
            done.append(do())
        return measure(trainer, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, "evaluate", evaluate)


@pytest.mark.parametrize("left", ["nothing", "hashes", "other files of the same names"])
def test_a_cache_that_is_deleted_or_replaced_while_it_is_used(left, whole, cache, tmp_path, monkeypatch):
    def delete() -> None:
        shutil.rmtree(cache)
        if left == "hashes":
            shutil.copytree(whole[1] / "hashes", cache / "hashes")
        elif left != "nothing":
            shutil.copytree(whole[1], cache)

    while_training(monkeypatch, delete)
    run_recipe(load_recipe(whole[0]), tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run") == outcome(whole[2])


@pytest.mark.parametrize(("folder", "way"), [("a-train", "zeroed"), ("b-validation", "flipped")])
def test_a_token_file_that_is_written_to_while_it_is_used_is_refused(folder, way, whole, cache, tmp_path, monkeypatch):
    """What is written in place shows in the tokens that are held: nothing trained or measured on them is saved."""
    while_training(monkeypatch, lambda: spoil(cache, folder, "tokens.bin", way))
    said = finish(whole[0], tmp_path / "run")
    assert re.search(rf"{folder}-[0-9a-f]+/tokens.bin' was written to while it was in use", said)
    assert outcome(tmp_path / "run") == outcome(whole[2])
