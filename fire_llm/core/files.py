"""Read files of others safely: only regular files, without waiting, and with a check that they stay the same."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fire_llm.core.errors import UserError

LONGEST = 100_000_000
"""Most bytes of a file, or of a header, that is read as a whole; safetensors has this limit for headers."""

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """An open file; an error of reading becomes a message that names it."""

    path: Path
    descriptor: int

    def read(self, size: int) -> bytes:
        """Read at most `size` of the next bytes; none at the end."""
        with _reading(self.path):
            return os.read(self.descriptor, size)

    def read_into(self, data: memoryview, offset: int) -> None:
        """Fill `data` with the bytes from an offset on.

        Raises:
            UserError: The file is too short, or cannot be read.
        """
        while data:
            with _reading(self.path):
                n_read = os.preadv(self.descriptor, [data], offset)
            if not n_read:
                raise UserError(f"'{self.path}' ends before its header says: it was changed while it was read")
            data, offset = data[n_read:], offset + n_read


@dataclass(frozen=True)
class SourceFile:
    """A regular file, and its state when it was first opened.

    Args:
        path: Where it is.
        size: Bytes.
        state: Device, inode and time of the last change, which show when it is replaced or changed.
    """

    path: Path
    size: int
    state: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Take the state of a file.

        Raises:
            UserError: It does not exist, cannot be read, or is no regular file.
        """
        with _opened(path) as reader:
            return cls(path, *_state(reader))

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """Open the file, unless it has changed.

        Raises:
            UserError: It was changed or replaced since its state was taken, before the block or within it.
        """
        with _opened(self.path) as reader:
            self._compare(reader)
            yield reader
            self._compare(reader)

    def _compare(self, reader: Reader) -> None:
        if _state(reader) != (self.size, self.state):
            raise UserError(
                f"'{self.path}' was changed while it was read: wait for whoever writes it, then run the command again"
            )


def read_file(path: Path) -> bytes:
    """Read a regular file as a whole.

    Raises:
        UserError: It cannot be read, is no regular file, or has more than `LONGEST` bytes.
    """
    with _opened(path) as reader:
        if (size := _state(reader)[0]) > LONGEST:
            raise UserError(f"'{path}' has {size / 1e6:,.0f} MB; at most {LONGEST / 1e6:,.0f} are read")
        return b"".join(iter(lambda: reader.read(size + 1), b""))


def refuse_irregular(folder: Path) -> None:
    """Refuse a folder with pipes, sockets or devices, from which libraries would wait to read."""
    with _reading(folder):
        for path in sorted(folder.iterdir()):
            if path.exists() and not path.is_dir():
                _refuse_kind(path, path.stat().st_mode)


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path below a folder links to a file outside of it.

    The Hub's cache keeps the files of `snapshots/COMMIT` in `blobs` beside `snapshots`; these count as inside.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    inside = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    return not any(real.is_relative_to(place) for place in inside)


@contextmanager
def _opened(path: Path) -> Iterator[Reader]:
    """Open a regular file; its kind is checked before, because opening a pipe may wait, and after."""
    with _reading(path):
        _refuse_kind(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_kind(path, os.fstat(descriptor).st_mode)
        yield Reader(path, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error


def _refuse_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise UserError(f"'{path}' is {kind}, not a file: put the file in its place, or name another folder")


def _state(reader: Reader) -> tuple[int, tuple[int, int, int]]:
    stats = os.fstat(reader.descriptor)
    return stats.st_size, (stats.st_dev, stats.st_ino, stats.st_mtime_ns)
