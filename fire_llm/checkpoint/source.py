"""A checkpoint as it lies on the disk: its config, its shards and their headers, its companions; no weight is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fire_llm.architectures.classes import CAUSAL, loader
from fire_llm.architectures.configs import CONFIG, read_config, read_settings
from fire_llm.checkpoint.headers import StoredTensor, read_header, read_index
from fire_llm.checkpoint.refusals import INDEX, WEIGHTS, refuse_config, refuse_files, refuse_tensors
from fire_llm.core.errors import UserError
from fire_llm.core.files import SourceFile, leads_out
from fire_llm.core.hub import asking_hub, no_folder

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
        copied: Every file that goes into a copy, by its name relative to the folder, the weights' last.
        left_behind: Files that do not: other formats, training states, old cards; and why, where it is not plain.
        unheld: Keys that the index lists and no shard holds; loading ignores them where the class has none such.
        revision: The Hub's commit, None for a folder.
    """

    name: str
    folder: Path
    config: Any
    shards: tuple[str, ...]
    index: str | None
    tensors: dict[str, StoredTensor]
    settings: dict[str, Any]
    copied: Mapping[str, SourceFile]
    left_behind: list[str]
    unheld: tuple[str, ...] = ()
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
        refuse_files(str(name), (p.name for p in folder.iterdir()), _loader(folder))
        companions, left_behind = _companions(folder)
        settings = read_settings(folder)
        refuse_config(folder, settings, native=native)
        config = read_config(str(folder))
        usual = next((n for n in (WEIGHTS, INDEX) if (folder / n).is_file()), WEIGHTS)
        first = str(settings.get("transformers_weights") or usual)
        index = first if first.endswith(".index.json") else None
        if index is not None:
            companions[index] = SourceFile.of(folder / index)
        tensors, unheld = _indexed(folder, folder / index) if index else (read_header(folder / first), ())
        if not tensors:
            raise UserError(f"'{folder / first}' holds no tensors: it is no checkpoint")
        refuse_tensors(folder, tensors)
        weights = {t.file.name: t.file for t in tensors.values()}
        shards = tuple(sorted(weights))
        copied = {**companions, **{name: weights[name] for name in shards}}
        left_behind = [name for name in left_behind if name not in copied]
        commit = folder.name if not os.path.isdir(name) else None
        return cls(str(name), folder, config, shards, index, tensors, settings, copied, left_behind, unheld, commit)

    @property
    def shard_bytes(self) -> int:
        """Count the bytes of the weights' files."""
        return sum(self.copied[name].size for name in self.shards)

    @property
    def n_bytes(self) -> int:
        """Count the bytes of all that a copy holds."""
        return sum(file.size for file in self.copied.values())


def _companions(folder: Path) -> tuple[dict[str, SourceFile], list[str]]:
    """Return the files beside the weights that go with the model, by relative name, and the names of all others."""
    companions, others = {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith((".git/", ".cache/")) or path.is_dir():
            continue
        if not any(fnmatch(name, pattern) for pattern in COMPANIONS):
            others += [name] if path.is_file() else []
        elif name != CONFIG and leads_out(path, folder):
            others.append(f"{name} (a link that leads out of the folder)")
        elif path.exists():
            companions[name] = SourceFile.of(path)
    return companions, others


def _loader(folder: Path) -> str:
    """Return the name of what loads a checkpoint, whatever else is wrong with it."""
    with suppress(UserError):
        return loader(read_settings(folder))
    return CAUSAL


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

    patterns = ["*.safetensors", "*.safetensors.index.json", "README.md", *COMPANIONS]
    ignored = ["consolidated*.safetensors", "*/*.safetensors"]
    with asking_hub(name):
        if not constants.HF_HUB_OFFLINE:  # look before gigabytes are fetched
            refuse_files(name, [s.rfilename for s in HfApi().model_info(name, revision=revision).siblings or []])
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))


def _indexed(folder: Path, index: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return the tensors of all files that an index names, as loading finds them, and the keys that none has."""
    files = read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(files.values())):
        if not os.path.lexists(folder / shard):
            raise UserError(f"'{index}' names '{shard}', which is not there: download or copy the checkpoint again")
        for name, tensor in read_header(folder / shard).items():
            if name in tensors:
                raise UserError(
                    f"'{name}' is in '{tensors[name].file.name}' and in '{shard}', and readers differ in which of the "
                    f"two they load: load the model, and save it again with save_pretrained"
                )
            tensors[name] = tensor
    return tensors, tuple(name for name in files if name not in tensors)
