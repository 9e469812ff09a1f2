"""Step-0 weights drawn a parameter at a time are the numbers that drawing the whole model gives."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import tiny_llama
from support.small_models import SMALL, stand_ins
from transformers import LlamaConfig

from fire_llm import UserError, reset_checkpoint
from fire_llm.checkpoint import drawn
from fire_llm.models import fresh_model, load_model

FEW = [
    "bloom",
    "deepseek_v3",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "llama",
    "mamba2",
    "mixtral",
    "openai-gpt",
    "qwen3_next",
]
# Some weights are drawn from the numbers of others: rejection sampling, orthogonal matrices, computed tables.
WHOLE = {
    "blt", "falcon_h1", "gemma3", "gemma3n", "gpt_bigcode", "gpt_neo", "marian", "modernbert-decoder", "nemotron_h",
    "openai-gpt", "pegasus", "phi4_multimodal", "roformer", "rwkv", "zamba",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted(SMALL)])
def test_the_same_numbers_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("musicgen"):
        pytest.skip("its config names no causal LM before it is saved")
    monkeypatch.setattr(drawn, "HOLLOW", 256)
    config = SMALL[name]()
    with stand_ins():
        if name.partition("+")[0] in WHOLE:
            with pytest.raises(NotImplementedError):
                drawn.Drawn(config, 5)
            return
        wanted, hollow = fresh_model(copy.deepcopy(config), 5), drawn.Drawn(config, 5)
    before = torch.random.get_rng_state()
    assert any(p.is_meta for p in hollow.model.parameters())
    for (key, a), b in zip(wanted.named_parameters(), hollow.model.parameters(), strict=True):
        assert torch.equal(a, hollow.parameter(b) if b.is_meta else b), key
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("hollow", [256, 1 << 20])
def test_a_reset_from_a_seed_does_not_depend_on_what_is_hollow(hollow, tmp_path, monkeypatch):
    tiny_llama(1).save_pretrained(tmp_path / "src")
    monkeypatch.setattr(drawn, "HOLLOW", hollow)
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", "shrink_perturb", shrink=0.5, seed=7)
    start, fresh = load_model(tmp_path / "src"), fresh_model(load_model(tmp_path / "src").config, 7)
    for a, b, c in zip(*(m.parameters() for m in (start, fresh, load_model(tmp_path / "dst"))), strict=True):
        assert torch.equal(torch.lerp(a, b, 0.5), c)


def test_where_only_all_at_once_will_do_the_memory_must_hold_them(monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(drawn, "Drawn", refuse)
    monkeypatch.setattr(drawn, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"takes \d+\.\d GB of memory, and 0\.0 GB are free: .* as --init"):
        drawn.draw_initial(LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=4000), 1)
