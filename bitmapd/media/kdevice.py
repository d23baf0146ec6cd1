"""A file or block device of this machine, opened for direct I/O.

Reads and writes bypass the page cache, so nothing that was acknowledged hides in memory of this
machine, a mirror reads what is on the medium, and a loop device or network block device below
cannot dead-lock on dirty pages.  Where a file system has no direct I/O (tmpfs before Linux 6.6)
the file is opened without it and `direct` is false.

Such files, and those in memory, are copied to and from by plain calls, since kernel AIO would do
no better (`media.aio`).  Large transfers that are no host's (`read_aside`, and all of a device that
was opened `aside`) go to threads; those of hosts do not, because handing them over costs more than
the copy where the client is as fast as we are.

Flushes go to the medium one at a time, and all that wait for the next one share its answer: the
kernel reports the loss of cached data once for each descriptor (`media.lost`), to whoever asks
first, and a flush that ran beside that one must not report success to anybody.  Writes with FUA
hear of it too; a flush that succeeds waits for those that are in flight, and what they hear is
reported before.

Opening and closing may block for as long as the medium likes.  The constructor blocks; `open` does
not, nor does `close` of a device that was opened `aside`; that of any other does.

Zeroing and discarding use `fallocate`, which for block devices means (block/fops.c):
PUNCH_HOLE = zero with unmap, never by writing; ZERO_RANGE = zero without unmap, by writing if
need be.  Where neither exists zeros are written.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bitmapd.errors import (
    BitmapdError,
    BusyError,
    OtherMediumError,
    PermissionError_,
    UsageError,
    refused,
)
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import ALLOC_HOLE, ALLOC_ZERO, AllocationDone, Done
from bitmapd.media.buffers import aligned
from bitmapd.media.claims import Claim, busy, holder_of
from bitmapd.media.transport import file_system, is_remote

_BLKSSZGET = 0x1268
_BLKROGET = 0x125E
_BLKDISCARD = 0x1277
_TMPFS, _RAMFS = 0x01021994, 0x858458F6
_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ZERO_RANGE = 16
# From here on a transfer takes longer than handing it to a thread: about 50 us.
ASIDE_BYTES = 256 << 10
_ZERO_CHUNK = 1 << 20
_LET_GO_S = (0.01, 0.03, 0.1)  # a tick is 1 to 10 ms
_ALLOCATION_LIMIT = 4096  # pieces in one answer
_NO_SUCH_OPERATION = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(fd: int, mode: int, offset_bytes: int, length_bytes: int) -> None:
    while _libc.fallocate(fd, mode, offset_bytes, length_bytes) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def open_error(path: str, error: OSError) -> BitmapdError:
    """The error to show a user for a medium that could not be opened."""
    if error.errno == errno.EBUSY:
        return busy(path, holder_of(path))
    return refused(error, f"cannot open {path}")


class _Round:
    """Operations with FUA that began between the ends of two flushes."""

    __slots__ = ("in_flight", "when_ended")

    def __init__(self) -> None:
        self.in_flight = 0
        self.when_ended: Callable[[], None] | None = None


class KernelDevice:
    """A `Device`, and a `Target` whose `open` opens the path again."""

    def __init__(
        self,
        path: str | Path,
        engine: AioEngine,
        *,
        read_only: bool = False,
        claim: Claim | None = None,
        defer: bool = False,
        guarded: bool = True,
        aside: bool = False,
        mismatch: Callable[[int], str | None] | None = None,
    ) -> None:
        """`claim`: for whom it is claimed while it is open, so that nobody else uses it.  Without
        `guarded` device-mapper has a pair's block device now: as after `lend`.  `defer` leaves the
        opening to `open`: until then there is no size and nothing works.  `aside` is for a medium
        that hosts do not work on: see `read_aside`.  `mismatch`, asked by its size in the course of
        opening, may block: why it is not the medium that was meant."""
        self.name = str(path)
        self._engine = engine
        self._read_only = read_only
        self._claim = claim
        self._aside = aside
        self._mismatch = mismatch
        self._zeros: memoryview | None = None
        self._fd = -1
        self._guard: int | None = None  # keeps a block device of a pair from being mounted
        self._guarded = guarded
        self._remote = False
        self._leaving: list[int] = []  # descriptors that a thread is to close
        self._descriptors = threading.Lock()  # to close them, or to claim through them
        self._flushing = False
        self._next_flush: list[Done] = []
        self._durables = _Round()
        self.size_bytes = 0
        self.block_size_bytes = 512
        self.direct = True
        if aside:
            engine.work_aside()
        if not defer:
            self._open()

    # -- life -----------------------------------------------------------------------------
    def _open(self) -> None:
        flags = (os.O_RDONLY if self._read_only else os.O_RDWR) | os.O_CLOEXEC
        exclusive = self._claim is not None and self._claim.node is None
        try:
            if exclusive and stat.S_ISBLK(os.stat(self.name).st_mode):
                flags |= os.O_EXCL
        except OSError as error:
            raise open_error(self.name, error) from error
        self.direct = True
        try:
            fd = os.open(self.name, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise open_error(self.name, error) from error
            self.direct = False
            try:
                fd = os.open(self.name, flags)
            except OSError as again:
                raise open_error(self.name, again) from again
        try:
            self._examine(fd)
            if self._mismatch is not None and (reason := self._mismatch(self.size_bytes)):
                raise OtherMediumError(errno.ENODEV, reason)
            with self._descriptors:
                self._take_claim(fd)
                self._fd = fd
        except BaseException:
            os.close(fd)
            raise

    def _open_as_soon_as_free(self) -> None:
        """As `_open` of what was closed just now.  The kernel may report a transfer before it drops
        its reference to the file.  The last one that a thread of the kernel drops ends a tick later
        (fput: delayed_fput_work), and until then the claim that was closed is in the way."""
        for pause_s in _LET_GO_S:
            try:
                self._open()
            except BusyError:
                time.sleep(pause_s)
            else:
                return
        self._open()

    def _take_claim(self, fd: int) -> None:
        claim = self._claim
        if claim is not None:
            claim.take(fd, self.name)
            if self._guarded and claim.node is not None and self.is_block and self._guard is None:
                self._guard = claim.hold(fd, self.name)

    async def lend(self) -> None:
        """Have device-mapper keep mounts off a pair's block device in our place; the locks stay."""

        def give() -> None:
            with self._descriptors:
                self._guarded = False
                guard, self._guard = self._guard, None
            if guard is not None:
                os.close(guard)

        await self._engine.call(give, aside=self._aside)

    async def take_back(self) -> None:
        """Keep mounts off it again, for device-mapper has it no more.  BusyError if somebody else
        has it."""

        def take() -> None:
            with self._descriptors:
                self._guarded = True
                if self._fd >= 0:
                    self._take_claim(self._fd)

        await self._engine.call(take, aside=self._aside)

    async def joined(self, claim: Claim) -> None:
        """What was claimed is claimed for this one, now and when it is opened again; BusyError if
        somebody else has it."""

        def take() -> None:
            with self._descriptors:
                if self._claim is not None:
                    self._claim = claim
                    if self._fd >= 0:
                        self._take_claim(self._fd)

        await self._engine.call(take, aside=self._aside)

    def _examine(self, fd: int) -> None:
        status = os.fstat(fd)
        self.is_block = stat.S_ISBLK(status.st_mode)
        if not self.is_block and not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{self.name} is neither a block device nor a regular file")
        if self.is_block:
            answer = array.array("i", [0])
            fcntl.ioctl(fd, _BLKSSZGET, answer)
            self.block_size_bytes = answer[0]
            # The kernel lets it be opened for writing all the same, and fails every write.
            fcntl.ioctl(fd, _BLKROGET, answer)
            if answer[0] and not self._read_only:
                raise PermissionError_(
                    f"{self.name} is read-only", hint=f"blockdev --setrw {self.name}"
                )
            queue = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
            self._fast_zero = _sysfs_number(queue, "write_zeroes_max_bytes") > 0
        else:
            self.block_size_bytes = self._file_block_size(fd)
            self._fast_zero = True
        self._aio_blocks = not self.is_block and (not self.direct or _is_in_memory(fd))
        if self._aio_blocks:
            self._engine.work_aside()
        self.size_bytes = self._size(fd)
        self._remote = self._remote or is_remote(fd)

    def _size(self, fd: int) -> int:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        return size_bytes - size_bytes % self.block_size_bytes

    def refresh_size(self) -> int:
        """Take up the medium's present size; blocks."""
        self.size_bytes = self._size(self._fd)
        return self.size_bytes

    def enlarge(self, size_bytes: int, done: Done) -> None:
        """Have a file at least this size, durably; of a device take up the present size."""

        def call() -> None:
            if not self.is_block and self.refresh_size() < size_bytes:
                os.ftruncate(self._fd, size_bytes)
                os.fsync(self._fd)
            self.refresh_size()

        self._engine.offload(call, lambda error, _: done(error), aside=self._aside)

    async def present_size_bytes(self) -> int:
        """As `refresh_size`, off the loop."""
        return await self._engine.call(self.refresh_size, aside=self._aside)

    def _file_block_size(self, fd: int) -> int:
        """512 unless direct I/O of that size is refused, as on a disk with 4 KiB sectors."""
        if not self.direct:
            return 512
        try:
            os.preadv(fd, [aligned(512)], 512)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return 4096
            raise open_error(self.name, error) from error
        return 512

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def connected(self) -> bool:
        return self._fd >= 0

    @property
    def writes_late(self) -> bool:
        """Whether it is, or has been, behind a transport: see `media.transport`."""
        return self._remote

    @property
    def takes_many(self) -> bool:
        """Its flush covers what was completed, whoever has written it."""
        return True

    def lands_late(self, error: OSError) -> bool:
        """The kernel reports what it gave up, not of what became of it."""
        return self._remote

    def open(self, done: Done) -> None:
        """Open the path again, for instance after the medium had gone away."""

        self._leave()

        def reopen() -> None:
            self._close_left()
            try:
                self._open_as_soon_as_free()
            except BitmapdError as error:
                raise OSError(errno.EIO, error.message) from error

        self._engine.offload(reopen, lambda error, _: done(error), aside=self._aside)

    def close(self) -> None:
        self._leave()
        if not self._aside:
            self._close_left()
        elif self._leaving:
            self._engine.offload(self._close_left, lambda error, _: None, aside=True)

    def _leave(self) -> None:
        if self._fd >= 0:
            self._leaving.append(self._fd)
            self._fd = -1
        if self._guard is not None:
            self._leaving.append(self._guard)
            self._guard = None

    def _close_left(self) -> None:
        """Blocks; returns when another thread that closes has returned, too."""
        with self._descriptors:
            while self._leaving:
                os.close(self._leaving.pop())

    # -- data -----------------------------------------------------------------------------
    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        if not self._aio_blocks:
            self._engine.read(self._fd, offset_bytes, buffer, done)
        elif self._aside:
            self.read_aside(offset_bytes, buffer, done)
        else:
            self._engine.read_now(self._fd, offset_bytes, buffer, done)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        if fua:
            done = self._durable(done)
        if not self._aio_blocks:
            self._engine.write(self._fd, offset_bytes, buffer, done, fua)
        elif self._aside and len(buffer) >= ASIDE_BYTES:
            self._engine.write_aside(self._fd, offset_bytes, buffer, done, fua)
        else:
            self._engine.write_now(self._fd, offset_bytes, buffer, done, fua)

    def read_aside(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        """As `read`, for work that goes on beside that of hosts: what would keep the loop long is
        done by a thread."""
        if not self._aio_blocks:
            self._engine.read(self._fd, offset_bytes, buffer, done)
        elif len(buffer) >= ASIDE_BYTES:
            self._engine.read_aside(self._fd, offset_bytes, buffer, done)
        else:
            self._engine.read_now(self._fd, offset_bytes, buffer, done)

    def flush(self, done: Done) -> None:
        self._next_flush.append(done)
        if not self._flushing:
            self._flush()

    def _flush(self) -> None:
        self._flushing = True
        sharing, self._next_flush = self._next_flush, []

        def flushed(error: OSError | None) -> None:
            if self._durables.in_flight:
                self._durables.when_ended = partial(ended, error)
                self._durables = _Round()
            else:
                ended(error)

        def ended(error: OSError | None) -> None:
            self._flushing = False
            if self._next_flush:
                self._flush()
            for done in sharing:
                self._engine.answer(done, error)

        self._engine.flush(self._fd, flushed)

    def _durable(self, done: Done) -> Done:
        """Count an operation with FUA until it has called back."""
        durables = self._durables
        durables.in_flight += 1

        def ended(error: OSError | None) -> None:
            self._engine.answer(done, error)
            durables.in_flight -= 1
            if not durables.in_flight and durables.when_ended is not None:
                durables.when_ended()

        return ended

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
    ) -> None:
        fd = self._fd
        if fua:
            done = self._durable(done)

        def work() -> bool:
            for mode in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE):
                if mode & _PUNCH_HOLE and not unmap:
                    continue
                if mode & _ZERO_RANGE and fast and not self._fast_zero:
                    continue
                try:
                    _fallocate(fd, mode, offset_bytes, length_bytes)
                except OSError as error:
                    if error.errno not in _NO_SUCH_OPERATION:
                        raise
                else:
                    if fua:
                        os.fdatasync(fd)
                    return True
            if fast:
                raise OSError(errno.EOPNOTSUPP, "zeroing is not faster than writing here")
            return False

        def worked(error: OSError | None, complete: bool | None) -> None:
            if error is not None or complete:
                done(error)
            else:
                self._write_zeros(offset_bytes, offset_bytes + length_bytes, fua, done)

        self._engine.offload(work, worked, aside=self._aside)

    def _write_zeros(self, offset_bytes: int, end_bytes: int, fua: bool, done: Done) -> None:
        if self._zeros is None:
            try:
                self._zeros = aligned(_ZERO_CHUNK)
            except (OSError, MemoryError):
                done(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
                return
        length = min(_ZERO_CHUNK, end_bytes - offset_bytes)
        following = offset_bytes + length

        def written(error: OSError | None) -> None:
            if error is not None or following >= end_bytes:
                done(error)
            else:
                self._write_zeros(following, end_bytes, fua, done)

        self.write(offset_bytes, self._zeros[:length], written, fua)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        fd = self._fd
        if fua:
            done = self._durable(done)

        def work() -> None:
            try:
                if self.is_block:
                    span = array.array("Q", [offset_bytes, length_bytes])
                    fcntl.ioctl(fd, _BLKDISCARD, span)
                else:
                    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset_bytes, length_bytes)
            except OSError as error:
                if error.errno not in _NO_SUCH_OPERATION:
                    raise
            if fua:
                os.fdatasync(fd)

        self._engine.offload(work, lambda error, _: done(error), aside=self._aside)

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        if self.is_block:
            self._engine.loop.call_soon(done, None, [(length_bytes, 0)])
            return
        fd, end = self._fd, offset_bytes + length_bytes
        self._engine.offload(
            lambda: _holes(fd, offset_bytes, end),
            lambda error, found: done(error, found or []),
            aside=self._aside,
        )


def _holes(fd: int, offset_bytes: int, end_bytes: int) -> list[tuple[int, int]]:
    """Data and holes of a file in order, as lengths with NBD allocation flags."""
    pieces: list[tuple[int, int]] = []
    seek: tuple[Callable[[int], int], ...] = (
        lambda at: os.lseek(fd, at, os.SEEK_DATA),
        lambda at: os.lseek(fd, at, os.SEEK_HOLE),
    )
    at = offset_bytes
    while at < end_bytes and len(pieces) < _ALLOCATION_LIMIT:
        for find, flags in ((seek[0], ALLOC_HOLE | ALLOC_ZERO), (seek[1], 0)):
            try:
                stop = min(find(at), end_bytes)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the file system cannot tell
                    return [*pieces, (end_bytes - at, 0)]
                if error.errno != errno.ENXIO:
                    raise
                stop = end_bytes  # nothing but a hole up to the end
            if stop > at:
                pieces.append((stop - at, flags))
                at = stop
            if at >= end_bytes:
                break
    return pieces


def _is_in_memory(fd: int) -> bool:
    return file_system(fd) in (_TMPFS, _RAMFS)


def _sysfs_number(device: Path, attribute: str) -> int:
    """A number of the request queue; a partition's queue is that of its parent."""
    for folder in (device / "queue", device / ".." / "queue"):
        try:
            return int((folder / attribute).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return 0
