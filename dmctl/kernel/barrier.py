"""The barrier: the blocks of the eras that ended, once no write of them is in flight (edge).

dm-era marks a block before a write to it goes on, in the era that is current then.  In this order:

 1. read the era device's counters of writes and discards;
 2. `take_metadata_snap`: the current era ends, the next one begins, what was marked so far is kept;
 3. load the new table into the write device, if there is one;
 4. drain: hold new writes, wait until none is in flight, let them go on, under the new table;
 5. read the counter of discards again, then the snapshot, and drop it.

1. Every write that was marked in an ended era was in flight at 2 or had landed: after 4 it has
   landed.  What is marked later belongs to the next barrier.
2. With a new table one ioctl does all of 4, and the death of this process at any moment leaves the
   device at work, under the old table or the new one.  Without one it takes two, which hold writes
   for a shorter time; a helper that is killed between them leaves the device suspended, and the
   next one resumes it first of all.  SIGALRM bounds the wait: the old table stays in force, and
   the next barrier collects the eras of both.
3. The era device itself is never suspended and never reloaded.
4. A discard marks the first block only.  It is no longer than a block (`discard_max_bytes` of the
   era device), so it touches at most one more: if there were discards, every run is one block
   longer at its end.
5. Kernels count a request when it ends or, before 6.3, when it begins.  So one that began before a
   reading may have been marked after the snapshot that followed; but the swap of the barrier
   before would have waited for it if it had begun before that one's reading.  Hence counters are
   compared with those read two barriers ago: for discards, and to skip a barrier: if three
   readings in a row are equal nothing is unknown, nothing is claimed, and the era goes on.  But
   what was brought may get lost on its way: whoever asks again from the same era on gets it again.
   So a reading counts as that of an earlier barrier once it is known that what that one brought has
   arrived: when the era behind it is asked for.
6. Somebody may have switched counting off (`media/blockstat`).  Lapses are part of a reading, so
   whatever was not counted is unknown, and discards may have been among it.
7. What a barrier needs of memory for 4 exists before.
8. dm-era digests an ended era at a cost of the volume's size, some seconds per TiB, keeps its marks
   until then, and fails writes when its metadata are full.  So no era is ended while more than half
   of them are in use: that leaves room for a copy of all that a digestion changes while a snapshot
   is held.
9. A table that only grows is put in force without all the rest (`swap`): no write leaves the way it
   took, so nothing has to be known of what was written.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Final, Protocol

from bitarray import bitarray

from bitmapd.media.blockstat import BlockStat
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.dm_wire import Target
from dmctl.model import era
from dmctl.model.targets import EraStatus, parse_era_status

TAKE_SNAPSHOT: Final = "take_metadata_snap"
DROP_SNAPSHOT: Final = "drop_metadata_snap"
# A timer that fires a moment before the ioctl begins to wait is lost: it fires again.
_TIMER_AGAIN_S: Final = 0.05
# Fields of /sys/block/X/stat.  Sectors and not writes: an empty flush counts as a write.
_SECTORS_WRITTEN, _DISCARDS = 6, 11


@dataclass(frozen=True, slots=True)
class Counters:
    """Of the era device since it was made; each only grows.  `lapses` as in `media/blockstat`."""

    sectors_written: int
    discards: int
    lapses: int = 0


class Metadata(Protocol):
    """Blocks of the era device's metadata as they are on their medium."""

    def read_block(self, number: int) -> memoryview | bytes: ...

    def read_blocks(self, numbers: Sequence[int]) -> Sequence[memoryview | bytes]: ...


class Alarm(Protocol):
    """Has what waits in the kernel end with EINTR after that time."""

    def __call__(self, seconds: float) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Collected:
    """The blocks written in the eras that were asked for, up to `to_era`."""

    blocks: bitarray
    to_era: int
    window_s: float = 0.0
    skipped: bool = False
    widened: bool = False
    damage: str = ""  # why the blocks could not be read: any may have been written


class MetadataFile:
    """Blocks of the era device's metadata, read past the page cache, which dm does not feed."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._memory = memoryview(mmap.mmap(-1, era.BATCH_BLOCKS * era.BLOCK_BYTES))

    def close(self) -> None:
        os.close(self._fd)

    def read_block(self, number: int) -> memoryview:
        return self.read_blocks([number])[0]

    def read_blocks(self, numbers: Sequence[int]) -> list[memoryview]:
        """Valid until the next call; at most BATCH_BLOCKS of them."""
        size = era.BLOCK_BYTES
        for first, stop in _neighbours(numbers):
            view = self._memory[first * size : stop * size]
            if os.preadv(self._fd, [view], numbers[first] * size) != len(view):
                raise OSError(errno.EIO, f"the era metadata end before block {numbers[stop - 1]}")
        return [self._memory[at * size : (at + 1) * size] for at in range(len(numbers))]


def _neighbours(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Slices [first, stop) of ascending numbers without gaps."""
    breaks = [at + 1 for at, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    return pairwise([0, *breaks, len(numbers)])


def widen(blocks: bitarray) -> bitarray:
    """Every run one block longer at its end."""
    return blocks | blocks >> 1


class Barrier:
    """Of one volume whose devices exist; see the module docstring.  Main thread only."""

    def __init__(
        self,
        mapper: DeviceMapper,
        era_name: str,
        write_name: str,
        metadata: Metadata,
        read_counters: Callable[[], Counters],
        deadline: Alarm | None = None,
    ) -> None:
        self._mapper = mapper
        self._era = era_name
        self._write = write_name
        self._metadata = metadata
        self._read_counters = read_counters
        self._deadline = alarm if deadline is None else deadline
        self._hold, self._go_on = mapper.holding(write_name), mapper.going_on(write_name)
        # Read before the latest two barriers whose blocks have arrived.  Not known of an era device
        # that was found: then every discard since it was made counts.
        self._last: Counters | None = None
        self._earlier: Counters | None = None
        self._brought: Counters | None = None  # read before one whose blocks are on their way
        self._next_era: int | None = None  # asked for by who has got all that was brought

    def __call__(
        self, table: Sequence[Target] | None, since_era: int, deadline_s: float
    ) -> Collected:
        """TimeoutError if writes were in flight for longer than `deadline_s`; then nothing changed
        but that an era ended, and the next barrier is to begin with the same `since_era`.
        OSError ENOBUFS if no era can be ended for the time being."""
        before = self._read_counters()
        if since_era == self._next_era and self._brought is not None:
            self._earlier, self._last, self._brought = self._last, self._brought, None
        known = since_era == self._next_era and before == self._last == self._earlier
        if table is None and known:
            return Collected(bitarray(), since_era - 1, skipped=True)
        status = self.drop_stale_snapshot()
        if 2 * status.used_blocks >= status.total_blocks:
            raise OSError(
                errno.ENOBUFS,
                f"dm-era is still at work on the marks of earlier eras ({status.used_blocks} of"
                f" {status.total_blocks} metadata blocks are in use)",
            )
        self._mapper.message(self._era, TAKE_SNAPSHOT)
        try:
            if table is not None:
                self._mapper.load(self._write, table)
            window_s = self._drain(table is None, deadline_s)
            after = self._read_counters()
            try:
                blocks, to_era = self._collect(since_era)
                damage = ""
            except era.EraDamagedError as error:
                blocks, to_era, damage = bitarray(), status.current_era, str(error)
        finally:
            self._mapper.message(self._era, DROP_SNAPSHOT)
        since = self._earlier or Counters(0, 0)
        widened = after.discards > since.discards or after.lapses > since.lapses
        self._brought, self._next_era = before, to_era + 1
        if widened:
            blocks = widen(blocks)
        return Collected(blocks, to_era, window_s, widened=widened, damage=damage)

    def swap(self, table: Sequence[Target], deadline_s: float) -> float:
        """Put a table in force that has all that is direct in the one before, and end no era; the
        seconds for which writes were held.  TimeoutError as with a barrier."""
        self._mapper.load(self._write, table)
        return self._drain(False, deadline_s)

    def status(self) -> EraStatus:
        line = self._mapper.status(self._era)[0].parameters
        try:
            return parse_era_status(line)
        except ValueError as error:
            raise OSError(errno.EIO, f"the state of '{self._era}': {error}") from error

    def drop_stale_snapshot(self) -> EraStatus:
        """One that a helper left which died; there is at most one."""
        status = self.status()
        if status.held_root is not None:
            self._mapper.message(self._era, DROP_SNAPSHOT)
        return status

    def _collect(self, since_era: int) -> tuple[bitarray, int]:
        root = self.status().held_root
        metadata = era.Metadata(self._metadata.read_block, self._metadata.read_blocks)
        view = metadata.snapshot(root)
        return view.bits_written(since_era), view.newest_era

    def _drain(self, hold_first: bool, deadline_s: float) -> float:
        """Seconds for which writes were held."""
        try:
            with self._deadline(deadline_s):
                start_s = time.monotonic()
                if hold_first:
                    self._hold()
                self._go_on()
                window_s = time.monotonic() - start_s
            if not hold_first and not self._go_on.resumed:
                # The table had gone, and then nothing was held.
                raise OSError(errno.EAGAIN, "another program cleared its new table")
            return window_s
        except OSError as error:
            # A table that is refused at the last moment leaves the device suspended.
            self._mapper.clear(self._write)
            self._mapper.resume(self._write)
            if isinstance(error, InterruptedError):
                raise TimeoutError(
                    errno.ETIMEDOUT,
                    f"writes were in flight for longer than {deadline_s} s;"
                    " the slowest one goes through the gate",
                ) from error
            raise OSError(
                error.errno, f"cannot hold the writes of '{self._write}': {error.strerror}"
            ) from error


Handler = Callable[[int, FrameType | None], None]


@contextmanager
def alarm(seconds: float, handler: Handler = lambda *_: None) -> Iterator[None]:
    """SIGALRM after that time, again and again: what waits in the kernel ends with EINTR."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, _TIMER_AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def counters(stat: BlockStat, lapses: int = 0) -> Counters:
    """`lapses`: those that somebody else has seen."""
    fields = stat.read()
    return Counters(fields[_SECTORS_WRITTEN], fields[_DISCARDS], stat.lapses + lapses)
