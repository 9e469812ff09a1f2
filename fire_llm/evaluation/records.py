"""The records of `fire-llm eval` (docs/results-schema.md).

A record is a measurement after the names of its checkpoint and text. The names come first in the JSON, because the
fields of the last base class come first in a dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fire_llm.evaluation.diagnose import Diagnostics
from fire_llm.evaluation.measurement import WORDS
from fire_llm.evaluation.perplexity import Perplexity
from fire_llm.evaluation.statistics import BOOTSTRAP, Difference

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class _Measured:
    checkpoint: str
    data: str


@dataclass(frozen=True)
class _Read(_Measured):
    split: str
    prefix_text: str | None
    """The token read first, as the tokenizer writes it."""


@dataclass(frozen=True)
class _Pair:
    checkpoint: str
    against: str
    data: str


@dataclass(frozen=True)
class CheckpointRow(Perplexity, _Read):
    """The perplexity of a checkpoint on a text."""

    se: dict[str, float | None]
    """Its standard errors, as in `standard_errors`."""


@dataclass(frozen=True)
class CheckpointDifference(Difference, _Pair):
    """The NLL of a checkpoint on a text less that of another checkpoint, `against`."""


@dataclass(frozen=True)
class CheckpointDiagnostics(Diagnostics, _Measured):
    """How plastic a checkpoint is, measured on a text."""


@dataclass(frozen=True)
class CheckpointSettings:
    """The settings of an evaluation."""

    prefix: str
    """Choice of the token read first, one of `PREFIXES`."""
    per_document: bool
    device: str
    words: str = WORDS
    bootstrap: dict[str, Any] = field(default_factory=lambda: {**BOOTSTRAP})
    max_tokens: int | None = None
    """Most tokens of a text, in whole documents from its beginning; None for all."""


@dataclass(frozen=True)
class CheckpointEvaluation:
    """Checkpoints × texts."""

    settings: CheckpointSettings
    rows: Sequence[CheckpointRow]
    differences: Sequence[CheckpointDifference]
    """Each other checkpoint against the first, on the same text."""
    diagnostics: Sequence[CheckpointDiagnostics]
    tasks: Mapping[str, dict[str, Any]]
    """By checkpoint, what `run_tasks` returns."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; diagnostics and tasks are left out where there are none."""
        data = {"schema_version": SCHEMA_VERSION, "settings": asdict(self.settings)}
        for name in ("rows", "differences", *(["diagnostics"] if self.diagnostics else [])):
            data[name] = [record.to_dict() for record in getattr(self, name)]
        return data | ({"tasks": dict(self.tasks)} if self.tasks else {})
