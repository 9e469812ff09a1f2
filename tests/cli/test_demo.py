"""The recipes that come with the package, run to their end at a fraction of their length."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fire_llm.cli import main
from fire_llm.data.corpora import CORPORA

TOUCHED = {
    "base": 0,
    "full-reset": 60,
    "s-and-p": 60,
    "fire": 24,
    "fire+head": 25,
    "rescale": 24,
    "fire-keep-norm": 24,
    "fire+s-and-p": 60,
}


def shortened(*sets: str) -> list[str]:
    return [word for pair in sets for word in ("--set", pair)]


def arms_of(output: Path) -> dict:
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    hashes = {run["batches_hash"] for arm in results["arms"].values() for run in arm["runs"]}
    assert len(hashes) == 1
    for arm in results["arms"].values():
        for final in arm["final"].values():
            assert final["perplexity"] == pytest.approx(math.exp(final["nll"]))
            assert final["tokens"] > 0 and final["bits_per_byte"] > 0
    assert (output / "report.html").stat().st_size > 1e6
    return results["arms"]


def test_the_demo_compares_eight_arms_on_two_corpora(tmp_path, capsys, monkeypatch):
    for name in ("python-docs", "library-docs"):  # a twentieth of their files: reading all takes half of the test
        of_all = CORPORA[name].builtin
        monkeypatch.setitem(CORPORA, name, replace(CORPORA[name], builtin=replace(of_all, share=of_all.share / 20)))
    short = ["phases.0.steps=3", "phases.1.steps=2", "batch.tokens_per_step=256", "evaluate.max_tokens=2048"]
    assert main(["demo", "--workers", "1", "--output", str(tmp_path / "demo"), *shortened(*short)]) == 0
    arms = arms_of(tmp_path / "demo")
    assert list(arms) == list(TOUCHED)
    for name, arm in arms.items():
        assert set(arm["final"]) == {"python-docs", "library-docs"}
        assert len(arm["runs"][0]["reset"]["touched"]) == TOUCHED[name]
    out = capsys.readouterr().out
    assert "fire+head" in out and f"report: {tmp_path / 'demo' / 'report.html'}" in out
    assert main(["report", str(tmp_path / "demo"), "--markdown"]) == 0
    assert "| fire+s-and-p |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.shared_data
def test_the_recipe_on_real_text(tmp_path, shared_data):
    sets = [f"data_root={shared_data}", f"tokenizer.path={shared_data / 'gpt2-tokenizer'}", "phases.0.steps=2"]
    recipe = Path(__file__).parents[2] / "recipes" / "small" / "wiki-web.yaml"
    short = shortened(*sets, "seed=1", "phases.1.steps=1", "evaluate.max_tokens=16384")
    assert main(["run", str(recipe), "--output", str(tmp_path / "run"), *short]) == 0
    assert list(arms_of(tmp_path / "run")) == ["base", "full-reset", "s-and-p", "fire", "fire+head", "fire+s-and-p"]
