"""The matrix of a run: transfer by hand-made numbers, and a tiny run against what its own results say."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import WORDS

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.cli import main
from fire_llm.core.atomic import is_run
from fire_llm.evaluation.records import CheckpointDifference
from fire_llm.evaluation.scores import Scores
from fire_llm.evaluation.table import plus_minus, print_scores
from fire_llm.experiment.evaluate_run import evaluate_run
from fire_llm.experiment.transfer import PhaseRun, transfer
from fire_llm.reporting.schema import Evaluation


def scores(*nats: float) -> Scores:
    """Score documents of 10 tokens and 40 bytes each."""
    return Scores(nats, [10] * len(nats), [40] * len(nats))


# ---- arithmetic, by hand


def hand_made() -> tuple[dict[str, dict[str, Scores]], list[PhaseRun]]:
    """Train on a, then b in two arms, then one of these on c with a replayed."""
    matrix = {
        "init": {"a": scores(80, 80), "b": scores(90, 90), "c": scores(70, 74)},
        "one": {"a": scores(20, 24), "b": scores(60, 70), "c": scores(66, 68)},
        "base": {"a": scores(28, 32), "b": scores(30, 30), "c": scores(64, 68)},
        "fire": {"a": scores(24, 36), "b": scores(28, 30), "c": scores(62, 66)},
        "last": {"a": scores(22, 22), "b": scores(38, 54), "c": scores(20, 20)},
    }
    one = PhaseRun("first", None, 1, ("a",), "init", "one", None)
    base = PhaseRun("second", "base", 1, ("b",), "one", "base", one)
    fire = PhaseRun("second", "fire", 1, ("b",), "one", "fire", one)
    last = PhaseRun("third", "fire", 1, ("c", "a"), "fire", "last", fire)
    return matrix, [one, base, fire, last]


def test_transfer_is_what_a_pencil_gives():
    lost, helped = transfer(*hand_made())
    # {(corpus, after, before): nats a byte}: the differences of two documents over their 80 bytes.
    forgetting = {(e.data, e.after, e.before): e.mean for e in lost}
    assert forgetting == {
        ("a", "base", "one"): pytest.approx((8 + 8) / 80),
        ("a", "fire", "one"): pytest.approx((4 + 12) / 80),
        ("a", "last", "one"): pytest.approx((2 - 2) / 80),
        ("b", "last", "fire"): pytest.approx((10 + 24) / 80),
    }
    forward = {(e.data, e.after, e.before): e.mean for e in helped}
    assert forward == {
        ("b", "one", "init"): pytest.approx((-30 - 20) / 80),
        ("c", "fire", "init"): pytest.approx((-8 - 8) / 80),
    }


def test_transfer_names_phases_arms_and_replay_and_gives_intervals():
    lost, helped = transfer(*hand_made())
    base, fire, replayed, _ = lost
    assert (base.phase, base.arm, base.seed, base.trained_in) == ("second", "base", 1, "first")
    assert [e.replayed for e in lost] == [False, False, True, False]
    assert (replayed.phase, replayed.arm, replayed.unit) == ("third", "fire", "byte")
    # Both documents lost 8 nats: nothing to doubt. 0.1 and 0.3 a byte: standard error 0.2/2, t of 1 degree.
    assert [base.se, base.low - base.mean, base.high - base.mean] == pytest.approx([0, 0, 0], abs=1e-15)
    assert fire.se == pytest.approx(0.1, rel=0.07)
    assert fire.high - fire.mean == pytest.approx(12.7062 * fire.se, rel=1e-4)
    assert [(e.phase, e.arm) for e in helped] == [("second", None), ("third", None)]


def test_a_corpus_trained_on_twice_is_forgotten_since_the_last_time():
    matrix, (one, base, *_) = hand_made()
    again = PhaseRun("third", None, 1, ("a",), "base", "fire", base)
    after = PhaseRun("fourth", None, 1, ("c",), "fire", "last", again)
    lost, _ = transfer(matrix, [one, base, again, after])
    assert [(e.data, e.before) for e in lost if e.after == "last"] == [("a", "fire"), ("b", "base")]


def test_a_run_of_one_phase_has_no_transfer():
    matrix, (one, *_) = hand_made()
    assert transfer(matrix, [one]) == ([], [])


# ---- a run


def recipe_data(texts: Path) -> dict:
    return {
        "name": "tiny",
        "data_root": str(texts),
        "seed": [1, 2],
        "model": {"preset": "gpt-tiny", "context": 32, "config": {"n_embd": 32, "n_layer": 1, "n_head": 2}},
        "tokenizer": {"train": 300, "corpora": ["a", "b"]},
        "corpora": {
            "a": {"files": "a.jsonl", "holdout": 0.2},
            "b": {"files": "b.jsonl", "holdout": 0.2},
            "whole": {"files": "b.jsonl", "holdout": 0.0},
        },
        "optimizer": {"lr": 3.0e-3, "min_lr": 3.0e-4},
        "batch": {"tokens_per_step": 256},
        "phases": [
            {"name": "first", "data": {"a": 1.0}, "steps": 8, "keep": [4, "best"]},
            {
                "name": "second",
                "data": {"b": 0.5, "whole": 0.5},
                "steps": 4,
                "start_from": {"first": 4},
                "arms": {"base": "keep", "fire": "fire"},
            },
        ],
        "evaluate": {"data": ["a", "b"], "every_steps": 4, "max_tokens": 700},
        "log_every_steps": 4,
        "save_every_steps": 4,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict, dict]:
    """Run a tiny recipe of two corpora, two arms and two seeds, and evaluate it: (folder, results, evaluation)."""
    import random

    texts = tmp_path_factory.mktemp("texts")
    for name, seed in (("a", 1), ("b", 2)):
        draw = random.Random(seed)
        chosen = WORDS[: 6 + 6 * seed]
        lines = [" ".join(draw.choices(chosen, k=draw.randint(10, 60))) for _ in range(200)]
        (texts / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    folder = tmp_path_factory.mktemp("run") / "tiny"
    results = run_recipe(load_recipe(recipe_data(texts)), folder, progress=False)
    return folder, results, evaluate_run(folder, progress=False)


def trials(evaluation: dict) -> dict[tuple[str, str], dict]:
    return {(row["checkpoint"], row["data"]): row for row in evaluation["rows"]}


def test_every_kept_checkpoint_meets_every_held_out_corpus(run):
    folder, _, evaluation = run
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in evaluation["rows"]))
    assert checkpoints[:2] == ["init/seed-1", "init/seed-2"]
    for seed in (1, 2):
        assert f"first/seed-{seed}/checkpoint-4" in checkpoints
        assert {f"second/{arm}/seed-{seed}/checkpoint-4" for arm in ("base", "fire")} <= set(checkpoints)
    assert len(evaluation["rows"]) == 2 * len(checkpoints)
    labels = {(row["phase"], row["seed"], row["step"]): row["labels"] for row in evaluation["rows"]}
    assert "4" in labels["first", 1, 4] and "final" in labels["first", 1, 8]
    assert sum("best" in found for key, found in labels.items() if key[0] == "first") == 2
    assert labels[None, 1, 0] == ["init"] and labels["second", 2, 4] == ["final"]
    assert "whole" in evaluation["left_out"] and "no validation documents" in evaluation["left_out"]["whole"]
    assert evaluation["unfinished"] == []
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(evaluation))


def test_its_numbers_are_those_of_the_runs_results(run):
    """In training each phase measured its own model, with the trainer's code; here it is loaded from the disk."""
    _, results, evaluation = run
    found = trials(evaluation)
    for first in results["phases"]:
        for entry in first["curve"]:
            key = f"first/seed-{first['seed']}/checkpoint-{entry['step']}" if entry["step"] else None
            for corpus, measured in entry["eval"].items():
                row = found[key or f"init/seed-{first['seed']}", corpus]
                assert row["nll"] == pytest.approx(measured["nll"], rel=1e-6)
                assert row["bits_per_byte"] == pytest.approx(measured["bits_per_byte"], rel=1e-6)
    for arm, entry in results["arms"].items():
        for one in entry["runs"]:
            for corpus, measured in one["final"].items():
                row = found[f"second/{arm}/seed-{one['seed']}/checkpoint-4", corpus]
                assert row["nll"] == pytest.approx(measured["nll"], rel=1e-6)
                assert row["tokens"] == measured["tokens"] <= 700
                assert row["se"]["nll"] > 0 and row["se"]["bits_per_byte"] > 0
                assert (row["context"], row["stride"], row["per_document"]) == (32, 32, False)


def test_forgetting_and_forward_transfer_follow_from_the_results(run):
    _, results, evaluation = run
    curves = {p["seed"]: {e["step"]: e["eval"] for e in p["curve"] if e["eval"]} for p in results["phases"]}
    bits = math.log(2)
    forgetting = {(e["data"], e["arm"], e["seed"]): e for e in evaluation["forgetting"]}
    assert set(forgetting) == {("a", arm, seed) for arm in ("base", "fire") for seed in (1, 2)}
    for (corpus, arm, seed), entry in forgetting.items():
        final = next(r["final"] for r in results["arms"][arm]["runs"] if r["seed"] == seed)
        lost = final[corpus]["bits_per_byte"] - curves[seed][4][corpus]["bits_per_byte"]
        assert entry["mean"] == pytest.approx(lost * bits, rel=1e-4, abs=1e-7)
        assert entry["low"] < entry["mean"] < entry["high"] and entry["unit"] == "byte"
        assert entry["before"] == f"first/seed-{seed}/checkpoint-4"
    forward = {(e["data"], e["seed"]): e for e in evaluation["forward_transfer"]}
    assert set(forward) == {("b", 1), ("b", 2)}  # `whole` has no held-out text
    for (corpus, seed), entry in forward.items():
        gained = curves[seed][4][corpus]["bits_per_byte"] - curves[seed][0][corpus]["bits_per_byte"]
        assert entry["mean"] == pytest.approx(gained * bits, rel=1e-4)
        assert entry["mean"] < 0 and entry["arm"] is None and entry["before"] == f"init/seed-{seed}"


def test_one_corpus_another_context_and_stride(run, tmp_path):
    folder, _, evaluation = run
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "second" / "fire" / "seed-2")
    one = evaluate_run(copy, ["a"], context=16, stride=4, progress=False)
    assert {row["data"] for row in one["rows"]} == {"a"}
    assert {(row["context"], row["stride"]) for row in one["rows"]} == {(16, 4)}
    assert one["unfinished"] == ["second/fire/seed-2"] and one["left_out"] == {}
    assert {row["tokens"] for row in one["rows"]} == {r["tokens"] for r in evaluation["rows"] if r["data"] == "a"}
    assert one["forward_transfer"] == [] and len(one["forgetting"]) == 3


def test_a_run_that_began_with_a_checkpoint_has_it_as_its_first_row(run, tmp_path):
    folder, *_ = run
    given = str(folder / "first" / "seed-1" / "checkpoint-8")
    data = recipe_data(Path(json.loads((folder / "recipe.json").read_text())["data_root"]))
    data |= {"model": {"checkpoint": given, "context": 32}, "tokenizer": given, "seed": 1}
    data["phases"] = [{"name": "only", "data": {"b": 1.0}, "steps": 1}]
    run_recipe(load_recipe(data), tmp_path / "more", progress=False)
    more = evaluate_run(tmp_path / "more", progress=False)
    assert [(r["checkpoint"], r["labels"], r["seed"]) for r in more["rows"][::2]] == [
        (given, ["start"], None),
        ("only/seed-1/checkpoint-1", ["final"], 1),
    ]
    assert trials(more)[given, "a"]["nll"] == trials(run[2])["first/seed-1/checkpoint-8", "a"]["nll"]


def test_what_was_measured_is_not_measured_again_but_where_something_differs(run, tmp_path):
    folder, _, evaluation = run
    copy = shutil.copytree(folder, tmp_path / "copy")
    number = len(evaluation["rows"])
    assert evaluation["reused"] == 0

    def without_time(found: dict) -> dict:
        return {key: value for key, value in found.items() if key not in ("created", "reused")}

    again = evaluate_run(copy, progress=False)
    assert again["reused"] == number and without_time(again) == without_time(evaluation)
    # Other settings, and being asked to, measure everything; so does what somebody changed in what is kept.
    assert evaluate_run(copy, ["a"], stride=16, progress=False)["reused"] == 0
    for kept in (copy / ".measured").iterdir():
        content = json.loads(kept.read_text())
        content["scores"]["nll"][0] += 1.0
        kept.write_text(json.dumps(content))
    measured = evaluate_run(copy, progress=False)
    assert measured["reused"] == 0 and without_time(measured) == without_time(evaluation)
    assert evaluate_run(copy, ["a"], again=True, progress=False)["reused"] == 0
    # Other weights under a checkpoint's name, of an equal size.
    weights = copy / "second" / "fire" / "seed-1" / "checkpoint-4" / "model.safetensors"
    shutil.copy(copy / "second" / "base" / "seed-1" / "checkpoint-4" / "model.safetensors", weights)
    with pytest.raises(UserError, match="checkpoint-4' is damaged: its weights are not what was written"):
        evaluate_run(copy, progress=False)


def test_an_unfinished_run_is_reported_as_far_as_it_is(run, tmp_path, capsys):
    copy = shutil.copytree(run[0], tmp_path / "copy")
    (copy / "results.json").unlink()
    for seed in (1, 2):
        shutil.rmtree(copy / "second" / "fire" / f"seed-{seed}")
    before = sorted(copy.rglob("*"))
    assert main(["report", str(copy), "--output", str(tmp_path / "page.html")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Unfinished, what follows is of the rest: second/fire/seed-1 (to do), second/fire/seed-2 (to do)." in said
    assert "base" in said and "Unfinished, what follows" in (tmp_path / "page.html").read_text()
    shutil.rmtree(copy / "first")
    shutil.rmtree(copy / "second")
    shutil.rmtree(copy / "tokenizer")
    assert main(["report", str(copy), "--output", str(tmp_path / "page.html")]) == 0
    assert "first/seed-1 (to do)" in capsys.readouterr().out and not (copy / "tokenizer").exists()
    assert {p for p in before if p.exists()} == {*copy.rglob("*")}


@pytest.mark.parametrize(
    "name", ["recipe.json", "first/seed-1/unit.json", "first/seed-1/checkpoint-8/trainer_state.json"]
)
def test_a_runs_own_files_edited_by_chance_are_told(name, run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "copy")
    whole = (copy / name).read_bytes()
    for content in [b"null", b"[]", b"", b"[" * 2000, whole[: len(whole) // 2]]:
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{Path(name).name}|its last checkpoint is damaged"):
            evaluate_run(copy, progress=False)


def test_what_is_no_finished_run_is_refused(run, tmp_path):
    folder, *_ = run
    assert is_run(folder) and not is_run(folder / "first" / "seed-1" / "checkpoint-4")
    with pytest.raises(UserError, match=r"is no run: it has no recipe\.json"):
        evaluate_run(folder / "first")
    shutil.copy(folder / "recipe.json", tmp_path / "recipe.json")
    with pytest.raises(UserError, match="has no finished phase to evaluate"):
        evaluate_run(tmp_path)
    with pytest.raises(UserError, match=r"the run has no corpus 'aa'\. Did you mean 'a'\? It has: a, b, whole"):
        evaluate_run(folder, ["aa"])
    with pytest.raises(UserError, match="corpus 'whole' has no validation documents"):
        evaluate_run(folder, ["whole"], progress=False)
    (tmp_path / "recipe.json").write_text('{"name":')
    with pytest.raises(UserError, match=r"recipe\.json' is damaged"):
        evaluate_run(tmp_path)


def test_text_that_changed_since_is_refused(run, tmp_path):
    folder, *_ = run
    copy = shutil.copytree(folder, tmp_path / "copy")
    recipe = json.loads((copy / "recipe.json").read_text())
    texts = shutil.copytree(recipe["data_root"], tmp_path / "texts")
    recipe["data_root"] = str(texts)
    (copy / "recipe.json").write_text(json.dumps(recipe))
    with (texts / "b.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match="corpus 'b' has changed since"):
        evaluate_run(copy, ["b"], progress=False)
    recipe["data_root"] = "nowhere"
    (copy / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="data_root counts from the current folder"):
        evaluate_run(copy, progress=False)


# ---- tables


def printed(evaluation: dict, differences=(), width: int = 100) -> str:
    out = io.StringIO()
    found = Evaluation.model_validate(evaluation)
    parts = {name: getattr(found, name) for name in ("forgetting", "forward_transfer", "left_out", "unfinished")}
    print_scores(found.rows, differences=differences, **parts, console=Console(file=out, width=width))
    return out.getvalue()


def test_numbers_are_written_with_the_digits_that_matter():
    assert plus_minus(3.214567, 0.0123) == "3.2146±0.0123"
    assert plus_minus(3.214567, 0.000045) == "3.214567±0.000045"
    assert plus_minus(24.8929, 0.3054, 2) == "24.89±0.31"
    assert plus_minus(3.214567, None) == "3.214567" and plus_minus(None, None) == ""
    assert plus_minus(-0.00123, 0.0002, 5, 6, "+") == "-0.00123±0.00020"
    assert plus_minus(1.0e40, 2.0e39, 2) == "1e+40±2e+39" and plus_minus(0.0, 0.0) == "0.0000±0.0000"


def test_a_runs_table_can_be_read_at_100_columns(run):
    text = printed(run[2])
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines())
    row = trials(run[2])["second/fire/seed-2/checkpoint-4", "a"]
    for key, least in (("nll", 4), ("perplexity", 2), ("bits_per_byte", 4), ("word_perplexity", 2)):
        assert plus_minus(row[key], row["se"][key], least) in text
    measured = "in fp32, context 32, stride 32, windows run across documents, after <|endoftext|>"
    assert measured in " ".join(text.split())
    assert "left out: corpus 'whole' has no validation documents" in text and "not trained to the end" not in text
    assert "not trained to the end: x/y, z" in printed({**run[2], "unfinished": ["x/y", "z"]})
    assert "Forgetting: NLL(after) less NLL(before" in text and "negative helps" in text
    assert "word perplexity per piece between runs of white space" in " ".join(text.split())


def test_differences_are_printed_against_the_first(run):
    row = {**run[2]["rows"][0], "se": None, "word_perplexity": None, "prefix": None, "per_document": True}
    rows = [{**row, "checkpoint": f"runs/x/{name}"} for name in ("one", "two", "three")]
    found = {"against": "runs/x/one", "data": "a", "unit": "byte", "level": 0.95, "documents": 9}
    interval = {"mean": -0.02, "se": 0.005, "low": -0.03, "high": -0.01}
    unknown = {"mean": 0.03, "se": None, "low": None, "high": None}
    differences = [
        CheckpointDifference(checkpoint="runs/x/two", **found, **interval),
        CheckpointDifference(checkpoint="runs/x/three", **found, **unknown),
    ]
    lines = printed({"schema_version": 1, "rows": rows}, differences).splitlines()
    assert lines[0].strip() == "checkpoints below runs/x/"
    assert "word ppl" not in lines[1] and lines[2].split()[:2] == ["one", "a"]
    text = " ".join(" ".join(lines).split())
    assert "each document by itself, the first token not scored" in text and "standard error" not in text
    assert "NLL less that of one: negative is better" in text
    assert "two a -0.02000±0.00500 -0.03000 to -0.01000 byte" in text
    assert "three a +0.030000 byte" in text
