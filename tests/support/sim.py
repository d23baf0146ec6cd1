"""A simulated machine: a clock, an event loop and disks that forget, tear and reorder.

`SimLoop` is a `Scheduler` whose time moves only when told.  `SimDisk` is a `Device` with a volatile
cache: a completed write is visible to reads at once, but durable only after a flush or with FUA.
Nothing completes by itself: `pending` operations are finished one by one, in whatever order the
test chooses.  `crash` gives the medium after a power cut: each write that was not made durable
(completed or in flight) is kept, lost or torn at 512-byte sectors, as the given chooser says.

With `luck` an operation that fails does harm: a write is carried out in part, and a flush loses
some of what was volatile, once, as the kernel reports it once.  With `writes_late` the disk is a
server: what a lost connection or a process that died had sent stays with it as `ghosts`, which land
when the test says so, at the latest `LATE_S` after the next connection.
"""

from __future__ import annotations

import errno
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from bitmapd.errors import Unanswered
from bitmapd.media.base import AllocationDone, Done

SECTOR = 512
LATE_S = 20.0

Volatile = tuple[int, int, bytes]  # serial number, offset, data


class Chooser(Protocol):
    """The part of `random.Random` that a power cut needs."""

    def random(self) -> float: ...


@dataclass(order=True)
class SimTimer:
    due_s: float
    serial: int
    callback: Callable[..., Any] = field(compare=False)
    args: tuple[Any, ...] = field(compare=False)
    cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        self.cancelled = True


class SimLoop:
    """A `Scheduler` with simulated time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._soon: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._timers: list[SimTimer] = []
        self._serial = itertools.count()

    def time(self) -> float:
        return self.now_s

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        self._soon.append((callback, args))

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        timer = SimTimer(self.now_s + delay, next(self._serial), callback, args)
        heapq.heappush(self._timers, timer)
        return timer

    def run_soon(self) -> None:
        """Run everything that is ready, without moving time."""
        while self._soon:
            callback, args = self._soon.popleft()
            callback(*args)

    def run_soon_once(self) -> None:
        """One turn: what is ready now."""
        for _ in range(len(self._soon)):
            callback, args = self._soon.popleft()
            callback(*args)

    def advance(self, seconds: float) -> None:
        """Move time, running timers as they come due."""
        end = self.now_s + seconds
        self.run_soon()
        while self._timers and self._timers[0].due_s <= end:
            timer = heapq.heappop(self._timers)
            self.now_s = max(self.now_s, timer.due_s)
            if not timer.cancelled:
                timer.callback(*timer.args)
                self.run_soon()
        self.now_s = end


@dataclass
class SimOp:
    kind: str
    offset_bytes: int
    data: bytes
    length_bytes: int
    buffer: memoryview | None
    done: Done
    fua: bool
    serial: int = 0  # flush: makes durable the writes completed before this serial number


class SimDisk:
    """A `Target` (and so a `Device`) in memory; see the module docstring."""

    block_size_bytes = SECTOR

    def __init__(self, name: str, size_bytes: int, content: bytes | None = None) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.durable = bytearray(content if content is not None else bytes(size_bytes))
        self.visible = bytearray(self.durable)
        self.volatile: list[Volatile] = []  # completed, not durable, oldest first
        self._serial = 0
        self.pending: list[SimOp] = []
        self.fail_next: dict[str, list[int]] = {}  # kind -> errno for the next operations
        self.unreadable: set[int] = set()  # bytes whose reading ends in EIO
        self.connected = True
        self.writes_late = False
        self.luck: Chooser | None = None
        self.ghosts: list[SimOp] = []
        self.history: list[tuple[str, int, int]] = []

    def extend(self, size_bytes: int, content: bytes) -> None:
        """The medium is larger from now on, and has this where there was nothing before."""
        added = (content * size_bytes)[: max(0, size_bytes - self.size_bytes)]
        self.durable += added
        self.visible += added
        self.size_bytes += len(added)

    # -- Device ---------------------------------------------------------------------------
    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        self._submit("read", offset_bytes, b"", len(buffer), buffer, done)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self._submit("write", offset_bytes, bytes(buffer), len(buffer), None, done, fua)

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
        self._submit("write", offset_bytes, bytes(length_bytes), length_bytes, None, done, fua)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        self._submit("write", offset_bytes, bytes(length_bytes), length_bytes, None, done, fua)

    def flush(self, done: Done) -> None:
        self._submit("flush", 0, b"", 0, None, done)
        self.pending[-1].serial = self._serial

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        self._submit(
            "allocation",
            offset_bytes,
            b"",
            length_bytes,
            None,
            lambda error: done(error, [(length_bytes, 0)]),
        )

    def lands_late(self, error: OSError) -> bool:
        return self.writes_late and isinstance(error, Unanswered)

    def open(self, done: Done) -> None:
        self._submit("open", 0, b"", 0, None, done)

    def close(self) -> None:
        self.connected = False

    # -- the test's side ------------------------------------------------------------------
    def _submit(
        self,
        kind: str,
        offset: int,
        data: bytes,
        length: int,
        buffer: memoryview | None,
        done: Done,
        fua: bool = False,
    ) -> None:
        if offset < 0 or offset + length > self.size_bytes or offset % SECTOR or length % SECTOR:
            raise AssertionError(f"{self.name}: {kind} {offset}+{length} breaks the contract")
        self.pending.append(SimOp(kind, offset, data, length, buffer, done, fua))

    def finish(self, index: int = 0) -> None:
        """Complete one pending operation and call its `done`."""
        op = self.pending.pop(index)
        self.history.append((op.kind, op.offset_bytes, op.length_bytes))
        if not self.connected and op.kind != "open":
            op.done(OSError(errno.ENOTCONN, "not connected"))
            return
        errors = self.fail_next.get(op.kind)
        if errors:
            number = errors.pop(0)
            if number:
                if self.luck is not None:
                    self._fail_badly(op, self.luck)
                op.done(OSError(number, f"simulated {errno.errorcode.get(number, number)}"))
                return
        if op.kind == "read":
            assert op.buffer is not None
            end = op.offset_bytes + op.length_bytes
            if any(op.offset_bytes <= at < end for at in self.unreadable):
                op.done(OSError(errno.EIO, "simulated medium error"))
                return
            op.buffer[:] = self.visible[op.offset_bytes : end]
        elif op.kind == "write":
            self.carry_out(op.offset_bytes, op.data, op.fua)
        elif op.kind == "flush":
            for serial, offset, data in self.volatile:
                if serial < op.serial:
                    self.durable[offset : offset + len(data)] = data
            self.volatile = [write for write in self.volatile if write[0] >= op.serial]
        elif op.kind == "open":
            self.connected = True
        op.done(None)

    def leave_unanswered(self, index: int, number: int) -> None:
        """A server may carry it out yet."""
        op = self.pending.pop(index)
        if op.kind == "write":
            self.ghosts.append(op)
        op.done(Unanswered(number, "it was not answered"))

    def carry_out(self, offset: int, data: bytes, fua: bool) -> None:
        end = offset + len(data)
        self.visible[offset:end] = data
        if fua:
            # Older volatile writes to the same place must not come back over this one.
            self.volatile = [piece for old in self.volatile for piece in _outside(old, offset, end)]
            self.durable[offset:end] = data
        else:
            self.volatile.append((self._serial, offset, data))
            self._serial += 1

    def resize(self, size_bytes: int, filling: bytes) -> None:
        """Cut off what is beyond, or add bytes like this one."""
        for content in (self.durable, self.visible):
            del content[size_bytes:]
            content.extend(filling * (size_bytes - len(content)))
        self.size_bytes = size_bytes

    def sync(self) -> None:
        """Everything that is volatile becomes durable."""
        for _, offset, data in self.volatile:
            self.durable[offset : offset + len(data)] = data
        self.volatile = []

    def _fail_badly(self, op: SimOp, luck: Chooser) -> None:
        if op.kind == "write":
            share = (0.0, 0.5, 1.0)[int(luck.random() * 3)]  # of it lands
            for at in range(0, len(op.data), SECTOR):
                if luck.random() < share:
                    piece = op.data[at : at + SECTOR]
                    self.carry_out(op.offset_bytes + at, piece, op.fua and luck.random() < 0.7)
        elif op.kind == "flush":
            kept = []
            for serial, offset, data in self.volatile:
                fate = luck.random()
                if serial >= op.serial or fate < 0.3:
                    kept.append((serial, offset, data))
                elif fate < 0.6:
                    self.durable[offset : offset + len(data)] = data
            self.volatile = kept
            self.visible = bytearray(self.durable)
            for _, offset, data in kept:
                self.visible[offset : offset + len(data)] = data

    def abandon(self) -> None:
        """Whoever asked is gone, and hears of nothing.  A disk carries out what it was asked for; a
        server keeps it for later."""
        pending, self.pending = self.pending, []
        for op in pending:
            if op.kind == "write":
                if self.writes_late:
                    self.ghosts.append(op)
                else:
                    self.carry_out(op.offset_bytes, op.data, op.fua)

    def lose_connection(self) -> None:
        """What was in flight ends in an error, and may yet be carried out."""
        pending = list(self.pending)
        self.abandon()
        self.connected = False
        for op in pending:
            op.done(Unanswered(errno.ENOTCONN, "the connection was lost"))

    def greet(self, loop: SimLoop, luck: Chooser) -> None:
        """A new connection: every ghost lands within `LATE_S`, or never."""
        for ghost in self.ghosts:
            loop.call_later(luck.random() * LATE_S * 0.99, self.land, ghost)

    def land(self, ghost: SimOp) -> None:
        if ghost in self.ghosts:
            self.ghosts.remove(ghost)
            self.carry_out(ghost.offset_bytes, ghost.data, ghost.fua)

    def disappear(self, chooser: Chooser) -> None:
        """Lose power and come back: nothing works until `open`, and what was volatile is gone."""
        image = self.crash(chooser)
        pending, self.pending = self.pending, []
        self.ghosts = []
        self.durable, self.visible, self.volatile = bytearray(image), bytearray(image), []
        self.connected = False
        for op in pending:
            op.done(OSError(errno.ENOTCONN, "the connection was lost"))

    @property
    def to_come(self) -> list[SimOp]:
        """Writes that may be carried out at any moment."""
        return self.ghosts + [op for op in self.pending if op.kind == "write"]

    def crash(self, chooser: Chooser) -> bytes:
        """The medium after a power cut; the disk object is of no use afterwards."""
        image = bytearray(self.durable)
        writes = [(offset, data) for _, offset, data in self.volatile]
        writes += [(op.offset_bytes, op.data) for op in self.to_come]
        for offset, data in writes:
            fate = chooser.random()
            if fate < 0.4:
                continue
            if fate < 0.8:
                image[offset : offset + len(data)] = data
                continue
            for at in range(0, len(data), SECTOR):
                if chooser.random() < 0.5:
                    image[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]
        return bytes(image)


def _outside(write: Volatile, start: int, end: int) -> list[Volatile]:
    """The parts of a write that lie outside [start, end)."""
    serial, offset, data = write
    if offset + len(data) <= start or offset >= end:
        return [write]
    parts = []
    if offset < start:
        parts.append((serial, offset, data[: start - offset]))
    if offset + len(data) > end:
        parts.append((serial, end, data[end - offset :]))
    return parts


def drain(loop: SimLoop, *disks: SimDisk) -> None:
    """Complete everything in order of submission until nothing is pending at this time."""
    loop.run_soon()
    while any(disk.pending for disk in disks):
        for disk in disks:
            while disk.pending:
                disk.finish()
                loop.run_soon()
