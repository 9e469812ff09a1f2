"""The loss before and after a reset is that of the two checkpoints, each measured by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.models import tiny_gpt2

from fire_llm import UserError, perplexity, reset_checkpoint
from fire_llm.checkpoint.perplexities import loss_lines
from fire_llm.cli import main
from fire_llm.data.corpora import CorpusSpec, resolve
from fire_llm.data.tokenizer import train_tokenizer
from fire_llm.evaluation import checkpoints
from fire_llm.evaluation.checkpoints import score_checkpoints
from fire_llm.models import load_model, load_tokenizer

TEXT = "One thing after another.\n\nAnother thing, and a longer one, with a comma.\n\nA third.\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> Path:
    """Return a checkpoint with a tokenizer, beside a text, and work there."""
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = train_tokenizer([resolve("notes.txt", CorpusSpec(files="notes.txt", holdout=0.0))], 280, progress=False)
    tokenizer.save_pretrained("model")
    tiny_gpt2(vocab_size=300, n_positions=32).save_pretrained("model")
    return tmp_path / "model"


def by_hand(folder: str | Path) -> float:
    """Return the mean NLL of a checkpoint on the text, over documents that end with the end-of-text token."""
    tokenizer = load_tokenizer(folder)
    ids = [token for part in TEXT.strip().split("\n\n") for token in [*tokenizer(part)["input_ids"], 0]]
    return perplexity(load_model(folder, torch.float32), torch.tensor(ids), context=32, prefix=0).nll


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_the_losses_are_those_of_either_checkpoint_and_are_written_down(dtype, source, capsys):
    assert main(["apply", "model", "dst", "--iterations", "3", "--measure-on", "notes.txt", "--dtype", dtype]) == 0
    before, after = json.loads(Path("dst/fire.json").read_text("utf-8"))["nll"]["notes.txt"]
    assert (before, after) == pytest.approx((by_hand("model"), by_hand("dst")), abs=1e-9)
    assert before != after
    assert f"notes.txt: {before:.4f} nats a token before, {after:.4f} after" in capsys.readouterr().out
    assert f"| notes.txt | {before:.4f} | {after:.4f} |" in Path("dst/README.md").read_text("utf-8")


def test_measuring_changes_no_byte_of_the_weights(source):
    reset_checkpoint("model", "plain")
    report = reset_checkpoint("model", "measured", measure_on=["notes.txt"], context=16)
    assert list(report.nll) == ["notes.txt"]
    plain, measured = (Path(folder, "model.safetensors").read_bytes() for folder in ("plain", "measured"))
    assert plain == measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--measure-on", "missing.txt"], "missing.txt"),
        (["--measure-on", "notes.txt", "--context", "64"], "32"),
        (["--max-tokens", "20"], "--max-tokens 20: it is of the texts of --measure-on, and there are none"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_cannot_be_measured_is_refused_before_anything_is_written(source, dry, options, message, capsys):
    assert main(["apply", "model", "dst", *options, *dry]) == 2
    assert message in capsys.readouterr().err
    assert not Path("dst").exists()


def test_the_bar_names_the_result_and_not_the_folder_that_it_is_made_in(source, monkeypatch):
    titles, scored = [], checkpoints.score
    monkeypatch.setattr(checkpoints, "score", lambda *a, progress, **k: titles.append(progress) or scored(*a, **k))
    reset_checkpoint("model", "dst", measure_on=["notes.txt"], progress=True, dtype="float32")
    assert titles == ["model on", "dst on"]


def test_either_spelling_of_a_dtype_is_taken_by_apply_and_eval(source, capsys):
    written = []
    for name in ("bf16", "bfloat16"):
        reset_checkpoint("model", name, dtype=name)
        written.append([file.read_bytes() for file in sorted(Path(name).glob("*.safetensors"))])
    assert written[0] == written[1]
    rows = [score_checkpoints(["model"], ["notes.txt"], dtype=n, progress=False).rows[0] for n in ("bf16", "bfloat16")]
    assert rows[0].nll == rows[1].nll
    assert main(["eval", "model", "--data", "notes.txt", "--dtype", "fp32"]) == 0


def test_a_result_that_is_worse_than_a_guess_is_warned_of():
    lines = loss_lines({"a": [3.5, 9.0], "b": [3.0, 3.1]}, 1000)
    assert lines[0] == "a: 3.5000 nats a token before, 9.0000 after"
    assert lines[2].startswith(f"warning: on a the result is worse than a uniform guess (ln V = {math.log(1000):.3f}")
    assert len(loss_lines({"b": [3.0, 3.1]}, 1000)) == 1


def test_settings_without_texts_are_refused_in_python_too(source):
    with pytest.raises(UserError, match="--context 8"):
        reset_checkpoint("model", "dst", context=8)
