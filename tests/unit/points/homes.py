"""A sender on simulated disks, and the receiver's words as a test says them.

Blocks of 4 KiB, four to an extent.  Nothing happens by itself: `run` lets the disks of the sender
do what they were asked for, `told` is what the receiver was told since it was last asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bitmapd.copier.throttle import Throttle
from bitmapd.gate.cycle import CutGate
from bitmapd.gate.direct import (
    BarrierDone,
    Counters,
    DirectPath,
    HostCounters,
    Landed,
    SwapDone,
)
from bitmapd.gate.routes import Routes, Segment
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool, aligned
from bitmapd.peer.frames import PeerError
from bitmapd.points.messages import (
    NIL,
    Committed,
    Data,
    End,
    Feature,
    Have,
    Hello2,
    Message,
    Role,
)
from bitmapd.points.sender import Sender, Settings
from bitmapd.points.uplink import Identity
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from tests.support.mirror import BLOCK, EXTENT, Answers, LoggedDisk, ScriptedPolicy
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop, drain

VOLUME, OURS, THEIRS, GENERATION = (bytes([number]) * 16 for number in (1, 2, 3, 4))
EXTENTS = 8
SPOOL_BLOCKS = 8
INTERVAL_S = 30.0
IDENTITY = Identity(VOLUME, OURS, (GENERATION, NIL, NIL, NIL), 0, 0, "vol0", "test")


def hello(**changes: Any) -> Hello2:
    values: dict[str, Any] = {
        "volume": VOLUME,
        "incarnation": THEIRS,
        "generations": (GENERATION, NIL, NIL, NIL),
        "size_bytes": EXTENTS * EXTENT,
        "block_bytes": BLOCK,
        "extent_bytes": EXTENT,
        "committed": 0,
        "applied": 0,
        "oldest_kept": 0,
        "role": Role.RECEIVER,
        "features": Feature.ZSTD,
        "credit_bytes": 1 << 20,
        "term": 0,
        "name": "vol0",
        "program": "test",
    }
    return Hello2(**(values | changes))


class FakeWire:
    """One connection."""

    def __init__(self) -> None:
        self.has_room = True
        self.reads = True
        self.sent: list[Message] = []
        self.geometry: Geometry | None = None
        self.is_open = True
        self.error: PeerError | None = None

    def send(self, message: Message) -> int:
        self.sent.append(message)
        return 1000

    def greeted(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def read(self, on: bool) -> None:
        self.reads = on

    def close(self, error: PeerError | None = None) -> None:
        self.is_open = False
        self.error = error


class IdleKernel:
    """Hosts could write past the gate, and do not."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def counters(self) -> Counters:
        return Counters(0, 0)

    def host_counters(self) -> HostCounters:
        return HostCounters(0, 0, 0, 0)

    def barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        self._loop.call_soon(done, None, Landed((), since_era, 0.0))

    def swap(self, segments: Sequence[Segment], done: SwapDone) -> None:
        self._loop.call_soon(done, None, 0.0)


class Ledger:
    """Superblock updates that end when the test says so."""

    def __init__(self) -> None:
        self.points: list[int] = []
        self.pending: list[Done] = []

    def commit(self, point: int, cut_ns: int, done: Done) -> None:
        self.points.append(point)
        self.pending.append(done)

    def finish(self, error: OSError | None = None) -> None:
        self.pending.pop(0)(error)


class Home:
    """See the module docstring."""

    def __init__(
        self,
        *,
        interval_s: float = INTERVAL_S,
        spool_blocks: int = SPOOL_BLOCKS,
        rate_bytes_per_s: float | None = None,
        pool_bytes: int = 1 << 20,
        identity: Identity = IDENTITY,
        compress: bool = True,
        spool_file: SimDisk | None = None,
        past_gate: bool = False,
    ) -> None:
        self.geometry = Geometry(EXTENTS * EXTENT, EXTENT, BLOCK)
        image = blank_image(self.geometry)
        self.loop = SimLoop()
        self.record = LoggedDisk("record", len(image), image)
        self.primary = LoggedDisk("primary", EXTENTS * EXTENT)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.store = RecordStore(
            self.geometry, load_image(image), self.record, self.loop, self._emit
        )
        self.policy = ScriptedPolicy()
        path = None
        if past_gate:
            kernel = IdleKernel(self.loop)
            path = DirectPath(self.geometry, kernel, Routes(), self._emit, since_era=1)
        self.gate = CutGate(
            self.geometry,
            self.primary,
            self.store,
            self.policy,
            self.loop,
            limit_extents=100,
            direct=path,
        )
        self.disks: list[SimDisk] = [self.record, self.primary]
        if spool_file is not None:
            self.disks.append(spool_file)
        self.ledger = Ledger()
        self.pool = BufferPool(self.loop, pool_bytes)
        self.sender = Sender(
            self.geometry,
            self.gate,
            self.primary,
            self.loop,
            self.pool,
            Throttle(rate_bytes_per_s, 4 * BLOCK),
            identity,
            self.ledger,
            Settings(interval_s, spool_blocks * BLOCK, compress),
            self._emit,
            lambda: 1_700_000_000_000_000_000,
            secondary="receiver",
            piece_bytes=2 * BLOCK,
            spool_file=spool_file,
        )
        self.wire = FakeWire()
        self.changes = 0
        self.sender.on_change = self._changed

    def _emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def _changed(self) -> None:
        self.changes += 1

    def names(self) -> list[str]:
        """Of the events so far."""
        names = [name for name, _ in self.events]
        self.events.clear()
        return names

    # -- hosts, disks and time --------------------------------------------------------------
    def write(self, block: int, count: int = 1, fill: int = 1) -> Answers:
        answers: Answers = []
        buffer = aligned(count * BLOCK)
        buffer[:] = bytes([fill]) * len(buffer)
        self.gate.write(block * BLOCK, buffer, answers.append)
        return answers

    def put(self, block: int, count: int = 1, fill: int = 1) -> None:
        answers = self.write(block, count, fill)
        self.run()
        assert answers == [None]

    def run(self, seconds: float = 0.0) -> None:
        self.loop.advance(seconds)
        drain(self.loop, *self.disks)

    def turn(self) -> None:
        self.loop.run_soon()

    def finish(self, kind: str) -> None:
        """The oldest request of the primary of this kind."""
        kinds = [op.kind for op in self.primary.pending]
        self.primary.finish(kinds.index(kind))
        self.loop.run_soon()

    def recorded(self) -> set[int]:
        return {e for first, stop in self.store.recorded_runs() for e in range(first, stop)}

    # -- the receiver -----------------------------------------------------------------------
    def connect(self) -> FakeWire:
        self.wire = FakeWire()
        self.sender.connected(self.wire)
        return self.wire

    def say(self, message: Message) -> None:
        self.sender.received(self.wire, message)
        self.turn()

    def greet(
        self, runs: Iterable[tuple[int, int, int]] = (), point: int = 0, **changes: Any
    ) -> None:
        """A connection, and the greeting with what the receiver has of an open point."""
        self.connect()
        self.say(hello(**changes))
        self.wire.sent.clear()
        self.say(Have(point, OURS if point else NIL, tuple(runs), True))

    def lose(self) -> None:
        self.sender.lost(self.wire, "gone")
        self.turn()

    def told(self) -> list[Message]:
        sent, self.wire.sent = self.wire.sent, []
        return sent

    def blocks(self) -> list[int]:
        """Those that were sent since it was last asked for anything."""
        return [
            entry.block
            for message in self.told()
            if isinstance(message, Data)
            for entry in message.entries
        ]

    def ended(self) -> End | None:
        """The END among what was told."""
        ends = [message for message in self.told() if isinstance(message, End)]
        return ends[-1] if ends else None

    def commit(self, point: int) -> None:
        """The receiver has it, and the record says so."""
        self.say(Committed(point, OURS))
        self.run()
        self.ledger.finish()
        self.turn()


def begun(**options: Any) -> Home:
    """Started, greeted, and with nothing to do."""
    home = Home(**options)
    home.sender.start()
    home.greet()
    return home
