"""Several phases with arms: each arm goes on from its namesake, and is compared with its own parent."""

from __future__ import annotations

import pytest
from test_run import recipe_data, texts  # noqa: F401

from fire_llm import load_recipe, run_recipe
from fire_llm.comparison import Comparison
from fire_llm.report import write_report

ARMS = {"base": "keep", "full-reset": "full_reset"}


@pytest.fixture(scope="module")
def stream(texts, tmp_path_factory):  # noqa: F811
    """Run a phase without arms and two with two each, a few steps long."""
    data = recipe_data(texts)
    data["phases"][0].update(steps=8, keep=[])
    data["phases"][1].update(steps=4, arms=ARMS)
    data["phases"].append({"name": "third", "data": {"b": 1.0}, "steps": 2, "arms": ARMS})
    return run_recipe(load_recipe(data), tmp_path_factory.mktemp("stream"), progress=False)


def test_results_tell_which_arm_each_phase_and_start_belongs_to(stream):
    assert [(p["phase"], p["arm"]) for p in stream["phases"]] == [
        ("first", None), ("second", "base"), ("second", "full-reset"),
    ]  # fmt: skip
    assert stream["arms_phase"] == "third" and set(stream["arms"]) == set(ARMS)
    assert stream["phases"][1]["start"] == {"phase": "first", "arm": None, "checkpoint": "final", "step": 8}
    for name, arm in stream["arms"].items():
        assert arm["runs"][0]["start"] == {"phase": "second", "arm": name, "checkpoint": "final", "step": 4}


def test_forgetting_counts_from_an_arms_own_parent(stream):
    compared = Comparison(stream)
    for name, own in zip(ARMS, stream["phases"][1:], strict=True):
        [(_, forgotten)] = compared.retention(name)
        before, after = own["final"]["a"]["nll"], stream["arms"][name]["final"]["a"]["nll"]
        assert forgotten == pytest.approx(after - before)
    base, full_reset = (own["final"]["a"]["nll"] for own in stream["phases"][1:])
    assert abs(base - full_reset) > 0.01


def test_the_page_keeps_the_arms_of_earlier_phases_apart(stream, tmp_path):
    page = tmp_path / "report.html"
    write_report(stream, page)
    text = page.read_text(encoding="utf-8")
    for title in ("Phase “first”", "Phase “second / base”", "Phase “second / full-reset”"):
        assert title in text
