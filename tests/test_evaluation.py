"""Exact perplexity against hand-computed numbers and plain loops."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt2, tiny_llama

from fire_llm import UserError, perplexity
from fire_llm.evaluation import windows

TOKENS = torch.randint(0, 97, (1003,), generator=torch.Generator().manual_seed(0))


def by_hand(model, tokens, context, stride, prefix=None):
    """Score each target in the first window that covers it, one window at a time, in fp64."""
    stream = torch.cat([torch.tensor([prefix]), tokens]) if prefix is not None else tokens
    model, total, done = model.double().eval(), 0.0, 0
    n = len(stream) - 1
    for start in range(0, n, stride):
        end = min(start + context, n)
        with torch.no_grad():
            log_p = F.log_softmax(model(input_ids=stream[start:end][None]).logits[0], -1)
        total -= sum(float(log_p[k - start, stream[k + 1]]) for k in range(done, end))
        done = end
        if end == n:
            break
    assert done == n
    return total / n


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(("context", "stride", "prefix"), [(64, 64, None), (64, 16, 0), (17, 5, 3), (64, 1, None)])
def test_perplexity_equals_a_plain_loop(build, context, stride, prefix):
    tokens = TOKENS[:130]
    wanted = by_hand(build(), tokens, context, stride, prefix)
    measured = perplexity(build(), tokens, context=context, stride=stride, prefix=prefix, batch_size=4)
    assert measured.nll == pytest.approx(wanted, rel=1e-7)
    assert measured.perplexity == pytest.approx(math.exp(wanted), rel=1e-6)
    assert measured.tokens == len(tokens) - (prefix is None)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_perplexity_does_not_depend_on_the_batch_size(build):
    model = build()
    values = [perplexity(model, TOKENS, context=64, batch_size=b, prefix=0).perplexity for b in (1, 3, 8)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, TOKENS, context=64).perplexity == pytest.approx(97, rel=1e-9)


def test_a_bigram_model_has_the_hand_computed_perplexity():
    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log())
            self.config = tiny_gpt2(vocab_size=3).config

        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": self.table[input_ids]})

    # 0→1→1→2→0: 0.25, 0.8, 0.1, 0.2
    wanted = -math.log(0.25 * 0.8 * 0.1 * 0.2) / 4
    measured = perplexity(Bigram(), [0, 1, 1, 2, 0], context=2, n_bytes=8)
    assert measured.nll == pytest.approx(wanted, rel=1e-7)
    assert measured.bits_per_byte == pytest.approx(wanted * 4 / math.log(2) / 8, rel=1e-7)


@pytest.mark.parametrize(("n", "context", "stride"), [(1, 4, 4), (10, 4, 4), (10, 4, 1), (12, 4, 3), (7, 100, 100)])
def test_windows_score_every_position_once(n, context, stride):
    scored = [k for start, end, first in windows(n, context, stride) for k in range(first, end)]
    assert scored == list(range(n))
    assert all(end - start <= context and first >= start for start, end, first in windows(n, context, stride))


def test_mode_and_gradients_are_left_as_they_were():
    model = tiny_gpt2().train()
    perplexity(model, TOKENS[:50], context=16)
    assert model.training
    model(input_ids=TOKENS[None, :8], labels=TOKENS[None, :8]).loss.backward()


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "0 token"),
        ([5], {}, "1 token"),
        ([5, 97], {}, "token 97 is outside the model's vocabulary of 97"),
        ([5, 6], {"context": 65}, "context 65 is longer than the model's 64 positions"),
        ([5, 6], {"context": 8, "stride": 9}, "stride 9 must lie between 1 and the context, 8"),
        ([5, 6], {"context": 8, "stride": -1}, "stride -1"),
    ],
)
def test_bad_input(tokens, options, message):
    with pytest.raises(UserError, match=message):
        perplexity(tiny_gpt2(), torch.tensor(tokens, dtype=torch.long), **options)


def test_logits_that_are_not_finite_are_refused():
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        perplexity(model, TOKENS[:20], context=8)


def test_results_are_plain_data():
    assert json.loads(json.dumps(perplexity(tiny_gpt2(), TOKENS[:20], context=8).to_dict()))["tokens"] == 19
