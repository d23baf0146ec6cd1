"""The kernel's part of the direct path, one effect at a time, and what a host sees of it.

`SimEra` is the era device over a `SimDisk`: a write marks its blocks in the era that is current
when the device gets to it, which is at once or at the next `work` (`defers`), and goes to the disk
after that, whoever submits it.  It is counted when it ends, however it ends, or when it begins
(`counts_at_start`), as kernels before 6.3 do.  A discard is split into pieces of at most a block,
wherever they begin, and each piece marks the first block that it touches and no other.

`SimKernel` is the table above it.  Its barrier is the real one (`simhelper`): each `step` takes it
one call to the kernel further, and between two of them anything may happen.  `give_up` has a call
fail (a deadline, no memory), `lose_helper` ends the helper there, and either table is in force; the
death of bitmapd ends the helper too, and nobody is told.  What the helper remembers from one
barrier to the next dies with it.

Writes of hosts are `Bio`s: split at the table's segments, sent to the era device or to the gate,
held while the table is suspended, and sent to the next gate again when one died.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitmapd.gate.direct import BarrierDone, Counters, HostCounters, Landed, SwapDone
from bitmapd.gate.routes import DIRECT, GATE, Run, Segment
from bitmapd.media.base import AllocationDone, Device, Done
from bitmapd.media.buffers import aligned
from bitmapd.record.geometry import Geometry
from dmctl.model.era import runs
from tests.support.sim import SECTOR, Chooser, SimDisk, SimOp
from tests.support.simhelper import Lockstep, Marks, SimHelper


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
        self.counting = True  # queue/iostats
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
        for_hosts, at_start, counted = self.for_hosts, self.counts_at_start, self.counting

        def ended(error: OSError | None) -> None:
            if counted and not at_start:
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

        if counted and at_start:
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


@dataclass(slots=True)
class _Barrier:
    segments: list[Segment] | None
    swaps: bool
    done: BarrierDone | SwapDone
    process: Lockstep
    older: Marks | None  # a snapshot that a helper left which died


class SimStat:
    """The era device's counters, as `media/blockstat` reads them."""

    def __init__(self, era: SimEra) -> None:
        self._era = era
        self.lapses = 0

    def read(self) -> list[int]:
        self.lapses += not self._era.counting
        fields = [0] * 17
        fields[6], fields[11] = self._era.written_bytes // SECTOR, self._era.discards
        return fields

    def switch_on(self) -> bool:
        was_off = not self._era.counting
        self._era.counting = True
        return was_off


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

    def __init__(self, geometry: Geometry, disk: SimDisk, era: SimEra | None = None) -> None:
        self.geometry = geometry
        self.size_bytes, self.block_bytes = geometry.size_bytes, geometry.block_bytes
        self.disk = disk
        self.era = era or SimEra(disk, geometry)
        self.table: list[Segment] = [(0, geometry.size_bytes, GATE)]
        self.inactive: list[Segment] | None = None
        self.coming: list[Segment] | None = None  # the resume that is under way has it
        self.snapshot: Marks | None = None
        self.metadata_used = 10  # of METADATA_BLOCKS
        self.suspended = False
        self.gate: Device | None = None
        self.busy: _Barrier | None = None
        self.in_flight: list[Bio] = []
        self.held: list[Bio] = []  # by the suspend
        self._at_gate: list[tuple[Bio, int, int]] = []  # bio, first byte, end byte
        self._seen = self.stat()  # what bitmapd sees
        self._helper = SimHelper(self, lambda: self.era.current)

    # -- Kernel ---------------------------------------------------------------------------
    def counters(self) -> Counters:
        fields = self._seen.read()
        return Counters(fields[6] * SECTOR, fields[11], self._seen.lapses)

    def host_counters(self) -> HostCounters:
        era = self.era
        return HostCounters(era.writes, era.written_bytes, era.discards, 0)

    def barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        self._must_be_free()
        wanted = None if segments is None else list(segments)
        process = self._helper.begin(wanted, since_era, self._seen.lapses)
        self.busy = _Barrier(wanted, False, done, process, self.snapshot)

    def swap(self, segments: Sequence[Segment], done: SwapDone) -> None:
        self._must_be_free()
        wanted = list(segments)
        gone = self.direct(self.table) - self.direct(wanted)
        if gone:
            raise AssertionError(f"extents {gone} are to leave the table without a barrier")
        self.busy = _Barrier(wanted, True, done, self._helper.begin_swap(wanted), self.snapshot)

    def _must_be_free(self) -> None:
        if self.busy is not None:
            raise AssertionError("a barrier was asked for while another one was under way")

    # -- what the helper asks of it -------------------------------------------------------
    @property
    def drained(self) -> bool:
        return not self.in_flight

    @property
    def is_suspended(self) -> bool:
        return self.suspended

    @property
    def has_inactive(self) -> bool:
        return self.inactive is not None

    def stat(self) -> SimStat:
        return SimStat(self.era)

    def load(self, segments: list[Segment] | None) -> None:
        self.inactive = segments

    def suspend(self, *, to_swap: bool) -> None:
        self.suspended = True
        if to_swap:
            self.coming, self.inactive = self.inactive, None

    def resume(self, *, swap: bool) -> None:
        """With the inactive table, if there is one; else the suspend was broken off."""
        if not swap:
            self.inactive = self.inactive or self.coming
        elif (table := self.coming or self.inactive) is not None:
            self.table, self.inactive = table, None
        self.coming = None
        self.suspended = False
        held, self.held = self.held, []
        for bio in held:
            self.submit(bio)

    def take_snapshot(self) -> Marks:
        self.era.roll_over()
        return Marks(self.geometry.blocks, self.era.current, self.era.marks)

    # -- the barrier, call by call --------------------------------------------------------
    @property
    def can_step(self) -> bool:
        barrier = self.busy
        return barrier is not None and (barrier.process.ended or barrier.process.waits_for())

    def step(self) -> None:
        """Take the barrier one call further."""
        barrier = self.busy
        if barrier is None or not self.can_step:
            raise AssertionError("there is nothing to do")
        if not barrier.process.ended:
            barrier.process.step()
            return
        self._must_be_tidy(barrier)
        self.busy = None
        collected = barrier.process.result
        if barrier.swaps:
            self._answer(barrier, barrier.process.error)
            return
        self._seen.lapses += self._helper.switched_on
        if collected is None:
            self._answer(barrier, barrier.process.error)
            return
        brought = runs(collected.blocks)
        landed = Landed(list(brought), collected.to_era, 0.001, collected.skipped, collected.damage)
        barrier.done(None, landed)  # type: ignore[arg-type]

    def _answer(self, barrier: _Barrier, error: OSError | None) -> None:
        """That it failed, or that a swap did not."""
        if barrier.swaps:
            barrier.done(error, 0.001)  # type: ignore[arg-type]
        else:
            barrier.done(error, None)  # type: ignore[arg-type]

    # -- what goes wrong ------------------------------------------------------------------
    def give_up(self) -> None:
        """The helper gives the barrier up, at whatever call it is, and says so; if all is done,
        what it says does not arrive."""
        barrier, self.busy = self.busy, None
        if barrier is None:
            return
        process = barrier.process
        if not process.ended:
            waits = not process.waits_for()
            process.fail(OSError(errno.EINTR if waits else errno.ENOMEM, "simulated"))
            while not process.ended:
                process.step()
        self._must_be_tidy(barrier)
        self._answer(barrier, process.error or OSError(errno.EPROTO, "simulated"))

    def _must_be_tidy(self, barrier: _Barrier) -> None:
        """Nothing waits for a helper that has answered."""
        left = [self.suspended and "a suspended device", self.inactive and "an inactive table"]
        if not barrier.process.failed_at_drop and self.snapshot is not barrier.older:
            left.append(self.snapshot is not None and "a snapshot")
        if any(left):
            raise AssertionError(f"a barrier that ended has left {left}")

    def lose_helper(self, *, swap: bool) -> None:
        """It dies; the next one clears what is loaded and resumes what is suspended.

        `swap`: the resume may have come first, which brings the new table if all was drained.
        """
        barrier = self._kill_helper()
        if not (swap and self.suspended and self.drained):
            self.inactive = self.coming = None
        if self.suspended:
            self.resume(swap=True)
        self._helper = SimHelper(self, lambda: self.era.current)
        if barrier is not None:
            self._answer(barrier, OSError(errno.EPIPE, "simulated"))

    def _kill_helper(self) -> _Barrier | None:
        barrier, self.busy = self.busy, None
        if barrier is not None:
            barrier.process.kill()
        return barrier

    def bitmapd_died(self, chooser: Chooser, *, swap: bool) -> None:
        """What it had sent to the primary is carried out or not; the helper goes with it."""
        self.gate = None
        self._kill_helper()
        self.lose_helper(swap=swap)
        self._seen = self.stat()
        self.era.work()  # the kernel has these
        others = [op for op in self.disk.pending if not self.owns(op)]
        finish_or_drop(self.disk, others, chooser)

    def end(self) -> None:
        """The machine has lost its power."""
        self._kill_helper()

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

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        """Reads do, too."""
        self.disk.read(offset_bytes, buffer, done)
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
        tables = (self.table, self.inactive or [], self.coming or [])
        return set().union(*map(self.direct, tables))

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
