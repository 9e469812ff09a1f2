"""Exact perplexity as a metric of the `evaluate` library: as an object, or through `evaluate.load(<this file>)`.

`evaluate` copies this file, runs the copy and takes the first metric among its names. So all imports are absolute, and
`evaluate.Metric`, itself a metric, is not imported by name.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from fire_llm.core.errors import UserError
from fire_llm.data.encode import Encoder
from fire_llm.data.tokens import count_words
from fire_llm.evaluation import Scores, perplexity, summarize
from fire_llm.evaluation.measurement import PREFIXES, check_choice, first_token

ROUNDING = 1e-3
"""Nats by which rounding, also in bfloat16, may put a negative log-likelihood below zero."""

USAGE = """
Args:
    predictions: The texts, one document each, for a model to score; or what a model gave already: for each document the
        negative log-likelihoods of its tokens, in nats.
    references: The texts whose UTF-8 bytes and words are counted, one a prediction. By default the predictions
        themselves where they are texts (lm_eval's wikitext scores a detokenised text, and counts the original), and
        none where they are not: bits per byte and word perplexity are then None.
    model: A loaded causal LM; it is used as it is, wherever it is, and left as it was.
    tokenizer: Its tokenizer.
    prefix: The token read before each document, or before the first: auto (the tokenizer's beginning of text, or its
        end of text where it has none), bos, eos or none.
    per_document: Read each document by itself (True), or windows across documents, the end of text after each of them,
        as `fire-llm eval` reads a corpus.
    context, stride, batch_size, compiled, mixed, progress: As in fire_llm.perplexity. With predictions that are no
        texts, `context`, `stride` and `per_document` are only repeated in the answer.

Returns:
    nll (nats a token), perplexity, byte_perplexity, word_perplexity, bits_per_byte; tokens, bytes, words and documents;
    context, stride, prefix, per_document and precision; document_nll (nats, the sum over each document) and
    document_tokens.

Example:
    metric = evaluate.load(fire_llm.evaluation.METRIC)
    metric.compute(predictions=["one text", "another"], model=model, tokenizer=tokenizer)
"""


class ExactPerplexity(evaluate.Metric):
    """Measure perplexity exactly, with a loaded model or from given likelihoods."""

    def _info(self) -> evaluate.MetricInfo:
        """Return the types of the inputs: a reference is a list of one text, a missing reference an empty list."""
        text, numbers = datasets.Value("string"), datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Exact perplexity: every token scored once, sums in fp64, one division at the end.",
            citation="",
            inputs_description=USAGE,
            features=[
                datasets.Features({"predictions": kind, "references": datasets.List(text)}) for kind in (text, numbers)
            ],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add some documents, with or without references.

        Raises:
            UserError: The predictions are none, or one text, whose letters would be taken for documents.
        """
        if isinstance(predictions, str) or predictions is None or not len(predictions):
            raise UserError(f"predictions are {predictions!r:.40}: give a list, with an entry for each document")
        references = [[]] * len(predictions) if references is None else [[text] for text in references]
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one document, with or without a reference.

        It is a batch of one: datasets before 5 keep single rows back until the end, behind batches that came later.
        """
        self.add_batch(predictions=[prediction], references=None if reference is None else [reference], **kwargs)

    def _compute(
        self,
        *,
        predictions: list[Any],
        references: list[list[str]],
        model: Any = None,
        tokenizer: Any = None,
        prefix: str = "auto",
        per_document: bool = True,
        context: int | None = None,
        stride: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Return what `USAGE` says of the documents added.

        Raises:
            UserError: References for some documents only; texts without a model, or likelihoods with one; what
                `perplexity` refuses; likelihoods that are none.
        """
        texts = isinstance(predictions[0], str)
        given = sum(map(len, references))
        if given not in (0, len(references)):
            raise UserError(
                f"{given} of {len(references)} predictions came with a reference: give one with each, or with none"
            )
        counted = [reference for (reference,) in references] if given else predictions if texts else None
        n_bytes = None if counted is None else np.asarray([len(text.encode()) for text in counted])
        n_words = None if counted is None else np.asarray([count_words(text) for text in counted])
        how: dict[str, Any] = {"context": context, "stride": stride, "per_document": per_document}
        if texts:
            check_choice("prefix", prefix, PREFIXES)
            if model is None or tokenizer is None:
                raise UserError(
                    "the predictions are texts, to be scored by a model: give model=, loaded, and tokenizer=; or give "
                    "as predictions the negative log-likelihoods of each document's tokens"
                )
            ids = Encoder(tokenizer)(predictions)
            for number, document in enumerate(ids, 1):
                if not len(document):
                    raise UserError(f"prediction {number} of {len(ids)} has no tokens: leave empty texts out")
            if not per_document:
                ids = [np.append(document, tokenizer.eos_token_id) for document in ids]
            result = perplexity(
                model,
                np.concatenate(ids),
                documents=np.cumsum([*map(len, ids)]),
                prefix=first_token(tokenizer, prefix, type(tokenizer).__name__),
                n_bytes=n_bytes,
                n_words=n_words,
                **how,
                **options,
            )
        else:
            if model is not None:
                raise UserError("the predictions are likelihoods, which need no model: leave model= out, or give texts")
            sums = np.asarray([_total(nll, number) for number, nll in enumerate(predictions, 1)])
            lengths = np.asarray([len(nll) for nll in predictions])
            result = summarize(Scores(sums, lengths, n_bytes, n_words), prefix=None, precision=None, **how)
        scores = result.scores
        return {**result.to_dict(), "document_nll": scores.nll.tolist(), "document_tokens": scores.tokens.tolist()}


def _total(nll: list[float], number: int) -> float:
    """Sum a document's negative log-likelihoods.

    Raises:
        UserError: There are none, or one of them is not finite or is below zero.
    """
    wrong = [value for value in nll if not -ROUNDING <= value < float("inf")]
    if wrong or not nll:
        what = f"holds {wrong[0]}" if wrong else "is empty"
        raise UserError(
            f"prediction {number} {what}: predictions that are no texts are, for each document, the negative "
            "log-likelihoods of its tokens, finite and not below zero"
        )
    return float(np.sum(nll))
