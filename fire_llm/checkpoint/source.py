"""A checkpoint as it lies on the disk: its config, its shards and their headers, its companions; no weight is read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fire_llm.checkpoint.headers import StoredTensor, read_header, read_index
from fire_llm.checkpoint.refusals import INDEX, WEIGHTS, refuse_config, refuse_files, refuse_tensors
from fire_llm.core.errors import UserError, first_line
from fire_llm.core.hub import no_folder, settle_hub

COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "preprocessor_config.json",
    "processor_config.json", "*image_processor*.json", "video_preprocessor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files that belong to a model beside its weights. What is not on this list is not copied."""


@dataclass(frozen=True)
class Source:
    """What is known of a checkpoint before any of its weights is read.

    Args:
        name: As the user gave it: a folder or a Hub id.
        folder: Where its files are; the Hub's cache keeps links there, which are read and never written to.
        config: Its transformers config.
        shards: File names of the weights, in order.
        index: File name of the index, None for a single file.
        tensors: Every stored tensor by its key, in the order of shards and offsets.
        settings: config.json as it is.
        revision: The Hub's commit, None for a folder.
    """

    name: str
    folder: Path
    config: Any
    shards: tuple[str, ...]
    index: str | None
    tensors: dict[str, StoredTensor]
    settings: dict[str, Any]
    revision: str | None = None

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None, *, native: bool = False) -> Source:
        """Find a checkpoint, refuse what cannot be rewritten, and read its headers.

        Args:
            name: A folder or a Hub id; what is needed of the latter is downloaded to the Hub's cache.
            revision: Branch, tag or commit on the Hub.
            native: Take transformers' own class where the checkpoint brings code; that code is never run.

        Raises:
            UserError: It is missing, damaged, quantised, an adapter, remote code, pickled, or no causal LM.
        """
        folder = _folder(str(name), revision)
        refuse_files(str(name), (p.name for p in folder.iterdir()))
        settings = _settings(folder)
        refuse_config(folder, settings, native=native)
        config = _config(folder)
        usual = next((n for n in (WEIGHTS, INDEX) if (folder / n).is_file()), WEIGHTS)
        first = settings.get("transformers_weights") or usual
        index = first if str(first).endswith(".index.json") else None
        tensors = _indexed(folder, folder / index) if index else read_header(folder / first)
        if not tensors:
            raise UserError(f"'{folder / first}' holds no tensors: it is no checkpoint")
        refuse_tensors(folder, tensors)
        shards = tuple(sorted({t.file.name for t in tensors.values()}))
        commit = folder.name if not os.path.isdir(name) else None
        return cls(str(name), folder, config, shards, index, tensors, settings, commit)

    @property
    def companions(self) -> list[str]:
        """Return the files beside the weights that go with the model, relative to the folder."""
        return [n for n in self._files() if any(fnmatch(n, pattern) for pattern in COMPANIONS)]

    @property
    def left_behind(self) -> list[str]:
        """Return the files that are neither weights nor companions: other formats, training states, old cards."""
        known = {*self.companions, *self.shards, self.index}
        return [n for n in self._files() if n not in known]

    @property
    def shard_bytes(self) -> int:
        """Count the bytes of the weights' files."""
        return sum((self.folder / name).stat().st_size for name in self.shards)

    @property
    def n_bytes(self) -> int:
        """Count the bytes of all that a copy holds."""
        names = [*self.companions, *([self.index] if self.index else [])]
        return self.shard_bytes + sum((self.folder / name).stat().st_size for name in names)

    def _files(self) -> list[str]:
        paths = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
        return [n for p in paths if not (n := p.relative_to(self.folder).as_posix()).startswith((".git/", ".cache/"))]


def _folder(name: str, revision: str | None) -> Path:
    """Return the folder of a checkpoint, downloaded where it is a Hub id."""
    path = Path(name)
    if os.path.isdir(path):  # unlike Path.is_dir, not upset by a name that is too long
        if revision is not None:
            raise UserError(f"--revision {revision}: '{name}' is a folder; revisions are the Hub's")
        return path
    if os.path.isfile(path):
        raise UserError(f"'{name}' is a file: name the folder that holds config.json and the weights")
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")):
        raise UserError(f"{no_folder(name)}, and a Hub id has the form owner/name: check the spelling")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.safetensors", "*.safetensors.index.json", "README.md", *COMPANIONS]
    settle_hub()
    ignored = ["consolidated*.safetensors", "*/*.safetensors"]
    try:
        if not constants.HF_HUB_OFFLINE:  # look before gigabytes are fetched
            refuse_files(name, [s.rfilename for s in HfApi().model_info(name, revision=revision).siblings or []])
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=ignored))
    except GatedRepoError as error:
        raise UserError(f"'{name}' is gated: accept its terms on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{no_folder(name)} and no Hub model of that name: check the spelling; for a private one, `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{no_folder(name)}, and the Hub's cache, which is all there is without a network, holds no model of that "
            "name: check the spelling, or download it first: hf download"
        ) from error
    except Exception as error:  # the Hub's clients raise dozens of kinds
        raise UserError(
            f"{no_folder(name)}, and the Hub could not be asked for a model of that name: {first_line(error)}"
        ) from error


def _settings(folder: Path) -> dict[str, Any]:
    """Return config.json as plain data."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON ({error}): download or copy it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' is not a JSON object: download or copy it again")
    return settings


def _config(folder: Path) -> Any:
    """Return the transformers config of a folder that has been looked through."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the classes raise whatever a config leads them to; their checks name it in the cause
        first = first_line(error.__cause__ or error)
        raise UserError(f"'{folder / 'config.json'}' is no config that transformers can read: {first}") from error


def _indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    """Return the tensors of all shards, the index and the headers held against each other."""
    files = read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(files.values())):
        if not (folder / shard).is_file():
            raise UserError(f"'{index}' names '{shard}', which is not there: download or copy the checkpoint again")
        tensors |= {k: t for k, t in read_header(folder / shard).items() if files.get(k) == shard}
    missing = next((name for name in files if name not in tensors), None)
    if missing is not None:
        raise UserError(
            f"'{index}' says that '{missing}' is in '{files[missing]}', whose header does not have it: "
            "the index and the shards are of different checkpoints. Download or copy them again"
        )
    return tensors
