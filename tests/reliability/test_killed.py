"""Runs that are killed at random instants, and end like one that was not: bit for bit, with the same command."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.killing import KINDS, Instant, command, draw, outcome, run
from support.tiny_recipe import quick_recipe
from support.training import FSDP2

from fire_llm.core.atomic import checkpoints
from fire_llm.core.manifest import damage

KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run the recipe once a number of ranks; return its path, a cache that is filled, events and outcome.

    What is killed finds a filled cache, but for one that is killed while it tokenises.
    """
    folder = tmp_path_factory.mktemp("whole")
    filled, done = folder / "cache", {}

    def of(world: int, asynchronous: bool = False, tokenising: bool = False, environment: Any = None):
        key, place = (world, asynchronous, tokenising, environment is not None), folder / f"of-{max(2, world)}"
        place.mkdir(exist_ok=True)
        path = quick_recipe(place, ranks=max(2, world))
        if not filled.exists():
            codes, said, _ = run(1, folder / "said", path, folder / "first", filled)
            assert codes == [0], said
        if key not in done:
            output, cache = folder / f"on-{key}", folder / f"cache-{key}" if tokenising else filled
            how = {"asynchronous": asynchronous, "environment": environment or {}}
            codes, said, counts = run(world, folder / "said", path, output, cache, **how)
            assert codes == [0] * world, said
            done[key] = path, filled, counts, outcome(output)
        return done[key]

    return of


def kill_and_go_on(
    whole,
    tmp_path: Path,
    world: int,
    kind: str,
    number: signal.Signals,
    seed: int,
    asynchronous: bool = False,
    environment: Any = None,
) -> None:
    path, filled, counts, wanted = whole(world, asynchronous, kind == "tokenising", environment)
    how: Any = {"asynchronous": asynchronous, "environment": environment or {}}
    instant = draw(seed, counts, kind, number)
    output, cache = tmp_path / "out", tmp_path / "cache" if kind == "tokenising" else filled
    codes, said, reached = run(world, tmp_path / "said", path, output, cache, instant, **how)
    while codes == [0] * world and (most := reached[instant.rank][kind]) < instant.index:
        # Which of several ranks comes first to a text or a folder is chance: this one did not come to the instant.
        shutil.rmtree(output)
        if kind == "tokenising":
            shutil.rmtree(cache)
        instant = replace(instant, index=max(1, most // 2))
        codes, said, reached = run(world, tmp_path / "said", path, output, cache, instant, **how)
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
    codes, said, _ = run(world, tmp_path / "said", path, output, cache, **how)
    assert codes == [0] * world, f"{where}\nthen {codes}: {said}"
    assert outcome(output) == wanted, where
    assert not list(output.rglob("*.partial*")), where
    assert all(damage(p) is None for unit in output.glob("*/**/seed-1") for p, _ in checkpoints(unit)), where


FAST = [(1, "saving", KILL), pytest.param(1, "step", TERM, marks=pytest.mark.slow), (2, "step", TERM)]


@pytest.mark.parametrize(("world", "kind", "number"), FAST)
def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path, world, kind, number):
    kill_and_go_on(whole, tmp_path, world, kind, number, seed=1)


def test_a_signal_to_one_rank_in_the_last_save_of_all_ends_all(whole, tmp_path):
    """No step comes after it at which the ranks would agree."""
    path, cache, counts, wanted = whole(2)
    instant = Instant("saving", counts[1]["saving"], TERM, 1)
    codes, said, _ = run(2, tmp_path / "said", path, tmp_path / "out", cache, instant)
    assert codes == [143, 143] and "saved at step 3; the same command goes on" in said, f"{codes}: {said}"
    codes, said, _ = run(2, tmp_path / "said", path, tmp_path / "out", cache)
    assert codes == [0, 0] and outcome(tmp_path / "out") == wanted, said


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


IN_SHARDS = [
    *itertools.product(["saving"], [KILL], range(1, 13)),
    *itertools.product(["step"], [KILL, TERM], (1, 2, 3)),
    *itertools.product(["saving"], [TERM], (1, 2)),
]  # 20


@pytest.mark.parametrize(
    ("world", "kind", "number", "seed"),
    [(2, "saving", KILL, 1), *(pytest.param(4, *one, marks=pytest.mark.slow) for one in IN_SHARDS)],
)
def test_ranks_that_write_shards_beside_training_are_killed_and_go_on(whole, tmp_path, world, kind, number, seed):
    """The last and the best checkpoints are ordinary folders, the others lie in shards."""
    kill_and_go_on(whole, tmp_path, world, kind, number, seed, environment=FSDP2)


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


# ---- commands of half a second, hundreds of times


def every_file(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class Command:
    """A command, what it ends with where nothing interrupts it, and how many events it comes to.

    Args:
        folder: For what belongs to it.
        argv: Behind `fire-llm`, without the place of its output.
        end: Returns what must be the same, of the output.
        kinds: Of the instants that are drawn.
        cache: A filled cache; an empty one a try where there is none.
        asynchronous: Write checkpoints beside training.
    """

    def __init__(
        self,
        folder: Path,
        argv: list[str],
        end: Any,
        kinds: tuple[str, ...],
        cache: Path | None,
        asynchronous: bool = False,
    ) -> None:
        self.folder, self.argv, self.end, self.kinds, self.filled = folder, argv, end, kinds, cache
        self.asynchronous = asynchronous
        folder.mkdir()
        code, said, self.counts = self.call("whole")
        assert code == 0, said
        self.wanted, self.files = self.state("whole")

    def call(self, name: str, instant: Instant | None = None) -> tuple[int, str, Counter]:
        place = self.folder / name
        argv = [part.replace("OUTPUT", str(place / "out")) for part in self.argv]
        (place / "out").parent.mkdir(exist_ok=True)
        cache = self.filled or place / "cache"
        codes, said, counts = command(argv, self.folder, place, cache, instant, asynchronous=self.asynchronous)
        return codes[0], said, counts[0]

    def state(self, name: str) -> tuple[Any, set[str]]:
        return self.end(self.folder / name / "out"), every_file(self.folder / name)

    def kill(self, chance: random.Random, seed: int) -> str:
        """Kill it at an instant, call it again, and see that it ends as if nothing had been; return the instant."""
        kind = chance.choice([kind for kind in self.kinds if self.counts[kind]])
        number = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        instant, name = Instant(kind, chance.randint(1, self.counts[kind]), number), f"try-{seed}"
        code, said, _ = self.call(name, instant)
        where = f"{self.argv[0]}, {instant}, try {seed}: {code}\n{said}"
        assert code in (-number, 128 + number), where
        assert "Traceback" not in said, where
        out = self.folder / name / "out"
        if not (self.argv[0] == "apply" and out.exists()):  # which is whole then, and refuses to be made again
            code, said, _ = self.call(name)
            assert code == 0, f"{where}\nthen {code}: {said}"
        found, files = self.state(name)
        assert found == self.wanted, where
        assert files == self.files, f"{where}\nleft: {files - self.files}, lost: {self.files - files}"
        shutil.rmtree(self.folder / name)
        return f"{kind} {number.name}"


def trials(output: Path) -> dict[str, Any]:
    return {path.parent.name: outcome(path.parent) for path in output.glob("*/results.json")}


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def commands(folder: Path) -> dict[str, Command]:
    """Return run, sweep, apply, and a run that is killed while it saves beside training, or while it tokenises."""
    path = quick_recipe(folder)
    runs = ["run", str(path), "--output", "OUTPUT"]
    tokenising = Command(folder / "tokenise", runs, outcome, ("tokenising",), None)
    cache = folder / "tokenise" / "whole" / "cache"
    checkpoint = next((folder / "tokenise" / "whole" / "out" / "first" / "seed-1").glob("checkpoint-4"))
    swept = [
        "sweep",
        str(path),
        "--workers",
        "1",
        "--grid",
        "phases.1.arms.fire.iterations=[1,2]",
        "--output",
        "OUTPUT",
    ]
    return {
        "run": Command(folder / "run", runs, outcome, ("step", "reset", "saving"), cache),
        "sweep": Command(folder / "sweep", swept, trials, ("step", "reset", "saving"), cache),
        "apply": Command(folder / "apply", ["apply", str(checkpoint), "OUTPUT"], weights, ("reset", "saving"), cache),
        "save": Command(folder / "save", runs, outcome, ("saving",), cache, True),
        "tokenise": tokenising,
    }


TIMES = {"run": 60, "sweep": 30, "apply": 50, "save": 40, "tokenise": 40}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_killed_commands_end_as_if_nothing_had_been(tmp_path, capsys):
    """Weights and results are equal bit for bit, exit codes right, and nothing is left behind."""
    began, chance, killed, wrong = time.monotonic(), random.Random(1), Counter(), []
    for name, one in commands(tmp_path).items():
        for seed in range(TIMES[name]):
            try:
                killed[f"{name}: {one.kill(chance, seed)}"] += 1
            except AssertionError as error:
                wrong.append(str(error))
    with capsys.disabled():
        print(f"\n{killed.total()} instants held in {time.monotonic() - began:.0f} s: {dict(sorted(killed.items()))}")
    assert not wrong, f"{len(wrong)} did not hold:\n" + "\n\n".join(wrong)
    assert killed.total() >= 200
