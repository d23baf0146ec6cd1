"""What points cost on recorded traces, counted in simulated time.

    python -m tests.bench.pointtraces [--traces FILE ...]

Real gate, record and sender; the media, the link and the receiver are simulated, and so is time:
what is counted is the same on every machine.  The primary is read at 200 MB/s and answers writes
after 0.2 ms, hosts write when the trace says so, and whatever the receiver is sent it has after a
round trip of 10 ms.  Blocks of 64 KiB, an interval of 30 s.

- *points*: from an equal receiver on: cuts given up for want of room in the spool, and because a
  host had waited for `cut_patience`; copies-before-write; what is sent (pieces with the headers of
  their entries, before compression) for what changed between the points, in pieces of 4 KiB;
- *catch-up*: the link is away for half of the trace, then there are 20 Mbit/s and a spool of 64
  MiB: what is sent until the first point is committed, against what had changed when it came back.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bitmapd.copier.throttle import Throttle
from bitmapd.gate.cycle import CutGate, Void
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool
from bitmapd.peer.frames import PeerError
from bitmapd.points.messages import (
    NIL,
    Applied,
    Begin,
    Committed,
    Data,
    End,
    Feature,
    Have,
    Hello2,
    Message,
    Role,
)
from bitmapd.points.pieces import raw_bytes
from bitmapd.points.sender import Sender, Settings
from bitmapd.points.uplink import Identity
from bitmapd.record.geometry import MIB, Geometry
from bitmapd.record.store import RecordStore
from dmctl.simulate import Trace
from dmctl.simulate.files import load_trace
from tests.support.policies import KeepNothing
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop

ROOT: Final = Path(__file__).resolve().parents[2]
RECORDED: Final = ROOT / "tests" / "data" / "traces"
VOLUME, OURS, THEIRS, GENERATION = (bytes([number]) * 16 for number in (1, 2, 3, 4))
MBIT: Final = 1e6 / 8
PRIMARY_BYTES_PER_S: Final = 200e6
WRITE_S: Final = 0.0002
ONE_WAY_S: Final = 0.005
IN_FLIGHT_BYTES: Final = MIB  # what the link takes ahead of what it has carried
ENTRY_BYTES: Final = 40
REST_S: Final = 4 * 3600.0  # for the last point to be committed, without a load


class Primary(SimDisk):
    """Holds nothing: what counts is when it answers."""

    def __init__(self, loop: SimLoop, size_bytes: int) -> None:
        super().__init__("primary", 512)
        self._loop = loop
        self.size_bytes = size_bytes
        self._free_s = 0.0

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        now = self._loop.time()
        self._free_s = max(now, self._free_s) + len(buffer) / PRIMARY_BYTES_PER_S
        self._loop.call_later(self._free_s - now, done, None)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self._loop.call_later(WRITE_S, done, None)

    def flush(self, done: Done) -> None:
        self._loop.call_later(WRITE_S, done, None)


class SpoolDisk(Primary):
    """Writes take as long as reads.  It holds nothing either, and so is all zeros, as is all that
    was read from the primary."""

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self.read(offset_bytes, buffer, done)


class RecordDisk(SimDisk):
    """Every write is durable after a while."""

    def __init__(self, loop: SimLoop, image: bytes) -> None:
        super().__init__("record", len(image), image)
        self._loop = loop

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self._loop.call_later(WRITE_S, done, None)

    def flush(self, done: Done) -> None:
        self._loop.call_later(WRITE_S, done, None)


class Ledger:
    """A superblock."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def commit(self, point: int, cut_ns: int, done: Done) -> None:
        self._loop.call_later(WRITE_S, done, None)


class Link:
    """To a receiver that has room for everything and commits at once."""

    def __init__(self, site: Site, bytes_per_s: float) -> None:
        self._site = site
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._stamps: dict[int, int] = {}
        self.raw_bytes = 0  # with the headers of entries

    @property
    def has_room(self) -> bool:
        ahead_s = self._free_s - self._site.loop.time()
        return ahead_s * self._bytes_per_s < IN_FLIGHT_BYTES

    def send(self, message: Message) -> int:
        size_bytes = 100
        if isinstance(message, Data):
            geometry = self._site.geometry
            size_bytes = sum(
                ENTRY_BYTES + raw_bytes(geometry, entry.block, entry.mask)
                for entry in message.entries
            )
            self.raw_bytes += size_bytes
        loop = self._site.loop
        self._free_s = max(loop.time(), self._free_s) + size_bytes / self._bytes_per_s
        arrives_s = self._free_s - loop.time()
        if isinstance(message, Hello2):
            loop.call_later(arrives_s + 2 * ONE_WAY_S, self._greet, message)
        elif isinstance(message, End):
            loop.call_later(arrives_s + 2 * ONE_WAY_S, self._commit, message)
        elif not isinstance(message, Begin):
            loop.call_later(arrives_s, self._site.sender.drained, self)
        return size_bytes

    def _greet(self, ours: Hello2) -> None:
        theirs = Hello2(
            volume=ours.volume,
            incarnation=THEIRS,
            generations=ours.generations,
            size_bytes=ours.size_bytes,
            block_bytes=ours.block_bytes,
            extent_bytes=ours.extent_bytes,
            committed=1,
            applied=1,
            oldest_kept=0,
            role=Role.RECEIVER,
            features=Feature(0),
            credit_bytes=1 << 60,
            term=0,
            name=ours.name,
            program="bench",
        )
        self._site.sender.received(self, theirs)
        self._site.sender.received(self, Have(0, NIL, (), True))

    def _commit(self, end: End) -> None:
        self._site.sender.received(self, Committed(end.point, end.incarnation))
        self._site.sender.received(self, Applied(end.point))

    def greeted(self, geometry: Geometry) -> None:
        """Nothing is decoded."""

    def read(self, on: bool) -> None:
        """What is said is little."""

    def close(self, error: PeerError | None = None) -> None:
        raise AssertionError(f"the sender gives the link up: {error}")


class Site:
    """A volume whose receiver has its content of the start."""

    def __init__(self, trace: Trace, spool_bytes: int, file_bytes: int) -> None:
        self.trace = trace
        size_bytes = -(-trace.size_bytes // MIB) * MIB
        self.geometry = Geometry(size_bytes)
        self.loop = SimLoop()
        image = blank_image(self.geometry)
        store = RecordStore(
            self.geometry, load_image(image), RecordDisk(self.loop, image), self.loop, _ignore
        )
        primary = Primary(self.loop, size_bytes)
        self.gate = CutGate(
            self.geometry,
            primary,
            store,
            KeepNothing(),
            self.loop,
            limit_extents=self.geometry.extents,
        )
        self.sender = Sender(
            self.geometry,
            self.gate,
            primary,
            self.loop,
            BufferPool(self.loop, 64 * MIB),
            Throttle(None),
            Identity(VOLUME, OURS, (GENERATION, NIL, NIL, NIL), 0, 1, "vol0", "bench"),
            Ledger(self.loop),
            Settings(spool_bytes=spool_bytes, compress=False),
            _ignore,
            lambda: 1,
            secondary="receiver",
            spool_file=SpoolDisk(self.loop, file_bytes) if file_bytes else None,
        )
        self.sender.start()
        self._buffer = memoryview(bytearray(max(self._lengths())))
        self._next = 0

    def _lengths(self) -> Iterator[int]:
        trace = self.trace
        return (end - at for at, end in zip(trace.first_byte, trace.end_byte, strict=True))

    def connect(self, mbit_per_s: float) -> Link:
        link = Link(self, mbit_per_s * MBIT)
        self.sender.connected(link)
        return link

    def until(self, time_s: float) -> None:
        """What hosts write by then, at its times."""
        trace, loop = self.trace, self.loop
        while self._next < len(trace) and trace.time_s[self._next] <= time_s:
            at = self._next
            self._next += 1
            loop.advance(max(0.0, trace.time_s[at] - loop.time()))
            offset = trace.first_byte[at]
            self.gate.write(offset, self._buffer[: trace.end_byte[at] - offset], _ended)
            loop.run_soon()
        loop.advance(max(0.0, time_s - loop.time()))

    def rest(self) -> None:
        """Until the receiver has all of it."""
        end_s = self.loop.time() + REST_S
        while not self.sender.in_sync:
            if self.loop.time() > end_s:
                raise AssertionError(f"{self.trace.name} does not converge")
            self.loop.advance(1.0)


def _ignore(event: str, **fields: object) -> None:
    """Nobody looks."""


def _ended(error: OSError | None) -> None:
    """The host has its answer."""


@dataclass(frozen=True, slots=True)
class Points:
    committed: int
    given_up: int  # for want of room
    slow: int
    cbw_per_1000: float
    sent_per_changed: float


def points(trace: Trace, mbit_per_s: float, spool_bytes: int, file_bytes: int) -> Points:
    site = Site(trace, spool_bytes, file_bytes)
    link = site.connect(mbit_per_s)
    site.until(trace.end_s)
    site.rest()
    sender = site.sender
    return Points(
        sender.points,
        sender.voids[Void.SPOOL],
        sender.voids[Void.SLOW],
        sender.reading.copies_before_write * 1000 / len(trace),
        link.raw_bytes / sender.changed_bytes,
    )


def catch_up(trace: Trace, mbit_per_s: float, spool_bytes: int) -> tuple[float, float]:
    """MiB that had changed when the link came back, and what was sent until a point had all of it,
    as a multiple of that."""
    site = Site(trace, spool_bytes, 0)
    half_s = trace.end_s / 2
    site.until(half_s)
    changed = site.gate.changes.most_bytes
    link = site.connect(mbit_per_s)
    now_s = half_s
    while not site.sender.points:
        if now_s > trace.end_s + REST_S:
            raise AssertionError(f"{trace.name} does not converge")
        now_s += 1.0
        site.until(now_s)
    return changed / MIB, link.raw_bytes / changed


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", nargs="*", type=Path, default=[], help="more of them")
    parser.add_argument("--only", default="", help="traces whose names hold this")
    arguments = parser.parse_args()
    files = [*sorted(RECORDED.glob("*.csv.gz")), *arguments.traces]
    traces = [load_trace(file) for file in files if arguments.only in file.name]
    for mbit_per_s, spool, file in (
        (1000, 256, 4096),
        (100, 256, 4096),
        (100, 256, 0),
        (100, 64, 0),
    ):
        beside = f" and {file} in a file" if file else ""
        print(f"\n## {mbit_per_s} Mbit/s, spool of {spool} MiB in memory{beside}\n")
        row("trace", "writes", "points", "no room", "too slow", "CBW / 1,000", "sent ÷ changed")
        row(*["---"] * 7)
        found = []
        for trace in traces:
            one = points(trace, mbit_per_s, spool * MIB, file * MIB)
            found.append(one)
            cbw, sent = f"{one.cbw_per_1000:.1f}", f"{one.sent_per_changed:.3f}"
            row(trace.name, len(trace), one.committed, one.given_up, one.slow, cbw, sent)
        cbws = [one.cbw_per_1000 for one in found]
        sents = [one.sent_per_changed for one in found]
        row(
            "median, largest",
            sum(map(len, traces)),
            sum(one.committed for one in found),
            sum(one.given_up for one in found),
            sum(one.slow for one in found),
            f"{statistics.median(cbws):.1f}, {max(cbws):.1f}",
            f"{statistics.median(sents):.3f}, {max(sents):.3f}",
        )
    print("\n## Catch-up, 20 Mbit/s, spool of 64 MiB in memory\n")
    row("trace", "set, MiB", "sent ÷ set")
    row(*["---"] * 3)
    ratios = []
    for trace in traces:
        changed, ratio = catch_up(trace, 20, 64 * MIB)
        ratios.append(ratio)
        row(trace.name, f"{changed:.0f}", f"{ratio:.2f}")
    row("median, largest", "", f"{statistics.median(ratios):.2f}, {max(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
