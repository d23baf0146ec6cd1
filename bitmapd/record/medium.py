"""An open record device: who may change it, how it is read and written.

Synchronous, and past the page cache where the medium allows it.

1. Who changes a record holds its lock (`RecordMedium.lock`): an open-file-description lock, which
   ends with the process.  Its asynchronous I/O is over by then, so a successor sees its last
   writes.  flock would be in the way of udev, which takes one while it looks at a disk.
2. A block device is claimed while it is open for writing, so nobody mounts it meanwhile.
3. What cannot be read is None or zeros, which are valid nowhere, and is noted; the rest of a unit
   is found all the same.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

from bitmapd.errors import (
    BitmapdError,
    BusyError,
    FormatTooNewError,
    RecordDamagedError,
    UsageError,
    refused,
)
from bitmapd.media.claims import set_lock
from bitmapd.record.layout import (
    PAGE_BYTES,
    SUPERBLOCK_OFFSETS,
    Raw,
    Superblock,
    SuperblockChoice,
    choose_superblock,
)
from bitmapd.record.pages import SECTOR_BYTES

Source: TypeAlias = "str | Path | RecordMedium"
Read = Callable[[int, list[memoryview], int], int]

CHUNK_BYTES: Final = 1 << 20


class RecordMedium:
    """An open record device or file; direct I/O, or buffered where the file system has none."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd

    @classmethod
    def open(cls, path: str | Path) -> RecordMedium:
        """For reading and writing.  A block device is claimed: BusyError if it is mounted, part of
        another device, or claimed by another process."""
        return cls(str(path), _open(str(path), os.O_RDWR | os.O_EXCL))

    @classmethod
    def open_read_only(cls, path: str | Path) -> RecordMedium:
        return cls(str(path), _open(str(path), os.O_RDONLY))

    def __enter__(self) -> RecordMedium:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up the lock, too.  May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def size_bytes(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)

    def lock(self) -> None:
        """Claim the record until `close`; BusyError names the volume whose server has it."""
        try:
            set_lock(self.fd, fcntl.F_WRLCK, 0, 0)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise explained(error, f"cannot lock {self.name}") from error
            try:
                superblock = probe(self)
            except BitmapdError:
                superblock = None
            owner = f"the record of volume {superblock.name!r}, " if superblock else ""
            raise BusyError(
                f"{self.name}, {owner}is in use: another process serves or changes it",
                hint="stop the volume first",
            ) from error

    def write(self, offset_bytes: int, view: memoryview, flags: int = 0) -> None:
        """All of `view`; RWF_DSYNC in `flags` makes it durable."""
        done = 0
        while done < len(view):
            try:
                done += os.pwritev(self.fd, [view[done:]], offset_bytes + done, flags)
            except OSError as error:
                what = f"cannot write {len(view)} bytes at byte {offset_bytes} of {self.name}"
                raise explained(error, what) from error

    def sync(self) -> None:
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise explained(error, f"cannot flush {self.name}") from error


def _open(name: str, flags: int) -> int:
    try:
        mode = os.stat(name).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
            raise UsageError(f"{name} is neither a block device nor a regular file")
        if not stat.S_ISBLK(mode):
            flags &= ~os.O_EXCL
        try:
            return os.open(name, flags | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.open(name, flags | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise explained(error, f"cannot open {name!r}") from error


def explained(error: OSError | ValueError, what: str) -> BitmapdError:
    """What to raise where `what` could not be done."""
    if not isinstance(error, OSError):
        return UsageError(f"{what}: {error}")
    is_busy = error.errno == errno.EBUSY
    return refused(error, what, "it is mounted, or another program claims it" if is_busy else None)


@contextmanager
def opened(source: Source) -> Iterator[RecordMedium]:
    """`source`, opened for reading and closed again unless it is open already."""
    if isinstance(source, RecordMedium):
        yield source
    else:
        with RecordMedium.open_read_only(source) as medium:
            yield medium


# -- reading ------------------------------------------------------------------------------------


class Reader:
    """Reads whole units of 4 KiB and keeps what could not be read in `notes`."""

    def __init__(self, medium: RecordMedium, read: Read) -> None:
        self._fd = medium.fd
        self._read = read
        self._buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        self.notes: list[str] = []

    def units(self, offset_bytes: int, count: int) -> Iterator[Raw]:
        """`count` units from `offset_bytes` on; None for one that cannot be read."""
        length = count * PAGE_BYTES
        for done in range(0, length, CHUNK_BYTES):
            yield from self._chunk(offset_bytes + done, min(CHUNK_BYTES, length - done))

    def _chunk(self, offset_bytes: int, length: int) -> list[Raw]:
        try:
            got = self._fill(offset_bytes, self._buffer[:length])
        except OSError:
            return [self._unit(offset_bytes + at) for at in range(0, length, PAGE_BYTES)]
        return [
            bytes(self._buffer[at : min(at + PAGE_BYTES, got)]) if at < got else None
            for at in range(0, length, PAGE_BYTES)
        ]

    def _unit(self, offset_bytes: int) -> Raw:
        """One unit; sectors that cannot be read are zeros, which are valid nowhere."""
        view = self._buffer[:PAGE_BYTES]
        try:
            got = self._fill(offset_bytes, view)
            return bytes(view[:got]) if got else None
        except OSError as error:
            self.notes.append(
                f"the 4 KiB at byte {offset_bytes} cannot be read in full: {error.strerror}"
            )
        unit = bytearray(PAGE_BYTES)
        found = False
        for at in range(0, PAGE_BYTES, SECTOR_BYTES):
            try:
                got = self._fill(offset_bytes + at, self._buffer[:SECTOR_BYTES])
            except OSError:
                continue  # noted above; the unit's checksums tell which sectors are missing
            unit[at : at + got] = self._buffer[:got]
            found = True
        return bytes(unit) if found else None

    def _fill(self, offset_bytes: int, view: memoryview) -> int:
        """Bytes read; fewer than asked for only at the end of the medium."""
        got = 0
        while got < len(view):
            more = self._read(self._fd, [view[got:]], offset_bytes + got)
            if more <= 0:
                break
            got += more
            if got % SECTOR_BYTES:  # an odd end of a file; direct I/O could not go on from here
                break
        return got


def find_superblock(reader: Reader, medium: RecordMedium) -> SuperblockChoice | None:
    """Which superblock counts, None if there is none; RecordDamagedError or FormatTooNewError if
    none that is there can be used."""
    first, second = (next(reader.units(offset, 1)) for offset in SUPERBLOCK_OFFSETS)
    try:
        return choose_superblock(first, second)
    except (RecordDamagedError, FormatTooNewError) as error:
        raise type(error)(f"{medium.name}: {error.message}", error.hint) from error


def probe(source: Source, read: Read = os.preadv) -> Superblock | None:
    """The superblock, or None if there is no record; two small reads."""
    with opened(source) as medium:
        choice = find_superblock(Reader(medium, read), medium)
    return choice.superblock if choice else None
