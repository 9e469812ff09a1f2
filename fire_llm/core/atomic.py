"""Write folders and files so that they appear whole or not at all, and list the checkpoints of a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fire_llm.core.errors import REASONS, UserError, system_reason

STAGING_SUFFIX = ".partial"
"""Ending of the name under which a folder is written before it is renamed to its own."""

BYTES_A_PARAMETER = 12
"""Size of a checkpoint: weights and AdamW's two moments, in fp32."""

CONTINUAL_STATE = "continual_state.json"
"""File in a checkpoint that holds what `TrainerState` has no room for."""

AVERAGED = "ema"
"""Folder in a checkpoint with the moving average of its weights, as a model of its own; also that model's label."""

AVERAGED_BYTES = 4
"""Bytes of an averaged parameter: fp32."""


def sync(folder: Path, *, below: bool = True) -> None:
    """Flush a folder with all files and folders below it to the disk; without `below`, its list of names alone."""
    for path in [*(sorted(folder.rglob("*")) if below else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def partial_of(destination: Path) -> Path:
    """Return the name under which a folder is written before it is renamed to its own."""
    return destination.with_name(destination.name + STAGING_SUFFIX)


@contextmanager
def renamed(partial: Path, destination: Path) -> Iterator[Path]:
    """Yield an empty folder, which is flushed to the disk and renamed when the block ends.

    What has the first name is deleted before, and the folder is deleted where the block raises.
    """
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        sync(partial)
        os.rename(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk, missing permissions and a file in a folder's place into one clear message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = system_reason(error)
        # torch reports a failed write in its own words.
        if reason is None and not isinstance(error, OSError) and "writ" in str(error) and free_bytes(folder) < 2**20:
            reason = REASONS[errno.ENOSPC]
        if reason is None or reason == REASONS[errno.ENOMEM]:
            raise
        raise UserError(f"cannot write below '{folder}': {reason}") from error


def remove(path: Path) -> None:
    """Delete a folder with all that it holds, or a file; of a link, the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def remove_empty(folders: Iterable[Path]) -> None:
    """Delete those of some folders that are empty, in the given order: the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def free_bytes(folder: Path) -> int:
    """Return the bytes free for a folder that need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def checkpoints(folder: Path) -> list[tuple[Path, int]]:
    """Return the whole checkpoints in a phase's folder with their steps, oldest first."""
    there = [(p.parent, step) for p in folder.glob(f"*/{CONTINUAL_STATE}") if (step := step_of(p.parent)) is not None]
    return sorted(there, key=lambda pair: pair[1])


def step_of(checkpoint: Path) -> int | None:
    """Return the step in the name of a checkpoint; None for another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def clear_partial_checkpoints(folder: Path) -> None:
    """Delete the half-written checkpoints of processes that died; links are not followed."""
    for partial in folder.glob(f"checkpoint-*{STAGING_SUFFIX}"):
        if step_of(partial.with_suffix("")) is not None:
            remove(partial)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, and no checkpoint."""
    return (folder / "recipe.json").is_file()


def check_file(option: str, name: str | None) -> None:
    """Refuse, before any work, an option's file that cannot be written; that is tried with another name.

    Raises:
        UserError: It is a folder or a device, lies below a file, or may not be written.
    """
    if name is None:
        return
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{option}: '{path}' is a folder: name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{option}: '{path}' is no file but a device or a pipe: name a file")
    blocked = next((p for p in path.parents if os.path.lexists(p) and not p.is_dir()), None)
    if blocked is not None:
        raise UserError(f"{option}: '{path}' cannot be written: '{blocked}' is a file. Choose another folder")
    absent = [p for p in path.parents if not p.exists()]
    tried = path.with_name(f"{path.name}.{os.getpid()}{STAGING_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tried.touch(exist_ok=False)
    except OSError as error:
        raise UserError(f"{option}: '{path}' cannot be written: {system_reason(error) or error.strerror}") from error
    finally:
        with suppress(OSError):
            tried.unlink()
        remove_empty(absent)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Args:
        path: The file.
        advice: The next step, for the message.

    Raises:
        UserError: It does not exist, cannot be read, is no JSON or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({error}): {advice}") from error
    if not isinstance(data, dict):
        raise UserError(f"'{path}' is damaged (it holds no mapping): {advice}")
    return data


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one rename, so that a reader never sees half of it; make its folder where there is none."""
    partial = path.with_name(path.name + STAGING_SUFFIX)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # never write through a link of that name
        # The error handler escapes surrogates as JSON does.
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(data, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
