"""What scripts/benchmark_evaluation.py measures perplexity beside is what lm_eval does."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_gpt2

from fire_llm import perplexity

SCRIPT = "rolling_loop"
TOKENS = torch.randint(0, 97, (203,), generator=torch.Generator().manual_seed(0)).numpy()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 33, 203])
def test_windows_are_those_of_lm_eval(script, n):
    theirs = pytest.importorskip("lm_eval.utils")

    tokens = TOKENS[:n].tolist()
    windows = script.rolling_windows([tokens], 16, 5)
    cut = map(theirs.make_disjoint_window, theirs.get_rolling_token_windows(tokens, 5, 16, 1))
    # As HFLM: what is read is the context and the continuation without its last token.
    assert [*windows] == [((context + scored)[-17:][:-1], scored) for context, scored in cut]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("documents", [None, [7, 100, 203]])
def test_the_loop_gives_the_likelihood_of_perplexity(script, batch_size, documents):
    model = tiny_gpt2().eval()
    total, n = script.rolling_loop(model, TOKENS, 16, batch_size, 5, documents=documents)
    ours = perplexity(model, TOKENS, context=16, prefix=5, documents=documents, per_document=True)
    assert n == ours.tokens == 203 and total / n == pytest.approx(ours.nll, rel=1e-6)


def test_every_precision_and_contestant_has_a_row(script):
    model = tiny_gpt2().eval()
    rows = script.measure(model, TOKENS, context=16, prefix=5, rolling_batch_sizes=(1, 16), repeat=1)
    wanted = ("ours", "rolling loop, batch 1", "rolling loop, batch 16")
    assert [(row["precision"], row["contestant"]) for row in rows] == [
        (precision, contestant) for precision in script.PRECISIONS for contestant in wanted
    ]
    assert next(model.parameters()).dtype == torch.float32
    nll = rows[0]["nll"]
    for row in rows:
        assert row["tokens"] == 203 and row["tokens_per_second"] > 0
        assert row["nll"] == pytest.approx(nll, rel=1e-6 if row["precision"] == "fp32" else 1e-2)
