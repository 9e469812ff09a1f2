"""A phase that ends where the loss on a corpus falls no longer, and checkpoints by the clock."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_gpt2
from support.training import STEPS, arguments, train

from fire_llm import UserError
from fire_llm.core.atomic import checkpoints
from fire_llm.training import EarlyStopCallback, EvaluationSet
from fire_llm.training.early_stop import evaluations_without_fall

SETS = {"c": EvaluationSet(torch.arange(200) % 97, 800, 0)}  # unlike what is trained on: its NLL rises in the end
EVALUATED = {
    "sets": SETS,
    "save_steps": 100,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_context": 16,
    "eval_on_start": True,
}


@pytest.mark.parametrize(
    ("values", "min_delta", "without"),
    [
        ([5.0, 4.0, 3.0], 0.0, 0),
        ([5.0, 4.0, 4.0, 4.5], 0.0, 2),
        ([5.0, 4.0, 4.5, 3.9], 0.0, 0),
        ([5.0, 4.0, 3.95, 3.92, 3.89], 0.1, 0),  # against the lowest that counted, not the value before
        ([5.0, 4.95, 4.9], 0.2, 2),
        ([5.0, float("nan"), float("inf")], 0.0, 2),
        ([], 0.0, 0),
    ],
)
def test_falls_are_counted(values, min_delta, without):
    history = [entry for v in values for entry in ({"loss": 1.0}, {"x": v})]
    assert evaluations_without_fall(history, "x", min_delta) == without


def test_it_ends_where_the_log_says_and_a_resumed_one_ends_there_too(tmp_path):
    whole = train(tiny_gpt2(), tmp_path / "whole", **EVALUATED)
    nll = [(e["step"], e["eval_c_nll"]) for e in whole.state.log_history if "eval_c_nll" in e]
    delta = 1.5 * abs(nll[0][1] - nll[1][1])
    lowest, expected, stale = nll[0][1], None, 0
    for step, value in nll[1:]:
        lowest, stale = (value, 0) if value < lowest - delta else (lowest, stale + 1)
        if stale == 2:
            expected = step
            break
    assert expected is not None and expected < STEPS

    def stopped(name, resume=None):
        stop = EarlyStopCallback("c", patience=2, min_delta=delta)
        return train(tiny_gpt2(), tmp_path / name, resume, [stop], keep_steps=[2, 3], **EVALUATED)

    first = stopped("first")
    assert first.state.global_step == expected == checkpoints(tmp_path / "first")[-1][1]
    assert first.state.max_steps == STEPS
    again = stopped("again", str(tmp_path / "first" / "checkpoint-3"))
    assert again.state.global_step == expected
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))


def test_what_never_stops_is_refused():
    with pytest.raises(UserError, match="patience: 0"):
        EarlyStopCallback("c", patience=0)
    with pytest.raises(UserError, match="min_delta: -1"):
        EarlyStopCallback("c", min_delta=-1)


def test_the_clock_saves_between_logs_and_changes_nothing(tmp_path):
    settings = {"max_steps": 6, "logging_steps": 4, "keep_last": 99, **EVALUATED}
    plain = train(tiny_gpt2(resid_pdrop=0.3), tmp_path / "plain", **settings)
    timed = train(tiny_gpt2(resid_pdrop=0.3), tmp_path / "timed", save_every_minutes=1e-9, **settings)
    assert [step for _, step in checkpoints(tmp_path / "timed")] == [1, 2, 3, 4, 5, 6]
    assert all(map(torch.equal, plain.model.parameters(), timed.model.parameters()))

    def logged(trainer):
        return [(e["step"], e.get("loss"), e.get("eval_c_nll")) for e in trainer.state.log_history[:-1]]

    assert logged(timed) == logged(plain)
    again = train(
        tiny_gpt2(seed=9, resid_pdrop=0.3), tmp_path / "again", str(tmp_path / "timed" / "checkpoint-3"), **settings
    )
    assert all(map(torch.equal, plain.model.parameters(), again.model.parameters())) and logged(again) == logged(plain)
    rare = train(tiny_gpt2(), tmp_path / "rare", save_every_minutes=60, **settings)
    assert [step for _, step in checkpoints(tmp_path / "rare")] == [6] == [rare.state.global_step]
    with pytest.raises(UserError, match="save_every_minutes 0"):
        arguments(tmp_path, save_every_minutes=0)
