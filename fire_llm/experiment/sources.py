"""The files that a run reads its model and tokenizer from, and their hashes: what a name holds may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fire_llm.core.errors import UserError
from fire_llm.core.hub import asking_hub, no_folder
from fire_llm.core.manifest import SHARDED, WEIGHTS
from fire_llm.data.cache import content_hashes

MODEL = ("config.json", *WEIGHTS, "model*.safetensors.index.json")
TOKENIZER = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "*.spm",
)  # fmt: skip
"""Names of the files that a model, and a tokenizer, are read from."""

COMPANIONS = ("generation_config.json", "chat_template*")
"""Names of files in a checkpoint that no weight depends on."""

Hashes = dict[str, str]
"""The hash of each file, by its name."""


@dataclass(frozen=True)
class Source:
    """A model or a tokenizer that a run reads from a folder or from the Hub."""

    what: str
    """`model` or `tokenizer`."""
    name: str
    """A folder or a Hub id."""
    patterns: tuple[str, ...]
    """Of the names of the files that are read. For a tokenizer, weights beside it are neither fetched nor hashed."""

    def folder(self) -> str:
        """Return the folder that it is loaded from: for a Hub id, the snapshot in the Hub's cache.

        Raises:
            UserError: There is no such folder, and the Hub has no such id or cannot be asked.
        """
        path = Path(self.name).expanduser()
        if path.is_dir():
            return str(path)
        if self.name.count("/") != 1:
            raise UserError(f"{self.what}: {no_folder(self.name)}, and a Hub id has the form owner/name")
        from huggingface_hub import snapshot_download

        with asking_hub(self.name):
            return snapshot_download(self.name, allow_patterns=[*self.patterns, *COMPANIONS], ignore_patterns=["*/*"])


def hashes(what: str, place: str, patterns: tuple[str, ...]) -> Hashes:
    """Return the hashes of the files of a model or tokenizer; each file is read once, and its hash remembered.

    Args:
        what: For messages: `model 'gpt2'`.
        place: Its folder.
        patterns: Patterns of the names of its files.

    Raises:
        UserError: A file cannot be read, or changes while it is.
    """
    folder = Path(place)
    below = [*folder.iterdir(), *(folder / SHARDED).glob("*")]
    files = {str(path.relative_to(folder)): path for path in below if path.is_file()}
    wanted = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in patterns))
    return dict(zip(wanted, content_hashes(what, [files[name] for name in wanted]), strict=True))


def changes(before: Any, after: Mapping[str, Hashes]) -> Iterator[str]:
    """Yield in words which files of model and tokenizer differ; one that `before` does not list is passed over.

    Args:
        before: {model or tokenizer: hashes} from `unit.json`; None if it has none.
        after: The same, later.
    """
    for what, now in after.items() if isinstance(before, dict) else ():
        then = before.get(what, now)
        then = then if isinstance(then, dict) else {}
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                how = "is gone" if name not in now else "is new" if name not in then else "has changed"
                yield f"{what}: {name} {how}"
