"""Reading for points: brings blocks of `gate.taken` into the spool.

Runs are read by the copier's `Transfers`, as much as the owner allows; what a host waits for is
read before them, by itself.  Both arrive here.

Invariants:
1. A block counts as read by the read of it that ends first: it leaves `taken` in that event, and
   what another read of it brings is dropped.
2. What was in flight at a `revoke` does not count.
3. The spool never holds more than its limit: what hosts wait for is refused instead, and there is
   always half of it for that.

A crash loses what was read; it is all in the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Protocol

from bitmapd.copier.leaving import Leaving
from bitmapd.copier.refusals import Refusal
from bitmapd.copier.throttle import SpeedMeter, Throttle
from bitmapd.copier.transfers import Transfers
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.cycle import CutGate
from bitmapd.gate.elsewhere import Run
from bitmapd.media.base import Done, Scheduler
from bitmapd.media.buffers import BufferPool
from bitmapd.points.pieces import gather, whole_mask
from bitmapd.points.spool import Spool
from bitmapd.record.geometry import Geometry

URGENT_BYTES: Final = 256 << 10  # of one read that a host waits for
# In flight in a cut: what is read for hosts queues behind it at the disk, 5 ms at 200 MB/s.
IN_CUT_BYTES: Final = 1 << 20

ReadPrimary = Callable[[int, memoryview, Done], None]


class ReadingOwner(Protocol):
    """What the owner is asked and told; never from inside a call of one of the methods."""

    def has_read(self, first: int, stop: int) -> None:
        """The spool has these blocks."""

    def not_read(self, first: int, stop: int, error: OSError) -> None:
        """The primary failed."""

    def proceed(self) -> None:
        """A read has ended."""


class Reading:
    """See the module docstring."""

    def __init__(
        self,
        geometry: Geometry,
        gate: CutGate,
        read_primary: ReadPrimary,
        scheduler: Scheduler,
        pool: BufferPool,
        spool: Spool,
        owner: ReadingOwner,
        *,
        piece_bytes: int,
    ) -> None:
        self._geometry = geometry
        self._gate = gate
        self._read_primary = read_primary
        self._scheduler = scheduler
        self._pool = pool
        self._spool = spool
        self._owner = owner
        self.transfers = Transfers(
            geometry,
            gate,
            read_primary,
            _Intake(scheduler, self._arrived),
            scheduler,
            pool,
            Throttle(None),  # rate and speed are those of the wire
            SpeedMeter(),
            Leaving(scheduler),
            owner=self,
            piece_bytes=piece_bytes,
        )
        self.copies_before_write = 0  # blocks
        self._revoked = False
        self._urgent = BlockSet()  # read for hosts that wait, or to be
        self._urgent_bytes = 0
        self._due: list[Run] | None = []  # of them; None: they are read at once
        self._cuts = 0
        self._reads = 0  # in flight, for hosts

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._reads and self.transfers.idle

    @property
    def is_revoked(self) -> bool:
        """Whether something is in flight that does not count: nothing may be begun."""
        return self._revoked

    @property
    def is_blocked(self) -> bool:
        """Whether some blocks wait to be read again after an error of their own."""
        return self.transfers.idle and bool(self.transfers.withheld_blocks)

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on."""
        self._geometry = geometry
        self.transfers.grow(geometry)

    # -- runs -----------------------------------------------------------------------------------
    def new_round(self) -> None:
        """`gate.taken` has been replenished."""
        self.transfers.new_round()

    def begin(self, now_s: float, most_bytes: int) -> float | None:
        """Read until the spool holds so much; as `Transfers.begin`, None too if it does."""
        gate = self._gate
        room = most_bytes - self._spool.held_bytes
        if gate.is_cutting:
            room = min(room, IN_CUT_BYTES)
        if room <= 0:
            return None
        # Hosts that write past the gate wait until all of an extent was read.
        awaited = gate.is_cutting and gate.direct is not None
        return self.transfers.begin(now_s, room, awaited=awaited)

    def revoke(self) -> None:
        """What is in flight does not count."""
        self._revoked = not self.idle
        self.transfers.revoke()

    # -- what hosts wait for --------------------------------------------------------------------
    def landed(self) -> None:
        """What is pending may be read: from now on, what hosts wait for is read at once."""
        due, self._due = self._due, None
        for run in due or ():
            self._read(run)

    def end_cut(self) -> None:
        """No host waits any more; reads in flight end by themselves."""
        self._urgent, self._urgent_bytes, self._due = BlockSet(), 0, []
        self._cuts += 1

    def read_first(self, runs: Iterable[Run]) -> bool:
        """As `gate.cycle.Reader`."""
        block_bytes = self._geometry.block_bytes
        asked = list(runs)
        if sum(stop - first for first, stop in asked) * block_bytes > self._spool.limit_bytes:
            return False  # as a zeroing of gigabytes, without going through its blocks
        wanted = BlockSet(
            (block, block + 1)
            for first, stop in asked
            for block in range(first, stop)
            if not self._urgent.any(block, block + 1)
            and not self.transfers.carries(block, block + 1)
        )
        held = self._spool.held_bytes + self.transfers.in_flight_bytes + self._urgent_bytes
        if held + wanted.count() * block_bytes > self._spool.limit_bytes:
            return False
        most, at = max(1, URGENT_BYTES // block_bytes), 0
        while (run := wanted.next_run(at, most)) is not None:
            at = run[1]
            self._urgent.add(*run)
            self._urgent_bytes += (run[1] - run[0]) * block_bytes
            self.copies_before_write += run[1] - run[0]
            if self._due is None:
                self._read(run)
            else:
                self._due.append(run)
        return True

    def _read(self, run: Run) -> None:
        offset, length = self._geometry.block_bytes_range(*run)
        buffer = self._pool.take(length)
        if buffer is None:
            self._pool.when_free(partial(self._read_later, run, self._cuts))
            return
        self._reads += 1
        self._read_primary(offset, buffer, partial(self._was_read, run, self._cuts, buffer))

    def _read_later(self, run: Run, cuts: int) -> None:
        if cuts == self._cuts:
            self._read(run)

    def _was_read(self, run: Run, cuts: int, buffer: memoryview, error: OSError | None) -> None:
        self._reads -= 1
        if cuts == self._cuts:
            self._urgent.discard(*run)
            self._urgent_bytes -= (run[1] - run[0]) * self._geometry.block_bytes
        if error is None:
            self._arrived(self._geometry.block_bytes_range(*run)[0], buffer)
        else:
            self._owner.not_read(*run, error)
        self._pool.give(buffer)
        self.proceed()

    # -- what was read --------------------------------------------------------------------------
    def _arrived(self, offset_bytes: int, content: memoryview) -> None:
        """A read has ended; the content belongs to whoever read it."""
        if self._revoked:
            return
        geometry, gate, taken = self._geometry, self._gate, self._gate.taken
        block_bytes = geometry.block_bytes
        first = offset_bytes // block_bytes
        came = BlockSet()
        for block in range(first, first - (-len(content) // block_bytes)):
            if taken.any(block, block + 1):
                at = (block - first) * block_bytes
                mask = gate.changes.of(block, pending=gate.is_cutting)
                if mask is None:
                    mask = whole_mask(geometry, block)
                raw = gather(geometry, block, mask, content[at : at + block_bytes])
                self._spool.put(block, mask, bytes(raw))
                came.add(block, block + 1)
        for run in came.runs():
            self._owner.has_read(*run)
            self._gate.copied(*run)

    # -- what became of a transfer (`TransfersOwner`) -------------------------------------------
    def copied(self, first: int, stop: int, length_bytes: int) -> None:
        """It has arrived before."""

    def not_read(self, first: int, stop: int, error: OSError) -> None:
        self._owner.not_read(first, stop, error)

    def not_compared(self, error: OSError) -> None:
        """Nothing is compared."""

    def not_written(self, first: int, stop: int, error: OSError, refusal: Refusal) -> None:
        """The spool takes everything."""

    def proceed(self) -> None:
        if self.idle:
            self._revoked = False
        self._owner.proceed()


class _Intake:
    """Where transfers go: what they have read is taken at once."""

    connected = True

    def __init__(self, scheduler: Scheduler, arrived: Callable[[int, memoryview], None]) -> None:
        self._scheduler = scheduler
        self._arrived = arrived

    def lands_late(self, error: OSError) -> bool:
        return False

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        """Nothing is compared."""
        self._scheduler.call_soon(done, OSError("the receiver's image is its own"))

    def write(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        self._arrived(offset_bytes, buffer)
        self._scheduler.call_soon(done, None)

    def zero(self, offset_bytes: int, length_bytes: int, done: Done) -> None:
        self.write(offset_bytes, memoryview(bytes(length_bytes)), done)
