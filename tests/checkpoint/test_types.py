"""Every causal LM that transformers knows: rewritten on the disk it equals the model reset in memory, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_models import SMALL, build, stand_ins
from support.small_others import classes_of_tasks, on_meta
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from fire_llm import fire_, reset_checkpoint
from fire_llm.architectures.families import TYPES
from fire_llm.architectures.matrices import parameter_slices
from fire_llm.core.errors import UserError

# One of every way to lie on the disk: plain, Conv1D, fused orders, MLA, experts one by one, stacked, renamed, cut.
FEW = [
    "aria_text", "bloom", "dbrx", "deepseek_v3", "falcon", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "granitemoe",
    "hrm_text", "inkling2_text", "jamba", "jetmoe", "kimi_linear", "lfm2", "llama4_text", "mamba2", "mixtral",
    "musicgen", "nemotron_h", "olmoe", "phi3", "qwen3", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "xlnet",
    "zamba2",
]  # fmt: skip
ROLES = ("attention", "mlp", "ssm")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted(SMALL)])
@pytest.mark.filterwarnings("ignore:fire. the norm of all")  # of random weights
def test_rewriting_equals_the_reset_in_memory(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "src", max_shard_size="60KB")
    with stand_ins():
        report = reset_checkpoint(tmp_path / "src", tmp_path / "dst", roles=ROLES)
        wanted, result = (type(model).from_pretrained(tmp_path / n) for n in ("src", "dst"))
    in_memory = fire_(wanted, roles=ROLES)
    assert [t.name for t in report.touched] == [t.name for t in in_memory.touched] and report.touched
    changed = set()
    for (key, a), (_, b), (_, c) in zip(*(m.named_parameters() for m in (wanted, result, model)), strict=True):
        assert torch.equal(a, b), key
        changed |= {key} if not torch.equal(b, c) else set()
    assert changed == {t.parameter for t in report.touched}


@pytest.mark.parametrize("name", ["inkling2_loop_text", "inkling2_text"])
def test_a_head_that_is_stored_with_rows_of_padding_is_reset_without_them(name: str, tmp_path: Path) -> None:
    if "inkling2_loop_text" not in SMALL:
        pytest.skip("transformers 5.24 is the first that stores it so")
    config = SMALL[name]()
    config.unpadded_vocab_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "src")
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", roles=["lm_head"])
    wanted, result = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("src", "dst"))
    assert wanted.lm_head.weight.shape[0] == 64
    fire_(wanted, roles=["lm_head"])
    assert torch.equal(wanted.lm_head.weight, result.lm_head.weight)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("src", "dst"))
    (head,) = (key for key in before if not torch.equal(before[key], after[key]))
    assert before[head].shape[0] == 96 and torch.equal(before[head][64:], after[head][64:])


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe"])
def test_checkpoints_with_towers_keep_them(name: str, tmp_path: Path) -> None:
    """The Hub's are of the composite class, with a vision tower; the causal LM in them is what is reset."""
    torch.manual_seed(0)
    config = SMALL[name]()
    composite = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    composite.save_pretrained(tmp_path / "src", max_shard_size="100KB")
    report = reset_checkpoint(tmp_path / "src", tmp_path / "dst")
    wanted, result = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("src", "dst"))
    fire_(wanted)
    for (key, a), b in zip(wanted.named_parameters(), result.parameters(), strict=True):
        assert torch.equal(a, b), key
    before, after = (type(composite).from_pretrained(tmp_path / n) for n in ("src", "dst"))
    pairs = list(zip(before.named_parameters(), after.parameters(), strict=True))
    towers = [key for key, _ in composite.named_parameters() if "vision" in key or "visual" in key]
    assert towers and all(torch.equal(a, b) for (key, a), b in pairs if key in towers)
    assert sum(not torch.equal(a, b) for (_, a), b in pairs) == len({t.parameter for t in report.touched})


def test_the_documented_table_lists_every_type() -> None:
    page = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text(encoding="utf-8")
    listed = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.count(" | ") >= 4]
    assert listed[0] == "type" and sorted(listed[1:]) == sorted(TYPES)


@pytest.mark.slow
def test_all_classes_of_four_more_tasks_are_known_or_refused_by_name() -> None:
    """As docs/layouts.md lists them; a refusal names the weight, and the way that is left."""
    page = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text(encoding="utf-8")
    section = page.partition("## Beyond")[2]
    known = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.count(" | ") == 2]
    refused = [line[2:].partition(":")[0] for line in section.splitlines() if line.startswith("- ") and "For" in line]
    assert known[0] == "class" and {*known[1:], *refused} >= set(classes_of_tasks())  # an older one lacks some
    for name in classes_of_tasks():
        try:
            model = on_meta(name)
        except Exception:  # a library that is not here
            assert name in refused
            continue
        if name in known:
            cut = parameter_slices(model)
            assert sum(p.tensor.numel() for p in {id(p.tensor): p for p in cut}.values()) == model.num_parameters()
            assert {p.role for p in cut} & {"attention", "mlp", "conv"}
        else:
            with pytest.raises(UserError, match=r"layout='modules'"):
                parameter_slices(model)
