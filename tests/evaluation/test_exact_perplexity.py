"""The metric of the `evaluate` library: loaded from its file, with a model at hand or with likelihoods."""

from __future__ import annotations

import json
import math
import re

import evaluate
import numpy as np
import pytest
import torch
from support.corpora import TEXTS, corpus_of, prose
from support.models import tiny_gpt2

from fire_llm import UserError
from fire_llm.data import train_tokenizer
from fire_llm.evaluation import exact_perplexity
from fire_llm.evaluation.exact_perplexity import ExactPerplexity

DOCUMENTS = [prose(n, seed=n) for n in (3, 40, 1, 17)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([corpus_of(TEXTS)], 400, progress=False)


@pytest.fixture(scope="module")
def model():
    return tiny_gpt2(vocab_size=400, n_positions=256)


@pytest.fixture(params=["object", "loaded"])
def metric(request, tmp_path, monkeypatch):
    """Make the metric in both ways; the copy that `evaluate` runs and what it writes stay in the test's folder."""
    if request.param == "object":
        return ExactPerplexity(cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return evaluate.load(exact_perplexity.__file__, cache_dir=str(tmp_path / "cache"))


def test_the_file_is_loaded_as_evaluate_loads_a_metric(metric, request):
    loaded = request.node.callspec.params["metric"] == "loaded"
    assert type(metric).__module__.startswith("evaluate_modules.") == loaded
    assert (type(metric).__name__, metric.name) == ("ExactPerplexity", "exact_perplexity")
    assert "predictions: The texts" in metric.compute.__doc__


def nll_by_hand(model, tokenizer, text: str) -> list[float]:
    """Return the negative log-likelihood of each token after the end of text, one forward pass a document."""
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
    with torch.no_grad():
        log_p = model.eval()(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return [-float(log_p[k, ids[k + 1]]) for k in range(len(ids) - 1)]


def assert_is(answer: dict, nll: list[list[float]], counted: list[str] | None) -> None:
    total, n = sum(map(sum, nll)), sum(map(len, nll))
    assert answer["nll"] == pytest.approx(total / n, rel=1e-6)
    assert answer["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-5)
    assert (answer["tokens"], answer["documents"]) == (n, len(nll))
    assert answer["document_nll"] == pytest.approx([sum(each) for each in nll], rel=1e-6)
    assert answer["document_tokens"] == [len(each) for each in nll]
    if counted is None:
        assert answer["bits_per_byte"] is answer["word_perplexity"] is answer["bytes"] is None
    else:
        n_bytes = sum(len(text.encode()) for text in counted)
        n_words = sum(len(re.split(r"\s+", text)) for text in counted)
        assert (answer["bytes"], answer["words"]) == (n_bytes, n_words)
        assert answer["bits_per_byte"] == pytest.approx(total / n_bytes / math.log(2), rel=1e-6)
        assert answer["word_perplexity"] == pytest.approx(math.exp(total / n_words), rel=1e-5)
    json.dumps(answer)


def test_texts_are_scored_by_the_model_given_which_is_not_loaded_nor_changed(metric, model, tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    wanted = [nll_by_hand(model, tokenizer, text) for text in DOCUMENTS]
    model.train()
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        answer = metric.compute(predictions=DOCUMENTS, model=model, tokenizer=tokenizer, context=256)
        assert_is(answer, wanted, DOCUMENTS)
    hook.remove()
    assert calls and model.training
    assert {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()} == before
    assert (answer["context"], answer["stride"], answer["per_document"]) == (256, 256, True)
    assert answer["prefix"] == tokenizer.eos_token_id


def test_bytes_and_words_are_those_of_the_references(metric, model, tokenizer):
    wanted = [nll_by_hand(model, tokenizer, text) for text in DOCUMENTS]
    originals = [text + " @-@ more" for text in DOCUMENTS]
    answer = metric.compute(predictions=DOCUMENTS, references=originals, model=model, tokenizer=tokenizer)
    assert_is(answer, wanted, originals)


def test_windows_may_run_across_documents(metric, model, tokenizer):
    answer = metric.compute(
        predictions=DOCUMENTS, model=model, tokenizer=tokenizer, per_document=False, prefix="none", batch_size=1
    )
    end = tokenizer.eos_token_id
    ids = torch.tensor([token for text in DOCUMENTS for token in [*tokenizer(text)["input_ids"], end]])
    assert len(ids) <= 256
    with torch.no_grad():
        loss = model.eval()(input_ids=ids[None], labels=ids[None]).loss
    assert answer["nll"] == pytest.approx(float(loss), rel=1e-6)
    assert (answer["tokens"], answer["prefix"]) == (len(ids) - 1, None)


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_likelihoods_that_are_at_hand_need_no_model(metric, kind):
    nll = [[1.0, 0.25], [0.5], [3.0, 0.0, 2.0]]
    assert_is(metric.compute(predictions=[kind(each) for each in nll]), nll, None)
    texts = ["a b", "ö", "c  d\ne"]
    assert_is(metric.compute(predictions=nll, references=texts), nll, texts)
    # By hand: 6.75 nats over 6 tokens, 3 + 2 + 6 bytes, 2 + 1 + 3 words.
    answer = metric.compute(predictions=nll, references=texts, context=1024, stride=512)
    assert answer["nll"] == 1.125 and answer["word_perplexity"] == pytest.approx(math.exp(1.125))
    assert answer["bits_per_byte"] == pytest.approx(6.75 / math.log(2) / 11)
    assert (answer["context"], answer["stride"], answer["prefix"]) == (1024, 512, None)


def test_documents_may_be_added_one_by_one_and_in_batches(metric, model, tokenizer):
    wanted = [nll_by_hand(model, tokenizer, text) for text in DOCUMENTS]
    metric.add(prediction=DOCUMENTS[0])
    metric.add_batch(predictions=DOCUMENTS[1:3])
    metric.add(prediction=DOCUMENTS[3])
    assert_is(metric.compute(model=model, tokenizer=tokenizer), wanted, DOCUMENTS)
    metric.add(prediction=wanted[0], reference=DOCUMENTS[0])
    metric.add_batch(predictions=wanted[1:], references=DOCUMENTS[1:])
    assert_is(metric.compute(), wanted, DOCUMENTS)


@pytest.mark.parametrize(
    ("predictions", "options", "message"),
    [
        (["a text"], {}, "give model=, loaded, and tokenizer="),
        (["a text", ""], {"model": 1, "tokenizer": 1}, "prediction 2 of 2 has no tokens"),
        (["a text"], {"model": 1, "tokenizer": 1, "prefix": "bus"}, "bus: it must be one of auto, bos"),
        ([[1.0]], {"model": 1}, "leave model= out"),
        ([[1.0], [-2.0]], {}, "prediction 2 holds -2.0: .*not below zero"),
        ([[1.0, math.inf]], {}, "prediction 1 holds inf"),
        ([[1.0, math.nan]], {}, "prediction 1 holds nan"),
        ([[1.0], []], {}, "prediction 2 is empty"),
        ("a text", {}, "predictions are 'a text': give a list"),
        ([], {}, r"predictions are \[\]: give a list"),
        (["a", "b"], {"references": ["a"]}, "Mismatch in the number of predictions"),
    ],
)
def test_bad_input(metric, model, tokenizer, predictions, options, message):
    at_hand = {"model": model, "tokenizer": tokenizer}
    with pytest.raises((UserError, ValueError), match=message):
        metric.compute(predictions=predictions, **{key: at_hand.get(key, value) for key, value in options.items()})


def test_references_for_some_documents_only_are_refused(metric):
    metric.add(prediction=[1.0], reference="a")
    metric.add(prediction=[1.0])
    with pytest.raises(UserError, match="1 of 2 predictions came with a reference"):
        metric.compute()
