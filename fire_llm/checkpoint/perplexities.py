"""The loss of a checkpoint before and after its reset, on texts that the user names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fire_llm.core.errors import UserError
from fire_llm.evaluation.checkpoints import open_checkpoints, score_checkpoints


@dataclass(frozen=True)
class Texts:
    """What is measured on, and how; nothing where there are no names.

    Raises:
        UserError: There are settings, and no texts that they would be of.
    """

    names: Sequence[str] = ()
    """Corpora, whose validation split is read, or local files."""
    max_tokens: int | None = None
    context: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for option, value in (("--max-tokens", self.max_tokens), ("--context", self.context)):
            if value is not None and not self.names:
                raise UserError(f"{option} {value}: it is of the texts of --measure-on, and there are none")

    def check(self, folder: Path) -> None:
        """Hold the texts against a checkpoint, without reading its weights.

        Raises:
            UserError: There is no such text, or its settings do not fit the checkpoint.
        """
        if self.names:
            open_checkpoints([str(folder)], self.names, max_tokens=self.max_tokens, context=self.context)

    def nll(self, folder: Path, progress: bool, title: Path) -> dict[str, float]:
        """Return the mean NLL of a checkpoint by text, nats a token; collective, and the whole model is loaded.

        Args:
            folder: The checkpoint.
            progress: Whether a bar is shown.
            title: The checkpoint as the bar calls it.

        Raises:
            UserError: As `score_checkpoints` raises it.
        """
        if not self.names:
            return {}
        scores = score_checkpoints(
            [str(folder)],
            [*self.names],
            max_tokens=self.max_tokens,
            context=self.context,
            device=self.device,
            progress=progress,
            titles=[str(title)],
        )
        return {row.data: row.nll for row in scores.rows}


def loss_lines(nll: dict[str, list[float]], vocabulary: int) -> list[str]:
    """Return a line a text on its loss before and after, and a warning where a uniform guess is better.

    Args:
        nll: {text: [before, after]}, nats a token.
        vocabulary: Entries of the model's vocabulary.
    """
    guess = math.log(vocabulary)
    lines = [f"{text}: {before:.4f} nats a token before, {after:.4f} after" for text, (before, after) in nll.items()]
    worse = [text for text, (_, after) in nll.items() if after > guess]
    if worse:
        lines.append(
            f"warning: on {', '.join(worse)} the result is worse than a uniform guess (ln V = {guess:.3f} nats): a "
            "lower --strength or --scale keep-norm keeps more of what the model knows; a healthy model may need no "
            "reset at all (docs/when-to-use.md)"
        )
    return lines
