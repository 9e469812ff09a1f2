"""What a run resolves once, when it does, and which stages are the same whatever a method was called."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from support.tiny_recipe import recipe

from fire_llm import load_recipe, run_recipe
from fire_llm.cli import main
from fire_llm.core.manifest import hash_file
from fire_llm.experiment import context, worker
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.stages import expand, refuse_other_recipe

SHORT = ["phases.0.steps=1", "phases.0.keep=[]", "phases.1.steps=1", "evaluate.max_tokens=200"]


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """Write a recipe on two local files, of which no cache knows anything."""
    monkeypatch.setenv("FIRE_LLM_CACHE", str(tmp_path / "cache"))
    return recipe(tmp_path)


def test_a_check_hashes_no_text_and_a_run_hashes_each_file_once(path, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise AssertionError("hashed")

    monkeypatch.setattr("fire_llm.data.cache.hash_file", fail)
    assert main(["check", str(path)]) == 0 and "second/fire/seed-1" in capsys.readouterr().out
    assert main(["check", str(path), "--set=sweep={phases.1.steps: [4, 8]}"]) == 0
    assert "2 trials of 4 stages, 3 of them different" in capsys.readouterr().out
    assert main(["run", str(path), "--dry-run", "--output", str(tmp_path / "run")]) == 0
    with pytest.raises(AssertionError, match="hashed"):
        run_recipe(load_recipe(path, SHORT), tmp_path / "run", progress=False)

    hashed, resolved = Counter(), Counter()
    real = context.resolve
    monkeypatch.setattr(
        "fire_llm.data.cache.hash_file", lambda file, **kw: (hashed.update([file.name]), hash_file(file, **kw))[1]
    )
    monkeypatch.setattr(context, "resolve", lambda name, *more: (resolved.update([name]), real(name, *more))[1])
    run_recipe(load_recipe(path, SHORT), tmp_path / "run", progress=False)
    assert hashed == {"a.jsonl": 1, "b.jsonl": 1} and resolved == {"a": 1, "b": 1}


def test_a_run_that_was_begun_with_keep_goes_on_with_none(path, tmp_path, monkeypatch):
    def named(name):
        data = yaml.safe_load(path.read_text())
        data["phases"][1]["arms"] = {"base": name, "two": [{"method": name}, "fire"]}
        data["phases"].append({"name": "third", "data": {"a": 1.0}, "steps": 1, "arms": {"base": name, "two": name}})
        return load_recipe(data, SHORT)

    old, new = named("keep"), named("none")
    specs = [[stage.spec for stage in expand(RunContext(one, tmp_path / "run"))] for one in (old, new)]
    assert specs[0] == specs[1]
    roles = ["attention", "mlp", "ssm", "embedding", "lm_head", "norm", "bias", "router", "other"]
    stored = {"method": "keep", "options": {}, "roles": roles, "exclude": []}  # as the first runs wrote it
    assert specs[1][1]["resets"] == [stored]
    run_recipe(old, tmp_path / "run", arms=["base"], progress=False)
    refuse_other_recipe(tmp_path / "run", expand(RunContext(new, tmp_path / "run")))
    monkeypatch.setattr(worker, "train", lambda *_: pytest.fail("trained again"))
    results = run_recipe(new, tmp_path / "run", arms=["base"], progress=False)
    assert list(results["arms"]) == ["base"] and results["arms"]["base"]["label"] == "none"
