"""What a checkpoint's files are: listed with sizes and hashes when it is written, verified before it is used."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fire_llm.core.atomic import AVERAGED, CONTINUAL_STATE, partial_of, remove, step_of, write_json
from fire_llm.core.errors import UserError
from fire_llm.core.hashing import CHUNK, digest, hash_file

MANIFEST = "manifest.json"
"""File in a checkpoint that lists the others; written last."""

SHARDED, OPTIMIZER_SHARDS = "weights", "optimizer"
"""Folders in a checkpoint with the weights and the optimizer's moments of a model in shards, a file a rank."""

WEIGHTS = ("model*.safetensors", f"{SHARDED}/*.safetensors")
"""Names of the files that hold a checkpoint's weights."""

TRAINER_STATE = "trainer_state.json"
"""File in a checkpoint that holds transformers' `TrainerState`: the step, the log."""

STATES = (TRAINER_STATE, CONTINUAL_STATE)
"""What every checkpoint holds, and what is read of one without loading it."""

REPLACED = "replaced"
"""Key of a checkpoint's `CONTINUAL_STATE`: steps of the older checkpoints that are deleted once it is there."""

_PIECES = range(2**16, 2**30 + 1)
"""Bytes of a piece that can have been meant."""


def in_shards(checkpoint: Path) -> bool:
    """Return whether the weights of a checkpoint lie in shards."""
    return any((checkpoint / SHARDED).glob("shard-*-of-*.safetensors"))


def write_manifest(folder: Path, known: Mapping[Path, str] | None = None) -> int:
    """List every file below a folder with its size and hash, and the hash of that list; return their bytes together.

    Args:
        folder: The folder.
        known: Hashes of files that are known already.
    """
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
    """Return what is wrong with a folder that has a manifest, naming the file; None for nothing.

    Files not listed do not count; a checkpoint lists its `STATES`.

    Args:
        folder: A checkpoint, or another folder that `write_manifest` was called with.
        contents: Read and hash every file. Otherwise that is done for its states, which are small and which results
            are read from, and for files that were written to after they were listed; of the others, which takes no
            time, sizes are compared.
        from_disk: Read what the disk holds, not what memory still has of it, as far as the system lets us choose.
        only: Names of the files to look at; all by default.
    """
    path = folder / MANIFEST
    if not path.exists():
        return f"{MANIFEST} is missing"
    manifest = _read(path)
    files, piece = (manifest or {}).get("files"), (manifest or {}).get("piece_bytes")
    lacking = step_of(folder) is not None and isinstance(files, dict) and not set(STATES) <= set(files)
    # Manifests of older versions have no hash of their own. It is taken out before the rest is hashed.
    changed = manifest is not None and manifest.pop("digest", None) not in (None, _digest(manifest))
    if not isinstance(files, dict) or lacking or changed or type(piece) is not int or piece not in _PIECES:
        return f"{MANIFEST} is damaged"
    try:
        listed_at = path.stat().st_mtime_ns
        for name in files if only is None else only:
            path, size, hashed = folder / name, files[name]["bytes"], files[name]["blake2b"]
            found = path.stat()
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes instead of {size}"
            read = contents or name in STATES or found.st_mtime_ns > listed_at
            if read and hash_file(path, piece, from_disk=from_disk) != hashed:
                return f"{name} is not what was written: its hash differs"
    except FileNotFoundError:
        return f"{path.relative_to(folder)} is missing"
    except OSError as error:
        return f"{path.relative_to(folder)} cannot be read: {error.strerror}"
    except (KeyError, TypeError, ValueError):  # of an entry, or of a name that no file can have
        return f"{MANIFEST} is damaged"
    return None


def weights_hash(checkpoint: Path, *, read: bool = False) -> str | None:
    """Return what a checkpoint's weights are, by the hashes of their files; None where its manifest has none.

    Args:
        checkpoint: With a manifest.
        read: Hash the files; otherwise what the manifest lists is taken, which takes no time.
    """
    manifest = _read(checkpoint / MANIFEST) or {}
    try:
        listed = {n: one["blake2b"] for n, one in manifest["files"].items() if any(fnmatch(n, p) for p in WEIGHTS)}
        found = {n: hash_file(checkpoint / n, manifest["piece_bytes"]) for n in listed} if read else listed
    except (AttributeError, OSError, KeyError, TypeError):
        return None
    return digest(json.dumps(found, sort_keys=True), 16) if found else None


def read_state(checkpoint: Path, name: str) -> dict[str, Any]:
    """Return the content of one of a checkpoint's `STATES`, if it is what was written.

    Raises:
        UserError: It is not; what is wrong is named.
    """
    wrong = damage(checkpoint, only=[name])
    state = None if wrong else _read(checkpoint / name)
    if state is None:
        raise UserError(
            f"'{checkpoint}' is damaged: {wrong or f'{name} cannot be read'}. Put back a copy of it, or run the recipe "
            "again, which goes on from an older checkpoint that is whole"
        )
    return state


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return transformers' state at a checkpoint; of averaged weights, at the checkpoint that they lie in.

    Raises:
        UserError: As `read_state` raises it.
    """
    return read_state(checkpoint.parent if checkpoint.name == AVERAGED else checkpoint, TRAINER_STATE)


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Return a stage's newest checkpoint that is what was written, and what is to be said of newer ones.

    Nothing is deleted, and nothing depends on the time of a file.

    Raises:
        UserError: There are checkpoints and none of them is whole; each is named with what is wrong.
    """
    steps = {path: step for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None}
    said: list[str] = []
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        wrong = damage(path)
        if wrong is None:
            return path, said
        said.append(f"{path.name} is skipped: {wrong}")
    if said:
        raise UserError(
            f"'{folder}' has no checkpoint that is whole:\n  " + "\n  ".join(said) + "\n"
            "Put back a copy of one, or delete that folder to train the stage again"
        )
    return None, said


def prune(checkpoint: Path, replaced: Iterable[int]) -> None:
    """Delete the older checkpoints that one replaces, once it has been read back from the disk.

    Args:
        checkpoint: The newer one.
        replaced: Steps of the older ones; what is not there counts as deleted.

    Raises:
        UserError: It is not what was written. Nothing is deleted.
    """
    older = [path for step in replaced if (path := checkpoint.with_name(f"checkpoint-{step}")).is_dir()]
    if older and (wrong := damage(checkpoint, from_disk=True)):
        raise UserError(f"'{checkpoint}' cannot be read back as it was written: {wrong}. Nothing older was deleted")
    for path in older:
        remove(path.rename(partial_of(path)))


def _digest(listed: dict[str, Any]) -> str:
    return digest(json.dumps(listed, sort_keys=True), 16)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
