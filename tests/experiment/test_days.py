"""What a run of days asks of a recipe: saves by the clock, text to read, averaged weights, an early end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.recipes import changed
from support.tiny_recipe import quick_recipe

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.cli import main
from fire_llm.core.manifest import damage
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.estimate import plan
from fire_llm.experiment.evaluate_run import evaluate_run
from fire_llm.experiment.stages import expand, final_checkpoint
from fire_llm.experiment.summary import Summary
from fire_llm.models import load_model
from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.schema import Results
from fire_llm.reporting.tables import load_results, write_report

PHASE = {
    "name", "data", "epochs", "steps", "tokens", "max_corpus_tokens", "sampling", "optimizer_state",
}  # fmt: skip
"""Keys of a phase in `unit.json` since the first version."""


def runs(results: dict) -> list[dict]:
    return [*results["phases"], *(run for arm in results["arms"].values() for run in arm["runs"])]


def timeless(results: dict) -> list[dict]:
    """Return what must not depend on the clock, on texts or on averages."""
    left = ("seconds", "throughput", "samples", "reset", "final_ema")
    return [{**{k: v for k, v in run.items() if k not in left}, "weights": last_weights(run)} for run in runs(results)]


def last_weights(run: dict) -> str:
    return run["weights"][run["checkpoint"]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, dict]:
    """Run the quick recipe once; return its folder and the results."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_recipe(load_recipe(quick_recipe(folder)), folder / "run", progress=False)


def again(plain, output: Path, *settings: str) -> dict:
    return run_recipe(load_recipe(plain[0] / "tiny.yaml", settings), output, progress=False)


def test_a_stage_is_what_it_was_where_none_of_the_keys_is_given(plain, tmp_path):
    def spec(*settings):
        run = RunContext(load_recipe(plain[0] / "tiny.yaml", settings), tmp_path)
        return [stage.spec for stage in expand(run)]

    before = spec()
    assert all(set(one["phase"]) == PHASE for one in before)
    assert spec("save_every_minutes=5", "generate={prompts: [''], max_new_tokens: 8}") == before
    first, second = spec("phases.0.ema={decay: 0.9}", "phases.1.stop={corpus: b, patience: 1, min_delta: 0.1}")
    assert first["phase"]["ema"] == {"decay": 0.9} and second["phase"]["stop"]["patience"] == 1
    assert set(first["phase"]) - PHASE == {"ema"} and set(second["phase"]) - PHASE == {"stop"}


def test_texts_and_the_clock_change_no_number_and_texts_are_in_results_and_page(plain, tmp_path):
    prompts = "generate={prompts: ['<b>&', ''], max_new_tokens: 6, every_steps: 2}"
    results = again(plain, tmp_path / "run", prompts, "save_every_minutes=1.0e-9", "keep_last=9")
    assert timeless(results) == timeless(plain[1]) and not any(run["samples"] for run in runs(plain[1]))
    first, fire = runs(results)
    assert [(s["step"], s["before_reset"], s["prompt"]) for s in fire["samples"]] == [
        (step, before, prompt) for step, before in ((0, True), (0, False), (2, False), (3, False))
        for prompt in ("<b>&", "")
    ]  # fmt: skip
    assert [s["text"] for s in fire["samples"][:2]] == [s["text"] for s in first["samples"][-2:]]
    saved = sorted(path.name for path in (tmp_path / "run" / "second" / "fire" / "seed-1").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    fire["samples"][1] |= {"text": "one" + 12 * "\n"}
    fire["samples"][0] |= {"text": "<script>alert(1)</script>\u202e\n  two"}
    page = write_report(Results.model_validate(results), tmp_path / "page.html").read_text()
    body = page[page.index("What the models write") :]
    assert "one\n[12 line breaks]\n<" in body and "\n\n\n\n" not in body
    assert "After “&lt;b&gt;&amp;”" in body and "Without a prompt" in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e\n  two" in body and "<script>alert(1)" not in body
    assert re.findall("before the reset|after the reset|step 3, the last", body)[:3] == [
        "before the reset", "after the reset", "step 3, the last",
    ]  # fmt: skip


def test_averaged_weights_are_a_checkpoint_that_is_measured_and_started_from(plain, tmp_path):
    settings = ("phases.0.ema={decay: 0.5}", "phases.1.ema={decay: 0.5}", "phases.1.start_from={first: ema}")
    results = again(plain, tmp_path / "run", *settings)
    first, fire = runs(results)
    average = tmp_path / "run" / "first" / "seed-1" / "checkpoint-4" / "ema"
    assert last_weights(first) == last_weights(runs(plain[1])[0]) and damage(average) is None
    assert fire["start"] == {"phase": "first", "arm": None, "checkpoint": "ema", "step": 4}
    assert fire["loss_jump"]["a"]["before"] == first["final_ema"]["a"]["nll"] != first["final"]["a"]["nll"]
    assert [bool(entry["ema"]) for entry in first["curve"] if entry["eval"]] == [False, True, True]
    rows = {(r["checkpoint"], r["data"]): r for r in evaluate_run(tmp_path / "run", progress=False)["rows"]}
    row = rows["first/seed-1/checkpoint-4/ema", "a"]
    assert row["nll"] == pytest.approx(first["final_ema"]["a"]["nll"], rel=1e-9)
    assert (row["labels"], row["step"]) == (["ema"], 4)
    told = Comparison(load_results(tmp_path / "run"))
    assert told.forgotten("fire", "a")[1] == fire["final"]["a"]["nll"] - first["final_ema"]["a"]["nll"]
    assert told.averaged()[0].columns == ("b", "b (EMA)", "a", "a (EMA)")
    assert "(EMA)" in write_report(load_results(tmp_path / "run"), tmp_path / "page.html").read_text()
    trial = SimpleNamespace(name="one", settings={})
    [table] = Summary([trial], [load_results(tmp_path / "run")]).averaged()
    assert (table.names, table.columns) == (("arm", "trial"), told.averaged()[0].columns)
    assert [(row.names, row.cells) for row in table.rows] == [
        ((row.name, "one"), row.cells) for row in told.averaged()[0].rows
    ]
    assert Summary([trial], [load_results(plain[0] / "run")]).averaged() == []
    assert load_model(average).num_parameters() == results["model"]["parameters"]


def test_a_phase_that_stopped_is_finished_and_its_results_tell(plain, tmp_path, capsys):
    """The base ends at the first evaluation; full reset, whose NLL falls from ln V, trains on."""
    settings = [
        "phases.1.arms={base: none, full-reset: full_reset}", "phases.1.steps=6", "optimizer.lr=1.0e-9",
        "optimizer.min_lr=1.0e-10", "phases.0.optimizer={lr: 3.0e-2}", "phases.1.keep=[best]",
        "phases.1.stop={corpus: b, patience: 1, min_delta: 0.01}",
    ]  # fmt: skip
    results = again(plain, tmp_path / "run", *settings)
    stage = tmp_path / "run" / "second" / "base" / "seed-1"
    stopped = {arm: (one["runs"][0]["steps"], one["runs"][0]["planned_steps"]) for arm, one in results["arms"].items()}
    assert stopped == {"base": (2, 6), "full-reset": (2, 6)} and results["unfinished"] == {}
    assert final_checkpoint(stage) == stage / "checkpoint-2"
    before = {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()}
    assert runs(again(plain, tmp_path / "run", *settings)) == runs(results)  # skipped: not even the clock differs
    assert {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=r"phase\.stop\.min_delta: 0.01 then, 0.0 now"):
        again(plain, tmp_path / "run", *settings[:-1], "phases.1.stop={corpus: b, patience: 1}")

    def read(**steps):
        data = json.loads((tmp_path / "run" / "results.json").read_text())
        for arm, (number, planned) in steps.items():
            changes = {"steps": number, "planned_steps": planned, "batches_hash": f"{number:016x}"}
            data["arms"][arm.replace("_", "-")]["runs"][0] |= changes
        return Comparison(Results.model_validate(data))

    assert read().batches()[0] is True
    told = read(base=(2, 6), full_reset=(6, None))
    assert told.batches()[0] is None and "(base 2, full-reset 6)" in told.batches()[1]
    assert "base (seed 1) at step 2 of 6" in told.reading()[-1] and "full-reset" not in told.reading()[-1]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("save_every_minutes", 0, "save_every_minutes: 0 is not allowed: it should be greater than 0"),
        ("generate", {"prompts": []}, r"generate.prompts: \[\] is not allowed: it should be a list of at least 1$"),
        ("phases/0/ema", 0.9, r"phases\[0\].ema: 0.9 is not allowed: it should be a mapping; its keys are decay$"),
        ("phases/0/stop", 3, "should be a mapping; its keys are corpus, patience, min_delta$"),
        ("gradient_checkpointing", "yes", '"yes" is not allowed: it should be true or false$'),
        ("generate", {"prompts": [""], "max_new_tokens": 64}, "generate.max_new_tokens: 64 do not fit .* context, 64"),
        ("generate", {"promts": [""]}, "generate.promts: unknown key. Did you mean 'prompts'"),
        ("generate", {"prompts": [""], "temperature": float("inf")}, "generate.temperature: .* is not allowed"),
        ("phases/0/ema", {"decay": 1.0}, r"phases\[0\].ema.decay: 1.0 is not allowed: it should be less than 1"),
        ("phases/0/ema", {"dekay": 0.9}, r"phases\[0\].ema.dekay: unknown key. Did you mean 'decay'"),
        ("phases/0/stop", {"corpus": "nowhere"}, r"phases\[0\].stop.corpus: 'nowhere' is not measured"),
        (
            "phases/0/stop",
            {"corpus": "python-docs", "patience": 10},
            "come to 10 of the phase's 10 steps: it would never",
        ),
        ("phases/1/start_from", {"one": ["ema"]}, "'ema' is not kept.*Give that phase ema"),
    ],
)
def test_faults_are_named_together(path, value, said):
    data = changed(path, value)
    with pytest.raises(UserError, match=said):
        load_recipe(data)


def test_what_a_later_phase_could_not_start_from_is_refused():
    data = changed("phases/0/stop", {"corpus": "python-docs"})
    for label in (5, "5"):
        with pytest.raises(UserError, match="step 5 may never come, as 'one' may stop before it"):
            load_recipe({**data, "phases": [data["phases"][0], {**data["phases"][1], "start_from": {"one": [label]}}]})
    data = changed("phases/0/ema", {})
    second = {**data["phases"][1], "start_from": {"one": ["ema"]}, "optimizer_state": "kept"}
    with pytest.raises(UserError, match="'ema' has no moments, and optimizer_state is kept"):
        load_recipe({**data, "phases": [data["phases"][0], second]})


def test_a_phase_in_epochs_that_could_never_stop_is_refused_before_the_first_step(plain, tmp_path):
    settings = "phases.1.steps=null", "phases.1.epochs=0.1", "phases.1.stop={corpus: b, patience: 50}"
    with pytest.raises(UserError, match=r"phase 'second': stop\.patience: 50 evaluations, one every 2 steps, come"):
        again(plain, tmp_path / "run", *settings)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_check_tells_memory_and_prompts_that_do_not_fit(plain, tmp_path, capsys):
    path, tokenizer = plain[0] / "tiny.yaml", plain[0] / "run" / "tokenizer"
    without = plan(load_recipe(path), tmp_path)
    averaged = plan(load_recipe(path, ["phases.1.ema={decay: 0.9}"]), tmp_path)
    assert averaged["memory_bytes"] / without["memory_bytes"] == 20 / 16  # weights, gradients, moments; the average
    # Three checkpoints, first's best and the two last ones, of weights and moments; one holds an average too.
    assert averaged["disk_bytes"] / without["disk_bytes"] == (3 * 12 + 4) / (3 * 12)
    asked = [
        "--set", "phases.1.ema={}", "--set", "phases.1.stop={corpus: b, patience: 1, min_delta: 0.1}",
        "--set", "name=quick",
        "--set", f"tokenizer={tokenizer}",
    ]  # fmt: skip
    assert main(["check", str(path), *asked]) == 0
    said = capsys.readouterr().out
    assert (
        "weights averaged (decay 0.999), 4 more bytes a parameter; ends early where the NLL of b has not fallen by more"
        in said
    )
    assert (
        main(
            [
                "check",
                str(path),
                *asked,
                "--set",
                "generate={prompts: ['the weights of a model so that'], max_new_tokens: 8}",
            ]
        )
        == 2
    )
    assert "generate.prompts[0]: 'the weights of a model so that' takes" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"generate.prompts\[0\]: 'fire fire"):
        again(plain, tmp_path / "run", "generate={prompts: ['fire fire fire fire fire fire'], max_new_tokens: 8}")
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
