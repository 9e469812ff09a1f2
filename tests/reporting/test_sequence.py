"""Several phases with arms: each arm goes on from its namesake, and is compared with its own parent."""

from __future__ import annotations

import pytest
from support.runs import recipe_data

from fire_llm import load_recipe, run_recipe
from fire_llm.reporting.comparison import Comparison
from fire_llm.reporting.schema import Results, Start
from fire_llm.reporting.sequence import PhaseSequence
from fire_llm.reporting.tables import markdown_table, write_report

ARMS = {"base": "keep", "full-reset": "full_reset", "once": "shrink_perturb"}
LAST = {**ARMS, "once": "keep"}


@pytest.fixture(scope="module")
def stream(texts, tmp_path_factory):
    """Run a phase without arms and two with three each, a few steps long; the third arm resets once."""
    data = recipe_data(texts)
    data["phases"][0].update(steps=8, keep=[])
    data["phases"][1].update(steps=4, arms=ARMS)
    data["phases"].append({"name": "third", "data": {"b": 1.0}, "steps": 2, "arms": LAST})
    return Results.model_validate(run_recipe(load_recipe(data), tmp_path_factory.mktemp("stream"), progress=False))


def test_results_tell_which_arm_each_phase_and_start_belongs_to(stream):
    assert [(p.phase, p.arm) for p in stream.phases] == [
        ("first", None), ("second", "base"), ("second", "full-reset"), ("second", "once"),
    ]  # fmt: skip
    assert stream.arms_phase == "third" and set(stream.arms) == set(ARMS)
    assert stream.phases[1].start == Start(phase="first", arm=None, checkpoint="final", step=8)
    for name, arm in stream.arms.items():
        assert arm.runs[0].start == Start(phase="second", arm=name, checkpoint="final", step=4)


def test_forgetting_counts_from_an_arms_own_parent(stream):
    compared = Comparison(stream)
    for name, own in zip(ARMS, stream.phases[1:], strict=True):
        [(_, forgotten)] = compared.retention(name)
        before, after = own.final["a"].nll, stream.arms[name].final["a"].nll
        assert forgotten == pytest.approx(after - before)
    base, full_reset, _ = (own.final["a"].nll for own in stream.phases[1:])
    assert abs(base - full_reset) > 0.01


def test_the_page_keeps_the_arms_of_earlier_phases_apart(stream, tmp_path):
    page = tmp_path / "report.html"
    write_report(stream, page)
    text = page.read_text(encoding="utf-8")
    for title in ("Phase “first”", "Phase “second / base”", "Phase “second / full-reset”"):
        assert title in text


def test_the_course_of_an_arm_is_read_off_its_own_ancestors(stream):
    course = PhaseSequence(Comparison(stream))
    first, *second = stream.phases
    assert course.phases == {"first": "a", "second": "b", "third": "b"} and course.armed == ["second", "third"]
    for name, own in zip(ARMS, second, strict=True):
        final = stream.arms[name].final
        then = {"first": first.final["a"].nll, "second": own.final["b"].nll, "third": final["b"].nll}
        assert course.learned(name) == {phase: {1: pytest.approx(nll)} for phase, nll in then.items()}
        lost = {"first": final["a"].nll - then["first"], "second": final["b"].nll - then["second"]}
        assert course.forgotten(name) == {phase: [pytest.approx(nll)] for phase, nll in lost.items()}
    base, full_reset, once = second
    apart = course.against_base("full-reset")
    assert apart["second"] == [pytest.approx(full_reset.final["b"].nll - base.final["b"].nll)]
    assert course.against_base("base") == {"second": [0.0], "third": [0.0]}
    assert course.against_base("once")["second"] == [pytest.approx(once.final["b"].nll - base.final["b"].nll)]


def test_runs_that_claim_to_start_from_themselves_are_followed_once(stream):
    itself = Start(phase="first", checkpoint="final", step=8)
    first = stream.phases[0].model_copy(update={"start": itself})
    compared = Comparison(stream.model_copy(update={"phases": [first, *stream.phases[1:]]}))
    assert [run.phase for run in compared.ancestors(compared.runs("base")[0])] == ["second", "first"]
    assert PhaseSequence(compared).learned("base").keys() == {"first", "second", "third"}


def test_an_arm_that_resets_once_is_no_base(stream):
    compared = Comparison(stream)
    assert compared.methods("once") == compared.methods("base") == ["none"]
    assert [arm for arm in compared.arms if compared.always(arm, "none")] == ["base"]
    assert [compared.reference(arm, "none") for arm in compared.arms] == ["base"] * 3
    assert [compared.reference(arm, "full_reset") for arm in compared.arms] == ["full-reset"] * 3


def test_the_page_and_the_tables_follow_a_stream(stream, tmp_path):
    write_report(stream, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The stream</h3>" in text and "learned, against the base" in text
    told = markdown_table(stream)
    # Two phases have the same corpus, so that columns are called after the phases.
    assert "| arm | second | third |" in told and "| arm | first | second |" in told
    second = stream.phases[1].final["b"].nll
    assert f"| base | {second:.4f} |" in told


def test_one_transition_is_no_stream(stream):
    alone = stream.model_copy(update={"phases": stream.phases[:1]})
    assert PhaseSequence(Comparison(alone)).phases == {} and PhaseSequence(Comparison(alone)).tables() == []
    assert "learned" not in markdown_table(alone)
