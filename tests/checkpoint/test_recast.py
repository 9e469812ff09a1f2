"""Results in another dtype: computed from the source's numbers, rounded once, and named by the config."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_llama

from fire_llm import UserError, fire_, reset_checkpoint
from fire_llm.cli import main
from fire_llm.models import load_model

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("stored", TORCH)
@pytest.mark.parametrize("written", TORCH)
def test_the_result_is_that_of_fp32_rounded_once(stored, written, tmp_path):
    tiny_llama().to(TORCH[stored]).save_pretrained(tmp_path / "src", max_shard_size="20KB")
    report = reset_checkpoint(tmp_path / "src", tmp_path / "dst", dtype=written, iterations=3)
    wanted = load_model(tmp_path / "src").float()
    fire_(wanted, iterations=3)
    result = load_model(tmp_path / "dst")
    assert result.dtype == TORCH[written]
    for (name, a), (_, b) in zip(wanted.named_parameters(), result.named_parameters(), strict=True):
        assert torch.equal(a.to(TORCH[written]), b), name
    settings = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert settings["dtype"] == str(TORCH[written]).removeprefix("torch.")
    before = json.loads((tmp_path / "src" / "config.json").read_text())
    assert {**before, "dtype": settings["dtype"]} == settings
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    shards = {path: load_file(path) for path in (tmp_path / "dst").glob("*.safetensors")}
    sizes = [t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert {name: path.name for path, tensors in shards.items() for name in tensors} == index["weight_map"]
    row = report.touched[0]
    old, new = (
        dict(m.named_parameters())[row.parameter].detach().double() for m in (load_model(tmp_path / "src"), result)
    )
    assert row.sfe == pytest.approx(float((old - new).square().sum()), rel=1e-6)
    assert row.sigma_after[-1] == pytest.approx(float(torch.linalg.svdvals(new)[-1]), rel=1e-3)
    told = json.loads((tmp_path / "dst" / "fire.json").read_text())
    assert told["dtype"] == written and not [*(tmp_path / "dst").glob("*.cast")]


def test_numbers_that_are_no_floats_stay_and_nested_configs_follow(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "src")
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    tensors |= {"steps": torch.tensor([2**40, 3]), "flags": torch.tensor([True, False, True]), "one": torch.tensor(0.5)}
    save_file(tensors, tmp_path / "src" / "model.safetensors", {"format": "pt", "by": "me"})
    settings = json.loads((tmp_path / "src" / "config.json").read_text())
    del settings["dtype"]
    settings |= {"torch_dtype": "float32", "other_config": {"dtype": "float32", "x": 1}}
    (tmp_path / "src" / "config.json").write_text(json.dumps(settings))
    assert main(["apply", str(tmp_path / "src"), str(tmp_path / "dst"), "--dtype", "bf16"]) == 0
    found = load_file(tmp_path / "dst" / "model.safetensors")
    assert torch.equal(found["steps"], tensors["steps"]) and torch.equal(found["flags"], tensors["flags"])
    assert found["one"].dtype == torch.bfloat16 and found["one"].shape == () and float(found["one"]) == 0.5
    told = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert told["torch_dtype"] == "bfloat16" and "dtype" not in told
    assert told["other_config"] == {"dtype": "bfloat16", "x": 1}


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "src")
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"'model.norm.weight' holds 1e\+05, which is beyond the range of fp16"):
        reset_checkpoint(tmp_path / "src", tmp_path / "dst", dtype="fp16")
    assert main(["apply", str(tmp_path / "src"), str(tmp_path / "dst"), "--dtype", "bf61"]) == 2
    assert "--dtype bf61: it must be keep or one of fp32, bf16, fp16. Did you mean 'bf16'?" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
