"""Perplexities that an evaluation of a run measured before, kept by all that they depend on.

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
from fire_llm.distributed import gather_objects, is_first
from fire_llm.evaluation.perplexity import Perplexity, summarize
from fire_llm.evaluation.scores import Scores
from fire_llm.evaluation.texts import EvaluationSet

FORMAT = 1
"""Raised whenever the same weights and text would give other sums."""


class Measured:
    """Keep and find perplexities, in a run's folder; under torch.distributed all ranks find the same.

    Args:
        folder: The run's.
        how: Settings that all of them share.
    """

    def __init__(self, folder: Path, how: Mapping[str, Any]) -> None:
        self.folder = folder / ".measured"
        self._how = [FORMAT, torch.__version__, transformers.__version__, dict(how)]

    def key(self, weights: str, text: str) -> str:
        """Return the name of a model's perplexity on a text.

        Args:
            weights: Hash of the model (`weights_digest`).
            text: Hash of what is measured (`text_digest`).
        """
        return digest(json.dumps([weights, text, *self._how], sort_keys=True), 16)

    def find(self, key: str) -> Perplexity | None:
        """Return what was kept under a key, None where nothing was, or not what was written."""
        found = None
        with suppress(UserError, KeyError, TypeError, ValueError):
            kept = read_json(self.folder / f"{key}.json", "it is measured again")
            if kept["digest"] == _digest(key, kept["scores"], kept["how"]):
                found = summarize(Scores(**kept["scores"]), **kept["how"])
        return found if all(gather_objects(None, found is not None)) else None

    def keep(self, key: str, result: Perplexity) -> None:
        """Keep a perplexity; of several ranks, the first does."""
        if is_first():
            scores = {name: None if v is None else v.tolist() for name, v in vars(result.scores).items()}
            how = {name: getattr(result, name) for name in ("context", "stride", "prefix", "per_document", "precision")}
            content = {"digest": _digest(key, scores, how), "how": how, "scores": scores}
            write_json(self.folder / f"{key}.json", content)


def weights_digest(model: torch.nn.Module) -> str:
    """Return the hash of a model's config, and of the name, dtype, shape and bytes of each tensor."""
    config: Any = model.config
    settings = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    found = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def text_digest(text: EvaluationSet) -> str:
    """Return the hash of a text's tokens, of its documents and of how it is read."""
    arrays = (text.tokens, text.documents, text.n_bytes, text.n_words)
    known = ((() if each is None else each) for each in arrays)
    parts = [digest(np.ascontiguousarray(each, dtype=np.int64).tobytes(), 16) for each in known]
    return digest(json.dumps([*parts, text.prefix, text.per_document]), 16)


def _digest(*content: Any) -> str:
    return digest(json.dumps(content, sort_keys=True), 16)
