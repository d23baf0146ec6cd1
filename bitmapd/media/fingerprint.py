"""A fingerprint of a primary at rest, by which writes past the volume are noticed (edge).

Both ends of the medium, where file systems, volume managers and partition tables keep what changes
with every mount, and blocks in between, at places that follow from the volume's identity.  Equal
fingerprints prove nothing about the blocks that are not among them; different ones prove a write.

It reads about 2 MiB, past the page cache where the medium allows it, and writes nothing.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from typing import Final

END_BYTES: Final = 1 << 20
SAMPLE_BYTES: Final = 4096
SAMPLES: Final = 64


def places(size_bytes: int, seed: bytes) -> list[tuple[int, int]]:
    """What is read: (offset, length) in bytes, ascending, without overlap."""
    first = min(END_BYTES, size_bytes)
    last = max(first, (size_bytes - END_BYTES) // SAMPLE_BYTES * SAMPLE_BYTES)
    between = (last - first) // SAMPLE_BYTES
    chosen = {
        int.from_bytes(hashlib.sha256(seed + number.to_bytes(2)).digest()[:8]) % between
        for number in range(SAMPLES if between else 0)
    }
    middle = [(first + index * SAMPLE_BYTES, SAMPLE_BYTES) for index in sorted(chosen)]
    ends = [(0, first), *middle, (last, size_bytes - last)]
    return [(offset, length) for offset, length in ends if length]


def fingerprint(path: str, size_bytes: int, seed: bytes) -> str:
    """Of the first `size_bytes` of a medium that nobody writes meanwhile; OSError if it cannot be
    read."""
    digest = hashlib.sha256()
    fd = _open(path)
    try:
        buffer = memoryview(mmap.mmap(-1, END_BYTES + SAMPLE_BYTES))
        for offset, length in places(size_bytes, seed):
            view = buffer[:length]
            if os.preadv(fd, [view], offset) != length:
                raise OSError(errno.EIO, f"{path} ends before byte {offset + length}")
            digest.update(view)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _open(path: str) -> int:
    """Without the page cache, which may be older than what was written past it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
