"""What a checkpoint's files are: listed with sizes and hashes when it is written, verified before it is used."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fire_llm.core.atomic import step_of, write_json
from fire_llm.core.errors import UserError
from fire_llm.core.hashing import CHUNK, digest, hash_file

MANIFEST = "manifest.json"
"""File in a checkpoint that lists the others; written last."""

WEIGHTS = "model*.safetensors"
"""Names of the files that hold a checkpoint's weights."""


def write_manifest(folder: Path) -> int:
    """List every file below a folder with its size and hash; return their bytes together."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    sizes = {name: (folder / name).stat().st_size for name in names}
    files = {name: {"bytes": size, "blake2b": hash_file(folder / name)} for name, size in sizes.items()}
    write_json(folder / MANIFEST, {"piece_bytes": CHUNK, "files": files})
    return sum(sizes.values())


def damage(folder: Path, *, contents: bool = True, from_disk: bool = False) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None for nothing. Files not listed do not count.

    Args:
        folder: A checkpoint.
        contents: Read and hash every file; otherwise only sizes are compared, which takes no time.
        from_disk: Read what the disk holds, not what memory still has of it, as far as the system lets us choose.
    """
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing"
    manifest = _read(folder / MANIFEST)
    if manifest is None or not {"files", "piece_bytes"} <= set(manifest):
        return f"{MANIFEST} is damaged"
    for name, listed in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != listed["bytes"]:
                return f"{name} has {size} bytes instead of {listed['bytes']}"
            if contents and hash_file(path, manifest["piece_bytes"], from_disk=from_disk) != listed["blake2b"]:
                return f"{name} is not what was written: its hash differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def weights_hash(checkpoint: Path, *, read: bool = False) -> str | None:
    """Return what a checkpoint's weights are, by the hashes of their files; None where its manifest has none.

    Args:
        checkpoint: With a manifest.
        read: Hash the files; otherwise what the manifest lists is taken, which takes no time.
    """
    manifest = _read(checkpoint / MANIFEST) or {}
    try:
        files = {name: listed["blake2b"] for name, listed in manifest["files"].items() if fnmatch(name, WEIGHTS)}
        found = {n: hash_file(checkpoint / n, manifest["piece_bytes"]) for n in files} if read else files
    except (AttributeError, OSError, KeyError, TypeError):
        return None
    return digest(json.dumps(found, sort_keys=True), 16) if found else None


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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
