"""The ratios of benchmarks that are tracked: what scripts/ratios.json names is there, and what falls short is told."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
TRACKED = json.loads((SCRIPTS / "ratios.json").read_text())
BENCHMARK = """
import json, sys
json.dump({"ratios": {"ours / theirs": 2.0625, "untracked": 1.0}}, open(sys.argv[sys.argv.index("--json") + 1], "w"))
sys.exit("--fail" in sys.argv)
"""


def run(script: Path, monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", [str(script), *words])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


@pytest.fixture
def file(tmp_path):
    """Return a file that tracks a ratio of a benchmark beside it."""
    (tmp_path / "benchmark.py").write_text(BENCHMARK)
    row = {"ours / theirs": {"last": 3.0, "threshold": 2.0}}
    (tmp_path / "ratios.json").write_text(json.dumps({"benchmark.py --size 3": {"ratios": row}}))
    return tmp_path / "ratios.json"


@pytest.mark.parametrize(
    ("old", "new", "ended", "said"),
    [
        ("", "", 0, "3      2.06         2  ours / theirs\nall reach their thresholds\n"),
        ("2.0}", "2.1}", 1, "!!           3      2.06       2.1  ours / theirs\n1 below their"),
        (
            "theirs",
            "others",
            1,
            "!!           3       nan         2  ours / others\n1 below their",
        ),
        ("size", "fail --size", 1, "ended with 1\n"),
    ],
)
def test_what_is_below_its_threshold_or_missing_fails(old, new, ended, said, file, monkeypatch, capsys):
    file.write_text(file.read_text().replace(old, new))
    assert run(SCRIPTS / "check_ratios.py", monkeypatch, "--file", str(file)) == ended
    assert said in capsys.readouterr().out


def test_new_figures_are_written_with_their_machine_and_thresholds_stay(file, monkeypatch, capsys):
    assert run(SCRIPTS / "check_ratios.py", monkeypatch, "--write", "--only", "size", "--file", str(file)) == 0
    (entry,) = json.loads(file.read_text()).values()
    assert entry["ratios"] == {"ours / theirs": {"last": 2.06, "threshold": 2.0}}
    assert "cores" in entry["processor"] and "torch" in entry["versions"]
    assert run(SCRIPTS / "check_ratios.py", monkeypatch, "--only", "sise", "--file", str(file)) == 2
    assert "--only sise: in no command of" in capsys.readouterr().err


def test_tracked_commands_are_of_benchmarks_that_write_ratios_and_reached_their_thresholds():
    for command, entry in TRACKED.items():
        source = (SCRIPTS / shlex.split(command)[0]).read_text()
        assert '"--json"' in source and '"ratios"' in source and set(entry) == {"processor", "versions", "ratios"}
        assert all(0 < row["threshold"] <= row["last"] for row in entry["ratios"].values()), command


def test_the_division_of_work_among_ranks_is_as_good_as_it_was(tmp_path, monkeypatch):
    """It is arithmetic: the same everywhere."""
    (command,) = (command for command in TRACKED if "plan" in command)
    script, *options = shlex.split(command)
    monkeypatch.setattr("sys.argv", [script, *options, "--json", str(tmp_path / "plan.json")])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    found = json.loads((tmp_path / "plan.json").read_text())["ratios"]
    last = {name: row["last"] for name, row in TRACKED[command]["ratios"].items()}
    assert {name: float(f"{ratio:.3g}") for name, ratio in found.items() if name in last} == last
