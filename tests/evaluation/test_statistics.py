"""Standard errors and paired intervals against closed forms, SciPy and simulated truth."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from fire_llm.core.errors import UserError
from fire_llm.evaluation.scores import Scores
from fire_llm.evaluation.statistics import paired_difference, standard_errors, student_t


def texts(documents: int, seed: int = 0, spread: float = 0.4) -> Scores:
    """Draw documents of unequal lengths whose nats a token differ from document to document."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 400, documents)
    nll = tokens * rng.normal(3.0, spread, documents)
    return Scores(nll, tokens, bytes=tokens * 4 + rng.integers(0, 40, documents), words=tokens // 2)


def linearised(total: np.ndarray, count: np.ndarray) -> float:
    """Return the delta method's standard error of Σtotal/Σcount."""
    ratio, n = total.sum() / count.sum(), len(total)
    return float(np.sqrt(((total - ratio * count) ** 2).sum() * n / (n - 1)) / count.sum())


@pytest.mark.parametrize("documents", [2, 3, 40, 4000])
def test_of_equal_documents_it_is_the_standard_error_of_a_mean(documents):
    nll = np.random.default_rng(documents).normal(300, 30, documents)
    errors = standard_errors(Scores(nll, np.full(documents, 100)))
    assert errors["nll"] == pytest.approx(nll.std(ddof=1) / 100 / math.sqrt(documents), rel=0.07)


@pytest.mark.parametrize("documents", [300, 30_000])  # beyond 10,000 groups are drawn
def test_of_unequal_documents_it_is_the_delta_methods(documents):
    scores = texts(documents)
    errors = standard_errors(scores)
    total = scores.nll.sum()
    assert errors["nll"] == pytest.approx(linearised(scores.nll, scores.tokens), rel=0.07)
    a_byte = linearised(scores.nll, scores.bytes)
    assert errors["bits_per_byte"] == pytest.approx(a_byte / math.log(2), rel=0.07)
    # A small error of x is one of exp(x)·x in exp(x).
    for name, count, error in (
        ("perplexity", scores.tokens, linearised(scores.nll, scores.tokens)),
        ("byte_perplexity", scores.bytes, a_byte),
        ("word_perplexity", scores.words, linearised(scores.nll, scores.words)),
    ):
        assert errors[name] == pytest.approx(math.exp(total / count.sum()) * error, rel=0.1)


def test_documents_that_all_cost_the_same_a_token_leave_no_doubt():
    scores = texts(50)
    errors = standard_errors(Scores(2.0 * scores.tokens, scores.tokens))
    assert errors["nll"] == pytest.approx(0, abs=1e-14)
    assert errors["perplexity"] == pytest.approx(0, abs=1e-13)


def test_what_cannot_be_known_is_none():
    assert set(standard_errors(Scores([7.0], [3], [9], [2])).values()) == {None}
    # A document of which no token was scored is none to judge by.
    assert set(standard_errors(Scores([7.0, 0.0], [3, 0], [9, 0], [2, 1])).values()) == {None}
    errors = standard_errors(Scores([7.0, 8.0], [3, 3]))
    assert errors["nll"] is not None and errors["perplexity"] is not None
    assert {errors[name] for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")} == {None}


def test_empty_documents_are_drawn_without_dividing_by_zero():
    """Of an empty document the end of text is scored, over no bytes; a draw of such alone has no bits per byte."""
    errors = standard_errors(Scores([2.0, 3.0, 40.0], [1, 1, 10], [0, 0, 50], [1, 1, 9]))
    assert all(error is not None and error > 0 for error in errors.values())
    none = standard_errors(Scores([2.0, 3.0], [1, 1], [0, 0], [1, 1]))
    assert none["bits_per_byte"] is None and none["nll"] is not None


def test_word_perplexities_beyond_fp64_have_no_error_and_give_no_warning():
    pages = Scores([9000.0, 5000.0, 1200.0], [3000, 2000, 400], [9000, 6000, 1200], [1, 1, 1])
    errors = standard_errors(pages)
    assert errors["word_perplexity"] is None
    assert errors["perplexity"] is not None and errors["byte_perplexity"] is not None


def test_the_same_seed_gives_the_same_errors():
    scores = texts(60)
    assert standard_errors(scores) == standard_errors(scores)
    assert standard_errors(scores, seed=1) != standard_errors(scores)
    few = [standard_errors(scores, resamples=20, seed=s)["nll"] for s in range(40)]
    many = [standard_errors(scores, resamples=2000, seed=s)["nll"] for s in range(40)]
    assert np.std(few) > 5 * np.std(many)  # the draws' own error falls with √resamples: tenfold


def test_a_million_documents_take_little_memory():
    scores = texts(1_000_000)
    tracemalloc.start()
    standard_errors(scores)
    paired_difference(scores, scores)
    assert tracemalloc.get_traced_memory()[1] < 300e6  # all draws at once would take 8 GB
    tracemalloc.stop()


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 57, 58, 1000, 10**6])
def test_students_t_is_scipys(level, freedom):
    assert student_t(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-6)


@pytest.mark.parametrize(("documents", "equal"), [(5, True), (40, False)])
def test_intervals_hold_the_truth_as_often_as_they_say(documents, equal):
    rng, experiments, held = np.random.default_rng(5), 1000, {0.95: 0, 0.8: 0}
    for _ in range(experiments):
        tokens = np.full(documents, 100) if equal else rng.integers(20, 400, documents)
        hard = tokens * rng.normal(3.0, 0.5, documents)
        gain = tokens * rng.normal(-0.02, 0.05, documents)  # the truth: −0.02 nats a token
        for level in held:
            found = paired_difference(Scores(hard + gain, tokens), Scores(hard, tokens), level=level, resamples=200)
            held[level] += found.low <= -0.02 <= found.high
    # Three standard deviations of a count of 1000, and a point for the shape of what is no normal distribution.
    assert held[0.95] / experiments == pytest.approx(0.95, abs=0.03)
    assert held[0.8] / experiments == pytest.approx(0.8, abs=0.05)


def test_pairs_are_told_apart_where_single_scores_are_not():
    hard = texts(200)
    gain = np.random.default_rng(1).normal(0.01, 0.005, 200) * hard.tokens
    better = Scores(hard.nll - gain, hard.tokens, hard.bytes, hard.words)
    found = paired_difference(better, hard)
    alone = math.hypot(standard_errors(hard)["nll"], standard_errors(better)["nll"])
    assert found.se < alone / 20
    assert found.low < found.mean < found.high < 0
    assert found.mean == pytest.approx(-gain.sum() / hard.tokens.sum(), rel=1e-12)
    assert found.se == pytest.approx(linearised(-gain, hard.tokens), rel=0.07)
    assert found.to_dict()["documents"] == 200 and found.unit == "token" and found.level == 0.95


def test_a_model_does_not_differ_from_itself():
    found = paired_difference(texts(30), texts(30))
    assert (found.mean, found.se, found.low, found.high) == (0.0, 0.0, 0.0, 0.0)


def test_tokenizers_are_compared_by_the_byte():
    a = texts(30)
    b = Scores(a.nll * 1.1, a.tokens * 2, a.bytes)
    found = paired_difference(b, a, unit="byte")
    assert found.mean == pytest.approx(0.1 * a.nll.sum() / a.bytes.sum())
    assert found.se == pytest.approx(linearised(0.1 * a.nll, a.bytes), rel=0.07)
    with pytest.raises(UserError, match=r"tokens differ .* unit='byte'"):
        paired_difference(b, a)


def test_one_document_gives_a_difference_without_an_interval():
    found = paired_difference(Scores([7.0], [3]), Scores([8.5], [3]))
    assert found.mean == -0.5 and (found.se, found.low, found.high) == (None, None, None)
    found = paired_difference(Scores([7.0, 0.0], [3, 0]), Scores([8.5, 0.0], [3, 0]))
    assert found.mean == -0.5 and found.se is None and found.documents == 2


@pytest.mark.parametrize(
    ("a", "b", "options", "told"),
    [
        (Scores([1.0, 2.0], [2, 2]), Scores([1.0], [2]), {}, "not the same text: 2 documents and 1"),
        (
            Scores([1.0, 2.0], [2, 2], [5, 6]),
            Scores([1.0, 2.0], [2, 2], [5, 7]),
            {"unit": "byte"},
            "document 2 has 6 bytes and 7",
        ),
        (Scores([1.0], [2]), Scores([1.0], [2]), {"unit": "byte"}, "needs the text's bytes"),
        (Scores([1.0], [0]), Scores([1.0], [0]), {}, "needs the text's tokens"),
        (Scores([1.0], [2]), Scores([1.0], [2]), {"unit": "word"}, "give token or byte"),
        (Scores([1.0], [2]), Scores([1.0], [2]), {"level": 95}, "between 0 and 1"),
    ],
)
def test_what_does_not_compare_is_refused(a, b, options, told):
    with pytest.raises(UserError, match=told):
        paired_difference(a, b, **options)


def test_scores_hold_one_count_a_document():
    scores = Scores([1, 2], [3, 4])
    assert scores.nll.dtype == np.float64 and scores.tokens.dtype == np.int64 and scores.documents == 2
    with pytest.raises(ValueError, match=r"words has the shape \(3,\), but there are \(2,\)"):
        Scores([1, 2], [3, 4], words=[1, 2, 3])
