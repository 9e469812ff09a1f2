"""Checkpoints on disk: written whole or not at all, and reset from one folder into another."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fire_llm.errors import UserError
from fire_llm.resets import ResetReport, ResetsLike, apply_reset, parse_resets

STAGING_SUFFIX = ".partial"
"""Ending of the name under which a folder is written before it is renamed to its own."""

CONTINUAL_STATE = "continual_state.json"
"""File in a checkpoint that holds what `TrainerState` has no room for."""


def sync(folder: Path) -> None:
    """Flush every file below a folder, and the folders themselves, to the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `destination` in one rename when the block ends without an error.

    A process killed at any instant leaves either nothing under that name or the whole folder.

    Raises:
        UserError: Where the destination exists, or the disk is full or read-only.
    """
    if destination.exists():
        raise UserError(f"'{destination}' exists already: name a new folder, or delete that one")
    partial = destination.with_name(destination.name + STAGING_SUFFIX)
    with writing(destination.parent):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            sync(partial)
            os.rename(partial, destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk, missing rights and a file in a folder's place into one clear message.

    Raises:
        UserError: Naming the folder.
    """
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full. Free some space, or choose another folder",
            errno.EDQUOT: "the disk quota is used up. Free some space, or choose another folder",
            errno.EROFS: "the file system is read-only. Choose another folder",
            errno.EACCES: "permission denied. Choose a folder you may write to",
            errno.EPERM: "permission denied. Choose a folder you may write to",
            errno.ENOTDIR: "a part of the path is a file. Choose another folder",
            errno.EEXIST: "a file has that name. Choose another folder",
        }
        if error.errno not in reasons:
            raise
        raise UserError(f"cannot write below '{folder}': {reasons[error.errno]}") from error
    except Exception as error:
        # safetensors and torch report a full disk in words of their own.
        if "No space left on device" in str(error) or ("writ" in str(error) and free_bytes(folder) < 2**20):
            raise UserError(f"cannot write below '{folder}': the disk is full. Free some space") from error
        raise


def free_bytes(folder: Path) -> int:
    """Return the bytes free for a folder that need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def checkpoints(folder: Path) -> list[tuple[Path, int]]:
    """Return the whole checkpoints in a phase's folder with their steps, oldest first."""
    found = [
        (p.parent, int(p.parent.name.removeprefix("checkpoint-")))
        for p in folder.glob(f"*/{CONTINUAL_STATE}")
        if p.parent.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=lambda pair: pair[1])


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one rename, so that a reader never sees half of it."""
    partial = path.with_name(path.name + STAGING_SUFFIX)
    with writing(path.parent):
        with partial.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def reset_checkpoint(
    src: str | Path,
    dst: str | Path,
    method: ResetsLike = "fire",
    *,
    init: str | Path | None = None,
    seed: int | None = None,
    progress: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> ResetReport:
    """Apply a reset to a checkpoint and save the result, tokenizer included, as a new one.

    Args:
        src: A checkpoint folder or a Hub id; never written to.
        dst: The folder to make; must not exist.
        method: A reset's name or spec, or a list of specs.
        init: Checkpoint with the run's step-0 weights, for `full_reset` and `shrink_perturb`.
        seed: Draw the step-0 weights anew from the config and this seed instead.
        progress: Show a progress bar.
        dry_run: Only say what would be done; nothing is written.
        options: Options of `method` where it is a name.

    Raises:
        UserError: For bad options, an unreadable or unknown checkpoint, an existing `dst` or one inside `src`.
    """
    from fire_llm.models import fresh_model, load_model

    named = cast("ResetsLike", {"method": method, **options})
    specs = parse_resets(named if isinstance(method, str) else method)
    target = Path(dst)
    if target.exists():
        raise UserError(f"'{dst}' exists already: name a new folder, or delete that one")
    if target.resolve().is_relative_to(Path(src).resolve()):
        raise UserError(f"'{dst}' lies inside '{src}', which is never written to: name a folder elsewhere")
    wanted = any(s.needs_initial for s in specs)
    if wanted and (init is None) == (seed is None):
        raise UserError("the reset needs step-0 weights: give one of --init CHECKPOINT and --seed N")
    model = load_model(src)
    initial = None
    if wanted:
        initial = load_model(init) if init is not None else fresh_model(model.config, int(seed or 0))
    report = apply_reset(model, specs, initial=initial, progress=progress)
    if not dry_run:
        with staged(target) as folder:
            model.save_pretrained(folder)
            _copy_companions(src, folder)
            write_json(folder / "fire.json", report.to_dict())
    return report


def _copy_companions(src: str | Path, folder: Path) -> None:
    """Save the tokenizer and generation settings beside the weights, where the source has them."""
    from transformers import AutoTokenizer

    if Path(src).is_dir():
        for name in ("generation_config.json", "chat_template.jinja"):
            if (Path(src) / name).exists():
                shutil.copyfile(Path(src) / name, folder / name)
        if not any((Path(src) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
            return
    AutoTokenizer.from_pretrained(str(src)).save_pretrained(folder)
