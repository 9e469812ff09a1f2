"""The cache folder, and the hashes of files that are remembered in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fire_llm.core.errors import UserError
from fire_llm.core.hashing import digest, hash_file
from fire_llm.core.progress import progress_bar
from fire_llm.core.ranks import first_rank

CACHE_VARIABLE = "FIRE_LLM_CACHE"
_DIGITS = 64
_untaken: dict[str, str] = {}  # what the cache folder did not take, for as long as this process lives


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the folder of what is computed once: `cache`, else $FIRE_LLM_CACHE, else ~/.cache/fire_llm."""
    return Path(os.path.expanduser(cache or os.environ.get(CACHE_VARIABLE) or "~/.cache/fire_llm"))


@contextmanager
def reporting(name: str, path: Path) -> Iterator[None]:
    """Turn what the file system and the decompressors raise into a message that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"corpus '{name}': cannot read {path}: {error.strerror or error}. "
            "Check its permissions; fetch it again if it is damaged or truncated."
        ) from error


def content_hashes(name: str, paths: Sequence[Path]) -> list[str]:
    """Return the hash of what each file holds (`hash_file`), wherever it lies and however old it is.

    A file is read once, at hundreds of MB/s: its hash is remembered in the cache folder, under its path, its size and
    the time it was last modified. Where that folder cannot be written to, each process reads it once.

    Args:
        name: the corpus's, for the progress bar.
        paths: files that are there.

    Raises:
        UserError: for a file that cannot be read.
    """
    folder = cache_folder() / "hashes"
    found = {path: known for path in paths if (known := _remembered(folder, _key(path)))}
    unread = [path for path in paths if path not in found]
    size = sum(path.stat().st_size for path in unread)
    with progress_bar(f"hashing {name}", size, "B", shown=first_rank()) as bar:
        for path in unread:
            key = _key(path)  # before it is read: a file that changes meanwhile is read again
            with reporting(name, path):
                found[path] = hash_file(path, advance=bar.update)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / key).write_text(found[path])
            except OSError:
                _untaken[key] = found[path]
    return [found[path] for path in paths]


def _key(path: Path) -> str:
    stat = path.stat()
    return digest(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}", 16)


def _remembered(folder: Path, key: str) -> str | None:
    """Return a hash that was written down whole, or that could not be."""
    with suppress(OSError, UnicodeDecodeError):
        text = (folder / key).read_text()
        if len(text) == _DIGITS:
            return text
    return _untaken.get(key)
