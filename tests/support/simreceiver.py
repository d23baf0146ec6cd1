"""A receiver on simulated disks, and a small sender that writes its points by a script.

`Machine` has the two disks and whatever process runs on them; `crash` is a power cut, `recovered`
says what another power cut at this moment would leave, after a recovery.  `Script` speaks to it
through the codec: it changes its volume, sends blocks in any order and more than once, and ends
points.  It keeps what each point has to be, by incarnation and number.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from bitmapd.media.base import Done
from bitmapd.peer.frames import Frame, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.peer.words import Error
from bitmapd.points import codec
from bitmapd.points.messages import (
    NIL,
    Applied,
    Begin,
    Committed,
    Credit,
    Data,
    End,
    Entry,
    Feature,
    Have,
    Hello2,
    Message,
    Need,
    Received,
    Role,
)
from bitmapd.points.pieces import Packer, digest, gather, whole_mask
from bitmapd.receiver import places
from bitmapd.receiver.catchup import CatchUp
from bitmapd.receiver.commit import encode_page, first_page, slot_offset
from bitmapd.receiver.directory import KeptPoint
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import NO_KEEPER
from bitmapd.receiver.receiver import Identity, Receiver
from bitmapd.receiver.retention import Rules
from bitmapd.receiver.scan import Scanned, scan
from bitmapd.receiver.steps import Steps, run
from bitmapd.receiver.superblock import JournalSuperblock, encode_superblock
from bitmapd.record.copies import SUPERBLOCK_OFFSETS
from bitmapd.record.geometry import Geometry
from tests.support.sim import SimDisk, SimLoop, drain

BLOCK = 16384
GEOMETRY = Geometry(12 * BLOCK - 4096 - 512, 4 * BLOCK, BLOCK)  # the last block is short
IMAGE_BYTES = 12 * BLOCK
SEGMENT = 65536
SEGMENTS = 9
JOURNAL_BYTES = (1 << 20) + SEGMENTS * SEGMENT
JOURNAL = UUID("5d8f1c1e-0a3b-4c5d-8e7f-102132435465")
VOLUME = UUID("7a1c6f0e-3b52-4c8d-9d6e-1f2a3b4c5d6e")
GENERATION = UUID("10000000-0000-4000-8000-00000000000a")
STORED = 16  # copies of points


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals of simulated machines are small: they fill up, and can be looked at often."""
    monkeypatch.setattr(places, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(places, "MIN_JOURNAL_BYTES", JOURNAL_BYTES)


def superblock(**changes: Any) -> JournalSuperblock:
    values = {
        "journal": JOURNAL,
        "name": "vol0",
        "journal_bytes": JOURNAL_BYTES,
        "image": "file:/image",
        "image_bytes": IMAGE_BYTES,
        "created_s": 1_767_225_600,
        "updated_s": 1_767_225_600,
    }
    return JournalSuperblock(**(values | changes))


def formatted(block: JournalSuperblock) -> bytearray:
    """The journal as `dmctl receive` makes it."""
    raw = bytearray(block.journal_bytes)
    for offset in SUPERBLOCK_OFFSETS:
        raw[offset : offset + 4096] = encode_superblock(block)
    page = encode_page(first_page(block.journal.bytes))
    raw[slot_offset(1) : slot_offset(1) + 4096] = page
    return raw


class SimWire:
    """One connection.  What is sent on either side is frames, until the other side takes them."""

    peer = "script"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.to_sender: deque[Frame] = deque()
        self.to_receiver: deque[Frame] = deque()
        self.error: PeerError | None = None
        self.is_open = True
        self.reads = True
        self.sender_reads = True
        self._receiver_decoder = codec.Decoder()
        self._sender_decoder = codec.Decoder(GEOMETRY)

    # -- the receiver's side ------------------------------------------------------------------
    def send(self, message: Message) -> int:
        if self.is_open:
            _push(self.to_sender, message)
        return 0

    def sender_greeted(self, geometry: Geometry) -> None:
        self._sender_decoder.set_geometry(geometry)

    def greeted(self, geometry: Geometry) -> None:
        self._receiver_decoder.set_geometry(geometry)

    @property
    def has_room(self) -> bool:
        return len(self.to_sender) < self.machine.most_answers

    def read(self, on: bool) -> None:
        self.reads = on

    def close(self, error: PeerError | None = None) -> None:
        self.is_open = False
        self.error = self.error or error

    # -- the sender's side --------------------------------------------------------------------
    def say(self, message: Message) -> None:
        _push(self.to_receiver, message)

    def deliver(self) -> bool:
        """One frame to the receiver."""
        if not self.to_receiver or not self.is_open or not self.reads:
            return False
        message = self._receiver_decoder.feed(self.to_receiver.popleft())
        if message is not None:
            self.machine.receiver.received(self, message)
        return True

    def answer(self) -> Message | None:
        """The next message for the sender."""
        if not self.to_sender or not self.sender_reads:
            return None
        had_room = self.has_room
        frame = self.to_sender.popleft()
        if self.has_room and not had_room:
            self.machine.receiver.drained(self)
        return self._sender_decoder.feed(frame)

    def cut(self) -> None:
        self.is_open = False
        self.to_sender.clear()
        self.machine.receiver.lost(self)


def _push(queue: deque[Frame], message: Message) -> None:
    for part in codec.encode(message):
        queue.append(Frame(part.kind, part.flags, part.request, bytes(part.payload), 1))


class Machine:
    """A receiver's disks, and the process on them."""

    differs: Runs | None = None  # of an image that was a primary
    rules: Rules = ()
    most_bytes = 1 << 40  # that the image can have
    catch_up = CatchUp.KEEP
    most_answers = 8  # frames that the link takes before the sender has read one

    def __init__(self, image: SimDisk, journal: SimDisk, store: SimDisk | None = None) -> None:
        """`store`: where copies of points are kept, if they are."""
        self.store = store
        self.loop = SimLoop()
        self.image, self.journal = image, journal
        self.failures: list[OSError] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        scanned = self._scan()
        self.notes = scanned.notes
        journal_machine = Journal(journal, scanned, self._failed)
        self.receiver = Receiver(
            journal_machine,
            image,
            self.loop,
            Identity("vol0", bytes([9] * 16), "test"),
            lambda: 1_767_225_700,
            lambda event, **fields: self.events.append((event, fields)),
            self.differs,
            NO_KEEPER if store is None else SimKeeper(image, store),
            self.rules,
            enlarge=self._enlarge,
            catch_up=self.catch_up,
        )
        self.receiver.have_blocks = 3
        self.receiver.start()

    def _scan(self) -> Scanned:
        found: list[Scanned] = []

        def done(error: OSError | None, result: Scanned | None) -> None:
            if error is not None:
                raise error
            assert result is not None
            found.append(result)

        run(scan(self.journal), done)
        drain(self.loop, self.journal)
        return found[0]

    def _enlarge(self, size_bytes: int, done: Done) -> None:
        """What a device that was larger all the time has beyond the volume is anything."""
        self.image.extend(min(size_bytes, self.most_bytes), b"\xee")
        self.loop.call_soon(done, None)

    def _failed(self, error: OSError) -> None:
        self.failures.append(error)
        self.receiver.fail()

    @property
    def disks(self) -> tuple[SimDisk, ...]:
        return (self.image, self.journal, *([] if self.store is None else [self.store]))

    def settle(self) -> None:
        drain(self.loop, *self.disks)

    def finish_one(self, rng: random.Random) -> bool:
        busy = [disk for disk in self.disks if disk.pending]
        if busy:
            disk = rng.choice(busy)
            disk.finish(rng.randrange(len(disk.pending)))
            self.loop.run_soon()
        return bool(busy)

    def crash(self, rng: random.Random) -> Machine:
        """The process that comes after a power cut at this moment."""
        return type(self)(*(SimDisk(d.name, d.size_bytes, d.crash(rng)) for d in self.disks))

    def kill(self, rng: random.Random) -> Machine:
        """The process that comes after this one was killed: the disks go on, and what it had asked
        them for has happened, or not, or is in their caches."""
        for disk in self.disks:
            pending, disk.pending = disk.pending, []
            for op in pending:
                if op.kind == "write" and rng.random() < 0.7:
                    disk.carry_out(op.offset_bytes, op.data, op.fua and rng.random() < 0.5)
        return type(self)(*self.disks)

    def recovered(self, rng: random.Random, cut_short: bool) -> Machine:
        """As after `crash`, when all is applied; `cut_short`: at the second attempt."""
        machine = self.crash(rng)
        if cut_short:
            for _ in range(rng.randrange(12)):
                machine.finish_one(rng)
            machine = machine.crash(rng)
        machine.settle()
        return machine


class SimKeeper:
    """Copies of the image on a disk that forgets and tears, as its own are."""

    obstacle: str | None = None

    def __init__(self, image: SimDisk, store: SimDisk) -> None:
        self.image, self.store = image, store

    def keep(self, kept: KeptPoint, done: Done) -> None:
        run(self._copied(self.image, 0, self.store, place(kept.point)), _said(done))

    def drop(self, kept: KeptPoint, done: Done) -> None:
        self.store.zero(place(kept.point), IMAGE_BYTES, done)

    def restore(self, kept: KeptPoint, done: Done) -> None:
        run(self._copied(self.store, place(kept.point), self.image, 0), _said(done))

    def _copied(self, source: SimDisk, at: int, target: SimDisk, to: int) -> Steps[None]:
        buffer = memoryview(bytearray(IMAGE_BYTES))
        half = IMAGE_BYTES // 2
        for start in (0, half):
            yield partial(source.read, at + start, buffer[start : start + half])
            yield partial(target.write, to + start, buffer[start : start + half])
        yield target.flush


def _said(done: Done) -> Callable[[OSError | None, None], None]:
    return lambda error, _: done(error)


def place(point: int) -> int:
    """Where the copy of a point is in the store."""
    return point % STORED * IMAGE_BYTES


def fresh() -> Machine:
    """A receiver that has just been made."""
    image = SimDisk("image", IMAGE_BYTES)
    return Machine(image, SimDisk("journal", JOURNAL_BYTES, bytes(formatted(superblock()))))


class Script:
    """See the module docstring.  `points`: (incarnation, number) -> content, and in which order."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.content = bytearray(GEOMETRY.size_bytes)
        self.points: dict[tuple[bytes, int], bytes] = {}
        self.seen = 0  # the newest point that was said to be committed
        self.committed_by: dict[int, bytes] = {0: NIL}
        self.wire: SimWire | None = None
        self.serial = 0
        self.incarnation = NIL
        self.sent_entries = 0
        self.label = ""  # of the points that it ends
        self.step_ns = 1  # between two points
        self.restart()

    def restart(self) -> None:
        """Another process: what differs from the last point is anywhere."""
        self.incarnation = self.rng.randbytes(16)
        self.packer = Packer(GEOMETRY, VOLUME.bytes, compress=True)
        self.stamp = 0
        self.changed = {b: whole_mask(GEOMETRY, b) for b in range(GEOMETRY.blocks)}  # since point
        self.dirty = set(self.changed)
        self.sent: dict[int, Entry] = {}
        self.point = 0  # that is open; 0: not greeted yet
        self.ended = False
        self.wire = None
        self.ready = False
        self.credit = 0
        self.here: dict[int, int] = {}

    # -- hosts --------------------------------------------------------------------------------
    def write(self) -> None:
        if self.ended:
            return
        block = self.rng.randrange(GEOMETRY.blocks)
        piece = self.rng.randrange(whole_mask(GEOMETRY, block).bit_length())
        start = block * BLOCK + piece * 4096
        end = min(start + 4096, GEOMETRY.size_bytes)
        self.serial += 1
        kind = self.rng.random()
        if kind < 0.2:
            self.content[start:end] = bytes(end - start)
        elif kind < 0.6:
            self.content[start:end] = (self.serial.to_bytes(4, "big") * 1024)[: end - start]
        else:
            self.content[start:end] = self.rng.randbytes(end - start)
        self.changed[block] = self.changed.get(block, 0) | 1 << piece
        self.dirty.add(block)

    # -- the link -----------------------------------------------------------------------------
    def connect(self, machine: Machine) -> None:
        self.wire = SimWire(machine)
        self.ready = False
        self.here = {}
        machine.receiver.connected(self.wire)
        self.wire.say(self.hello())

    def hello(self, **changes: Any) -> Hello2:
        values: dict[str, Any] = {
            "volume": VOLUME.bytes,
            "incarnation": self.incarnation,
            "generations": (GENERATION.bytes, NIL, NIL, NIL),
            "size_bytes": GEOMETRY.size_bytes,
            "block_bytes": GEOMETRY.block_bytes,
            "extent_bytes": GEOMETRY.extent_bytes,
            "committed": 0,
            "applied": 0,
            "oldest_kept": 0,
            "role": Role.SENDER,
            "features": Feature.ZSTD,
            "credit_bytes": 0,
            "term": 0,
            "name": "vol0",
            "program": "script",
        }
        return Hello2(**(values | changes))

    def take(self) -> bool:
        """One message of the receiver."""
        wire = self.wire
        if wire is None:
            return False
        if not wire.is_open and not wire.to_sender:
            self.wire, self.ready = None, False
            return False
        message = wire.answer()
        if message is None:
            return False
        if isinstance(message, Hello2):
            self.credit = message.credit_bytes
            if not self.point:
                self.point = message.committed + 1
            elif message.committed == self.point:
                self.is_committed()
            assert message.committed == self.point - 1, "the receiver has other points"
        elif isinstance(message, Have):
            for first, count, stamp in message.runs:
                self.here.update((first + n, stamp + n) for n in range(count))
            if message.last:
                self._compare()
        elif isinstance(message, Committed):
            assert (message.point, message.incarnation) == (self.point, self.incarnation)
            self.is_committed()
        elif isinstance(message, Credit):
            self.credit += message.bytes
        elif isinstance(message, Need):
            for first, stop in message.runs:
                for block in range(first, stop):
                    self.changed[block] = whole_mask(GEOMETRY, block)
                    self.dirty.add(block)
                    self.ended = False
        else:
            assert isinstance(message, Applied | Received), message
        return True

    def _compare(self) -> None:
        """What was sent and is not there is dirty again."""
        lost = [b for b, entry in self.sent.items() if self.here.get(b) != entry.stamp]
        extra = set(self.here) - set(self.sent) - self.dirty
        assert not extra, "the receiver has what was never sent to it"
        for block in lost:
            del self.sent[block]
            self.dirty.add(block)
            self.ended = False
        self.here = {}
        assert self.wire is not None
        self.wire.say(self.begin())
        self.ready = True
        if self.ended:
            self._say_end()

    def is_committed(self) -> None:
        self.seen = max(self.seen, self.point)
        self.committed_by[self.point] = self.incarnation
        self.changed = {b: self.changed[b] for b in self.dirty}
        self.sent = {}
        self.ended = False
        self.point += 1
        if self.wire is not None and self.wire.is_open and self.ready:
            self.wire.say(self.begin())

    # -- points -------------------------------------------------------------------------------
    def begin(self, label: str = "") -> Begin:
        wall_ns = 1_767_225_600_000_000_000 + self.point * self.step_ns
        size_bytes = GEOMETRY.size_bytes
        return Begin(self.point, self.incarnation, self.point - 1, wall_ns, 0, size_bytes, label)

    def send(self, most: int = 1) -> bool:
        """Some dirty blocks, in one DATA."""
        if self.wire is None or not self.ready or self.ended or not self.dirty:
            return False
        blocks = sorted(self.rng.sample(sorted(self.dirty), min(most, len(self.dirty))))
        entries = []
        for block in blocks:
            start, length = GEOMETRY.block_bytes_range(block, block + 1)
            whole = memoryview(bytes(self.content[start : start + length]))
            mask = self.changed[block]
            self.stamp += 1
            raw = gather(GEOMETRY, block, mask, whole)
            entries.append(self.packer.pack(block, self.stamp, mask, raw))
        data = Data(tuple(entries))
        cost = codec.cost_bytes(data)
        if cost > self.credit:
            return False
        self.credit -= cost
        for entry in entries:
            self.sent[entry.block] = entry
            self.dirty.discard(entry.block)
            self.sent_entries += 1
        self.wire.say(data)
        return True

    def end(self) -> bool:
        """The point is what the volume is now."""
        if self.wire is None or not self.ready or self.ended or self.dirty:
            return False
        self.ended = True
        self.points[(self.incarnation, self.point)] = bytes(self.content)
        self._say_end()
        return True

    def _say_end(self) -> None:
        assert self.wire is not None
        if self.label:
            self.wire.say(self.begin(self.label))  # the label is that of the cut
        self.wire.say(self.end_message())

    def end_message(self) -> End:
        lines = [(e.block, e.stamp, e.mask, e.sum64) for e in self.sent.values()]
        return End(self.point, self.incarnation, len(lines), digest(lines))


def exchange(script: Script, machine: Machine, until: Callable[[], bool] = lambda: False) -> None:
    """All messages both ways, and all that the disks are asked for."""
    while not until():
        machine.settle()
        wire = script.wire
        moved = wire is not None and wire.deliver()
        if not (script.take() or moved):
            return


def point(script: Script, machine: Machine) -> None:
    """One whole point, committed and applied."""
    if script.wire is None:
        script.connect(machine)
    exchange(script, machine)
    while script.send(4):
        exchange(script, machine)
    assert script.end(), (script.dirty, script.credit)
    exchange(script, machine)


__all__ = ["Error", "Machine", "Script", "SimWire", "exchange", "fresh", "point", "small"]
