"""Make causal LMs of the toy models of transformers' trainer tests, which learn the two numbers of a line.

Here `a` and `b` weigh two guesses of the next token, and samples are walks through the vocabulary.
"""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY, LENGTH, IGNORED = 11, 8, -100


def guesses(ids: Tensor, a: Any, b: Any) -> Tensor:
    """Return logits (B, T, V): `a` for the token one up, `b` for the one twice as high."""
    return sum(w * F.one_hot(to % VOCABULARY, VOCABULARY).float() for w, to in ((a, ids + 1), (b, 2 * ids)))


def answer(logits: Tensor, labels: Tensor | None, double: bool = False) -> CausalLMOutput:
    """Return logits and, where there are labels (those at the positions), the mean loss."""
    wanted = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    loss = None if wanted is None else F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
    return CausalLMOutput(loss=loss, logits=logits, hidden_states=(logits,) if double else None)


class Causal:
    """A mark: transformers' own models have it by their names."""

    loss_type = property(lambda self: "ForCausalLM", lambda self, of_name: None)


class Correct:
    """The share of next tokens that are the likeliest ones, where theirs is the share of points near the line."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: list[float] = []

    def __call__(self, found: Any, compute_result: bool | None = None) -> dict[str, float]:
        logits, labels = (torch.as_tensor(x[0] if isinstance(x, tuple) else x) for x in found)
        self.seen += (logits.argmax(-1)[:, :-1] == labels[:, 1:]).float().mean(-1).tolist()
        result = {"accuracy": float(np.mean(self.seen))}
        if compute_result is not False:
            self.seen = []
        return result


def toys(theirs: ModuleType) -> dict[str, Any]:
    """Return what stands in place of the toys of their module, by name."""

    class Config(theirs.RegressionModelConfig):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.vocab_size = VOCABULARY

    class Walks(theirs.RegressionDataset):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            draw = torch.Generator().manual_seed(i)
            up = torch.rand(LENGTH, generator=draw) < 0.7
            steps = torch.where(up, 1, torch.randint(VOCABULARY, (LENGTH,), generator=draw))
            ids = steps.cumsum(0) % VOCABULARY
            return {"input_ids": ids, **{name: ids.clone() for name in self.label_names}}

    class Plain(theirs.RegressionModel):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
            return answer(guesses(input_ids, self.a, self.b), labels, self.double_output).to_tuple()

    class AsDict(theirs.RegressionDictModel):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
            return dict(answer(guesses(input_ids, self.a, self.b), labels))

    class Lm(Causal, theirs.RegressionPreTrainedModel):
        config_class = Config

        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
            return answer(guesses(input_ids, self.a, self.b), labels, self.double_output)

    class Noisy(Causal, theirs.RegressionRandomPreTrainedModel):
        config_class = Config

        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
            noise = torch.randn(()) if self.random_torch else 0.0
            noise = 1 + 0.05 * (noise + float(np.random.rand()) + random.random())
            return answer(guesses(input_ids, self.a * noise, self.b), labels)

    class Checkpointing(Causal, theirs.RegressionPreTrainedModelWithGradientCheckpointing):
        config_class = Config

        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
            y = input_ids[..., None] / VOCABULARY
            for layer in self.layers:
                again = self.training and self.gradient_checkpointing
                y = self._gradient_checkpointing_func(layer.__call__, y) if again else layer(y)
            return answer(guesses(input_ids, self.head(y), 0.0), labels)

    return {
        "RegressionModelConfig": Config, "RegressionDataset": Walks, "RegressionModel": Plain,
        "RegressionDictModel": AsDict, "RegressionPreTrainedModel": Lm, "RegressionRandomPreTrainedModel": Noisy,
        "RegressionPreTrainedModelWithGradientCheckpointing": Checkpointing, "AlmostAccuracy": Correct,
        "AlmostAccuracyBatched": Correct,
    }  # fmt: skip
