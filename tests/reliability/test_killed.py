"""Runs that are killed at random instants, and end like one that was not: bit for bit, with the same command."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest
from support.killing import KINDS, draw, outcome, run
from support.tiny_recipe import recipe

from fire_llm.core.atomic import checkpoints
from fire_llm.core.manifest import damage

KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run the recipe once a number of ranks; return its path, a cache that is filled, events and outcome."""
    folder = tmp_path_factory.mktemp("whole")
    path, done = recipe(folder), {}

    def of(world: int, asynchronous: bool = False):
        key = world, asynchronous
        if key not in done:
            output, cache = folder / f"on-{key}", folder / f"cache-{key}"
            codes, said, counts = run(world, folder / "said", path, output, cache, asynchronous=asynchronous)
            assert codes == [0] * world, said
            done[key] = path, cache, counts, outcome(output)
        return done[key]

    return of


def kill_and_go_on(
    whole, tmp_path: Path, world: int, kind: str, number: signal.Signals, seed: int, asynchronous: bool = False
) -> None:
    path, filled, counts, wanted = whole(world, asynchronous)
    instant = draw(seed, counts, kind, number)
    output, cache = tmp_path / "out", tmp_path / "cache" if kind == "tokenising" else filled
    codes, said, _ = run(world, tmp_path / "said", path, output, cache, instant, asynchronous=asynchronous)
    where = f"{instant} on {world} rank(s), seed {seed}: {codes}\n{said}"
    assert codes[instant.rank] in (-number, 128 + number), where
    assert "Traceback" not in said, where
    # Whatever stands under a checkpoint's name is whole.
    for found in output.glob("*/**/checkpoint-*/continual_state.json"):
        if ".partial" not in str(found):
            assert damage(found.parent) is None, where
    if number == TERM and kind == "step":
        assert codes == [143] * world, where
        assert "saved at step" in said and "the same command goes on" in said, where
    codes, said, _ = run(world, tmp_path / "said", path, output, cache, asynchronous=asynchronous)
    assert codes == [0] * world, f"{where}\nthen {codes}: {said}"
    assert outcome(output) == wanted, where
    assert not list(output.rglob("*.partial*")), where
    assert all(damage(p) is None for unit in output.glob("*/**/seed-1") for p, _ in checkpoints(unit)), where


FAST = [(1, "saving", KILL), pytest.param(1, "step", TERM, marks=pytest.mark.slow), (2, "step", TERM)]


@pytest.mark.parametrize(("world", "kind", "number"), FAST)
def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path, world, kind, number):
    kill_and_go_on(whole, tmp_path, world, kind, number, seed=1)


@pytest.mark.parametrize(
    ("kind", "number", "seed"),
    [
        ("saving", KILL, 8),
        pytest.param("saving", KILL, 7, marks=pytest.mark.slow),
        pytest.param("step", TERM, 9, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_while_it_writes_beside_training(whole, tmp_path, kind, number, seed):
    assert whole(1, True)[3] == whole(1)[3]
    kill_and_go_on(whole, tmp_path, 1, kind, number, seed, asynchronous=True)


MANY = [
    *itertools.product((1, 2), KINDS, (KILL, TERM), (2,)),  # 16
    *itertools.product((1, 2), ("saving", "step"), (KILL, TERM), (3,)),  # 8
    *itertools.product((1, 2), ("saving", "reset", "tokenising"), (KILL,), (4,)),  # 6
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "kind", "number", "seed"), MANY)
def test_thirty_killed_runs_go_on_to_the_same_end(whole, tmp_path, world, kind, number, seed):
    kill_and_go_on(whole, tmp_path, world, kind, number, seed)


def test_there_are_thirty():
    assert len(MANY) == 30 and len(set(MANY)) == 30


def test_killed_twice_and_killed_while_it_goes_on(whole, tmp_path):
    """The second resumption is no different from the first."""
    path, cache, counts, wanted = whole(1)
    for seed, number in ((5, TERM), (6, KILL), (7, TERM)):
        kind = "step" if number == TERM else "saving"
        instant = draw(seed, [{kind: counts[0][kind] // 3}], kind, number)
        codes, said, _ = run(1, tmp_path / "said", path, tmp_path / "out", cache, instant)
        assert codes[0] in (143, -9), f"{instant}: {codes}\n{said}"
    codes, said, _ = run(1, tmp_path / "said", path, tmp_path / "out", cache)
    assert codes == [0] and outcome(tmp_path / "out") == wanted, said
