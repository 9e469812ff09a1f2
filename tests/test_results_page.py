"""docs/results.md is what its JSON and its texts say, and statistics of kept runs are those of their seeds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from fire_llm.core.errors import UserError

ROOT = Path(__file__).parent.parent
SCRIPT = "write_results_page"
STEPS = (0, 10, 20, 30, 40)
# By arm and start, the gap to base at the end, on the new corpus and on the old; s-and-p crosses base on its way.
ARMS = {"base": (0, 0), "full-reset": (0.3, 0.5), "s-and-p-0.5": (-0.04, 0.02), "s-and-p-0.2": (-0.01, 0.005)}
METHODS = {"base": "none", "full-reset": "full_reset"}


@pytest.fixture
def folder(tmp_path):
    """Return an empty docs/results."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "page.md").write_text("# Results\n\nA head.\n")
    return tmp_path / "docs" / "results"


def nll(arm: str, corpus: str, seed: int, share: float = 1.0, start: str = "final") -> float:
    """Return a made-up loss that no two arms, corpora, seeds, warm starts and steps share."""
    gap = ARMS[arm][corpus == "old"] + 0.2 * (1 - share) * (arm != "base") + 0.003 * math.sin(7 * seed + len(arm))
    return 5 - 2 * share + gap + 0.02 * seed**1.3 + (corpus == "old") + 0.1 * (start == "best")


def run_of(arm: str, seed: int, start: str = "final") -> dict:
    def scores(share: float) -> dict:
        return {c: {"nll": nll(arm, c, seed, share, start)} for c in ("new", "old")}

    curve = [{"step": step, "tokens": 1000 * step, "eval": scores(step / 40)} for step in STEPS]
    return {
        "phase": "second", "arm": arm, "seed": seed, "steps": 40, "tokens_per_step": 1000, "seconds": 1800.0,
        "start": {"phase": "first", "checkpoint": start, "step": 8}, "curve": curve, "final": curve[-1]["eval"],
    }  # fmt: skip


def arm_of(arm: str, seeds: tuple[int, ...], start: str = "final") -> dict:
    runs = [run_of(arm, seed, start) for seed in seeds]

    def mean(share: float) -> dict:
        values = {c: [nll(arm, c, seed, share, start) for seed in seeds] for c in ("new", "old")}
        return {
            c: {"nll": float(np.mean(v)), "perplexity": float(np.exp(np.mean(v))), "nll_std": float(np.std(v, ddof=1))}
            for c, v in values.items()
        }

    curve = [{"step": step, "tokens": 1000 * step, "eval": mean(step / 40)} for step in STEPS]
    return {
        "label": arm,
        "methods": [METHODS.get(arm, "shrink_perturb")],
        "final": mean(1),
        "curve": curve,
        "runs": runs,
    }


def write_run(place: Path, starts=("final",), short: str | None = None) -> Path:
    """Write the results.json of a made-up run; the arm `short` lacks its third seed."""
    arms = {
        f"{arm}@{start}" if len(starts) > 1 else arm: arm_of(arm, (1, 2) if arm == short else (1, 2, 3), start)
        for start in starts
        for arm in ARMS
    }
    data = {
        "schema_version": 2, "name": "made-up", "created": "2026-11-27T10:00:00+00:00", "arms": arms,
        "versions": {"torch": "2.13.0+cpu", "transformers": "5.23.0"}, "hardware": {"cpu": "Xeon", "cores": 2},
        "recipe": {"name": "made-up", "data_root": "/somewhere/of/mine", "precision": "fp32"},
        "model": {"parameters": 1234567, "description": "GPT"}, "phase_corpus": {"first": "old", "second": "new"},
        "arms_phase": "second", "first_corpus": "old", "new_corpus": "new",
        "unfinished": {f"second/{short}/seed-3": "step 2 of 40"} if short else {},
    }  # fmt: skip
    place.mkdir()
    (place / "results.json").write_text(json.dumps(data))
    return place


def mean_and_reach(values: list[float]) -> tuple[float, float]:
    """Return a mean and half its 95 % interval, by scipy."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(np.mean(values)), float(high - low) / 2


def printed(mean: float, spread: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f} ± {spread:.4f}".replace("-", "−")


def rows(page: str) -> dict[str, list[str]]:
    found = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.+\|$", page, re.M)]
    return {row[0]: row[1:] for row in found}


def test_the_page_and_its_plots_are_what_the_studies_say(script, capsys):
    assert script.main(["--check"]) == 0, f"run `make schema`: {capsys.readouterr().out}"


def test_every_study_with_seeds_prints_what_they_give(script):
    """Recompute, from the JSON alone, each arm's mean and its difference to the base of its warm start."""
    page = script.Page()
    for name in page.names:
        data = page.data(name)
        text = script.OfRun(data).tables() if "results" in data else {}
        arms = data["results"]["arms"] if "results" in data else {}
        finals = {
            arm: {c: {r["seed"]: r["final"][c]["nll"] for r in of["runs"] if c in r["final"]} for c in of["final"]}
            for arm, of in arms.items()
        }
        for arm, by_corpus in finals.items():
            base = finals.get("@".join(["base", *arm.split("@")[1:]]))
            for corpus, seeds in by_corpus.items():
                values = [*seeds.values()]
                if len(values) > 1:
                    assert printed(np.mean(values), np.std(values, ddof=1)) in text[corpus], (name, arm)
                gaps = [nll - base[corpus][seed] for seed, nll in seeds.items() if seed in base[corpus]] if base else []
                if len(gaps) > 1 and base is not by_corpus:
                    assert printed(*mean_and_reach(gaps), "+") in text[corpus], (name, arm)


def test_a_run_is_added_with_its_seeds_and_its_numbers_are_computed_from_them(script, folder, tmp_path):
    run = write_run(tmp_path / "run")
    assert script.main(["--add", str(run), "--name", "made-up"], folder) == 0
    text = folder / "made-up.md"
    words = (
        "{new/s-and-p-0.5} {new/s-and-p-0.5 - full-reset} {old/base - s-and-p-0.5:3 abs} {forgotten old/base:2 mean}"
    )
    text.write_text(text.read_text() + f"\nWords: {words} {{new/base/perplexity}} `{{code}}`\n")
    before = (folder / "made-up.json").read_text()
    assert script.main(["--add", str(run), "--name", "made-up", "--command", "fire-llm run it.yaml"], folder) == 0
    assert (folder / "made-up.json").read_text() == before.replace(
        "fire-llm run made-up.yaml --set data_root=FOLDER", "fire-llm run it.yaml"
    )
    assert "/somewhere" not in before and "FOLDER/mine" in before
    page = (folder.parent / "results.md").read_text()
    assert "2 cores of Xeon, fp32, torch 2.13.0, transformers 5.23.0. Seeds 1, 2, 3; 12 stages, 6.0 h" in page
    assert "```\nfire-llm run it.yaml\n```" in page and "1,234,567 parameters" in page

    def of(arm: str, corpus: str) -> list[float]:
        return [nll(arm, corpus, seed) for seed in (1, 2, 3)]

    for corpus in ("new", "old"):
        table = rows(script.Page(folder).study("made-up").tables()[corpus])
        for arm in ARMS:
            values = of(arm, corpus)
            assert table[arm][1] == printed(np.mean(values), np.std(values, ddof=1))
            for column, other in ((2, "base"), (3, "full-reset")):
                gaps = [a - b for a, b in zip(values, of(other, corpus), strict=True)]
                assert table[arm][column] == ("–" if other == arm else printed(*mean_and_reach(gaps), "+"))
    ends = rows(script.Page(folder).study("made-up").tables()["new"])
    assert ends["base"][4] == "15 %"  # 5 − 2·share gets to 3 + 0.3 at a share of 0.85
    said = re.search("^Words: (.*)$", page, re.M)[1]
    new = of("s-and-p-0.5", "new")
    gap = [a - b for a, b in zip(new, of("full-reset", "new"), strict=True)]
    old = mean_and_reach([a - b for a, b in zip(of("base", "old"), of("s-and-p-0.5", "old"), strict=True)])
    assert said == (
        f"{printed(np.mean(new), np.std(new, ddof=1))} {printed(*mean_and_reach(gap), '+')} "
        f"{abs(old[0]):.3f} ± {old[1]:.3f} −2.00 {np.exp(np.mean(of('base', 'new'))):.2f} `{{code}}`"
    )
    assert script.main(["--check"], folder) == 0
    (folder.parent / "results.md").write_text(page.replace("1,234,567", "1,234,568"))
    assert script.main(["--check"], folder) == 1


@pytest.mark.parametrize(
    ("trained", "evaluated", "said"),
    [("auto", "fp32", "precision auto"), ("auto", "training", "bf16"), ("fp16", "fp32", "fp16")],
)
def test_the_precision_is_that_of_training_and_not_of_measuring(script, tmp_path, trained, evaluated, said):
    data = json.loads((write_run(tmp_path / "run") / "results.json").read_text())
    data["recipe"] |= {"precision": trained, "evaluate": {"precision": evaluated}}
    measured = "fp32" if evaluated == "fp32" else "bf16"
    data["measurement"] = {"precision": measured, "context": 64, "stride": 64, "per_document": False}
    assert script.OfRun({"results": data}).facts["precision"] == said


def test_each_warm_start_is_compared_with_its_own_base_and_a_missing_seed_is_told(script, folder, tmp_path):
    run = write_run(tmp_path / "run", ("final", "best"), short="s-and-p-0.2")
    assert script.main(["--add", str(run), "--name", "starts"], folder) == 0
    table = script.Page(folder).study("starts").tables()["new"]
    assert "| *from final* |" in table and "Unfinished: 1 stage" in (folder.parent / "results.md").read_text()
    for start, part in zip(("final", "best"), table.split("*from best*"), strict=True):
        for arm, seeds in (("s-and-p-0.5", (1, 2, 3)), ("s-and-p-0.2", (1, 2))):
            gaps = [nll(arm, "new", s, start=start) - nll("base", "new", s, start=start) for s in seeds]
            assert rows(part)[arm][0] == str(len(seeds)) and rows(part)[arm][3] == printed(*mean_and_reach(gaps), "+")


def test_a_finished_run_is_added(script, folder, finished):
    run, results = finished
    assert script.main(["--add", str(run), "--name", "tiny"], folder) == 0
    table = rows(script.Page(folder).study("tiny").tables()["b"])
    assert {arm: cells[1] for arm, cells in table.items() if arm in results["arms"]} == {
        arm: f"{of['final']['b']['nll']:.4f}" for arm, of in results["arms"].items()
    }
    assert str(run.parent) not in (folder / "tiny.json").read_text()
    first = next(r for r in results["phases"] if r["phase"] == "first")["final"]["a"]["nll"]
    kept = script.Page(folder).study("tiny").cell("forgotten a/base").mean
    assert kept == pytest.approx(results["arms"]["base"]["final"]["a"]["nll"] - first, abs=2e-6)


def test_plots_show_every_arm_where_it_is(script, folder, tmp_path):
    run = write_run(tmp_path / "run", ("final", "best"))
    assert script.main(["--add", str(run), "--name", "drawn"], folder) == 0
    (folder / "drawn.md").write_text("{plot curves}\n\n{plot differences}\n\n{plot trade-off}\n")
    assert script.main([], folder) == 0
    texts = {kind: [*ElementTree.parse(folder / f"drawn-{kind}.svg").iter()] for kind in script.PLOTS}
    words = {kind: [e.text for e in of if e.tag.endswith("text")] for kind, of in texts.items()}
    for kind in ("curves", "differences"):
        assert {"new, from final", "old, from best", "20 k", *ARMS} <= {*words[kind]}
    assert [w for w in words["trade-off"] if w in ("0.2", "0.5", "s-and-p")] == ["0.2", "0.5", "0.2", "0.5", "s-and-p"]
    # The point of 0.2 lies nearer to zero than that of 0.5, and both are below base on the new corpus.
    labels = {e.text: e for e in texts["trade-off"] if e.get("paint-order")}
    assert float(labels["0.5"].get("y")) > float(labels["0.2"].get("y"))
    assert float(labels["0.5"].get("x")) > float(labels["0.2"].get("x"))
    (folder / "drawn.md").write_text("{tables}\n")
    assert script.main([], folder) == 0 and not [*folder.glob("*.svg")]


def test_differences_are_drawn_of_arms_with_the_seeds_of_base_alone(script, folder, tmp_path):
    run = write_run(tmp_path / "run", short="s-and-p-0.2")
    assert script.main(["--add", str(run), "--name", "drawn"], folder) == 0
    (folder / "drawn.md").write_text("{plot curves}\n\n{plot differences}\n")
    assert script.main([], folder) == 0
    curves, differences = (
        {e.text for e in ElementTree.parse(folder / f"drawn-{kind}.svg").iter()} for kind in ("curves", "differences")
    )
    assert "s-and-p-0.2" in curves - differences and "s-and-p-0.5" in curves & differences


def table_study(folder: Path, text: str) -> None:
    rows_ = [
        ["**fire** (5 steps)", "CELL", {"mean": 1, "half": 2}],
        ["s-and-p", 161, {"value": 4131, "unit": "MB"}],
        ["cut", [1, "a"], {"from": 3, "to": 5}],
    ]
    data = {"command": "python it.py", "date": "2026-11-21", "tables": {"a": {"columns": [], "rows": rows_}}}
    data["tables"]["a"]["columns"] = ["arm", "web text: NLL", "web text: vs base"]
    flat = json.dumps(data).replace('"CELL"', '{"mean": 4.7510, "sd": 0.0140}')
    flat = flat.replace('1, "half": 2', '0.0170, "half": 0.0030')
    (folder / "old.json").write_text(flat)
    (folder / "old.md").write_text(text)
    (folder / "page.md").write_text("# Results\n\n{study old}\n")


def test_printed_numbers_keep_their_digits(script, folder):
    table_study(folder, "{date}\n\n{command}\n\n{table a}\n\n{web-text/fire} {web-text/fire - base:2 mean}\n")
    assert script.main([], folder) == 0
    assert (folder.parent / "results.md").read_text() == (
        "# Results\n\n2026-11-21\n\n```\npython it.py\n```\n\n"
        "| arm | web text: NLL | vs base |\n|---|---:|---:|\n"
        "| **fire** (5 steps) | **4.7510 ± 0.0140** | **+0.0170 ± 0.0030** |\n"
        "| s-and-p | 161 | 4,131 MB |\n| cut | 1, a | 3–5 |\n\n4.7510 ± 0.0140 +0.02\n"
    )


def test_differences_of_a_table_are_drawn_beside_the_names_of_its_rows(script, folder):
    table_study(folder, "{plot against-base}\n")
    data = json.loads((folder / "old.json").read_text())
    rows = [["base", 1, None], ["up", 1, {"mean": 2.0, "half": 0.5}], ["down", 1, {"mean": -1.0, "half": 0.25}]]
    data["tables"]["a"]["rows"] = rows
    (folder / "old.json").write_text(json.dumps(data))
    assert script.main([], folder) == 0
    elements = [*ElementTree.parse(folder / "old-against-base.svg").iter()]
    places = {e.text: e for e in elements if e.tag.endswith("text")}
    assert "base" not in places and float(places["up"].get("y")) < float(places["down"].get("y"))
    marks = [(float(e.get("cx")), float(e.get("cy"))) for e in elements if e.tag.endswith("circle")][:2]
    (left, low), (right, high) = sorted(marks)
    assert low == pytest.approx(float(places["down"].get("y")) - 4, abs=0.1) and high < low
    per_point = (right - left) / 3  # pixels between −1 and 2
    zero = next(e for e in elements if e.get("stroke") == "#444")
    assert float(zero.get("d").split()[0][1:]) == pytest.approx(left + per_point, abs=0.2)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{web-text/flame}", "0 cells of row 'flame'"),
        ("{web-text/fire:x}", "'x' is no format"),
        ("{colour}", "neither a cell (CORPUS/ARM) nor a key"),
        ("{table b}", "no table of that name: a"),
        ("{plot curves}", "plots of a kept run are"),
        ("{new#web-text/fire}", "no study 'new': old"),
    ],
)
def test_a_placeholder_that_stands_for_nothing_is_named(script, folder, capsys, text, fault):
    table_study(folder, text)
    with pytest.raises(SystemExit) as ended:
        script.main([], folder)
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and f"old.md: {text}: " in said and fault in said
    assert not (folder.parent / "results.md").exists()


def test_what_cannot_be_added_is_told(script, folder, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for arguments, fault in (
        (["--add", str(tmp_path / "nothing"), "--name", "a"], "no results there"),
        (["--add", str(run)], "--add RUN_DIR and --name NAME go together"),
        (["--add", str(run), "--name", "a/b"], "--name a/b: small letters"),
        (["--add", str(run), "--name", "page"], "--name page: page.md is the page's head"),
    ):
        with pytest.raises(SystemExit) as ended:
            script.main(arguments, folder)
        assert ended.value.code == 2 and fault in capsys.readouterr().err
    assert [f.name for f in folder.iterdir()] == ["page.md"]
    (folder / "lost.json").write_text('{"tables": {}}')
    with pytest.raises(UserError, match=r"no \{study NAME\} for lost"):
        script.Page(folder).files()
    study = script.OfRun({"results": json.loads((run / "results.json").read_text())})
    for address, fault in (
        ("web/base", "no corpus of this study: new, old"),
        ("new/flame", "no arm of this study: base, full-reset"),
        ("new/base/colour", "no column 'colour'"),
        ("new/full-reset/perplexity - base", "'perplexity' is a column of an arm's own table"),
        ("forgotten old/base/perplexity", "'perplexity' is a column of an arm's own table"),
    ):
        with pytest.raises(UserError, match=fault):
            study.cell(address)
