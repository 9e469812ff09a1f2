"""Keep the perplexities that evaluations of a run measured, by the hashes of all that they depend on.

RUN_DIR/.measured/KEY.json        the sums of every document, and a hash of them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fire_llm.core.atomic import read_json, write_json
from fire_llm.core.errors import UserError
from fire_llm.core.hashing import digest
from fire_llm.core.locks import held, lock_of
from fire_llm.distributed import gather_objects, is_first
from fire_llm.evaluation.perplexity import Perplexity, summarize
from fire_llm.evaluation.scores import Scores
from fire_llm.evaluation.texts import EvaluationSet, score

FORMAT = 1
"""Increased whenever the same weights and text would give other sums."""


class Measured:
    """Keep and find perplexities in a run's folder; under torch.distributed all ranks find the same.

    Args:
        folder: The run's folder.
        settings: The settings that all of them are measured with.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self._lock = folder / ".measured", lock_of(folder, "evaluation")
        self._settings = [FORMAT, torch.__version__, transformers.__version__, dict(settings)]

    def key(self, weights: str, text: str) -> str:
        """Return the key of a model's perplexity on a text.

        Args:
            weights: The hash of the model (`weights_digest`).
            text: The hash of the text (`text_digest`).
        """
        return digest(json.dumps([weights, text, *self._settings], sort_keys=True), 16)

    def find(self, key: str) -> Perplexity | None:
        """Return the perplexity that was kept under a key; None if there is none, or its file is damaged."""
        perplexity = None
        with suppress(UserError, KeyError, TypeError, ValueError):
            content = read_json(self.folder / f"{key}.json", "it is measured again")
            if content["digest"] == _digest(key, content["scores"], content["how"]):
                perplexity = summarize(Scores(**content["scores"]), **content["how"])
        return perplexity if all(gather_objects(None, perplexity is not None)) else None

    def keep(self, key: str, result: Perplexity) -> None:
        """Keep a perplexity; of several ranks, the first writes it."""
        if is_first():
            scores = {name: None if v is None else v.tolist() for name, v in vars(result.scores).items()}
            how = {name: getattr(result, name) for name in ("context", "stride", "prefix", "per_document", "precision")}
            content = {"digest": _digest(key, scores, how), "how": how, "scores": scores}
            write_json(self.folder / f"{key}.json", content)

    def score(
        self, model: Any, texts: Mapping[str, EvaluationSet], device: torch.device, *, again: bool, **how: Any
    ) -> tuple[dict[str, Perplexity], int]:
        """Return a model's perplexity on each text, and how many of them were found and not measured.

        Args:
            model: A model in memory, loaded for this.
            texts: The texts by name.
            device: Where to compute.
            again: Measure all of them.
            **how: As in `evaluation.texts.score`.
        """
        weights = weights_digest(model)
        keys = {name: self.key(weights, text_digest(text)) for name, text in texts.items()}
        known = {name: kept for name, key in keys.items() if not again and (kept := self.find(key))}
        unknown = {name: text for name, text in texts.items() if name not in known}
        new = score(model.to(device), unknown, **how) if unknown else {}
        with held(self._lock, wait=True):
            for name, result in new.items():
                self.keep(keys[name], result)
        return {name: (known | new)[name] for name in texts}, len(known)


def weights_digest(model: torch.nn.Module) -> str:
    """Return the hash of a model's config, and of the name, dtype, shape and bytes of each tensor."""
    config: Any = model.config
    settings = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    hashed = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def text_digest(text: EvaluationSet) -> str:
    """Return the hash of a text's tokens, of its documents and of how it is read."""
    arrays = (text.tokens, text.documents, text.n_bytes, text.n_words)
    parts = [digest(np.ascontiguousarray(() if a is None else a, dtype=np.int64).tobytes(), 16) for a in arrays]
    return digest(json.dumps([*parts, text.prefix, text.per_document]), 16)


def _digest(*content: Any) -> str:
    return digest(json.dumps(content, sort_keys=True), 16)
