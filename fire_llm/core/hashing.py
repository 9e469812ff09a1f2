"""Hashes of texts and files: BLAKE2b, as hexadecimal digits; CRC-32 where only damage has to be found."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

CHUNK = 2**24
"""Bytes hashed at a time, each chunk by a thread of its own: one thread reaches a third to one GB/s."""


def digest(data: str | bytes, size: int) -> str:
    """Return the hash of a text's UTF-8 bytes, the same in every process and on every machine.

    Args:
        data: The text, or its bytes; a file name that is no UTF-8 is hashed by its own bytes.
        size: Bytes of the hash.
    """
    encoded = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    return blake2b(encoded, digest_size=size).hexdigest()


def blake2b_256(data: bytes) -> bytes:
    """Return the BLAKE2b hash of 256 bits."""
    return blake2b(data, digest_size=32).digest()


def crc32(data: bytes) -> bytes:
    """Return the CRC-32, in a fifth of the time of BLAKE2b: it finds damage, but identifies no file."""
    return zlib.crc32(data).to_bytes(4, "big")


def hash_file(
    path: Path,
    chunk: int = CHUNK,
    *,
    of_chunk: Callable[[bytes], bytes] = blake2b_256,
    from_disk: bool = False,
    advance: Callable[[int], object] = lambda _: None,
) -> str:
    """Return the hash of the hashes of a file's chunks, so that all cores can work on one file.

    Args:
        path: The file.
        chunk: Bytes of a chunk.
        of_chunk: Hash of a chunk.
        from_disk: Whether to drop the system's cache of the file first.
        advance: Called with the number of bytes of each chunk that is done.

    Returns:
        BLAKE2b, 256 bits, as hex.
    """
    with path.open("rb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        size = os.fstat(file.fileno()).st_size
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def digest_of(start: int) -> bytes:
            return of_chunk(os.pread(file.fileno(), chunk, start))

        whole, starts = blake2b(digest_size=32), range(0, size, chunk)
        # Most files are one chunk, for which a thread is not worth its start.
        digests = pool.map(digest_of, starts) if size > chunk else map(digest_of, starts)
        for start, chunk_digest in zip(starts, digests, strict=True):
            whole.update(chunk_digest)
            advance(min(chunk, size - start))
        return whole.hexdigest()
