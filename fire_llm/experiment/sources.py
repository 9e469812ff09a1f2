"""The files that a run's model and tokenizer come from, by what they hold: the same name may hold others tomorrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
"""Files that a model, and a tokenizer, are read from."""

COMPANIONS = ("generation_config.json", "chat_template*")
"""What checkpoints hold too, and no weight depends on."""

Hashes = dict[str, str]
"""The hash of each file, by its name."""


def place_of(what: str, name: str, patterns: tuple[str, ...]) -> str:
    """Return the folder that a model or tokenizer is loaded from: for a Hub id, the snapshot in the Hub's cache.

    Args:
        what: For messages: `model`.
        name: A folder or a Hub id.
        patterns: Of the files that are fetched; another's weights are not, where its tokenizer is wanted.

    Raises:
        UserError: There is no such folder, and the Hub has none of that id or cannot be asked.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.count("/") != 1:
        raise UserError(f"{what}: {no_folder(name)}, and a Hub id has the form owner/name")
    from huggingface_hub import snapshot_download

    with asking_hub(name):
        return snapshot_download(name, allow_patterns=[*patterns, *COMPANIONS], ignore_patterns=["*/*"])


def hashes(what: str, place: str, patterns: tuple[str, ...]) -> Hashes:
    """Return what the files of a model or tokenizer hold; each is read once, and its hash remembered.

    Args:
        what: For messages: `model 'gpt2'`.
        place: Its folder.
        patterns: Of the files' names.

    Raises:
        UserError: A file cannot be read, or changes while it is.
    """
    folder = Path(place)
    files = {str(p.relative_to(folder)): p for p in [*folder.iterdir(), *(folder / SHARDED).glob("*")] if p.is_file()}
    found = {name: files[name] for name in sorted(files) if any(fnmatch(name, pattern) for pattern in patterns)}
    return dict(zip(found, content_hashes(what, [*found.values()]), strict=True))


def changes(before: Any, after: Mapping[str, Hashes]) -> Iterator[str]:
    """Yield in words which files of model and tokenizer differ, where both sides know of them.

    Args:
        before: {model or tokenizer: hashes}, as `unit.json` has it; None where it has none.
        after: The same, later.
    """
    for what, now in after.items() if isinstance(before, dict) else ():
        then = before.get(what, now)
        then = then if isinstance(then, dict) else {}
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                how = "is gone" if name not in now else "is new" if name not in then else "has changed"
                yield f"{what}: {name} {how}"
