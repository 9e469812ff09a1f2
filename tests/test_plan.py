"""The plan against numbers worked out by hand."""

from __future__ import annotations

import pytest
from test_recipe import GOOD

from fire_llm import load_recipe
from fire_llm.plan import plan


def test_tokens_flops_disk_and_memory(tmp_path):
    planned = plan(load_recipe(GOOD), tmp_path)
    # gpt-tiny with a vocabulary of 512 and 64 positions: 512·128 + 64·128 + 4·(12·128² + 13·128) + 2·128 parameters.
    parameters = 65_536 + 8_192 + 4 * (196_608 + 1_664) + 256
    assert [row["unit"] for row in planned["units"]] == ["one/seed-1", "two/base/seed-1", "two/fire/seed-1"]
    for row in planned["units"]:
        assert row["steps"] == 10 and row["tokens"] == 10_240 and row["state"] == "to do"
        assert row["flops"] == 10_240 * (6 * parameters + 12 * 4 * 128 * 64)
    # Three final checkpoints and the two that phase one keeps, each with AdamW's two moments.
    assert planned["disk_bytes"] == 5 * parameters * 12
    assert planned["memory_bytes"] == parameters * 16
    assert planned["units"][2]["reset"] == "fire, iterations 5, roles attention mlp"


def test_epochs_count_what_the_corpora_hold(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 42_000)
    phase = {"name": "one", "data": {"a": 1.0}, "epochs": 2.0}
    data = {**GOOD, "data_root": str(tmp_path), "corpora": {"a": {"files": "a.txt"}}, "phases": [phase]}
    steps = plan(load_recipe(data), tmp_path)["units"][0]["steps"]
    assert steps == pytest.approx(2 * 42_000 / 4.2 / 1024, abs=2)
    phase["max_corpus_tokens"] = 2048
    assert plan(load_recipe(data), tmp_path)["units"][0]["steps"] == 4
