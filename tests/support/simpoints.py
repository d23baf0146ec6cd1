"""A volume and its receiver, both real, on disks that forget, tear and reorder.

`Site` is a process at the primary's side: gate, record, clearing, sender.  `Machine` (simreceiver)
is the one at the other side.  Between them messages travel as frames, one at a time, and are gone
when the link is cut.  `World` makes them do things at random, or as a test says, and knows what
hosts have submitted: `model`, and by incarnation and number what each point has to be.

Looked at after every step, with power cuts of all disks at random, and a recovery of the receiver
that may itself be cut short:

I1 The receiver holds, byte for byte, the model at the cut of the point that its commit page names;
   and that is no older than any that the sender was told of.
I2 Every extent in which the primary differs from the receiver is in the stored record.
I3 When all faults are over, both sides become equal, and nothing is dirty.
I4 A comparison finds no difference but where a medium has changed by itself.

The volume of a `Growing` world grows now and then, in the steps of `volume.resize`, the receiver
first: a point has the size of the volume at its cut, and beyond it the receiver has nothing that
counts.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from bitmapd.copier.engine import CopyState
from bitmapd.copier.throttle import Throttle
from bitmapd.copier.verify import Verify, VerifyResult
from bitmapd.gate.cycle import CutGate, Void
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool, aligned
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.points.messages import NIL, Committed, End, Message
from bitmapd.points.overflow import BATCH_BYTES
from bitmapd.points.sender import Sender, Settings
from bitmapd.points.sums import BySums
from bitmapd.points.uplink import Identity
from bitmapd.predict.policy import Policy
from bitmapd.receiver import receiver
from bitmapd.receiver.places import Places
from bitmapd.receiver.steps import Steps, run
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import SUPERBLOCK_OFFSETS, Loaded, encode_superblock
from bitmapd.record.store import RecordStore
from tests.support import simreceiver
from tests.support.policies import MischievousPolicy
from tests.support.records import blank_image, load_image, superblock
from tests.support.sim import SECTOR, SimDisk, SimLoop
from tests.support.simreceiver import BLOCK, GENERATION, GEOMETRY, VOLUME, Machine, SimWire, fresh

SIZE = GEOMETRY.size_bytes
EXTENT = GEOMETRY.extent_bytes
INTERVAL_S = 2.0
SPOOL_BYTES = 6 * BLOCK
SIZES = (SIZE, SIZE + 512, 12 * BLOCK, 13 * BLOCK)
NEW = b"\x5a\xa5"  # what the primary has where the volume grows


ASKED = Void.ASKED


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `simreceiver.small`; credit for what a small journal frees is worth a message."""
    simreceiver.small(monkeypatch)
    monkeypatch.setattr(receiver, "CREDIT_BYTES", 4096)


class Wrong(AssertionError):
    """One of the invariants does not hold."""


class PrimaryDisk(SimDisk):
    """Tells what was submitted, in the order of submission."""

    submitted: Callable[[int, bytes], None] | None = None

    def _told(self, offset_bytes: int, data: bytes) -> None:
        if self.submitted is not None:
            self.submitted(offset_bytes, data)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self._told(offset_bytes, bytes(buffer))
        super().write(offset_bytes, buffer, done, fua)

    def zero(self, offset_bytes: int, length_bytes: int, done: Done, **options: Any) -> None:
        self._told(offset_bytes, bytes(length_bytes))
        super().zero(offset_bytes, length_bytes, done, **options)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        self._told(offset_bytes, bytes(length_bytes))
        super().trim(offset_bytes, length_bytes, done, fua=fua)


class LedgerDisk(SimDisk):
    """Sectors of a superblock: the number of the newest committed point; the volume's size."""

    def commit(self, point: int, cut_ns: int, done: Done) -> None:
        raw = bytearray(SECTOR)
        raw[:8] = point.to_bytes(8, "little")
        self.write(0, memoryview(raw), done, fua=True)

    def grow(self, size_bytes: int, done: Done) -> None:
        raw = bytearray(SECTOR)
        raw[:8] = size_bytes.to_bytes(8, "little")
        self.write(SECTOR, memoryview(raw), done, fua=True)

    @property
    def point(self) -> int:
        return int.from_bytes(self.visible[:8], "little")


def size_said(ledger: bytes | bytearray) -> int:
    """The volume's size."""
    return int.from_bytes(ledger[SECTOR : SECTOR + 8], "little") or SIZE


def loaded(record: bytes, geometry: Geometry) -> Loaded:
    """A record whose superblock says this size."""
    image = bytearray(record)
    raw = encode_superblock(superblock(geometry))
    for offset in SUPERBLOCK_OFFSETS:
        image[offset : offset + len(raw)] = raw
    return load_image(bytes(image))


class Link:
    """The sender's end of a connection."""

    def __init__(self, world: World, wire: SimWire) -> None:
        self.world, self.wire = world, wire
        self.is_open = True

    @property
    def has_room(self) -> bool:
        return len(self.wire.to_receiver) < 4

    def send(self, message: Message) -> int:
        if isinstance(message, End):
            self.world.ended(message)
        if self.is_open:
            self.wire.say(message)
        return 100

    def greeted(self, geometry: Geometry) -> None:
        self.wire.sender_greeted(geometry)

    def read(self, on: bool) -> None:
        self.wire.sender_reads = on

    def close(self, error: PeerError | None = None) -> None:
        self.is_open = False
        if self.wire.is_open:
            self.wire.cut()
        self.world.closed(self, error)


class Site:
    """One process at the primary's side."""

    def __init__(
        self,
        world: World,
        primary: PrimaryDisk,
        record: SimDisk,
        ledger: LedgerDisk,
        policy: Policy | None = None,
    ) -> None:
        self.world = world
        self.primary, self.record, self.ledger = primary, record, ledger
        self.spool_file = SimDisk("spool", BATCH_BYTES * 3)
        self.loop = SimLoop()
        self.geometry = geometry = replace(GEOMETRY, size_bytes=size_said(ledger.visible))
        self.offered_bytes = 0  # to the receiver, before the volume grows
        self.is_growing = False  # one resize at a time
        self.incarnation = world.rng.randbytes(16)
        self.verifying: Verify | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.store = RecordStore(
            geometry, loaded(bytes(record.visible), geometry), record, self.loop, self._emit
        )
        self.policy = policy or MischievousPolicy(geometry.extents, world.rng)
        self.gate = world.gate_class(
            geometry, primary, self.store, self.policy, self.loop, limit_extents=2
        )
        self.sender = world.sender_class(
            geometry,
            self.gate,
            primary,
            self.loop,
            BufferPool(self.loop, 1 << 20),
            Throttle(None),
            Identity(
                volume=VOLUME.bytes,
                incarnation=self.incarnation,
                generations=world.generations,
                term=0,
                committed=ledger.point,
                name="vol0",
                program="test",
                promoted=world.promoted,
            ),
            ledger,
            Settings(interval_s=INTERVAL_S, spool_bytes=SPOOL_BYTES),
            self._emit,
            lambda: 1_767_225_600_000_000_000,
            secondary="receiver",
            piece_bytes=2 * BLOCK,
            spool_file=self.spool_file,
        )
        self.sender.uplink.slice_blocks = 2
        primary.submitted = world.submitted
        begin_cut = self.gate.begin_cut

        def cut(ready: Callable[[], None]) -> None:
            world.cut = bytes(world.model)
            begin_cut(ready)

        self.gate.begin_cut = cut  # type: ignore[method-assign]
        self.gate.take_recorded()
        self.sender.start()

    def _emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    # -- a larger size, as `volume.resize` and `volume.offering` take it up --------------------
    def offer(self, size_bytes: int) -> None:
        self.offered_bytes = size_bytes
        self.sender.uplink.offer(size_bytes)
        self.sender.uplink.close(reason="the volume grows")

    def withdraw(self) -> None:
        """The receiver cannot take it now."""
        self.offered_bytes = 0
        self.sender.uplink.offer(0)
        self.world.count["put off"] += 1

    def look(self) -> None:
        """Go on when the receiver has taken it."""
        theirs = self.sender.uplink.receiver
        if self.offered_bytes and theirs is not None and theirs.size_bytes >= self.offered_bytes:
            size_bytes, self.offered_bytes = self.offered_bytes, 0
            self.is_growing = True
            run(self._growing(replace(self.geometry, size_bytes=size_bytes)), self._has_grown)

    def _has_grown(self, error: OSError | None, _: None) -> None:
        self.is_growing = False

    def _growing(self, geometry: Geometry) -> Steps[None]:
        yield self.gate.prepare_growth
        yield partial(self.store.prepare_growth, geometry)
        yield partial(self.ledger.grow, geometry.size_bytes)
        if self.verifying is not None:
            self.verifying.cancel(OSError(errno.ECANCELED, "the volume has grown"))
        self.store.grow(geometry, ())
        self.sender.grow(geometry)
        self.gate.grow(geometry)
        if isinstance(self.policy, MischievousPolicy):
            self.gate.set_policy(MischievousPolicy(geometry.extents, self.world.rng))
        self.world.model += self.primary.visible[self.geometry.size_bytes : geometry.size_bytes]
        self.geometry = geometry
        self.world.count["grown"] += 1

    def write(self, offset: int, data: bytes, done: Done) -> None:
        buffer = aligned(len(data))
        buffer[:] = data
        self.gate.write(offset, buffer, done)


class World:
    """See the module docstring."""

    gate_class: type[CutGate] = CutGate
    sender_class: type[Sender] = Sender
    policy: Callable[[], Policy] | None = None
    generations: tuple[bytes, ...] = (GENERATION.bytes, NIL, NIL, NIL)
    promoted = False
    machine_made: Callable[[], Machine] = staticmethod(fresh)
    sizes: tuple[int, ...] = (SIZE,)  # that the volume has, one after the other

    def __init__(self, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.model = bytearray(SIZE)
        self.cut = bytes(SIZE)
        self.points: dict[tuple[bytes, int], bytes] = {}
        self.seen = 0  # the newest point that the sender was told of
        self.count: Counter[str] = Counter()
        self.flying: set[int] = set()  # sectors
        self.verified: list[tuple[OSError | None, VerifyResult]] = []
        self.damaged: set[int] = set()  # blocks of the image
        self.serial = 0
        self.link: Link | None = None
        self.machine = self.machine_made()
        primary = bytes(SIZE) + (NEW * SIZE)[: max(self.sizes) - SIZE]
        self.boot(primary, blank_image(GEOMETRY), bytes(SECTOR * min(2, len(self.sizes))))

    # -- processes --------------------------------------------------------------------------
    def end(self) -> None:
        self.note()

    def note(self) -> None:
        """Add up what this process of the sender has done."""
        sender = self.site.sender
        self.count["cbw"] += sender.reading.copies_before_write
        if sender.overflow is not None:
            self.count["spooled-out"] += sender.overflow.written_bytes
        self.count["waits"] += self.site.gate.waits
        for reason, count in sender.voids.items():
            self.count[f"void-{reason.value}"] += count

    def boot(self, primary: bytes, record: bytes, ledger: bytes) -> None:
        self.model[:] = primary[: size_said(ledger)]
        self.flying = set()
        self.site = Site(
            self,
            PrimaryDisk("primary", len(primary), primary),
            SimDisk("record", len(record), record),
            LedgerDisk("ledger", len(ledger), ledger),
            None if self.policy is None else self.policy(),
        )

    def crash_sender(self, *, power: bool = True) -> None:
        self.count["crashes"] += 1
        self.cut_link()
        images = []
        for disk in self.sender_disks:
            if not power:  # what completed is in the kernel's cache, which stays
                disk.sync()
            images.append(disk.crash(self.rng))
        self.note()
        self.boot(*images)

    def crash_receiver(self) -> None:
        self.count["crashes"] += 1
        self.cut_link()
        self.machine = self.machine.crash(self.rng)

    # -- the link ---------------------------------------------------------------------------
    def connect(self) -> None:
        if self.link is None:
            wire = SimWire(self.machine)
            self.link = Link(self, wire)
            self.machine.receiver.connected(wire)
            self.site.sender.connected(self.link)

    def cut_link(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.is_open = False
            link.wire.cut()
            self.site.sender.lost(link, "cut")

    def closed(self, link: Link, error: PeerError | None) -> None:
        if link is self.link:
            self.link = None
            if error is not None:
                raise Wrong(f"the sender refuses what the receiver says: {error.text}")

    def to_receiver(self) -> bool:
        link = self.link
        moved = link is not None and link.wire.deliver()
        if link is not None and link is self.link and link.has_room:
            self.site.sender.drained(link)
        return moved

    def to_sender(self) -> bool:
        link = self.link
        if link is None:
            return False
        if not link.wire.to_sender:
            if not link.wire.is_open:
                self.cut_link()
                if self.site.offered_bytes and _is_busy(link.wire.error):
                    self.site.withdraw()
                elif link.wire.error is not None:
                    raise Wrong(
                        f"the receiver refuses what the sender says: {link.wire.error.text}"
                    )
            return False
        message = link.wire.answer()
        if message is not None:
            if isinstance(message, Committed):
                self.told(message.point)
            self.site.sender.received(link, message)
        return True

    # -- what is known ----------------------------------------------------------------------
    def submitted(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data

    def ended(self, end: End) -> None:
        key = (end.incarnation, end.point)
        self.points[key] = self.cut  # that of a cut that was given up after its END is gone

    def told(self, point: int) -> None:
        if point < self.seen:
            raise Wrong("I1 points went back")
        self.seen = point
        self.count["points"] += 1

    # -- hosts ------------------------------------------------------------------------------
    def host(self) -> None:
        rng = self.rng
        if rng.random() < 0.05:
            self.flush()
            return
        length = rng.choice((1, 1, 8, 33, 70)) if rng.random() < 0.95 else 150
        first = rng.randrange(self.site.geometry.size_bytes // SECTOR - length + 1)
        if rng.random() < 0.6:  # some places are hot
            first = first // 3
        sectors = set(range(first, first + length))
        if sectors & self.flying:
            return
        self.flying |= sectors
        self.serial += 1

        def done(error: OSError | None) -> None:
            self.flying -= sectors
            self.count["writes"] += 1

        kind = rng.random()
        fill = rng.randbytes(8) if kind < 0.6 else self.serial.to_bytes(8, "big")
        name = "zero" if kind < 0.1 else "trim" if kind < 0.2 else "write"
        self.change(name, first * SECTOR, fill * (length * SECTOR // 8), done)

    def flush(self) -> None:
        self.site.gate.flush(lambda error: None)

    def change(self, kind: str, offset: int, data: bytes, done: Done) -> None:
        """A host's, of which only a write has data."""
        if kind == "write":
            self.site.write(offset, data, done)
        elif kind == "zero":
            self.site.gate.zero(offset, len(data), done)
        else:
            self.site.gate.trim(offset, len(data), done)

    # -- one thing at a time ----------------------------------------------------------------
    @property
    def sender_disks(self) -> tuple[SimDisk, ...]:
        return self.site.primary, self.site.record, self.site.ledger

    @property
    def disks(self) -> tuple[SimDisk, ...]:
        return *self.sender_disks, self.site.spool_file, *self.machine.disks

    def finish(self, disk: SimDisk, index: int = 0) -> None:
        disk.finish(index)
        self.run_soon()

    def run_soon(self) -> None:
        self.site.loop.run_soon()
        self.machine.loop.run_soon()

    @property
    def compares(self) -> bool:
        """The sender finds, turn by turn, what the receiver has of the open point."""
        return self.site.sender.uplink._work is not None

    def run_some(self) -> None:
        """As a rule everything that is ready; or so few turns that something else comes between."""
        if not self.compares and self.rng.random() < 0.8:
            self.run_soon()
            return
        for loop in (self.site.loop, self.machine.loop):
            loop.run_soon_once()

    def step(self, *, faults: bool = True) -> None:
        """One of the things that can happen now."""
        rng, link = self.rng, self.link
        self.count["steps"] += 1
        busy = [disk for disk in self.disks if disk.pending]
        may: list[tuple[float, Callable[[], object]]] = [(1.0, self.time_passes)]
        if busy:
            disk = rng.choice(busy)
            may.append((4.0, lambda: self.finish(disk, rng.randrange(len(disk.pending)))))
        if faults:
            may.append((3.0 if self.site.gate.is_cutting else 0.7, self.host))
            may.append((0.15, self.fault))
        if link is None:
            may.append((0.5, self.connect))
        else:
            if link.wire.to_receiver:
                may.append((2.0, self.to_receiver))
            if link.wire.to_sender or not link.wire.is_open:
                may.append((1.0, self.to_sender))
            if faults and self.compares:
                may.append((0.7, self.cut_link))
        may += self.beside(faults=faults)
        weights = [weight for weight, _ in may]
        ((_, action),) = rng.choices(may, weights)
        action()
        self.site.look()
        self.run_some()

    def beside(self, *, faults: bool) -> list[tuple[float, Callable[[], object]]]:
        """What else can happen, and how likely it is."""
        return []

    def time_passes(self) -> None:
        self.advance(self.rng.choice((0.001, 0.02, 0.06, 0.3, 1.1)))

    def fault(self) -> None:
        if len(self.sizes) > 1 and self.rng.random() < 0.2:
            self.grow()
            return
        x = self.rng.random()
        gate, sender = self.site.gate, self.site.sender
        if x < 0.3:
            gate.tick()
        elif x < 0.45:
            gate.drop_clean(range(self.site.geometry.extents))
        elif x < 0.6:
            self.cut_link()
            self.count["links"] += 1
        elif x < 0.65:
            sender.pause()
        elif x < 0.7:
            gate.take_recorded()
        elif x < 0.75:
            self.site.primary.fail_next.setdefault("read", []).append(5)
        elif x < 0.8:
            sender.cut("label")
        elif x < 0.81:
            self.verify()
        elif x < 0.83:
            self.site.primary.fail_next.setdefault("flush", []).append(5)
        elif x < 0.85:
            kind = self.rng.choice(("read", "write"))
            self.site.spool_file.fail_next.setdefault(kind, []).append(5)
        elif x < 0.92:
            self.crash_sender(power=self.rng.random() < 0.7)
        else:
            self.crash_receiver()
        if sender.state is CopyState.PAUSED and self.rng.random() < 0.7:
            sender.resume()

    def grow(self) -> None:
        site = self.site
        larger = [size for size in self.sizes if size > site.geometry.size_bytes]
        is_free = not site.offered_bytes and not site.is_growing
        if larger and site.sender.is_linked and is_free:
            site.offer(self.rng.choice(larger))

    def verify(self, *, repair: bool = False) -> list[tuple[OSError | None, VerifyResult]]:
        """Compare both sides; what it ends with comes into the list.  Nothing is to be found that
        `damage` has not done."""
        site, ended = self.site, self.verified
        if not site.sender.is_linked or site.verifying is not None or site.sender.sums.is_due:
            return ended

        def done(error: OSError | None, result: VerifyResult) -> None:
            site.verifying = None
            ended.append((error, result))
            self.count["verified"] += error is None
            runs = result.unexpected
            found = {at // BLOCK for low, count in runs for at in range(low, low + count, BLOCK)}
            if found - self.damaged:
                raise Wrong(f"I4 blocks {found - self.damaged} are said to differ")

        site.verifying = Verify(
            site.geometry,
            site.gate,
            BySums(site.geometry, site.primary.read, site.sender, site.loop,
                   BufferPool(site.loop, 1 << 20)),
            site.loop,
            repair=repair,
            done=done,
        )  # fmt: skip
        site.verifying.start()
        return ended

    def damage(self, block: int) -> None:
        """The medium of the image changes by itself."""
        self.damaged.add(block)
        for raw in (self.machine.image.visible, self.machine.image.durable):
            raw[block * BLOCK] ^= 0xFF

    def advance(self, seconds: float) -> None:
        self.site.loop.advance(seconds)
        self.machine.loop.advance(seconds)

    # -- looking ----------------------------------------------------------------------------
    def check(self) -> None:
        rng = self.rng
        self.look_at(self.machine.recovered(rng, cut_short=rng.random() < 0.3))

    def look_at(self, machine: Machine) -> None:
        """After a recovery."""
        page = machine.receiver.journal.page
        got = bytes(machine.image.visible[: page.committed_bytes or SIZE])
        if page.committed < self.seen:
            raise Wrong(f"I1 the receiver fell back from point {self.seen} to {page.committed}")
        if page.committed:
            wanted = {
                content for (_, number), content in self.points.items() if number == page.committed
            }
            exact = self.points.get((page.incarnation, page.committed))
            if got != exact and (exact is not None or got not in wanted):
                right = exact or next(iter(wanted), b"")
                blocks = range(-(-max(SIZES) // BLOCK))
                bad = [b for b in blocks if _block(got, b) != _block(right, b)]
                raise Wrong(f"I1 blocks {bad} of point {page.committed} are not those of its cut")
        self.check_record(got, page.committed)

    def check_record(self, got: bytes, committed: int) -> None:
        """I2, against what the receiver has."""
        rng = self.rng
        primary = self.site.primary.crash(rng)
        size_bytes = SIZE if len(self.sizes) == 1 else size_said(self.site.ledger.crash(rng))
        geometry = replace(GEOMETRY, size_bytes=size_bytes)
        bits = loaded(self.site.record.crash(rng), geometry).bits
        for extent in range(geometry.extents):
            at = slice(extent * EXTENT, min((extent + 1) * EXTENT, size_bytes))
            if primary[at] != got[at] and not bits[extent]:
                raise Wrong(f"I2 extent {extent} differs from point {committed} unrecorded")

    def at_rest(self) -> bool:
        site = self.site
        return site.gate.in_sync and site.sender.in_sync and not self.flying

    def run(self, steps: int) -> None:
        """At random, then without faults until all is at rest."""
        for _ in range(steps):
            self.step()
            self.check()
        if self.site.sender.state is CopyState.PAUSED:
            self.site.sender.resume()
        for number in range(20_000):
            self.step(faults=False)
            if number % 50 == 0:
                self.check()
            if self.at_rest():
                break
        else:
            raise Wrong(f"I3 it never came to rest: {self.site.sender.figures()}")
        self.settle()
        self.check()
        if not self.are_equal:
            raise Wrong("I3 at rest and not equal")

    @property
    def are_equal(self) -> bool:
        """Both sides, as far as the volume goes."""
        size_bytes = self.site.geometry.size_bytes
        return self.machine.image.visible[:size_bytes] == self.site.primary.visible[:size_bytes]

    def moves(self) -> bool:
        """Whether something moved that is neither disk nor link."""
        return False

    def settle(self) -> None:
        """Everything that is under way ends, in order."""
        moved = True
        while moved:
            self.run_soon()
            moved = False
            for disk in self.disks:
                while disk.pending:
                    self.finish(disk)
                    moved = True
            moved |= self.moves()
            while self.to_receiver() or self.to_sender():
                self.run_soon()
                moved = True


class Growing(World):
    """Whose volume becomes larger."""

    sizes = SIZES


def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal of a volume that has grown has larger maps, and its segments elsewhere."""

    def larger(self: Places) -> int:
        return int(self.geometry.size_bytes > SIZE)

    monkeypatch.setattr(Places, "map_bytes", property(lambda self: 4096 * (1 + larger(self))))
    monkeypatch.setattr(
        Places,
        "segments_offset",
        property(lambda self: (1 << 20) - self.segment_bytes * (1 - larger(self))),
    )


def _is_busy(error: PeerError | None) -> bool:
    return error is not None and error.code is ErrorCode.BUSY


def _block(content: bytes, block: int) -> bytes:
    return content[block * BLOCK : (block + 1) * BLOCK]
