"""List a checkpoint's files with sizes and hashes when it is written, and verify them before it is used."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fire_llm.core.atomic import AVERAGED, CONTINUAL_STATE, partial_of, read_json, remove, step_of, write_json
from fire_llm.core.errors import UserError
from fire_llm.core.hashing import CHUNK, digest, hash_file

MANIFEST = "manifest.json"
"""File in a checkpoint that lists the others; written last."""

SHARDED, OPTIMIZER_SHARDS = "weights", "optimizer"
"""Folders in a checkpoint of a model in shards: its weights and the optimizer's moments, a file a rank."""

WEIGHTS = ("model*.safetensors", f"{SHARDED}/*.safetensors")
"""Names of the files that hold a checkpoint's weights."""

TRAINER_STATE = "trainer_state.json"
"""File in a checkpoint that holds transformers' `TrainerState`: the step, the log."""

STATES = (TRAINER_STATE, CONTINUAL_STATE)
"""Files that every checkpoint holds, and that are read without loading it."""

REPLACED = "replaced"
"""Key of a checkpoint's `CONTINUAL_STATE`: steps of the older checkpoints that are deleted once it is there."""

_PIECES = range(2**16, 2**30 + 1)
"""Sizes of a hashed piece, in bytes, that a sound manifest can have."""


def in_shards(checkpoint: Path) -> bool:
    """Return whether the weights of a checkpoint are stored in shards."""
    return any((checkpoint / SHARDED).glob("shard-*-of-*.safetensors"))


def write_manifest(folder: Path, known: Mapping[Path, str] | None = None) -> int:
    """List every file below a folder with its size and hash, and the hash of that list; return their total bytes."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    sizes = {name: (folder / name).stat().st_size for name in names}
    hashes = {name: (known or {}).get(folder / name) or hash_file(folder / name) for name in names}
    files = {name: {"bytes": size, "blake2b": hashes[name]} for name, size in sizes.items()}
    listed = {"piece_bytes": CHUNK, "files": files}
    write_json(folder / MANIFEST, {**listed, "digest": _digest(listed)})
    return sum(sizes.values())


def damage(
    folder: Path, *, contents: bool = True, from_disk: bool = False, only: Collection[str] | None = None
) -> str | None:
    """Return which file of a folder with a manifest is damaged, and how; None for no damage.

    Files that are not listed do not count; a checkpoint must list its `STATES`.

    Args:
        folder: A checkpoint, or another folder that `write_manifest` was called with.
        contents: Hash every file. Otherwise only the states, from which results are read, and files that were written
            to after the manifest are hashed; of all others only the size is compared, which takes no time.
        from_disk: Read from the disk, not from the system's cache, as far as the system allows.
        only: Names of the files to check; all by default.
    """
    path = folder / MANIFEST
    if not path.exists():
        return f"{MANIFEST} is missing"
    manifest = _read(path)
    files, piece = (manifest or {}).get("files"), (manifest or {}).get("piece_bytes")
    lacking = step_of(folder) is not None and isinstance(files, dict) and not set(STATES) <= set(files)
    # Manifests of older versions have no `digest`, which does not cover itself.
    changed = manifest is not None and manifest.pop("digest", None) not in (None, _digest(manifest))
    if not isinstance(files, dict) or lacking or changed or type(piece) is not int or piece not in _PIECES:
        return f"{MANIFEST} is damaged"
    try:
        listed_at = path.stat().st_mtime_ns
        for name in files if only is None else only:
            path, size, hashed = folder / name, files[name]["bytes"], files[name]["blake2b"]
            stats = path.stat()
            if stats.st_size != size:
                return f"{name} has {stats.st_size} bytes instead of {size}"
            read = contents or name in STATES or stats.st_mtime_ns > listed_at
            if read and hash_file(path, piece, from_disk=from_disk) != hashed:
                return f"{name} is not what was written: its hash differs"
    except FileNotFoundError:
        return f"{path.relative_to(folder)} is missing"
    except OSError as error:
        return f"{path.relative_to(folder)} cannot be read: {error.strerror}"
    except (KeyError, TypeError, ValueError):  # an entry without a value, or a name that no file can have
        return f"{MANIFEST} is damaged"
    return None


def weights_hash(checkpoint: Path, *, read: bool = False) -> str | None:
    """Return a hash that identifies a checkpoint's weights, of the hashes of their files; None without a manifest.

    Args:
        checkpoint: The checkpoint's folder.
        read: Hash the files; otherwise their hashes are taken from the manifest, which takes no time.
    """
    manifest = _read(checkpoint / MANIFEST) or {}
    try:
        hashes = {n: file["blake2b"] for n, file in manifest["files"].items() if any(fnmatch(n, p) for p in WEIGHTS)}
        if read:
            hashes = {name: hash_file(checkpoint / name, manifest["piece_bytes"]) for name in hashes}
    except (AttributeError, OSError, KeyError, TypeError):
        return None
    return digest(json.dumps(hashes, sort_keys=True), 16) if hashes else None


def read_state(checkpoint: Path, name: str) -> dict[str, Any]:
    """Return the content of one of a checkpoint's `STATES`, once it is verified."""
    wrong = damage(checkpoint, only=[name])
    state = None if wrong else _read(checkpoint / name)
    if state is None:
        raise UserError(
            f"'{checkpoint}' is damaged: {wrong or f'{name} cannot be read'}. Put back a copy of it, or run the recipe "
            "again, which goes on from an older checkpoint that is whole"
        )
    return state


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return transformers' state at a checkpoint; of averaged weights, that of the checkpoint they belong to."""
    return read_state(checkpoint.parent if checkpoint.name == AVERAGED else checkpoint, TRAINER_STATE)


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Return a stage's newest whole checkpoint, None for none, and a message about each newer one, which is damaged.

    Nothing is deleted, and nothing depends on the time of a file.

    Raises:
        UserError: There are checkpoints and none of them is whole; each is named with its damage.
    """
    steps = {path: step for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None}
    skipped: list[str] = []
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        wrong = damage(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path.name} is skipped: {wrong}")
    if skipped:
        raise UserError(
            f"'{folder}' has no checkpoint that is whole:\n  " + "\n  ".join(skipped) + "\n"
            "Put back a copy of one, or delete that folder to train the stage again"
        )
    return None, skipped


def prune(checkpoint: Path, replaced: Iterable[int]) -> None:
    """Delete the older checkpoints that a newer one replaces, once that has been read back from the disk.

    Args:
        checkpoint: The newer one.
        replaced: Steps of the older ones; those that do not exist count as deleted.

    Raises:
        UserError: The newer one is damaged. Nothing is deleted.
    """
    older = [path for step in replaced if (path := checkpoint.with_name(f"checkpoint-{step}")).is_dir()]
    if older and (wrong := damage(checkpoint, from_disk=True)):
        raise UserError(f"'{checkpoint}' cannot be read back as it was written: {wrong}. Nothing older was deleted")
    for path in older:
        remove(path.rename(partial_of(path)))


def _digest(listed: dict[str, Any]) -> str:
    return digest(json.dumps(listed, sort_keys=True), 16)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file, None where that cannot be read."""
    try:
        return read_json(path, "")
    except UserError:
        return None
