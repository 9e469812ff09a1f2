"""Attention without a mask, where transformers makes none and nowhere else; seen in what torch.compile traces."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama
from support.simulated import Graphs, given_masks
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, MistralConfig

from fire_llm.evaluation.unmasked import needs_no_mask, unmasked
from fire_llm.training import loss as sliced
from fire_llm.training.loss import SummedLoss

CONTEXT = 16


def mistral(window):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=97, num_key_value_heads=2, sliding_window=window, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def other(config_class, **settings):
    return AutoModelForCausalLM.from_config(
        config_class(
            vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, pad_token_id=0, **settings
        )
    )


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny_gpt2, True),
        (tiny_llama, True),
        (lambda: mistral(None), True),
        (lambda: mistral(CONTEXT + 1), True),
        (lambda: mistral(8), False),  # a window
        (lambda: other(BloomConfig), False),  # a bias of distances, and no SDPA
        (lambda: other(BertConfig, intermediate_size=48), False),  # sees what is ahead
    ],
)
def test_a_mask_is_left_out_where_attention_is_causal_and_nothing_else(build, expected):
    model = build().eval()
    before = model.config._attn_implementation
    assert needs_no_mask(model, CONTEXT) is expected
    assert model.config._attn_implementation == before
    if expected:
        ids = torch.randint(0, 97, (3, CONTEXT))
        with torch.no_grad():
            own = model(input_ids=ids).logits
            with unmasked(model):
                assert torch.equal(model(input_ids=ids).logits, own)


def attention_masks(model, monkeypatch, **inputs):
    """Return the mask, or None, that each attention of the compiled trunk is given, in training."""
    monkeypatch.setattr(sliced, "WHOLE", 97)
    graphs = Graphs()
    torch._dynamo.reset()
    ids = torch.randint(0, 97, (3, CONTEXT + 1))
    loss = SummedLoss(model, contextlib.nullcontext, compiling={"backend": graphs})
    loss(model, ids[:, 1:].contiguous(), input_ids=ids[:, :-1].contiguous(), **inputs).backward()
    torch._dynamo.reset()
    return given_masks(graphs)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_compiled_trunk_has_no_mask(build, monkeypatch):
    """Flash attention takes none: with one, a step's attention took 2.5 to 5 times as long."""
    model = build().train()
    assert attention_masks(model, monkeypatch) == [None, None]
    assert model.config._attn_implementation == "sdpa"


def test_a_mask_that_is_needed_stays(monkeypatch):
    assert None not in attention_masks(mistral(8).train(), monkeypatch)
    positions = torch.arange(CONTEXT).remainder(5).expand(3, -1)  # documents
    assert None not in attention_masks(tiny_llama().train(), monkeypatch, position_ids=positions)
