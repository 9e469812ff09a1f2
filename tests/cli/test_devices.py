"""Where apply, inspect and eval compute: the accelerator where there is one, unless --device names another."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_gpt2
from support.simulated import simulated_cuda

from fire_llm import UserError
from fire_llm.cli import main
from fire_llm.models import find_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and these simulate one")

GPU = pytest.mark.parametrize(
    ("there", "options", "device"),
    [(False, [], "cpu"), (True, [], "cuda"), (True, ["--device", "cpu"], "cpu"), (True, ["--device", "cuda"], "cuda")],
)


def machine(gpu: bool):
    return simulated_cuda() if gpu else nullcontext()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Save a tiny GPT-2 with a byte-level tokenizer."""
    from fire_llm.data import train_tokenizer
    from fire_llm.data.corpora import CorpusSpec, resolve

    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 200)
    corpus = resolve("text", CorpusSpec(files="text.txt", holdout=0.0), folder)
    tiny_gpt2(vocab_size=320).save_pretrained(folder / "gpt2")
    train_tokenizer([corpus], 300, progress=False).save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def test_auto_is_the_accelerator_that_has_float64(monkeypatch):
    assert find_device("auto") == torch.device("cpu")
    with simulated_cuda():
        assert find_device("auto") == torch.device("cuda", 0) and find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="'gpu' is none; give auto, cpu, cuda or cuda:N"):
        find_device("gpu")


@GPU
def test_apply_writes_down_the_device(there, options, device, checkpoint, tmp_path, capsys):
    with machine(there):
        assert main(["apply", str(checkpoint), str(tmp_path / "out"), *options]) == 0
    assert f"; computed on {device}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "fire.json").read_text())["device"] == device
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Computed on `{device}`." in card and f" --device {device}\n" in card
    assert main(["apply", str(checkpoint), str(tmp_path / "cpu"), "--device", "cpu"]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "cpu"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name])


@GPU
def test_inspect_and_eval_print_the_device(there, options, device, checkpoint, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("the lazy dog jumps over the fox")
    said = "computed on cuda:0" if device == "cuda" else "computed on cpu"
    data = ["--data", str(tmp_path / "t.txt"), "--json", str(tmp_path / "e.json")]
    for argv in (["inspect", str(checkpoint)], ["eval", str(checkpoint), *data]):
        with machine(there):
            assert main([*argv, *options]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == said
    assert json.loads((tmp_path / "e.json").read_text())["settings"]["device"] == said.split()[-1]


@pytest.mark.parametrize("argv", [["apply", "{c}", "{t}/out"], ["eval", "{c}", "--data", "{t}/t.txt"]])
def test_more_processes_than_accelerators_are_refused_with_the_way_to_the_cpu(argv, checkpoint, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("the lazy dog")
    with simulated_cuda():
        assert main([a.format(c=checkpoint, t=tmp_path) for a in argv] + ["--num-processes", "2"]) == 2
    error = capsys.readouterr().err
    assert "this machine has 1 accelerator(s)" in error and "compute on the CPU: --device cpu" in error
