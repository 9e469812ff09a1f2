"""Report a user's mistake, in one way: a message that names the value, what is allowed and the next step."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_FSDP2 = "fsdp_version: 2 (as --accelerate-config fsdp2 has it)"
ENGINES = {
    "FSDP1": f"FSDP1 flattens parameters, so that matrices cannot be distinguished in them: set {_FSDP2}",
    "DEEPSPEED": (
        "DeepSpeed keeps master copies of the weights, from which its next step would undo a reset: use FSDP with "
        f"{_FSDP2}, or reset the checkpoint before training with `fire-llm apply`"
    ),
    "MEGATRON_LM": f"Megatron-LM stores the model in layouts of its own: use FSDP with {_FSDP2}",
}
"""Engines that cannot be trained under, and what to use instead."""

CHECKPOINTED_ONCE = (
    "is refused: it computes layers again with dropout drawn anew, so that gradients belong to another loss. Remove it "
    "and set gradient_checkpointing: true in the recipe (in a Trainer's arguments: activation_checkpointing)"
)
"""Of accelerate's own checkpointing of activations, which does not restore the random generators."""


class UserError(ValueError):
    """Report input that the user must change; the command line prints the message alone and exits with 2."""


_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
SECRET = re.compile(r"(://)[^/\s@]+(@)|\b(hf_)[A-Za-z0-9]{30,}")
"""Names and passwords in addresses, tokens of the Hub; its groups are the parts that stay."""


def redact(text: str) -> str:
    """Remove secrets from a message: tokens in the environment, of the Hub, names and passwords in addresses."""
    for secret in filter(lambda value: len(value) >= 8, (os.environ.get(name, "") for name in _SECRETS)):
        text = text.replace(secret, "***")
    return SECRET.sub(lambda match: f"{match[1] or match[3]}***{match[2] or ''}", text)


_FOLDER = "or choose another folder"
REASONS = {
    errno.ENOSPC: f"the disk is full. Free some space, {_FOLDER}",
    errno.EDQUOT: f"the disk quota is used up. Free some space, {_FOLDER}",
    errno.EFBIG: f"the file would be larger than its disk or `ulimit -f` allows. Raise the limit, {_FOLDER}",
    errno.EROFS: "the file system is read-only. Choose another folder",
    errno.EACCES: "permission denied. Choose a folder you may write to",
    errno.EPERM: "permission denied. Choose a folder you may write to",
    errno.ENOTDIR: "a part of the path is a file. Choose another folder",
    errno.EEXIST: "a file has that name. Choose another folder",
    errno.ENOTEMPTY: "a folder of that name appeared meanwhile. Choose another folder",
    errno.EISDIR: "a folder stands where a file is written. Choose another folder",
    errno.ELOOP: "a link stands where a file is written. Choose another folder",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter one",
    errno.EMFILE: "this process may open no more files. Raise its limit: ulimit -n 4096",
    errno.ENFILE: "the machine may open no more files. Close some programs",
    errno.ENOMEM: "there was not enough memory. Free some, raise the limit (`ulimit -v`, the container's), or take "
    "smaller batches, windows or documents",
    errno.EIO: f"the disk, or the network to it, failed. Look into the machine's log, {_FOLDER}",
    errno.ESTALE: f"the network file system has lost it. Mount it again, {_FOLDER}",
}
"""Errors of the operating system in words, and what to do."""


def system_reason(error: BaseException) -> str | None:
    """Return the system's error behind an exception, in words; also where a library reports it in its own words.

    Example: safetensors raises `I/O error: No space left on device (os error 28)`, which is no OSError.
    """
    if isinstance(error, MemoryError):
        return REASONS[errno.ENOMEM]
    if isinstance(error, OSError) and error.errno in REASONS:
        return REASONS[error.errno]
    return next((reason for number, reason in REASONS.items() if os.strerror(number) in str(error)), None)


_GONE = re.compile(r"Connection (?:closed|reset) by peer[^.\s]*(?: \[[^]\s]+\](?::\d+)?)?|remote process exited")
"""Messages of gloo and NCCL about a rank that has ended."""


def explained(error: BaseException) -> str:
    """Return an error in words, never an empty text: what failed, where that is known, and what to do."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package '{error.name}' is not installed: pip install {error.name.partition('.')[0]}"
    text, reason = str(error).strip(), system_reason(error)
    if isinstance(error, RuntimeError) and _GONE.search(text):
        text = f"another rank is gone, and what it or its launcher said tells why ({_GONE.findall(text)[0]})"
    if isinstance(error, OSError) and error.strerror:
        named = f"'{error.filename}'" if error.filename else ""
        text = ": ".join(filter(None, [named, "" if reason else error.strerror]))
    if text or reason:
        return ": ".join(filter(None, [text, reason]))
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" at {frame.tb_frame.f_code.co_filename}, line {frame.tb_lineno}" if frame is not None else ""
    return f"{type(error).__name__} without a message{where}. FIRE_LLM_DEBUG=1 shows how it came to that"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reading(said: str) -> Iterator[None]:
    """Turn all that transformers, tokenizers and safetensors raise over a user's files into one message.

    They raise exceptions of every kind; a panic in tokenizers' Rust is not even an `Exception`. Errors of memory are
    not the files' fault, and pass.

    Args:
        said: Begins the message: what was read, and that it cannot be.

    Raises:
        UserError: `said`, and the first line of what was raised.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if isinstance(error, UserError | MemoryError) or not (panic or isinstance(error, Exception)):
            raise
        if "OutOfMemory" in type(error).__name__ or "DefaultCPUAllocator" in str(error):
            raise
        # The checks of a config name the value in the cause; errors of fetching files say more themselves.
        cause = error if isinstance(error, OSError) else error.__cause__ or error
        kind = "" if isinstance(cause, OSError | ValueError | RuntimeError | TypeError) else f"{type(cause).__name__}, "
        raise UserError(f"{said}: {kind}{first_line(cause)}") from error


class _Faults(UserError):
    """The faults that several checks found."""

    faults: list[str]


def check_all(*checks: Callable[[], Any]) -> None:
    """Run checks that do not depend on one another, and raise the faults of all as one `UserError`."""
    faults: list[str] = []
    for check in checks:
        try:
            check()
        except _Faults as error:
            faults += error.faults
        except UserError as error:
            faults.append(str(error))
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        several = _Faults("\n  ".join([f"{len(faults)} faults:", *faults]))
        several.faults = faults
        raise several


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest allowed name, in any case, or an empty string where none is near."""
    lower = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(str(value).lower(), lower, n=1, cutoff=0.5)
    return f" Did you mean '{lower[near[0]]}'?" if near else ""
