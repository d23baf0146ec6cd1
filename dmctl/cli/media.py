"""Looking at media from the command line: whether they are there, their size, samples of them."""

from __future__ import annotations

import asyncio
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bitmapd.config import ReceiverConfig, VolumeConfig
from bitmapd.errors import UnreachableError
from bitmapd.media.base import Done
from bitmapd.nbd.client.target import NbdTarget
from bitmapd.net.uri import parse_uri
from dmctl.model.assembly import local_media

CONNECT_TIMEOUT_S = 10.0
SAMPLE_BYTES = 64 << 10
SAMPLES = 128

Read = Callable[[int, int], bytes]  # offset and length in bytes


@dataclass(frozen=True, slots=True)
class Medium:
    size_bytes: int
    block_size_bytes: int
    read: Read
    takes_many: bool  # clients at a time


def present(path: str) -> bool:
    """Whether a medium is there: a file, or a block device that has a size by now."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return True
        if not stat.S_ISBLK(found.st_mode):
            return False
        number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        return int(Path("/sys/dev/block", number, "size").read_text()) > 0
    except (OSError, ValueError):
        return False


def missing_media(config: VolumeConfig | ReceiverConfig) -> dict[str, str]:
    """Role -> path of what is not there."""
    return {role: path for role, path in local_media(config).items() if not present(path)}


def listed(missing: dict[str, str]) -> str:
    """Such as `its primary /dev/x and its record /dev/y`."""
    return " and ".join(f"its {role} {path}" for role, path in missing.items())


@contextmanager
def open_file(path: str) -> Iterator[Read]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield lambda offset, length: os.pread(fd, length, offset)
    finally:
        os.close(fd)


@contextmanager
def open_export(uri: str, tls_certificates: Path | None) -> Iterator[Medium]:
    """An NBD export that can be a secondary; UnreachableError says why it cannot."""
    parsed = parse_uri(uri)
    loop = asyncio.new_event_loop()
    try:
        target = NbdTarget(
            loop,
            parsed,
            tls_certificates=tls_certificates if parsed.tls else None,
            timeout_s=CONNECT_TIMEOUT_S,
        )

        def complete(submit: Callable[[Done], None]) -> None:
            future: asyncio.Future[OSError | None] = loop.create_future()
            submit(future.set_result)
            error = loop.run_until_complete(future)
            if error is not None:
                raise UnreachableError(
                    f"secondary {error.strerror or error}", hint="start its server, or see its log"
                )

        def read(offset_bytes: int, length_bytes: int) -> bytes:
            block = target.block_size_bytes
            padded = -(-length_bytes // block) * block
            buffer = memoryview(mmap.mmap(-1, padded))
            complete(lambda done: target.read(offset_bytes, buffer, done))
            return bytes(buffer[:length_bytes])

        complete(target.open)
        try:
            yield Medium(target.size_bytes, target.block_size_bytes, read, target.takes_many)
        finally:
            target.close()
            loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()


def first_difference(one: Read, other: Read, size_bytes: int) -> int | None:
    """The byte offset of a sample in which two media differ: both ends and places in between."""
    step = max(SAMPLE_BYTES, size_bytes // SAMPLES // SAMPLE_BYTES * SAMPLE_BYTES)
    last = max(0, size_bytes - SAMPLE_BYTES)
    for offset in (*range(0, last, step), last):
        length = min(SAMPLE_BYTES, size_bytes - offset)
        if one(offset, length) != other(offset, length):
            return int(offset)
    return None
