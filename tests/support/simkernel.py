"""The kernel's part of the direct path, one effect at a time, and what a host sees of it.

`SimEra` is the era device over a `SimDisk`: a write marks its blocks in the era that is current
when the device gets to it, which is at once or at the next `work` (`defers`), and goes to the disk
after that, whoever submits it.  It is counted when it ends, however it ends, or when it begins
(`counts_at_start`), as kernels before 6.3 do.  A discard is split into pieces of at most a block,
wherever they begin, and each piece marks the first block that it touches and no other.

`SimKernel` is the table above it with the barrier: each `step` takes the barrier under way one
stage further, and between two of them anything may happen.  `give_up` ends it with an error and
the old table (a deadline, no memory), `lose_helper` with an error and either table; the death of
bitmapd ends the helper too, and nobody is told.  What the helper remembers from one barrier to the
next dies with it.

Writes of hosts are `Bio`s: split at the table's segments, sent to the era device or to the gate,
held while the table is suspended, and sent to the next gate again when one died.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.direct import BarrierDone, Counters, HostCounters, Landed
from bitmapd.gate.routes import DIRECT, GATE, Run, Segment
from bitmapd.media.base import AllocationDone, Device, Done
from bitmapd.media.buffers import aligned
from bitmapd.record.geometry import Geometry
from tests.support.sim import Chooser, SimDisk, SimOp


class SimEra:
    """A `Device`; see the module docstring."""

    def __init__(self, disk: SimDisk, geometry: Geometry) -> None:
        self.disk = disk
        self.geometry = geometry
        self.current = 1
        self.marks: dict[int, set[int]] = {1: set()}
        self.counts_at_start = False
        self.defers: Callable[[], bool] = lambda: False
        self.for_hosts = False  # what is submitted now
        self.host_ops: list[SimOp] = []  # on the disk, or were
        self.writes = 0
        self.written_bytes = 0
        self.discards = 0
        self._deferred: list[Callable[[], None]] = []

    @property
    def name(self) -> str:
        return self.disk.name

    @property
    def size_bytes(self) -> int:
        return self.disk.size_bytes

    @property
    def block_size_bytes(self) -> int:
        return self.disk.block_size_bytes

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        self.disk.read(offset_bytes, buffer, done)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        length = len(buffer)
        span = self.geometry.block_span(offset_bytes, length)

        def count() -> None:
            self.writes += 1
            self.written_bytes += length

        self._submit(
            span, count, done, lambda ended: self.disk.write(offset_bytes, buffer, ended, fua)
        )

    def _submit(
        self, blocks: Run, count: Callable[[], None], done: Done, issue: Callable[[Done], None]
    ) -> None:
        for_hosts, at_start = self.for_hosts, self.counts_at_start

        def ended(error: OSError | None) -> None:
            if not at_start:
                count()
            done(error)

        def go() -> None:
            self.marks[self.current].update(range(*blocks))
            before = len(self.disk.pending)
            issue(ended)
            if for_hosts:
                pending = self.disk.pending
                self.host_ops = [op for op in self.host_ops if any(op is it for it in pending)]
                self.host_ops += pending[before:]

        if at_start:
            count()
        if self.defers():
            self._deferred.append(go)
        else:
            go()

    @property
    def has_deferred(self) -> bool:
        return bool(self._deferred)

    def work(self) -> None:
        """Mark and pass on what waits for that."""
        deferred, self._deferred = self._deferred, []
        for go in deferred:
            go()

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
        self.write(offset_bytes, memoryview(bytes(length_bytes)), done, fua)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        errors: list[OSError | None] = []
        block = self.geometry.block_bytes
        end = offset_bytes + length_bytes
        pieces = [(at, min(at + block, end)) for at in range(offset_bytes, end, block)]

        def count() -> None:
            self.discards += 1

        def ended(error: OSError | None) -> None:
            errors.append(error)
            if len(errors) == len(pieces):
                done(next(filter(None, errors), None))

        def trim(start: int, stop: int) -> None:
            first = start // block
            self._submit(
                (first, first + 1),
                count,
                ended,
                lambda landed: self.disk.trim(start, stop - start, landed, fua=fua),
            )

        for start, stop in pieces:
            trim(start, stop)

    def flush(self, done: Done) -> None:
        self.disk.flush(done)

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        self.disk.allocation(offset_bytes, length_bytes, done)

    def close(self) -> None:
        """It outlives whoever opened it."""

    def roll_over(self) -> int:
        """Begin a new era; the number of the one that has ended."""
        self.current += 1
        self.marks[self.current] = set()
        return self.current - 1

    def marked(self, first_era: int, last_era: int) -> set[int]:
        eras = (blocks for era, blocks in self.marks.items() if first_era <= era <= last_era)
        return set().union(*eras)


class Stage(IntEnum):
    ASKED = 0
    COUNTED = 1
    ROLLED_OVER = 2
    LOADED = 3
    SUSPENDED = 4
    RESUMED = 5
    READ = 6


@dataclass(slots=True)
class _Barrier:
    segments: list[Segment] | None
    since_era: int
    done: BarrierDone
    stage: Stage = Stage.ASKED
    era: int = 0
    writes: int = 0
    discards: int = 0
    marked: set[int] = field(default_factory=set)
    landed: Landed | None = None


@dataclass(slots=True, eq=False)
class Bio:
    """A change that a host has asked for; `kind` is "write", "zero" or "trim"."""

    kind: str
    offset_bytes: int
    data: bytes
    fua: bool
    done: Done
    parts: int = 0
    error: OSError | None = None


class SimKernel:
    """A `Kernel`; see the module docstring."""

    def __init__(self, geometry: Geometry, disk: SimDisk) -> None:
        self.geometry = geometry
        self.disk = disk
        self.era = SimEra(disk, geometry)
        self.table: list[Segment] = [(0, geometry.size_bytes, GATE)]
        self.inactive: list[Segment] | None = None
        self.suspended = False
        self.gate: Device | None = None
        self.busy: _Barrier | None = None
        self.in_flight: list[Bio] = []
        self.held: list[Bio] = []  # by the suspend
        self._at_gate: list[tuple[Bio, int, int]] = []  # bio, first byte, end byte
        # The helper's memory: counters as they were before the latest two snapshots.
        self._previous: tuple[int, int] | None = None
        self._earlier: tuple[int, int] | None = None
        self._next_era: int | None = None

    # -- Kernel ---------------------------------------------------------------------------
    def counters(self) -> Counters:
        era = self.era
        return Counters(era.written_bytes, era.discards)

    def host_counters(self) -> HostCounters:
        era = self.era
        return HostCounters(era.writes, era.written_bytes, era.discards, 0)

    def barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        if self.busy is not None:
            raise AssertionError("a barrier was asked for while another one was under way")
        if segments is not None:
            covered = [at for first, end, _ in segments for at in (first, end)]
            inner = covered[1:-1]
            if covered[0] or covered[-1] != self.geometry.size_bytes or inner[::2] != inner[1::2]:
                raise AssertionError(f"{segments} do not cover the volume once")
        self.busy = _Barrier(None if segments is None else list(segments), since_era, done)

    # -- the barrier, stage by stage ------------------------------------------------------
    @property
    def can_step(self) -> bool:
        barrier = self.busy
        return barrier is not None and not (barrier.stage is Stage.SUSPENDED and self.in_flight)

    def step(self) -> None:
        """Take the barrier one stage further."""
        barrier = self.busy
        if barrier is None or not self.can_step:
            raise AssertionError("there is nothing to do")
        if barrier.stage is Stage.ASKED:
            barrier.writes, barrier.discards = self.era.writes, self.era.discards
            read = (barrier.writes, barrier.discards)
            known = barrier.since_era == self._next_era and self._earlier == self._previous == read
            if barrier.segments is None and known:
                barrier.landed = Landed((), barrier.since_era - 1, 0.0, skipped=True)
                barrier.stage = Stage.READ
                return
        elif barrier.stage is Stage.COUNTED:
            barrier.era = self.era.roll_over()
            barrier.marked = self.era.marked(barrier.since_era, barrier.era)
        elif barrier.stage is Stage.ROLLED_OVER:
            self.inactive = barrier.segments or self.inactive
        elif barrier.stage is Stage.LOADED:
            self.suspended = True
        elif barrier.stage is Stage.SUSPENDED:
            self._resume()
        elif barrier.stage is Stage.RESUMED:
            self._read(barrier)
        else:
            self.busy = None
            barrier.done(None, barrier.landed)
            return
        barrier.stage = Stage(barrier.stage + 1)

    def _read(self, barrier: _Barrier) -> None:
        runs = self._runs(barrier.marked, self._discards_since(self._earlier))
        barrier.landed = Landed(runs, barrier.era, 0.001)
        self._earlier, self._previous = self._previous, (barrier.writes, barrier.discards)
        self._next_era = barrier.era + 1

    def _discards_since(self, previous: tuple[int, int] | None) -> bool:
        """Whether a discard may be marked in the eras that are collected."""
        return self.era.discards > (0 if previous is None else previous[1])

    def _runs(self, marked: set[int], widen: bool) -> list[Run]:
        blocks = BlockSet()
        for block in marked:
            blocks.add(block, block + 1 + widen)
        return list(blocks.runs())

    def _resume(self) -> None:
        """As a resume in the kernel does it: with the inactive table, if there is one."""
        if self.inactive is not None:
            self.table, self.inactive = self.inactive, None
        self.suspended = False
        held, self.held = self.held, []
        for bio in held:
            self.submit(bio)

    # -- what goes wrong ------------------------------------------------------------------
    def give_up(self) -> None:
        """The helper gives the barrier up, at whatever stage it is, and says so."""
        self.inactive = None
        self._end_with_error(errno.ETIMEDOUT)

    def lose_helper(self, *, swap: bool) -> None:
        """It dies; the next one resumes what is suspended and clears what is loaded.

        `swap`: the resume may have come first, which brings the new table if all was drained.
        """
        self._previous = self._earlier = None
        if not (swap and self.suspended and not self.in_flight):
            self.inactive = None
        self._end_with_error(errno.EPIPE)

    def _end_with_error(self, number: int) -> None:
        barrier, self.busy = self.busy, None
        if self.suspended:
            self._resume()
        if barrier is not None:
            barrier.done(OSError(number, "simulated"), None)

    def bitmapd_died(self, chooser: Chooser, *, swap: bool) -> None:
        """What it had sent to the primary is carried out or not; the helper goes with it."""
        self.gate = self.busy = None
        self.lose_helper(swap=swap)
        self.era.work()  # the kernel has these
        others = [op for op in self.disk.pending if not self.owns(op)]
        finish_or_drop(self.disk, others, chooser)

    def new_gate(self, gate: Device) -> None:
        """Requests that the dead one had not answered are sent again."""
        self.gate = gate
        for request in list(self._at_gate):
            self._send(request)

    # -- hosts ----------------------------------------------------------------------------
    def write(self, kind: str, offset_bytes: int, data: bytes, done: Done, fua: bool) -> None:
        self.submit(Bio(kind, offset_bytes, data, fua, done))

    def flush(self, done: Done) -> None:
        """Flushes pass the table by."""
        self.disk.flush(done)
        self.era.host_ops.append(self.disk.pending[-1])

    def submit(self, bio: Bio) -> None:
        if self.suspended:
            self.held.append(bio)
            return
        self.in_flight.append(bio)
        end = bio.offset_bytes + len(bio.data)
        pieces = [
            (max(first, bio.offset_bytes), min(stop, end), kind)
            for first, stop, kind in self.table
            if first < end and stop > bio.offset_bytes
        ]
        bio.parts = len(pieces)
        for first, stop, kind in pieces:
            if kind == DIRECT:
                self.era.for_hosts = True
                self._issue(self.era, bio, first, stop, self._ended(bio))
                self.era.for_hosts = False
            else:
                self._at_gate.append((bio, first, stop))
                self._send((bio, first, stop))

    def _issue(self, device: Device, bio: Bio, first: int, stop: int, done: Done) -> None:
        if bio.kind == "write":
            buffer = aligned(stop - first)
            buffer[:] = bio.data[first - bio.offset_bytes : stop - bio.offset_bytes]
            device.write(first, buffer, done, bio.fua)
        elif bio.kind == "zero":
            device.zero(first, stop - first, done, fua=bio.fua)
        else:
            device.trim(first, stop - first, done, fua=bio.fua)

    def _send(self, request: tuple[Bio, int, int]) -> None:
        gate, (bio, first, stop) = self.gate, request
        if gate is None:
            return

        def answered(error: OSError | None) -> None:
            self._at_gate.remove(request)
            self._ended(bio)(error)

        self._issue(gate, bio, first, stop, answered)

    def _ended(self, bio: Bio) -> Done:
        def ended(error: OSError | None) -> None:
            bio.error = bio.error or error
            bio.parts -= 1
            if not bio.parts:
                self.in_flight.remove(bio)
                bio.done(bio.error)

        return ended

    # -- questions ------------------------------------------------------------------------
    def direct(self, table: list[Segment]) -> set[int]:
        """Extents that are direct in a table."""
        per = self.geometry.extent_bytes
        return {
            extent
            for first, stop, kind in table
            if kind == DIRECT
            for extent in range(first // per, -(-stop // per))
        }

    def may_be_direct(self) -> set[int]:
        """In the table that is in force, or in the one that is loaded."""
        return self.direct(self.table) | self.direct(self.inactive or [])

    def owns(self, op: SimOp) -> bool:
        """Whether an operation on the disk is a host's, which came there without the gate."""
        return any(op is theirs for theirs in self.era.host_ops)


def finish_or_drop(disk: SimDisk, ops: list[SimOp], chooser: Chooser) -> None:
    """A process died: each operation it had submitted is carried out or not, and nobody hears."""
    for op in ops:
        index = next(i for i, other in enumerate(disk.pending) if other is op)
        if op.kind != "open" and chooser.random() < 0.7:
            op.done = lambda error, *rest: None
            disk.finish(index)
        else:
            del disk.pending[index]
