"""The model card: what it says of the weights is true, and what it says made them makes them again."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_llama

from fire_llm import dfi, register_reset, reset_checkpoint
from fire_llm.cli import main
from fire_llm.resets import RESETS

COMMANDS = [
    [],
    ["--role", "lm_head"],
    [
        "--iterations",
        "3",
        "--scale",
        "keep-norm",
        "--exclude",
        "up_proj",
        "--exclude",
        r"layers\.1\.(mlp|self_attn)\.k",
    ],
    ["--solver", "polar", "--tolerance", "0.05", "--scale", "none"],
    ["--exclude=-x|up_proj", "--exclude", 'it\'s "q" $HOME `x`|k_proj', "--device", "cpu"],
    ["--method", "rescale", "--iterations", "2"],
    ["--method", "shrink_perturb", "--seed", "0", "--shrink", "0.25", "--role", "attention", "--role", "norm"],
    ["--method", "shrink_perturb", "--init", "the start/it"],
    ["--method", "full_reset", "--seed", "7"],
    ["--method", "initial_norm", "--seed", "7", "--role", "lm_head"],
    ["--layers", "1", "--include", "(up|down)_proj", "--include", "v_proj"],
    ["--no-measures"],
    ["--strength", "0.3"],
    ["--dtype", "bf16"],
]
CALLS = [
    {"method": [{"method": "fire", "roles": ["mlp"]}]},
    {"method": [{"method": "fire", "compute_dtype": "float64", "exclude": ["q_proj"]}]},
    {"method": ["fire", {"method": "initial_norm", "times": 0.5, "roles": ["mlp"]}], "seed": 3},
    {"method": "initial_norm", "times": 2.0, "init": "the start/it"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Work where there are a checkpoint `a b`, one whose name looks like an option, and initial weights."""
    for seed, name in enumerate(("a b", "-x", "the start/it"), 10):
        tiny_llama(seed).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(card: str) -> str:
    return card.split("## How it was made")[1].strip()


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def repeat(card: Path) -> None:
    """Do what a card says, in place of DST into `again`."""
    block = made(card.read_text(encoding="utf-8"))
    if block.startswith("```python"):
        exec(block.strip("`").removeprefix("python").replace("'DST'", "'again'"), {})
        return
    program, *words = shlex.split(block.strip("`"))
    assert program == "fire-llm" and main(["again" if word == "DST" else word for word in words]) == 0


@pytest.mark.parametrize("options", COMMANDS, ids=" ".join)
def test_the_command_of_a_card_makes_the_same_weights(options, folder, capsys):
    source = "./-x" if "--exclude" in options else "a b"  # a name that looks like an option
    assert main(["apply", source, "dst", *options]) == 0
    repeat(folder / "dst" / "README.md")
    assert weights("dst") == weights("again") != weights(source)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_what_the_command_line_lacks_is_given_as_python(call, folder):
    reset_checkpoint("a b", "dst", **call)
    assert made((folder / "dst" / "README.md").read_text()).startswith("```python")
    repeat(folder / "dst" / "README.md")
    assert weights("dst") == weights("again") != weights("a b")


def test_a_reset_of_ones_own_is_given_as_python_that_says_so(folder):
    try:
        register_reset("halved")(lambda w: w / 2)
        reset_checkpoint("a b", "dst", "halved")
        assert "# 'halved': to be registered first" in made((folder / "dst" / "README.md").read_text())
        repeat(folder / "dst" / "README.md")
    finally:
        RESETS.pop("halved", None)
    assert weights("dst") == weights("again")


def test_the_command_names_what_was_read_and_not_where_it_once_came_from(folder):
    """A checkpoint that was trained on keeps the name of its base in its config."""
    settings = json.loads(Path("a b/config.json").read_text())
    Path("a b/config.json").write_text(json.dumps({**settings, "_name_or_path": "owner/base"}))
    reset_checkpoint(folder / "a b", "dst", iterations=4)
    card = (folder / "dst" / "README.md").read_text()
    assert "base_model: owner/base" in card and "The weights of `a b` after" in card
    repeat(folder / "dst" / "README.md")
    assert weights("dst") == weights("again")


def test_the_figures_of_the_card_are_those_of_the_smaller_gram_matrix(folder):
    report = reset_checkpoint("a b", "dst")
    card = (folder / "dst" / "README.md").read_text()
    assert "‖WᵀW − I‖²_F where W is tall, ‖WWᵀ − I‖²_F where it is wide" in card
    stored = load_file("a b/model.safetensors")
    for part, tall in (("up_proj", True), ("down_proj", False)):
        cells = [c.strip() for c in re.search(rf"\| mlp \| {part} \|(.*)", card)[1].split("|")]
        both = [stored[f"model.layers.{layer}.mlp.{part}.weight"].double() for layer in (0, 1)]
        grams = [w.mT @ w if tall else w @ w.mT for w in both]
        wanted = [float((g - torch.eye(len(g))).square().sum()) for g in grams]
        assert (
            float(cells[1])
            == pytest.approx(sum(wanted) / 2, rel=1e-3)
            == pytest.approx(sum(map(dfi, both)) / 2, rel=1e-3)
        )
        smallest = [float(torch.linalg.svdvals(w)[-1]) for w in both]
        assert float(cells[5]) == pytest.approx(sum(smallest) / 2, rel=1e-3)
    assert all(t.sigma_before is not None for t in report.touched)


def test_without_measures_nothing_is_said_to_be_known(folder, capsys):
    assert main(["apply", "a b", "dst", "--no-measures"]) == 0
    assert "14 tensors touched in" in (out := capsys.readouterr().out) and "not measured" in out and "SFE" not in out
    told = json.loads(Path("dst/fire.json").read_text())
    for row in told["touched"]:
        measures = {key: row[key] for key in row if key.startswith(("sfe", "dfi", "norm", "sigma", "residual"))}
        assert set(measures.values()) == {None} and len(measures) == 8
    card = Path("dst/README.md").read_text()
    assert "| mlp | up_proj | 2 | – | – |" in card and "Medians" not in card
    assert main(["apply", "a b", "measured"]) == 0
    assert weights("dst") == weights("measured")
