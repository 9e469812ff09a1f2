"""Recipes: every fault at once, each with its path, the value, what is allowed and the next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from support.recipes import GOOD, changed, validator

from fire_llm import UserError, load_recipe
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.estimate import plan
from fire_llm.experiment.evaluate_run import run_and_stages
from fire_llm.experiment.recipe import Recipe, doubts, load_trials, recipe_schema, recipes_folder
from fire_llm.resets import parse_resets


def test_the_good_one_loads():
    recipe = load_recipe(GOOD)
    assert isinstance(recipe, Recipe)
    assert recipe.seed == [1] and recipe.phases[0].keep == ["best", 5]
    assert recipe.optimizer.lr == 6e-4
    assert recipe.evaluated() == ["python-docs", "library-docs"]


@pytest.mark.parametrize("name", ["n_positions", "max_position_embeddings"])
def test_the_context_of_a_preset_follows_its_config(name):
    """gpt-tiny reads 128 tokens by itself; 1024 is a multiple of that, but not of 96."""
    recipe = changed("model", {"preset": "gpt-tiny", "config": {name: 96}})
    with pytest.raises(UserError, match=r"batch\.tokens_per_step: 1024 is not a multiple of the context, 96"):
        load_recipe(recipe)
    recipe["batch"]["tokens_per_step"] = 96 * 3
    loaded = load_recipe(recipe)
    assert RunContext(loaded).sequence_length == 96


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("phases/1/arms/fire/method", "fier", "phases[1].arms.fire.method: unknown reset 'fier'. Did you mean 'fire'?"),
        ("phases/1/arms/fire/iterashuns", 3, "unknown option of 'fire'. Did you mean 'iterations'?"),
        ("phases/1/arms/fire/iterations", "5", "phases[1].arms.fire.iterations: '5' is not allowed"),
        ("phases/1/arms/fire", [{"method": "fire"}, {"method": "kep"}], "arms.fire[1].method: unknown reset 'kep'"),
        ("phases/1/arms/fire", 7, "phases[1].arms.fire: 7 is no reset"),
        ("phases/1/arms/a b", "keep", "phases[1].arms.a b"),
        ("phases/1/arms/..", "keep", "phases[1].arms..."),
        ("optimiser", {"lr": 1.0}, "optimiser: unknown key. Did you mean 'optimizer'?"),
        ("optimizer/learning_rate", 1.0, "optimizer.learning_rate: unknown key"),
        ("optimizer/lr", "6e-4", "optimizer.lr: '6e-4' is text to YAML, and a number is wanted. Write 6.0e-4"),
        ("optimizer/lr", "1e3", "Write 1.0e+3"),
        ("optimizer/lr", "fast", "optimizer.lr: 'fast' is text; a number is wanted"),
        ("optimizer/lr", -1.0, "optimizer.lr: -1.0 is not allowed"),
        ("optimizer/min_lr", 1.0, "optimizer.min_lr: 1.0 is above lr"),
        ("optimizer/betas", [0.9], "optimizer.betas"),
        ("seed", "one", "seed[0]: 'one' is text; a whole number is wanted"),
        ("seed", [1, 1], "names a seed twice"),
        ("precision", "bf61", "precision: 'bf61' is not allowed. Did you mean 'bf16'?"),
        ("model/preset", "gpt-0.1", "model.preset: unknown preset 'gpt-0.1'. Did you mean 'gpt-0.1b'?"),
        ("model/checkpoint", "x/y", "model: give one of preset, checkpoint, architecture, and config as a path"),
        ("model/context", 0, "model.context: 0 is not allowed"),
        ("tokenizer", ..., "tokenizer: a preset brings none"),
        ("tokenizer/path", "x", "tokenizer: give one of path and train"),
        ("tokenizer/train", 10, "tokenizer.train: 10 is not allowed"),
        ("batch/tokens_per_step", 1000, "1000 is not a multiple of the context, 64. The nearest is 1024"),
        ("phases", [], "phases: [] is not allowed"),
        ("phases/0/steps", ..., "phases[0].steps: give exactly one of epochs, steps and tokens"),
        ("phases/0/epochs", 2.0, "phases[0].epochs and steps: give exactly one"),
        ("phases/0/steps", 1.5, "phases[0].steps"),
        ("phases/0/steps", 0, "phases[0].steps: 0 is not allowed"),
        ("phases/0/keep", ["bets"], "phases[0].keep: 'bets' is not allowed; 'best' or a number of steps"),
        ("phases/0/keep", [50], "keep: step 50 lies beyond the phase's 10 steps"),
        ("phases/0/data", {"python-dosc": 1.0}, "Did you mean 'python-docs'?"),
        ("phases/0/data", {"missing.txt": 1.0}, "missing.txt"),
        ("phases/0/data", {"python-docs": 0.0}, "phases[0].data: the weights are all zero"),
        ("phases/0/data", {"python-docs": -1.0}, "should be a number of 0 or more"),
        ("phases/0/data", {}, "phases[0].data"),
        ("phases/0/sampling", "random", "phases[0].sampling: 'random' is not allowed"),
        ("phases/1/name", "one", "phases[1].name: 'one' is the name of an earlier phase"),
        ("phases/1/name", "../up", "names a folder"),
        ("phases/1/start_from", {"oen": "final"}, "there is no earlier phase 'oen'. Did you mean 'one'?"),
        ("phases/1/start_from", {"one": [7]}, "phases[1].start_from.one: '7' is not kept; kept: final, best, 5"),
        ("evaluate/data", ["python-docs", "nowhere"], "evaluate.data: unknown corpus 'nowhere'"),
        ("evaluate/every_steps", 0, "evaluate.every_steps: 0 is not allowed"),
        ("corpora", {"mine": {"fiels": "a.txt"}}, "corpora.mine.fiels: unknown key. Did you mean 'files'?"),
        ("model", ..., "model: missing"),
        ("phases/1/arms", [1], "phases[1].arms"),
    ],
)  # fmt: skip
def test_one_fault_one_message(path, value, message):
    with pytest.raises(UserError) as error:
        load_recipe(changed(path, value))
    text = str(error.value)
    assert message in text
    assert text.startswith("one fault in the recipe:"), text


def test_every_fault_is_told_at_once():
    data = changed("optimizer", {"lr": "6e-4", "beta": 1})
    data["phases"][0]["steps"] = "ten"
    data["phases"][1]["arms"]["fire"] = {"method": "fier"}
    data["phases"][1]["arms"]["s"] = {"method": "shrink_perturb", "shrink": 3.0}
    with pytest.raises(UserError) as error:
        load_recipe(data)
    lines = str(error.value).splitlines()
    assert lines[0] == "5 faults in the recipe:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "optimizer.lr", "optimizer.beta", "phases[0].steps", "phases[1].arms.fire.method", "phases[1].arms.s.shrink",
    ]  # fmt: skip


def test_arms_and_contradictions_and_then_all_that_the_model_and_the_machine_lack_are_told_together():
    data = changed("batch/tokens_per_step", 1000)
    data["phases"][1]["arms"]["fire"] = {"method": "fier"}
    data["phases"][1]["arms"]["control"] = {"method": "rescale", "scale": "keep-norm"}
    with pytest.raises(UserError) as error:
        load_recipe(data)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        "3 faults in the recipe", "phases[1].arms.fire.method", "phases[1].arms.control.scale", "batch.tokens_per_step",
    ]  # fmt: skip
    assert "'rescale' changes nothing else: give sqrt or none" in lines[2]
    data = changed("attention", "flash_attention_3")
    data["report_to"] = ["comet_ml"]  # not installed
    data["phases"][1]["arms"]["fire"] = {"method": "fire", "exclude": ["nowhere"]}
    data["phases"][1]["arms"]["layers"] = {"method": "fire", "layers": "77"}
    with pytest.raises(UserError) as error:
        plan(load_recipe(data))
    said = str(error.value)
    assert said.startswith("4 faults:") and said.count("faults:") == 1
    assert all(word in said for word in ("comet_ml", "flash_attention_3", "nowhere", "77"))


def test_a_run_is_read_that_was_made_with_an_arm_that_is_refused_today(tmp_path):
    data = json.loads(json.dumps(GOOD))
    data["phases"][1]["arms"]["control"] = {"method": "rescale", "scale": "keep-norm"}
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    run, _ = run_and_stages(tmp_path, progress=False)
    assert [reset.options["scale"] for reset in run.arms[run.recipe.phases[1].name]["control"]] == ["keep-norm"]
    for refused in (lambda: load_recipe(data), lambda: parse_resets("rescale", {"scale": "keep-norm"})):
        with pytest.raises(UserError, match="scale: keep-norm keeps the norm"):
            refused()


def test_later_phases_go_on_from_arms_of_the_same_name():
    data = json.loads(json.dumps(GOOD))
    third = {"name": "three", "data": {"python-docs": 1.0}, "steps": 5, "arms": {"fire": "fire", "base": "keep"}}
    load_recipe({**data, "phases": [*data["phases"], third]})
    load_recipe({**data, "phases": [*data["phases"], {**third, "arms": None, "start_from": {"two/fire": "final"}}]})
    with pytest.raises(UserError, match="the previous phase has arms"):
        load_recipe({**data, "phases": [*data["phases"], {**third, "arms": None}]})


def test_overrides():
    before = json.dumps(GOOD)
    recipe = load_recipe(GOOD, ["phases.1.steps=99", "phases[0].keep=[best]", "seed=[1, 2]", "optimizer.lr=1.0e-3"])
    assert json.dumps(GOOD) == before
    assert recipe.phases[1].steps == 99 and recipe.phases[0].keep == ["best"]
    assert recipe.seed == [1, 2] and recipe.optimizer.lr == 1e-3
    for bad, message in [
        ("steps", "write KEY=VALUE"),
        ("phases.7.steps=1", "no 'phases.7'"),
        ("name.x=1", "no 'name"),
        ("seed=[", "not YAML"),
    ]:
        with pytest.raises(UserError, match=message):
            load_recipe({**GOOD, "name": "n"}, [bad])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("- 1", "holds no recipe"),
        ("", "holds no recipe"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_a_missing_recipe_names_the_built_in_ones():
    with pytest.raises(UserError, match=r"Did you mean 'demo'\? Built in: demo"):
        load_recipe("dmo")


BUILT_IN = sorted(p for p in recipes_folder().rglob("*.yaml") if p.parent.name != "accelerate")


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda p: p.stem)
def test_recipes_that_come_with_the_package_are_sound(path, shared_data_or_none):
    data = yaml.safe_load(path.read_text())
    if data.get("corpora") and shared_data_or_none is None:
        pytest.skip("its corpora are local files that are not at hand")
    overrides = [f"data_root={shared_data_or_none}"] if data.get("corpora") else []
    load_recipe(path, overrides)


def test_the_schema_file_is_current():
    path = recipes_folder() / "recipe.schema.json"
    assert json.loads(path.read_text()) == recipe_schema(), "run `make schema`"
    arms = json.dumps(recipe_schema()["$defs"]["PhaseSection"]["properties"]["arms"])
    assert "iterations" in arms and "shrink" in arms


def test_the_schema_accepts_what_loads_and_refuses_what_does_not():
    demo = yaml.safe_load((recipes_folder() / "demo.yaml").read_text())
    for good in (GOOD, demo, {**GOOD, "seed": [1, 2]}):
        validator().validate(good)
    for path, value in [("optimiser", {}), ("optimizer/lr", "6e-4"), ("phases/1/arms/fire/method", "fier")]:
        with pytest.raises(ValidationError):
            validator().validate(changed(path, value))


def test_a_recipe_survives_its_own_json():
    recipe = load_recipe(GOOD)
    assert load_recipe(json.loads(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))) == recipe
    assert Path(recipes_folder() / "demo.yaml").exists()


# ---- text that is named twice or not held out


def texts(folder: Path, **corpora: Any) -> dict:
    (folder / "t.txt").write_text("\n\n".join(f"document {n}" for n in range(60)))
    return {
        **GOOD,
        "data_root": str(folder),
        "corpora": {name: {"files": "t.txt", **settings} for name, settings in corpora.items()},
        "phases": [{"name": "one", "data": dict.fromkeys(corpora, 1.0), "steps": 1}],
    }


def test_text_that_is_measured_on_must_be_held_out(tmp_path):
    data = texts(tmp_path, a={"holdout": 0.0}, b={})
    with pytest.raises(UserError, match=r"corpora\.a\.holdout: 0 holds no text out, and 'a' is measured on"):
        load_recipe(data)
    assert load_recipe({**data, "evaluate": {"data": "b"}}).evaluated() == ["b"]


def test_a_text_that_is_named_twice_is_measured_once_and_a_leak_is_told(tmp_path):
    data = texts(tmp_path, a={"holdout": 0.1}, b={"holdout": 0.2})
    data["evaluate"] = {"data": ["b", "b"]}
    recipe = load_recipe(data)
    assert recipe.evaluated() == ["b"]
    (doubt,) = doubts(recipe)
    assert doubt.startswith("'a' trains on a part of t.txt that 'b' holds out and is measured on")
    data["corpora"]["a"]["holdout"] = 0.2
    assert [*doubts(load_recipe(data))] == []


def test_the_home_folder_stands_for_models_tokenizers_and_texts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {**texts(tmp_path, a={}), "model": "~/m", "tokenizer": "~/tok", "data_root": "~"}
    recipe = load_recipe(data)
    assert (recipe.model.checkpoint, recipe.tokenizer.path) == (f"{tmp_path}/m", f"{tmp_path}/tok")
    assert recipe.data_root == str(tmp_path)


def test_a_grid_of_a_million_trials_is_told_at_once():
    grid = [f"optimizer.lr=[{','.join(str(n + 1) for n in range(1000))}]", f"seed=[{','.join(map(str, range(1000)))}]"]
    with pytest.raises(UserError, match=r"sweep: 1,000,000 trials, .* at most 500 are allowed"):
        load_trials(GOOD, grid=grid)
    with pytest.raises(UserError, match="holds itself"):
        load_trials(GOOD, grid=["seed=&a [*a, 1]"])


def test_a_tag_cannot_steer_the_terminal(tmp_path):
    (tmp_path / "r.yaml").write_text("model: !%1b[2J x")
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "\x1b" not in str(caught.value)
