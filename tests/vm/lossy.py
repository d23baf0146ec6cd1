"""What a disk loses at a power cut: a store whose unflushed writes may vanish.

The medium is a file; beside it lies a second file, the *view*, which is what the guest reads.  A
write goes to the view and to a log in memory; a flush puts the log on the medium.

1. Outside the ranges of the log, view and medium are equal.
2. A flush is answered when every write answered before it is on the medium; a write with FUA when
   its own data are.  Neither makes anything else durable.
3. At a cut each sector of the medium becomes what it was at the last flush or what one of the later
   writes left there, never something else: `LossyStore.cut` keeps a seeded choice of the log, torn
   at 512 bytes.  Afterwards the log is empty and rule 1 holds again.
4. A sector written with FUA never goes back to an older write of the log.

The medium's file never shows more than a cut could leave, so it may be read at any time after one.
The log is bounded: past `cache_bytes` its older half goes to the medium in order, as a drive that
runs out of cache does.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

TEAR_BYTES = 512
_MIB = 1 << 20
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Mode(Enum):
    """What a cut keeps of the log."""

    NOTHING = "nothing"
    EVERYTHING = "everything"
    PREFIX = "the first writes, the last of them torn"
    WHOLE_WRITES = "some of the writes"
    SECTORS = "some sectors of the writes"


@dataclass(frozen=True, slots=True)
class Loss:
    """What a cut did."""

    mode: Mode
    kept_bytes: int
    lost_bytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A write that is not on the medium; without data it wrote zeros."""

    start: int
    stop: int
    data: memoryview | None

    def part(self, start: int, stop: int) -> _Entry:
        data = None if self.data is None else self.data[start - self.start : stop - self.start]
        return _Entry(start, stop, data)

    def without(self, start: int, stop: int) -> Iterator[_Entry]:
        if self.start < start:
            yield self.part(self.start, min(self.stop, start))
        if stop < self.stop:
            yield self.part(max(self.start, stop), self.stop)


class LossyStore:
    """Medium, view and log.  Not thread-safe: `LossyServer` calls it from its one thread."""

    def __init__(
        self, folder: Path, size_bytes: int, rng: random.Random, cache_bytes: int = 64 * _MIB
    ) -> None:
        self.medium_path = folder / "medium"
        self._size = size_bytes
        self._rng = rng
        self._cache_bytes = cache_bytes
        self._log: list[_Entry] = []
        self._held = 0
        self._medium = os.open(self.medium_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._view = os.open(
            folder / "view", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        os.ftruncate(self._medium, size_bytes)
        os.ftruncate(self._view, size_bytes)
        for start, stop in _allocated(self._medium, size_bytes):
            self._revert(start, stop)

    def close(self) -> None:
        os.close(self._medium)
        os.close(self._view)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._view, length, offset)

    def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        self._add(_Entry(offset, offset + len(data), memoryview(data)), fua)

    def zero(self, offset: int, length: int, fua: bool = False) -> None:
        """Also a trim: what was trimmed reads as zeros, until a cut may bring it back."""
        self._add(_Entry(offset, offset + length, None), fua)

    def flush(self) -> None:
        self._destage(len(self._log))

    def cut(self, mode: Mode | None = None) -> Loss:
        mode = mode or self._rng.choice(list(Mode))
        log, self._log, self._held = self._log, [], 0
        kept = 0
        for entry in self._survivors(log, mode):
            _put(self._medium, entry)
            kept += entry.stop - entry.start
        for entry in log:
            self._revert(entry.start, entry.stop)
        return Loss(mode, kept, sum(entry.stop - entry.start for entry in log) - kept)

    def _add(self, entry: _Entry, fua: bool) -> None:
        _put(self._view, entry)
        if fua:
            _put(self._medium, entry)
            if self._log:
                self._log = [
                    left for old in self._log for left in old.without(entry.start, entry.stop)
                ]
            return
        self._log.append(entry)
        self._held += 0 if entry.data is None else len(entry.data)
        if self._held > self._cache_bytes:
            self._destage(len(self._log) // 2 + 1)

    def _destage(self, count: int) -> None:
        for entry in self._log[:count]:
            _put(self._medium, entry)
        del self._log[:count]
        self._held = sum(len(entry.data) for entry in self._log if entry.data is not None)

    def _survivors(self, log: list[_Entry], mode: Mode) -> Iterator[_Entry]:
        rng = self._rng
        share = rng.random()
        match mode:
            case Mode.NOTHING:
                return
            case Mode.EVERYTHING:
                yield from log
            case Mode.PREFIX if log:
                last = rng.randrange(len(log))
                yield from log[:last]
                sectors = -(-(log[last].stop - log[last].start) // TEAR_BYTES)
                stop = log[last].start + rng.randrange(sectors + 1) * TEAR_BYTES
                yield log[last].part(log[last].start, min(stop, log[last].stop))
            case Mode.WHOLE_WRITES:
                yield from (entry for entry in log if rng.random() < share)
            case Mode.SECTORS:
                for entry in log:
                    yield from _torn(entry, rng, share)

    def _revert(self, start: int, stop: int) -> None:
        """Makes the view equal to the medium."""
        for at in range(start, stop, _MIB):
            data = os.pread(self._medium, min(_MIB, stop - at), at)
            if data.count(0) == len(data):
                _punch(self._view, at, len(data))
            else:
                os.pwrite(self._view, data, at)


def _torn(entry: _Entry, rng: random.Random, share: float) -> Iterator[_Entry]:
    """Some sectors; long writes are torn in pieces of more than one, to stay quick."""
    step = max(1, (entry.stop - entry.start) // TEAR_BYTES // 64) * TEAR_BYTES
    for start in range(entry.start, entry.stop, step):
        if rng.random() < share:
            yield entry.part(start, min(start + step, entry.stop))


def _put(fd: int, entry: _Entry) -> None:
    if entry.data is None:
        _punch(fd, entry.start, entry.stop - entry.start)
        return
    done = 0
    while done < len(entry.data):
        done += os.pwrite(fd, entry.data[done:], entry.start + done)


def _punch(fd: int, offset: int, length: int) -> None:
    if length and _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) != 0:
        raise OSError(ctypes.get_errno(), "fallocate: the file system of the lab punches no holes")


def _allocated(fd: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at
