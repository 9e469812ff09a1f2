"""Resets that wait until the phase before has overtrained the weights: the rule, what it is read off, what acts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.models import tiny_gpt2
from support.ranks import run_ranks
from support.recipes import GOOD, changed
from support.runs import run_rank
from support.tiny_recipe import quick_recipe

from fire_llm import UserError, apply_reset, load_recipe, run_recipe
from fire_llm.checkpoint import reset_checkpoint
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.estimate import plan
from fire_llm.experiment.stages import expand
from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.schema import Results
from fire_llm.reporting.tables import load_results, markdown_table, write_report
from fire_llm.resets import ResetSpec
from fire_llm.resets.conditions import Overtraining
from fire_llm.training import ResetCallback

# ---- the rule, on numbers worked out by hand


def log(*rows: tuple[int, float | None, float | None]) -> list[dict]:
    """Return a log of (step, training loss, held-out loss), as a trainer writes it: the loss first."""
    entries = []
    for step, loss, nll in rows:
        entries += [{"step": step, "loss": loss}] if loss is not None else []
        entries += [{"step": step, "eval_nll": nll, "eval_x_nll": 99.0}] if nll is not None else []
    return entries


@pytest.mark.parametrize(
    ("rows", "threshold", "applied", "rise", "at"),
    [
        # Turned up while the training loss went on falling.
        ([(0, None, 6.0), (10, 5.0, 4.0), (20, 3.0, 3.5), (30, 1.0, 4.2)], 0.1, True, 0.7, 20),
        ([(0, None, 6.0), (10, 5.0, 4.0), (20, 3.0, 3.5), (30, 1.0, 4.2)], 0.8, False, 0.7, 20),
        # A short phase that still learns.
        ([(0, None, 6.0), (10, 5.0, 4.0), (20, 3.0, 3.5)], 0.0, False, 0.0, 20),
        # Up again from the weights that it began with, and falling: the rate was warmed up, nothing was overtrained.
        ([(0, None, 3.0), (10, 3.4, 3.4), (20, 3.2, 3.2)], 0.1, False, 0.0, 20),
        # Overtrained further, from weights that were overtrained before.
        ([(0, None, 4.0), (10, 0.5, 4.5), (20, 0.3, 5.0)], 0.1, True, 0.5, 10),
        # A learning rate that is too high: both losses rise.
        ([(0, None, 6.0), (10, 4.0, 3.5), (20, 5.0, 4.5)], 0.1, False, 1.0, 10),
        # The training loss is logged more seldom than the held-out one; a value that is not finite is none.
        ([(5, 4.0, None), (10, None, 3.5), (12, None, float("nan")), (15, 2.0, None), (20, None, 4.5)],
         0.1, True, 1.0, 10),
    ],
)  # fmt: skip
def test_held_out_loss_that_turned_up_while_training_loss_fell_is_overtraining(rows, threshold, applied, rise, at):
    found = Overtraining.of(log(*rows), "eval_nll", ["x"], threshold)
    assert (found.applied, found.lowest_step) == (applied, at)
    assert found.nll - found.lowest == pytest.approx(rise)
    text = str(found)
    assert text.startswith("applied: " if applied else "not applied: ") and f"held-out {found.nll:.3f} on x" in text
    assert ("but the training loss did not fall" in text) is (not applied and rise > threshold)


def test_what_was_not_measured_is_not_judged():
    for rows in ([(0, None, 3.0)], [(10, 2.0, float("inf"))], [(10, None, 2.0)]):
        with pytest.raises(ValueError, match="no finite 'eval_nll'"):
            Overtraining.of(log(*rows), "eval_nll", ["x"], 0.1)


# ---- what may be written


def test_a_condition_is_a_word_or_a_number_of_nats():
    assert ResetSpec.parse("fire").when is None
    assert ResetSpec.parse({"method": "fire", "when": "overtrained"}).when == {"overtrained": 0.1}
    spec = ResetSpec.parse({"method": "shrink_perturb", "when": {"overtrained": 1}})
    assert spec.when == {"overtrained": 1} and spec.label().endswith("when overtrained by more than 1 nats")


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        ({"method": "fire", "when": "worn"}, "when: 'worn' is not allowed: give overtrained, or {overtrained: NATS}"),
        (
            {"method": "fire", "when": {"overtrained": -1}},
            "-1 is not allowed: give overtrained, or {",
        ),
        ({"method": "fire", "when": {}}, "{} is not allowed"),
        ({"method": "fire", "when": {"srank": 3}}, "'srank' is not allowed"),
        ({"method": "fire", "when": True}, "True is not allowed"),
        ({"method": "none", "when": "overtrained"}, "'none' leaves every weight as it is"),
        ({"method": "l2_init", "when": "overtrained"}, "'l2_init' acts during the whole phase, and a condition is for"),
        ({"method": "redo", "when": "overtrained"}, "'redo' acts during the whole phase"),
    ],
)
def test_other_conditions_are_told_by_check(reset, message):
    with pytest.raises(UserError) as error:
        load_recipe(changed("phases/1/arms/fire", [reset]))
    assert "phases[1].arms.fire[0].when: " in str(error.value) and message in str(error.value)


WAITING = {"method": "fire", "when": "overtrained"}


def armed(**changes) -> dict:
    data = changed("phases/1/arms/fire", ["rescale", WAITING])
    for path, value in changes.items():
        at = data["phases"][int(path[1])] if path[0] == "p" else data.setdefault("evaluate", {})
        at[path[3:]] = value
        if value is ...:
            del at[path[3:]]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**GOOD, "phases": armed()["phases"][1:]}, "what the first phase starts from was not measured by a phase"),
        (armed(e0_data=["library-docs"]), "evaluate.data has none of python-docs, which 'one' trains on; add one"),
        (armed(e0_every_steps=10), "'one' is evaluated once by step 10, which shows no rise"),
        (armed(e0_every_steps=4, p1_start_from={"one": [5]}), "'one' is evaluated every 4 steps, and so not at step 5"),
        (armed(e0_every_steps=5, p1_start_from={"one": [5]}), "'one' is evaluated once by step 5"),
        (armed(p0_steps=..., p0_epochs=2, p1_start_from={"one": [5]}), "may not be evaluated at step 5; give eval"),
    ],
)  # fmt: skip
def test_what_nothing_could_judge_is_told_by_check_once(data, message):
    with pytest.raises(UserError) as error:
        load_recipe(data)
    own = [line for line in str(error.value).splitlines() if ".when: " in line]
    assert len(own) == 1 and "arms.fire[1].when: " in own[0] and message in own[0]


def test_what_can_be_judged_passes_and_the_plan_names_the_condition(tmp_path):
    load_recipe(armed(p1_start_from={"one": ["best", "final", 5]}))
    rows = plan(load_recipe(armed()), tmp_path / "run")["stages"]
    assert [("when overtrained by more than 0.1" in row["reset"]) for row in rows] == [False, False, True]


def test_the_identity_of_a_stage_holds_a_condition_where_one_is_given_alone():
    def resets(data):
        return [stage.outline["resets"] for stage in expand(RunContext(load_recipe(data)))]

    [_, _, [plain]] = resets(changed("phases/1/arms/fire", [{"method": "fire"}]))
    assert plain.keys() == {"method", "options", "roles", "exclude"}
    [_, _, [waiting]] = resets(changed("phases/1/arms/fire", [WAITING]))
    assert waiting == {**plain, "when": {"overtrained": 0.1}}


def test_what_knows_no_phase_before_refuses_a_condition(tmp_path):
    for call in (
        lambda: apply_reset(tiny_gpt2(), "fire", when="overtrained"),
        lambda: apply_reset(tiny_gpt2(), ["rescale", WAITING]),
        lambda: ResetCallback(WAITING),
        lambda: ResetCallback("fire", when={"overtrained": 0.5}),
        lambda: reset_checkpoint(tmp_path, tmp_path / "new", "fire", when="overtrained"),
    ):
        with pytest.raises(UserError, match="when: 'overtrained' is judged by the phase before, and there is none"):
            call()


# ---- runs


def stream(folder: Path) -> dict:
    """Return a recipe whose first phase reads one sentence, and is measured on its words in another order."""
    data = yaml.safe_load(quick_recipe(folder).read_text())
    for name, text in (
        ("read", "fire resets the weights of a model "),
        ("other", "model a of weights the resets fire "),
    ):
        (folder / f"{name}.jsonl").write_text(f"{json.dumps({'text': text * 8})}\n" * 12)
    data["corpora"]["a"] = {"files": "read.jsonl", "validation": "other.jsonl"}
    data["optimizer"] = {"lr": 3.0e-2, "min_lr": 3.0e-2, "warmup": 0.0}
    data["evaluate"] = {"data": ["a", "b"], "every_steps": 4, "max_tokens": 600}
    head = {"method": "fire", "roles": ["lm_head"]}
    shrink = {"method": "shrink_perturb", "shrink": 0.3, "roles": ["mlp"]}
    always = {"base": "none", "head": head}
    when = {
        "head-when": {**head, "when": "overtrained"},
        "one-when": [{**shrink, "when": {"overtrained": 90.0}}, {**head, "when": {"overtrained": 0.2}}],
        "full-when": {"method": "full_reset", "when": {"overtrained": 90.0}},
    }
    data["phases"] = [
        {"name": "worn", "data": {"a": 1.0}, "steps": 24, "keep": ["best"], "ema": {"decay": 0.5}},
        {"name": "next", "data": {"b": 1.0}, "steps": 3, "arms": {**always, **when},
         "start_from": {"worn": ["final", "best"]}, "optimizer_state": "kept", "keep": [2]},
    ]  # fmt: skip
    data |= {"log_every_steps": 4, "save_every_steps": 2}
    return data


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worn")
    run_recipe(load_recipe(stream(folder)), folder / "run", progress=False)
    return folder / "run"


def states(run: Path, arm: str) -> list[dict[str, torch.Tensor]]:
    """Return the weights and the moments that an arm ended with."""
    [last] = (run / "next" / arm / "seed-1").glob("checkpoint-3")
    moments = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    flat = {f"{i}.{key}": value for i, state in moments.items() for key, value in state.items()}
    return [load_file(last / "model.safetensors"), flat]


def same(run: Path, one: str, other: str) -> bool:
    pairs = zip(states(run, one), states(run, other), strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def reset_of(run: Path, arm: str) -> dict:
    return json.loads((run / "next" / arm / "seed-1" / "reset.json").read_text())


def test_a_waiting_reset_is_the_same_as_an_unconditional_one_or_as_none(ran):
    assert same(ran, "head-when@final", "head@final") and not same(ran, "head@final", "base@final")
    assert same(ran, "one-when@final", "head@final")  # of a list, each has its own condition
    assert same(ran, "full-when@final", "base@final")
    assert not same(ran, "head@best", "base@best")
    for arm in ("head-when@best", "one-when@best", "full-when@best"):
        assert same(ran, arm, "base@best")


def test_what_decided_is_what_the_checkpoint_was_measured_at(ran):
    history = json.loads((ran / "worn" / "seed-1" / "checkpoint-24" / "trainer_state.json").read_text())["log_history"]
    held_out = {e["step"]: e["eval_a_nll"] for e in history if "eval_a_nll" in e and e["step"]}
    losses = {e["step"]: e["loss"] for e in history if "loss" in e}
    lowest = min(held_out, key=held_out.__getitem__)
    assert held_out[24] - held_out[lowest] > 0.2 and losses[24] < losses[lowest] and lowest < 24
    [reset] = reset_of(ran, "head-when@final")["resets"]
    assert reset["when"] == {"overtrained": 0.1}
    assert reset["found"] == {
        "applied": True, "corpora": ["a"], "threshold": 0.1, "step": 24, "nll": held_out[24],
        "lowest": held_out[lowest], "lowest_step": lowest,
        "train_loss": losses[24], "lowest_train_loss": losses[lowest],
    }  # fmt: skip
    [reset] = reset_of(ran, "head-when@best")["resets"]
    found = reset["found"]
    assert not found["applied"] and found["step"] == found["lowest_step"] == lowest and found["nll"] == held_out[lowest]
    report = reset_of(ran, "full-when@final")
    assert not report["touched"] and report["optimizer_states_cleared"] == 0
    assert all("not applied: held-out" in row["reason"] for row in report["untouched"])
    assert [r["found"] for r in reset_of(ran, "head@final")["resets"]] == [None]


def test_an_average_is_judged_by_the_averages_before_it(ran, tmp_path):
    data = stream(tmp_path)
    data["phases"][1] |= {"start_from": {"worn": ["ema"]}, "optimizer_state": "cleared"}
    data["phases"][1]["arms"] = {"base": "none", "head-when": WAITING}
    shutil.copytree(ran, tmp_path / "run", ignore=shutil.ignore_patterns("next"))
    results = run_recipe(load_recipe({**data, "data_root": str(ran.parent)}), tmp_path / "run", progress=False)
    history = json.loads((ran / "worn" / "seed-1" / "checkpoint-24" / "trainer_state.json").read_text())["log_history"]
    averages = {e["step"]: e["ema_a_nll"] for e in history if "ema_a_nll" in e and e["step"]}
    found = results["arms"]["head-when"]["runs"][0]["reset"]["resets"][0]["found"]
    assert (found["nll"], found["lowest"]) == (averages[24], min(averages.values()))


def test_a_resumed_arm_is_not_reset_again_and_another_condition_is_another_stage(ran, tmp_path, capfd):
    run = shutil.copytree(ran, tmp_path / "run")
    own = run / "next" / "head-when@final" / "seed-1"
    before = (own / "reset.json").read_bytes()
    data = {**stream(tmp_path), "data_root": str(ran.parent)}
    shutil.rmtree(own / "checkpoint-3")
    run_recipe(load_recipe(data), run, progress=False)
    assert (own / "reset.json").read_bytes() == before and same(run, "head-when@final", "head@final")
    data["phases"][1]["arms"]["head-when"]["when"] = {"overtrained": 0.3}
    with pytest.raises(UserError, match=r"resets: .*\"when\": \{\"overtrained\": 0.1\}.* then"):
        run_recipe(load_recipe(data), run, progress=False)
    data["phases"][1]["arms"]["head-when"]["when"] = "overtrained"
    shutil.rmtree(own)
    capfd.readouterr()
    run_recipe(load_recipe(data), run, progress=True)
    assert "next / head-when@final: fire: applied: held-out" in capfd.readouterr().err
    assert json.loads((own / "reset.json").read_text())["resets"] == json.loads(before)["resets"]
    assert same(run, "head-when@final", "head@final")


def test_the_tables_and_the_page_say_which_waited_in_vain(ran, tmp_path):
    results = load_results(ran)
    said = markdown_table(results)
    assert "| head-when@best | 0 of 1, 0.00 |" in said and "| head-when@final | 1 of 1, " in said
    assert "| one-when@final: shrink\\_perturb | 0 of 1, " in said and "| head@final | 1 of 1" not in said
    page = write_report(results, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not applied: held-out" in page and "and the training loss fell from" in page
    compared = Comparison(results)
    assert set(compared.bases) == {"base@final", "base@best"}
    assert compared.reference("head@final", "full_reset") is None  # a full reset that did not act is none
    older = json.loads((ran / "results.json").read_text())
    for arm in older["arms"].values():
        for one in (reset for run in arm["runs"] for reset in run["reset"]["resets"]):
            del one["when"], one["found"]
    assert len(markdown_table(Results.model_validate_json(json.dumps(older)))) < len(said)


@pytest.mark.slow
def test_two_ranks_decide_alike(ran, tmp_path):
    data = {**stream(tmp_path), "data_root": str(ran.parent)}
    data["batch"]["sequences_per_device"] = 1
    run = shutil.copytree(ran, tmp_path / "run", ignore=shutil.ignore_patterns("next"))
    (first, said), (second, other) = run_ranks(
        2, run_rank, tmp_path, data, run, {}, ["head-when", "full-when"], seconds=200
    )
    assert first == second and "applied: held-out" in said and "applied" not in other
    for arm, applied in (("head-when@final", True), ("head-when@best", False), ("full-when@final", False)):
        assert reset_of(run, arm)["resets"][0]["found"]["applied"] is applied
