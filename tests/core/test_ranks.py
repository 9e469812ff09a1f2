"""What launchers leave in the environment: a launch, one process alone, or neither, which is told."""

from __future__ import annotations

import os

import pytest

from fire_llm import UserError
from fire_llm.core.ranks import launched, settle_launcher

LAUNCH = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SETTINGS = ("USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "DYNAMO_BACKEND")


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCH and not k.startswith("ACCELERATE_")}
    monkeypatch.setattr(os, "environ", kept)


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"MASTER_ADDR": "x", "MASTER_PORT": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        *({f"ACCELERATE_{name}": "true"} for name in SETTINGS),
        {"ACCELERATE_USE_FSDP": "who knows"},
    ],
    ids=str,
)
def test_what_stands_for_one_process_is_dropped_with_a_word(left, capsys):
    os.environ.update(left)
    settle_launcher()
    told = capsys.readouterr().err
    dropped = {name: value for name, value in left.items() if not name.startswith(("MASTER", "SLURM"))}
    assert not launched() and not set(dropped) & set(os.environ)
    assert all(f"{name}={value}" in told for name, value in dropped.items()) and told.count("\n") == bool(dropped)


def test_settings_that_ask_for_nothing_need_no_word(capsys):
    os.environ.update(ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_FSDP="False", ACCELERATE_DYNAMO_BACKEND="NO")
    settle_launcher()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 in the environment, without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "3"}, "RANK=3 in the environment, without LOCAL_RANK"),
        ({"LOCAL_RANK": "1"}, "Unset them to work in one process"),
        ({**LAUNCH, "MASTER_ADDR": ""}, "without MASTER_ADDR:"),
        ({**LAUNCH, "RANK": "2"}, "ranks count from 0 to WORLD_SIZE - 1"),
        ({**LAUNCH, "WORLD_SIZE": "two"}, "a launcher sets whole numbers"),
        ({"RANK": "-1"}, "a launcher sets whole numbers"),
    ],
)
def test_a_part_of_a_launch_is_refused_and_no_rank_is_left_to_keep_silent(left, message):
    os.environ.update(left)
    with pytest.raises(UserError, match=message):
        settle_launcher()
    assert not launched()


def test_a_launch_is_left_alone_with_its_settings(capsys):
    os.environ.update(LAUNCH, ACCELERATE_USE_FSDP="true")
    settle_launcher()
    assert launched() and os.environ["ACCELERATE_USE_FSDP"] == "true" and capsys.readouterr().err == ""
