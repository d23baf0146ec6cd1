"""Two appliances in one simulated world: one primary and one secondary that both reach, a record
disk each, a clock each, and a link that delays, loses its tail and ends.

Everything above the disks and the link is real: gate, copier, stored record, rights, node, the
encoding of every message.  Nothing happens by itself: `World.step` does one thing at random, and
`World.check` looks at what must hold after every single effect.

A block's content names the write it is from, and the world numbers the writes as they land on the
primary.  So a read can be judged: it must not show less than what was answered, or was read, before
it began.

What is checked:
1. No extent is both nodes' own, and what one owns the other knows of (rule 1).
2. Two nodes never have writes to the same block on their way at once.
3. Where primary and secondary differ, or a write is on its way, each live node that knows anything
   has the extent in its records, and one of the stored records names it, or the flag VOLATILE
   stands in one of the superblocks, or beside that of a keeper's host.  A node that writes has
   either in its own, or what it writes is in the other's stored record (partner_ack = stored); or
   the flag is in the other's, if its own record cannot be written.
4. Reads are those of one disk with two doors.
5. No message is refused, and nobody sees a split brain, since every proof of death is true.
6. A node that has said BYE or TAKEN owns nothing, and nothing of its is on its way.
7. What a node's kernel may write past its gate is its own, living or dead: the other knows it, and
   does not own it.
Of a keeper, node 2 of a world that is `kept`, 3 holds as well, while the host cannot have gone on
without it; and its stored record alone names what differs, or says that it may lack something.

With the trouble "kernel" hosts of one node write through the table of a simulated kernel
(`simkernel`), which goes on when the node's process dies; a fence ends both.
Once somebody has lied of a death (trouble "lie") 1, 2, 3 and 5 hold no more; 4 does, and what
follows.
And after `heal`: both are paired, nobody waits, nothing is dirty, both sides are equal.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from random import Random
from uuid import UUID

from bitarray import bitarray

from bitmapd.copier.engine import Copier, CopyState
from bitmapd.copier.throttle import Backoff, Throttle
from bitmapd.errors import BitmapdError, BusyError, UnreachableError
from bitmapd.gate.direct import DirectPath
from bitmapd.gate.gate import Gate
from bitmapd.gate.promoted import PromotedPath
from bitmapd.gate.routes import Routes
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool, aligned
from bitmapd.partner import codec
from bitmapd.partner.greeting import NIL, OFFERED, REQUIRED, has
from bitmapd.partner.growth import Answer
from bitmapd.partner.holder import Hands, PairRecord
from bitmapd.partner.messages import Hello, HelloFlag, Message, Role
from bitmapd.partner.node import Lasting, Node, Phase, Proof, State
from bitmapd.partner.otherrecord import why_not
from bitmapd.partner.rights import MOST_REQUESTS, Rights
from bitmapd.peer import frames
from bitmapd.peer.frames import PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.record import layout
from bitmapd.record.extents import each, joined, runs_of
from bitmapd.record.geometry import Geometry
from bitmapd.record.pair_state import PairFlag, PairState
from bitmapd.record.store import RecordStore
from bitmapd.record.superblock import from_ids
from bitmapd.volume.keeping import NoHosts
from tests.support.policies import MischievousPolicy
from tests.support.records import VOLUME, blank_image, load_image, superblock
from tests.support.sim import LATE_S, SECTOR, SimDisk, SimLoop, SimOp
from tests.support.simkernel import SimKernel, finish_or_drop

BLOCK = 4096
PER_EXTENT = 2
EXTENT = PER_EXTENT * BLOCK
EXTENTS = 5
SIZE = EXTENTS * EXTENT - BLOCK
GEOMETRY = Geometry(SIZE, EXTENT, BLOCK)
LARGEST = 9 * EXTENT  # that a volume grows to


class Shared:
    """What a medium holds that several nodes reach."""

    def __init__(self, size_bytes: int) -> None:
        self.durable = bytearray(size_bytes)
        self.visible = bytearray(size_bytes)
        self.volatile: list[tuple[int, int, bytes]] = []
        self.serial = 0


class Path(SimDisk):
    """One node's way to a shared medium."""

    def __init__(self, name: str, shared: Shared, landed: Callable[[int, bytes], None]) -> None:
        self.shared = shared
        self._landed = landed
        super().__init__(name, len(shared.visible), b"")

    durable = property(lambda self: self.shared.durable, lambda self, value: None)  # type: ignore[assignment]
    visible = property(lambda self: self.shared.visible, lambda self, value: None)  # type: ignore[assignment]

    @property  # type: ignore[override]
    def volatile(self) -> list[tuple[int, int, bytes]]:
        return self.shared.volatile

    @volatile.setter
    def volatile(self, value: list[tuple[int, int, bytes]]) -> None:
        if hasattr(self, "pending"):
            self.shared.volatile = value

    @property  # type: ignore[override]
    def _serial(self) -> int:
        return self.shared.serial

    @_serial.setter
    def _serial(self, value: int) -> None:
        if hasattr(self, "pending"):
            self.shared.serial = value

    def carry_out(self, offset: int, data: bytes, fua: bool) -> None:
        self._landed(offset, data)
        super().carry_out(offset, data, fua)


class Connection:
    """Both directions of one link; what is on its way are frames."""

    def __init__(self) -> None:
        self.queues: tuple[deque[bytes], deque[bytes]] = (deque(), deque())  # to node 1, to node 2
        self.whole = True


class End:
    """A `Wire`: one node's end of a connection."""

    def __init__(self, world: World, side: Side, connection: Connection) -> None:
        self._side = side
        self.connection = connection
        self._out = connection.queues[2 - side.number]
        self._sequence = 0
        self.reader = frames.Reader()
        self.decoder = codec.Decoder()
        self.closed = False

    def send(self, message: Message) -> int:
        for part in codec.encode(message):
            self._sequence += 1
            if self.connection.whole and not self.closed:
                self._out.append(frames.encode(part, self._sequence))
        self._side.sent[type(message).__name__] = self._side.sent.get(type(message).__name__, 0) + 1
        return self._sequence

    def close(self, error: PeerError | None) -> None:
        if error is not None:
            for part in [frames.refusal(error.code, error.text)]:
                self._sequence += 1
                if self.connection.whole:
                    self._out.append(frames.encode(part, self._sequence))
        self.closed = True


class Side:
    """One node: its disks, and while it lives its process."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.alive = False
        self.incarnations = 0
        self.session = 0
        self.keeps = world.kept and number == 2
        self.record_image = blank_image(GEOMETRY)
        self.lasting = Lasting(True, 1, (b"\1" * 16, NIL, NIL, NIL), VOLUME.bytes)
        self.broken = False  # nothing can be written to the record's device
        self.went_on = False  # in a cut, with places that were in a record that is lost
        self.marked = False  # its own disk says what the record could not: it is VOLATILE
        self.sent: dict[str, int] = {}
        self.ghosts: list[tuple[Path, SimOp]] = []
        self.kernel: SimKernel | None = None  # the stack that hosts have, if this node has one
        self.stacks = 0  # that have gone
        self.primary: Path
        self.secondary: Path

    # -- life ---------------------------------------------------------------------------------
    def boot(self) -> None:
        world = self.world
        self.alive = True
        self.incarnations += 1
        self.session += 1
        self.relies = world.record_on == "partner"  # what the configuration says
        if world.record_on == "either":
            self.relies = world.rng.random() < 0.5
        self.relies = self.relies and not self.keeps
        self.stored = world.rng.random() < world.stored_often
        self.loop = SimLoop()
        self.record = SimDisk("record", len(self.record_image), self.record_image)
        self.record.luck = world.rng
        self.primary = Path("primary", world.primary, world.primary_landed)
        self.secondary = Path("secondary", world.secondary, lambda offset, data: None)
        self.secondary.writes_late = "errors" in world.troubles
        loaded = load_image(self.record_image)
        self.geometry = geometry = loaded.superblock.geometry
        self.durable_blocks = geometry.blocks  # of the size that is in the superblock
        self.store = RecordStore(geometry, loaded, self.record, self.loop, lambda *a, **k: None)
        hands = Hands(self.store, self._send, lambda: None)
        self.rights = Rights(geometry, self.number, self.loop, hands)
        self.rights.cut_patience_s = 2.0 if world.impatient else None
        self.pair_record = PairRecord(self.store, self.rights)
        self.path = PromotedPath()
        self.path.is_held_up = self._is_held_up
        direct = self._find_stack()
        self.gate = Gate(
            geometry,
            self.primary,
            self.pair_record,
            MischievousPolicy(geometry.extents, world.rng),
            self.loop,
            limit_extents=3,
            elsewhere=(self.path,) if world.direct == self.number else (),
            asks=self.rights,
            piecewise=True,
            owns=self.rights.owns,
        )
        self.copier = Copier(
            geometry,
            self.gate,
            self.primary,
            self.secondary,
            self.loop,
            BufferPool(self.loop, 1 << 20),
            Throttle(None),
            Backoff(jitter=lambda: 0.5),
            lambda *a, **k: None,
            check_secondary=lambda: None,
            era_interval_s=1.0,
            piece_bytes=2 * BLOCK,
            late_writes_s=LATE_S if "errors" in world.troubles else 0.0,
        )
        if self.keeps:
            nothing = NoHosts()
            hands.attach(nothing, nothing, self.pair_record)
        else:
            hands.attach(self.gate, self.copier, self.pair_record)
        self.end: End | None = None
        self.superblocks: list[
            tuple[Callable[[], None], Callable[[OSError | None], None], Callable[[], bool]]
        ] = []
        if self.marked:
            self.lasting, self.marked = replace(self.lasting, volatile=True), False
        self.events: list[tuple[str, dict[str, object]]] = []
        self.node = Node(
            self.number, self.lasting, self.rights, self.loop, _Around(self), keeps=self.keeps
        )
        self.node.serve(self)
        self.node.stand_in.on = world.falls_back
        self.pair_record.on_unwritten = self.node.stand_in.unwritten
        hands.on_unstored = lambda: self.loop.call_soon(self.node.begin_anew)
        self.node.growth.media = _Media(self)
        self.leaving = self.gone = False
        self.stopping: Callable[[str | None], None] | None = None  # hosts, for a planned takeover
        self.stopped = False
        self.compared = 0  # how often everything was
        self.alarmed = False  # a split brain was found where there was none
        self.shut_out = False  # its ways to the media are fenced
        if self.kernel is None:
            self.requests = 0  # of hosts, that are not answered
        self.node.start(direct)
        if not self.keeps:
            self.copier.start()
        self.loop.run_soon()

    # -- a kernel that hosts write through ------------------------------------------------------
    def _is_held_up(self) -> bool:
        return self.node.state is not State.PAIRED and bool(self.rights.waiting)

    def _find_stack(self) -> Runs:
        if self.kernel is None:
            return ()
        direct = joined(self.kernel.direct(self.kernel.table))
        self._follow(self.kernel).routes.adopt(direct)
        return direct

    def _follow(self, kernel: SimKernel) -> DirectPath:
        rng = self.world.rng
        routes = Routes(max_segments=rng.choice((3, 5, 2000)), growth_hits=rng.choice((1, 16)))
        since_era = kernel.era.current
        path = DirectPath(self.geometry, kernel, routes, lambda *a, **k: None, since_era=since_era)
        self.path.begin(path)
        return path

    def promote(self) -> None:
        """Let hosts in who write past the gate; those of an earlier process are served on."""
        if self.number != self.world.direct or not (self.alive and self.node.serves):
            return
        off = self.leaving or self.gone or self.stopping is not None or self.stopped
        if off or self.requests < 0:
            return
        if self.kernel is None and not self.may_serve:
            return
        if self.kernel is None:
            disk = Path("primary", self.world.primary, self.world.primary_landed)
            self.kernel = SimKernel(self.geometry, disk)
            self._follow(self.kernel)
        if self.kernel.gate is None:
            self.kernel.new_gate(self.gate)

    def take_down(self) -> None:
        """No host is left: the stack goes, and whatever is open counts as written."""
        if self.kernel is not None:
            if self.kernel.busy is not None:
                self.kernel.lose_helper(swap=self.world.rng.random() < 0.5)
            unknown = self.path.end()
            self.gate.take_over((self.geometry.extent_blocks(*run) for run in unknown), ())
            self.fence_kernel()

    def fence_kernel(self) -> None:
        """Nothing of it reaches the media any more, but for what is there already."""
        if self.kernel is not None:
            self.kernel.end()
            disk = self.kernel.disk
            finish_or_drop(disk, list(disk.pending), self.world.rng)
            self.kernel = None
            self.stacks += 1
            self.requests = 0

    def die(self) -> None:
        """`kill -9`: what was on its way to the media may land yet, unless it is shut out."""
        world = self.world
        self.alive = False
        for path in (self.primary, self.secondary):
            if not self.shut_out:  # else the storage refuses them
                self.ghosts += [(path, op) for op in path.to_come]
            path.pending, path.ghosts = [], []
        for write, _, _ in self.superblocks[:1]:
            if world.rng.random() < 0.5:
                write()
        self.superblocks = []
        self.record_image = self.record.crash(world.rng)
        if self.kernel is not None:
            self.kernel.bitmapd_died(world.rng, swap=world.rng.random() < 0.5)
        else:
            world.answers_lost(self)
        if self.end is not None:
            self.end.closed = True
            self.end = None

    def lay_ghosts(self) -> None:
        """What a dead process had sent lands now, in part, or never."""
        for path, op in self.ghosts:
            for at in range(0, len(op.data), SECTOR):
                if self.world.rng.random() < 0.5:
                    path.carry_out(op.offset_bytes + at, op.data[at : at + SECTOR], False)
        self.ghosts = []

    def compare(self) -> None:
        """What `volume/paired` does when nobody knows what differs."""
        if self.compared < self.node.comparisons and self.node.serves:
            self.compared = self.node.comparisons
            everything = [(0, self.geometry.extents)]
            self.pair_record.add(everything, (), lambda error: self.gate.take_recorded())
            self.gate.take_recorded()
            self.copier.begin_pass(compare=True)

    # -- Hosts --------------------------------------------------------------------------------
    def stop(self, force: bool, done: Callable[[str | None], None]) -> None:
        if self.requests and not force:
            self.loop.call_soon(done, "hosts are connected")
        elif (demoted := self.stopping) is not None:
            self.stopping = lambda reason: (demoted(reason), done(reason))[1]
        else:
            self.stopping = done

    def go_on(self) -> None:
        self.stopping, self.stopped = None, False

    # -- Surroundings ---------------------------------------------------------------------------
    def _send(self, message: Message) -> int:
        return 0 if self.end is None else self.end.send(message)

    def hello(self) -> Hello:
        return Hello(
            volume=NIL, node=self.number, lowest=1, highest=1,
            role=Role.KEEPER if self.keeps else Role.PAIR,
            flags=self._flags(),
            required=REQUIRED, offered=OFFERED, term=0,
            incarnation=self.number * 1000 + self.incarnations, session=self.session,
            boot=b"\7" * 16, generations=(NIL,) * 4, size_bytes=self.geometry.size_bytes,
            extent_bytes=EXTENT, block_bytes=BLOCK, last_paired=0,
            machine=bytes([self.number]) * 16, timeout_ms=2000,
            most_requests=MOST_REQUESTS, name="vol0", primary="p", secondary="s", program="sim",
        )  # fmt: skip

    def _flags(self) -> HelloFlag:
        flags = HelloFlag.RELIES if self.relies else HelloFlag(0)
        if self.stored:
            flags |= HelloFlag.STORED
        if self.number == self.world.goes_on:
            flags |= HelloFlag.GO_ON
        if self.store.failing:
            flags |= HelloFlag.UNSTORED
            if self.world.falls_back:
                flags |= HelloFlag.RELIES
        if self.world.direct:
            flags |= HelloFlag.ON_PROMOTE
        if self.world.direct == self.number:
            flags |= HelloFlag.DIRECT
        return flags

    @property
    def may_lack(self) -> bool:
        """Whether the other has gone on, and this one does not know where.  One that is alone and
        has said READY may not have noticed that the other has come up, and was cut off."""
        other, node = self.world.sides[2 - self.number], self.node
        if self.keeps and (self.world.lacking or (other.alive and other.node.state is State.ALONE)):
            return True
        is_ready = node.phase is Phase.READY and node._exchange.has_said_ready
        went_on = other.lasting.gone_on or other.went_on
        return went_on and (node.state is not State.ALONE or is_ready)

    @property
    def may_be_in_memory(self) -> bool:
        """Whether VOLATILE says that what it owns may stand in the other's memory only."""
        other = self.world.sides[2 - self.number]
        return self.is_volatile or (self.leaves_it_to_the_other and other.is_volatile)

    @property
    def is_volatile(self) -> bool:
        """Whether it is durable here that the stored record may lack something."""
        return self.lasting.volatile or self.marked

    @property
    def leaves_it_to_the_other(self) -> bool:
        """Its record could not be written when the two met last: the other's has to say all."""
        return self.node.exchanges > 0 and has(self.node._mine, HelloFlag.UNSTORED)

    @property
    def joins_again(self) -> bool:
        """It has a new record, and has not met the other node since."""
        lost = self.lasting.volatile or (self.world.kept and self.number == 1)
        return self.lasting.volume == NIL and lost

    def replace_record(self) -> None:
        """`dmctl record replace`: it names nothing, and says so.  Of a host whose keeper has all:
        `dmctl create --join`."""
        self.record_image = blank_image(self.world.sides[2 - self.number].size_in_force)
        self.went_on = self.went_on or self.lasting.gone_on
        joins = self.number == 2 or self.world.kept
        volume = NIL if joins else VOLUME.bytes
        generations = (self.world.rng.randbytes(16), NIL, NIL, NIL)
        self.lasting = Lasting(joins, 0, generations, volume, volatile=not self.world.kept)
        self.marked = False

    @property
    def size_in_force(self) -> Geometry:
        """What a node that joins has to have: a size that is only in the superblock counts when the
        next process begins."""
        return self.geometry if self.alive else load_image(self.record_image).superblock.geometry

    def look_at_record(self) -> None:
        self.node.stand_in.record_is(failing=self.store.failing)

    def keeps_from(self, other: Side) -> bool:
        """Whether it has not given everything, but for what the other has handed over meanwhile."""
        both = min(self.geometry.extents, other.geometry.extents)
        mine = self.rights.own | self.rights.owed
        return (mine[:both] & ~other.rights.owed[:both]).any() or mine[both:].any()

    def writes_elsewhere(self) -> bool:
        """Whether a write is on its way to what is not its own."""
        ops = self.primary.pending + self.secondary.pending
        return any(
            op.kind == "write" and not self.rights.own[op.offset_bytes // EXTENT] for op in ops
        )

    def known(self) -> bitarray:
        return self.rights.own | self.rights.other | self.rights.owed

    def names(self, block: int) -> bool:
        """Whether its records in memory do; what lies beyond its size counts as the other's."""
        extent = block // PER_EXTENT
        return block >= self.geometry.blocks or bool(self.known()[extent])

    def unnamed(self, blocks: set[int]) -> set[int]:
        """Those that its stored record does not name; what lies beyond its size will be new."""
        bits = self.store._durable if self.alive else load_image(self.record_image).bits
        if self.alive and (last := self.store._pages._pages[-1].last) is not None:
            bits = bits.copy()
            bits[last] = True  # in every write of the page
        return {
            block
            for block in blocks
            if block < self.durable_blocks
            and block // PER_EXTENT < len(bits)
            and not bits[block // PER_EXTENT]
        }

    @property
    def takes_hosts(self) -> bool:
        off = self.leaving or self.stopping is not None or self.stopped
        if self.world.direct == self.number:
            return self.kernel is not None and not off and self.requests >= 0
        return self.alive and self.node.serves and not off and self.requests >= 0 and self.may_serve

    @property
    def hands_over(self) -> bool:
        """Whether it gives dirt away while hosts write: not past its gate.  A barrier would wait
        for a write that waits for what only the barrier sets free."""
        return self.world.direct != self.number

    @property
    def may_serve(self) -> bool:
        """Whether hosts come to this node, unless it has stopped or lost them."""
        return self.world.direct == 0 or self.world.serving == self.number

    @property
    def counts(self) -> bool:
        """Whether it lives, and what it writes is carried out."""
        return self.alive and not self.shut_out

    @property
    def knows(self) -> bool:
        if not self.keeps:
            return self.counts and self.node.serves
        # One that has said BYE is asked no more: what it has stored is what counts.
        return self.counts and self.node._known and not self.node._over


class _Around:
    """`Surroundings` of a side."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def store(self, lasting: Lasting, done: Callable[[OSError | None], None]) -> None:
        side = self._side

        def write() -> None:
            side.lasting, side.marked = lasting, False

        def mark() -> bool:
            """On the machine's own disk, where the record's cannot be written."""
            if lasting.kept and replace(side.node.lasting, volatile=True) == lasting:
                side.marked = True
                return True
            return False

        side.superblocks.append((write, done, mark))

    def rely(self, on: bool) -> None:
        self._side.pair_record.rely(on)

    def destage(self, done: Done) -> bool:
        return self._side.pair_record.destage(done)

    def new_generation(self) -> bytes:
        return self._side.world.rng.randbytes(16)

    def hello(self) -> Hello:
        return self._side.hello()

    def stored(self) -> bitarray:
        return self._side.store.recorded

    def partner_record(self, done: Callable[[bitarray | None], None]) -> None:
        side = self._side
        other, world = side.world.sides[2 - side.number], side.world
        found: bitarray | None = None
        if world.reads_other and not other.broken:
            loaded = load_image(bytes(other.record.durable if other.alive else other.record_image))
            last = other.lasting
            pair = PairState(
                other.number,
                None if last.volume == NIL else UUID(bytes=last.volume),
                (PairFlag.VOLATILE if last.volatile else PairFlag(0))
                | (PairFlag.NEVER_PAIRED if last.never_paired else PairFlag(0)),
            )
            block = replace(
                loaded.superblock.with_pair(pair), generations=from_ids(last.generations)
            )
            problem = why_not(block, side.node.lasting, side.number, side.geometry)
            world.log.append(f"{side.number}: reads the other's record, {problem}")
            found = loaded.bits if problem is None else None
        side.loop.call_soon(done, found)

    def other_died(self, extents: Runs) -> None:
        """The paths of this world land nothing late after `lay_ghosts`."""

    def changed(self) -> None:
        """Nobody waits for it."""

    def emit(self, event: str, **fields: object) -> None:
        self._side.events.append((event, fields))


class _Media:
    """`growth.Media` of a side; everything fits on one page of the record."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def look(self, size_bytes: int, answer: Answer) -> None:
        fits = size_bytes <= self._side.world.size_bytes
        self._side.loop.call_soon(answer, None if fits else "too small")

    def record_end(self, done: Done) -> None:
        self._side.gate.prepare_growth(done)

    def enlarge(self, size_bytes: int, answer: Answer) -> None:
        side, geometry = self._side, replace(self._side.geometry, size_bytes=size_bytes)

        def stored(error: OSError | None) -> None:
            if error is not None:
                answer(str(error))
            else:
                side.store.prepare_growth(geometry, prepared)

        def prepared(error: OSError | None) -> None:
            if error is not None:
                answer(str(error))
            else:
                side.superblocks.append((write, written, lambda: False))

        def written(error: OSError | None) -> None:
            answer(error and str(error))

        def write() -> None:
            raw = layout.encode_superblock(replace(superblock(GEOMETRY), geometry=geometry))
            for offset in layout.SUPERBLOCK_OFFSETS:
                side.record.carry_out(offset, raw, fua=True)
            side.durable_blocks = geometry.blocks

        short = side.geometry.short_extent
        if short is None or not side.store.add([(short, short + 1)], (), stored):
            side.loop.call_soon(stored, None)

    def grow(self, size_bytes: int) -> None:
        side, old = self._side, self._side.geometry
        side.geometry = geometry = replace(old, size_bytes=size_bytes)
        side.store.grow(geometry, ())
        side.copier.grow(geometry)
        side.gate.grow(geometry, mine=False)
        side.gate.set_policy(MischievousPolicy(geometry.extents, side.world.rng))


class World:
    """See the module docstring.  `troubles` are the names of what may go wrong."""

    def __init__(self, seed: int, troubles: frozenset[str], *, kept: bool = False) -> None:
        self.rng = Random(seed)
        self.kept = kept  # node 2 is a keeper
        self.lacking = False  # it may lack something, although it lives
        self.told = False  # that nobody will be given its record as it is
        self.troubles = troubles - {"lie", "hand-over"} | {"replace"} if kept else troubles
        self.primary, self.secondary = Shared(LARGEST), Shared(LARGEST)
        for shared, old in ((self.primary, b"\xaa"), (self.secondary, b"\xbb")):
            for content in (shared.durable, shared.visible):
                content[SIZE:] = old * (LARGEST - SIZE)  # what is there before the volume grows
        self.size_bytes = SIZE  # of the media
        self.healing = False
        self.connection: Connection | None = None
        self._serial = 0
        self._landings = 0
        self._number: list[dict[bytes, int]] = [
            {bytes(8): 0, b"\xaa" * 8: 0} for _ in range(LARGEST // SECTOR)
        ]
        self._floor = [0] * (LARGEST // SECTOR)  # what every later read has to show at least
        self._stalls: dict[tuple[int, str], bool] = {}  # what does not move for a while
        self._stalls_end = self.rng.choice((0.01, 0.003))
        self.impatient = self.rng.random() < 0.3  # hosts' requests do not wait for ever in a cut
        self._trouble = self.rng.choice((2, 2, 6))  # so many steps in a hundred
        self.lied = False  # a node was said to be dead, and lived
        self._flaps = "cut" in troubles and self.rng.random() < 0.3  # the link does, while greeting
        self.record_on = self.rng.choice(("both", "partner", "either"))  # the latter: at each start
        self.stored_often = self.rng.choice((0.0, 0.5, 1.0))  # partner_ack, at each start
        self.goes_on = self.rng.choice((0, 1, 2))  # the node that goes on in a cut, if any
        self.reads_other = self.rng.random() < 0.5  # partner_record
        self.falls_back = self.rng.random() < 0.7  # record_fallback
        if kept:
            self.goes_on %= 2
        # The node whose hosts write past its gate, if any; then one node has hosts at a time.
        self.direct = self.rng.choice((1, 2)) if "kernel" in troubles else 0
        self.serving = self.direct  # which one
        self._swift = self.rng.random() < 0.5  # a link that is lost comes back soon
        self._writes_superblocks = self.rng.choice((0.05, 0.5))  # how soon they are written
        self.log: list[str] = []
        self.sides = (Side(self, 1), Side(self, 2))
        for side in self.sides:
            side.boot()
        if self.rng.random() < 0.5:
            self._meet()

    # -- hosts --------------------------------------------------------------------------------
    def primary_landed(self, offset: int, data: bytes) -> None:
        self._landings += 1
        for at in range(0, len(data), SECTOR):
            self._number[(offset + at) // SECTOR][data[at : at + 8]] = self._landings

    def _shows(self, sector: int, content: bytes) -> int:
        return self._number[sector][content[:8]]

    def answers_lost(self, side: Side) -> None:
        side.requests = 0

    def host(self, side: Side) -> None:
        size_bytes, kernel = side.geometry.size_bytes, side.kernel
        first = self.rng.randrange(size_bytes // SECTOR)
        direct = [] if kernel is None else sorted(kernel.direct(kernel.table))
        if direct and self.rng.random() < 0.7:
            first = self.rng.choice(direct) * EXTENT // SECTOR + self.rng.randrange(8)
        length = min(self.rng.choice((1, 4, 8, 16, 24)) * SECTOR, size_bytes - first * SECTOR)
        kind = self.rng.choice(("write",) * 6 + ("read",) * 4 + ("zero", "trim", "flush"))
        sectors = range(first, first + length // SECTOR)
        incarnation, stacks = side.incarnations, side.stacks
        side.requests += 1
        self._serial += 1
        content = (
            self._serial.to_bytes(8, "big") * (SECTOR // 8) if kind == "write" else bytes(SECTOR)
        )
        self.log.append(f"{side.number}: {kind} {first}+{length // SECTOR} = {self._serial}")

        def over(error: OSError | None) -> bool:
            if kernel is not None:
                if side.stacks != stacks:
                    return False
            elif side.incarnations != incarnation or not side.alive:
                return False
            side.requests -= 1
            return error is None

        if kind == "read":
            floor = [self._floor[sector] for sector in sectors]
            buffer = aligned(length)

            def was_read(error: OSError | None) -> None:
                if not over(error):
                    return
                for at, sector in enumerate(sectors):
                    shown = self._shows(sector, bytes(buffer[at * SECTOR : at * SECTOR + 8]))
                    if shown < floor[at]:
                        raise AssertionError(f"sector {sector} shows {shown} after {floor[at]}")
                    self._floor[sector] = max(self._floor[sector], shown)

            if kernel is None:
                side.gate.read(first * SECTOR, buffer, was_read)
            else:
                kernel.read(first * SECTOR, buffer, was_read)
            return

        def was_written(error: OSError | None) -> None:
            if over(error) and kind != "flush":
                for sector in sectors:
                    number = self._number[sector][content[:8]]
                    self._floor[sector] = max(self._floor[sector], number)

        if kernel is not None:
            if kind == "flush":
                kernel.flush(was_written)
            else:
                data = content * (length // SECTOR)
                kernel.write(kind, first * SECTOR, data, was_written, self.rng.random() < 0.2)
        elif kind == "write":
            data = aligned(length)
            data[:] = content * (length // SECTOR)
            side.gate.write(first * SECTOR, data, was_written, self.rng.random() < 0.2)
        elif kind == "zero":
            side.gate.zero(first * SECTOR, length, was_written)
        elif kind == "trim":
            side.gate.trim(first * SECTOR, length, was_written)
        else:
            side.gate.flush(was_written)

    # -- one thing at a time ------------------------------------------------------------------
    def step(self) -> None:
        if not self._stalls or self.rng.random() < self._stalls_end:
            self._stalls = {
                (number, what): self.rng.random() < self._stalls_often(number, what)
                for number in (1, 2)
                for what in ("record", "primary", "secondary", "frames")
            }
        side = self.sides[self.rng.randrange(2)]
        if self.rng.random() * 100 < self._trouble:
            self.trouble(side)
        dice = self.rng.random() * 98
        if dice < 22:
            if side.takes_hosts and side.requests < 5:
                self.host(side)
        elif dice < 62:
            self.finish(side, anything=False)
        elif dice < 85:
            if not self._stalls[side.number, "frames"]:
                self.deliver(side)
        elif dice < 90:
            if side.alive:
                side.loop.advance(self.rng.choice((0.001, 0.05, 0.3, 1.1)))
        elif dice < 91:
            if side.alive:
                side.gate.tick()
                side.rights.tick()
                side.node.tick()
                side.look_at_record()
                self.hand_over(side)
        elif dice < 95:
            self.superblock(side)
        elif dice < 96.5:
            if not self.lied or self.rng.random() < 0.1:
                self.connect()
        else:
            self.notice(side)
        if self.rng.random() < self._writes_superblocks:
            self.superblock(side)
        if self._swift and not self.lied and self.rng.random() < 0.05:
            self.notice(side)
            self.connect()
        if self._flaps and side.alive:
            if side.node.phase in (Phase.RECORDS, Phase.READY) and self.rng.random() < 0.05:
                self.cut()
            elif side.node.phase is Phase.CLOSED and self.rng.random() < 0.2:
                self.notice(side)
                self.connect()
        self.kernel(side)
        if side.alive:
            side.compare()
            side.loop.run_soon()
            self.leave(side)
            self.yield_hosts(side)

    def _stalls_often(self, number: int, what: str) -> float:
        """A keeper has nothing else to do than to write its record."""
        return 0.75 if self.kept and (number, what) == (2, "record") else 0.25

    def kernel(self, side: Side) -> None:
        """What the machine of this side does by itself."""
        side.promote()
        if side.kernel is None or side.kernel.busy is None:
            return
        if side.kernel.can_step:
            if self.rng.random() < 0.3:
                side.kernel.step()
        elif self.rng.random() < 0.01:
            side.kernel.give_up()  # its time is up
        if self.rng.random() < 0.002:
            side.kernel.lose_helper(swap=self.rng.random() < 0.5)
        side.loop.run_soon()

    def _meet(self) -> None:
        """Both are paired before anything else happens."""
        while any(side.node.state is not State.PAIRED for side in self.sides):
            self.connect()
            for side in self.sides:
                self.notice(side)
                self.deliver(side)
                self.superblock(side)

    def hand_over(self, side: Side) -> None:
        """What the pair does at each tick, where the secondary is away at one node."""
        other = self.sides[2 - side.number]
        is_there = other.alive and other.copier.state is CopyState.RUNNING
        away = side.copier.state is CopyState.LINK_DOWN
        side.copier.rounds.hands_over = on = away and is_there
        if on and side.node.state is State.PAIRED and side.hands_over and not self.kept:
            side.rights.hand_over(side.gate.idle_dirt(EXTENTS))

    def yield_hosts(self, side: Side) -> None:
        """Hosts are off for a planned takeover once they have been answered."""
        if side.stopping is not None and side.requests == 0:
            done, side.stopping, side.stopped = side.stopping, None, True
            side.take_down()
            done(None)
            side.loop.run_soon()

    def take(self, side: Side) -> None:
        """A planned takeover by this side."""
        other = self.sides[2 - side.number]
        if not side.alive or side.node.state is not State.PAIRED or side.leaving or side.keeps:
            return
        incarnation = side.incarnations, other.incarnations
        before = other.end

        def taken(error: Exception | None) -> None:
            self.log.append(f"{side.number}: has taken, {error!r}")
            if side.alive and error is None:
                self.serving = side.number
                side.go_on()
            same = incarnation == (side.incarnations, other.incarnations) and before is other.end
            if error is None and same and other.alive and other.stopped:
                # What this side has handed over meanwhile is not meant.
                if other.keeps_from(side):
                    raise AssertionError("TAKEN before everything was given")
                if other.writes_elsewhere():
                    raise AssertionError("TAKEN with writes on their way")

        self.log.append(f"{side.number}: takes")
        try:
            side.node.take(self.rng.random() < 0.7, taken)
        except BusyError:
            return
        side.loop.run_soon()

    def demote(self, side: Side) -> None:
        """Hosts are off at this side, and then it gives everything, unasked."""
        other = self.sides[2 - side.number]
        if not (side.alive and side.takes_hosts):
            return
        incarnation = side.incarnations, other.incarnations
        before = other.end

        def given(all_of_it: bool) -> None:
            self.log.append(f"{side.number}: has given, {all_of_it}")
            same = incarnation == (side.incarnations, other.incarnations) and before is other.end
            if all_of_it and same and side.stopped:
                # What the other has handed over meanwhile is not meant.
                if side.keeps_from(other):
                    raise AssertionError("not everything was given")
                if side.writes_elsewhere():
                    raise AssertionError("given with writes on their way")

        def out(_: str | None) -> None:
            with suppress(BusyError):
                side.node.give(given)

        self.log.append(f"{side.number}: is demoted")
        side.stopping = out

    def leave(self, side: Side) -> None:
        """A clean stop, once the hosts that were served have been answered."""
        if side.gone:
            side.die()
        if not side.leaving or side.requests or side.node.phase is not Phase.UP:
            return
        self.log.append(f"{side.number}: leaves")
        side.take_down()
        side.leaving, side.requests = False, -1

        def left(all_given: bool) -> None:
            self.log.append(f"{side.number}: has left, {all_given}")
            side.requests = 0
            if all_given or self.kept:
                if not self.kept and any(
                    op.kind == "write" for op in side.primary.pending + side.secondary.pending
                ):
                    raise AssertionError(f"node {side.number} said BYE with writes on their way")
                side.gone = True

        if self.kept:
            side.node.part(lambda: left(False))
        else:
            side.node.leave(left)

    def leave_off(self, keeper: Side) -> None:
        """A clean stop of a keeper."""
        self.log.append("the keeper leaves off")

        def left(given: bool) -> None:
            keeper.gone = True

        keeper.node.leave(left)

    def replace(self, host: Side) -> None:
        """The machine of the host is lost, and its record; another one takes its place."""
        keeper = self.sides[1]
        image = keeper.record.durable if keeper.alive else keeper.record_image
        geometry = load_image(image).superblock.geometry
        same = host.durable_blocks == keeper.durable_blocks == geometry.blocks
        met = not (host.lasting.never_paired or keeper.lasting.never_paired)
        if self.told or not same or not met:
            return
        if host.alive:
            self.crash(host)
        self.log.append("1: its record is lost")
        self.lacking = self.lacking or host.lasting.gone_on
        host.replace_record()

    def finish(self, side: Side, *, anything: bool) -> bool:
        """One disk operation of this side."""
        disks = [side.record, side.primary, side.secondary] if side.alive else []
        if side.kernel is not None:
            disks.append(side.kernel.disk)
        busy = [
            disk
            for disk in disks
            if disk.pending and (anything or not self._stalls[side.number, disk.name])
        ]
        if not busy:
            return False
        disk = self.rng.choice(busy)
        index = self.rng.randrange(len(disk.pending))
        if side.shut_out and disk is not side.record:
            disk.pending.pop(index).done(OSError(errno.EBADE, "reservation conflict"))
            side.node.shut_out("reservation conflict")
        else:
            kind = disk.pending[index].kind
            if disk is side.record and side.broken and not disk.fail_next.get(kind):
                disk.fail_next[kind] = [errno.EIO]
            disk.finish(index)
            if kind == "open":
                disk.greet(side.loop, self.rng)
        side.loop.run_soon()
        return True

    def superblock(self, side: Side) -> bool:
        if not side.alive or not side.superblocks:
            return False
        write, done, mark = side.superblocks.pop(0)
        fails = side.broken or (self._errs and self.rng.random() < 0.1)
        if not fails or self.rng.random() < 0.5:  # one that fails has landed, or has not
            write()
        done(OSError(errno.EIO, "simulated") if fails and not mark() else None)
        side.loop.run_soon()
        return True

    @property
    def _errs(self) -> bool:
        return "records" in self.troubles and not self.healing

    def deliver(self, side: Side) -> bool:
        """One frame to this side."""
        end = side.end
        if not side.alive or end is None or end.closed:
            return False
        queue = end.connection.queues[side.number - 1]
        if not queue:
            return False
        raw = queue.popleft()
        cut = self.rng.randrange(len(raw))
        for piece in (raw[:cut], raw[cut:]):
            end.reader.feed(piece)
            while (frame := end.reader.take()) is not None:
                message = end.decoder.feed(frame)
                if message is not None:
                    self.log.append(f"{side.number} < {message}")
                    side.node.received(message, frame.sequence)
                if side.node.phase is not Phase.HELLO:
                    end.reader.limit_bytes = frames.MAX_PAYLOAD_BYTES
                    end.decoder.extents = side.geometry.extents
                    end.decoder.blocks = side.geometry.blocks
        side.loop.run_soon()
        return True

    # -- the link -----------------------------------------------------------------------------
    def connect(self) -> None:
        one, two = self.sides
        if not (one.alive and two.alive):
            return
        old = self.connection
        if (
            old is not None
            and old.whole
            and not any(
                side.end is None or side.end.closed or side.end.connection is not old
                for side in self.sides
            )
        ):
            return  # there is one
        if old is not None:
            self.cut()
        self.connection = Connection()
        self.log.append("connect")
        for side in self.sides:
            side.end = End(self, side, self.connection)
            side.node.connected(side.end)
            side.loop.run_soon()

    def cut(self) -> None:
        """What is on its way is lost, the older part may arrive."""
        if self.connection is None or not self.connection.whole:
            return
        self.log.append("cut")
        self.connection.whole = False
        for queue in self.connection.queues:
            for _ in range(self.rng.randint(0, len(queue))):
                queue.pop()

    def notice(self, side: Side) -> None:
        """A connection that is gone is noticed once nothing of it can come any more."""
        end = side.end
        if not side.alive or end is None:
            return
        other = self.sides[2 - side.number]
        gone = not end.connection.whole or other.end is None or other.end.closed
        if end.closed or (gone and not end.connection.queues[side.number - 1]):
            self.log.append(f"{side.number}: notices")
            was_closed, side.end = end.closed, None
            end.closed = True
            if not was_closed:
                side.node.lost()
            side.loop.run_soon()

    # -- what goes wrong ----------------------------------------------------------------------
    def trouble(self, side: Side) -> None:
        what = self.rng.choice(sorted(self.troubles) or ["nothing"])
        if what == "replace":
            self.replace(self.sides[0])
        elif side.keeps and what == "stop" and side.alive and side.node._known:
            if self.rng.random() < 0.3 and not side.node._over:
                self.leave_off(side)
        elif what == "cut":
            self.cut()
        elif what == "crash":
            if side.alive and self.rng.random() < 0.5:
                self.crash(side)
            elif not side.alive:
                self.restart(side)
        elif what == "takeover":
            self.takeover(side)
        elif what == "lie":
            self.lie()
        elif what == "take":
            if side.alive and side.stopped and not self.direct and self.rng.random() < 0.5:
                side.go_on()
            elif self.rng.random() < 0.3:
                self.demote(side)
            else:
                self.take(side)
        elif what == "errors":
            self.error(side)
        elif what == "records":
            self.device(side)
        elif what == "stop":
            if not side.alive:
                self.restart(side)
            elif side.takes_hosts and self.rng.random() < 0.3:
                side.leaving = True
        elif what == "hand-over" and side.alive and side.node.serves and side.hands_over:
            own = [e for e in range(side.geometry.extents) if side.rights.own[e]]
            if own:
                side.rights.hand_over([self.rng.choice(own)])
        elif what == "resize":
            self.resize(side)

    def resize(self, side: Side) -> None:
        """The media have grown, or had grown before; `dmctl resize` at this side."""
        if not self.healing and self.size_bytes == side.geometry.size_bytes:
            more = self.rng.choice((1, 2, 3)) * BLOCK
            self.size_bytes = min(self.size_bytes + more, LARGEST)
        size_bytes = self.size_bytes
        if not side.takes_hosts or size_bytes <= side.geometry.size_bytes:
            return
        incarnation = side.incarnations

        def over(error: BitmapdError | None) -> None:
            self.log.append(f"{side.number}: has grown, {error!r}")
            same = side.alive and side.incarnations == incarnation
            if error is None and same and side.geometry.size_bytes < size_bytes:
                raise AssertionError("the command ended and the volume has not grown")

        self.log.append(f"{side.number}: grows to {size_bytes // BLOCK} blocks")
        try:
            side.node.growth.begin(size_bytes, over)
        except (BusyError, UnreachableError):
            return
        side.loop.run_soon()

    def error(self, side: Side) -> None:
        """Something that is this side's fails, and comes back."""
        if not side.alive:
            return
        dice = self.rng.random()
        if dice < 0.4:
            self.log.append(f"{side.number}: loses the secondary")
            side.secondary.lose_connection()
        elif dice < 0.7 and side.secondary.ghosts:
            side.secondary.land(self.rng.choice(side.secondary.ghosts))
        else:
            disk, kind = self.rng.choice(
                ((side.record, "write"), (side.primary, "write"), (side.primary, "read"))
            )
            errors = 12 if disk is side.record and self.rng.random() < 0.5 else 1
            disk.fail_next.setdefault(kind, []).extend([errno.EIO] * errors)
        side.loop.run_soon()

    def device(self, side: Side) -> None:
        """That of the record fails for good, is well again, or another one takes its place."""
        if not side.broken:
            side.broken = self.rng.random() < 0.5
        elif side.alive or self.kept or self.rng.random() < 0.5:
            side.broken = False
        else:
            side.replace_record()
            side.broken = False
            self.log.append(f"{side.number}: has a new record")
        if side.alive and not side.broken:
            side.record.fail_next = {"write": [errno.EIO]} if self.rng.random() < 0.3 else {}
        self.log.append(f"{side.number}: the record's device fails: {side.broken}")

    def crash(self, side: Side) -> None:
        self.log.append(f"{side.number}: dies")
        side.die()

    def restart(self, side: Side) -> None:
        if side.broken:
            return  # no process can begin
        if side.joins_again:
            side.replace_record()  # the volume may have grown meanwhile, and who joins has its size
        self.log.append(f"{side.number}: starts")
        side.lay_ghosts()
        side.boot()

    def takeover(self, side: Side) -> None:
        """The other is fenced, really."""
        other = self.sides[2 - side.number]
        if not side.counts or side.node.state not in (State.CUT, State.WAITING):
            return
        if side.node.phase is not Phase.CLOSED or side.node.lasting.never_paired:
            return
        if side.keeps:
            return
        if self.kept:
            self.log.append("1: goes on without its keeper")
            self.told = self.lacking = True
            side.node.fenced(Proof.WORD)
            side.loop.run_soon()
            return
        if other.alive and not self.direct and self.rng.random() < 0.5:
            self.cut()
            other.shut_out = True  # it lives, and what it writes is refused
            for path in (other.primary, other.secondary):
                other.ghosts += [(path, op) for op in path.to_come]
                path.ghosts = []
        elif other.alive:
            self.crash(other)
        other.fence_kernel()
        other.lay_ghosts()
        self.log.append(f"{side.number}: takes over")
        self.serving = side.number
        side.node.fenced(Proof.FENCE)
        side.loop.run_soon()

    def lie(self) -> None:
        """Somebody says to both that the other is dead, and both live."""
        self.cut()
        for side in self.sides:
            if side.end is not None:
                side.end.connection.queues[side.number - 1].clear()
            self.notice(side)
        if any(not side.alive or side.node.state is not State.CUT for side in self.sides):
            return
        self.log.append("both are lied to")
        self.lied = True
        for side in self.sides:
            side.node.fenced(Proof.WORD)
            side.loop.run_soon()

    # -- what must hold -----------------------------------------------------------------------
    def check(self) -> None:
        for side in self.sides:
            if side.alive:
                self._check_side(side)
        if self.lied:
            return
        one, two = self.sides
        if self._are_paired:
            self.told = self.lacking = one.went_on = two.went_on = False
        live = [side for side in self.sides if side.knows]
        if one.counts and two.counts:
            both = min(one.geometry.extents, two.geometry.extents)
            if (one.rights.own[:both] & two.rights.own[:both]).any():
                raise AssertionError("both own the same extent")
        for side, other in ((one, two), (two, one)):
            if side.counts and other.knows and not other.may_lack:
                unknown = [
                    e
                    for e in each(runs_of(side.rights.own))
                    if e < other.geometry.extents
                    and not (other.rights.other[e] or other.rights.owed[e])
                ]
                if unknown:
                    raise AssertionError(f"node {other.number} does not know of {unknown}")
        for side, other in ((one, two), (two, one)):
            self._check_kernel(side, other)
        flying = [self._flying(side) for side in self.sides]
        if flying[0] & flying[1]:
            raise AssertionError("writes of both nodes to the same block are on their way")
        may_differ = flying[0] | flying[1] | self._different()
        for side in live:
            for block in may_differ:
                if not side.may_lack and not side.names(block):
                    raise AssertionError(f"node {side.number} does not name block {block}")
        unnamed = one.unnamed(may_differ) & two.unnamed(may_differ)
        # A host whose record is lost leaves it to the keeper, which says so if it cannot tell.
        excused = one.lasting.volume == NIL and two.lasting.gone_on
        if unnamed and not (excused or any(side.is_volatile for side in self.sides)):
            raise AssertionError(f"no stored record names blocks {unnamed}")
        complete = self.kept and not (two.lasting.gone_on or two.lasting.never_paired or self.told)
        if complete and (lacking := two.unnamed(may_differ)):
            raise AssertionError(f"the keeper has not stored {lacking}, and does not say so")
        for side, blocks in zip(self.sides, flying, strict=True):
            lacking = side.unnamed(blocks)
            if self.stored_often or side.leaves_it_to_the_other:
                lacking &= self.sides[2 - side.number].unnamed(blocks)
            if side.counts and not side.may_be_in_memory and lacking:
                raise AssertionError(f"node {side.number} writes to {lacking}, stored nowhere")
        for side, other in ((one, two), (two, one)):
            has_new_record = not other.alive and other.is_volatile
            if not side.counts or not side.pair_record._relies or side.may_be_in_memory:
                continue
            held = {e * PER_EXTENT for e in range(len(side.rights.held)) if side.rights.held[e]}
            if (lacking := other.unnamed(held)) and not has_new_record:
                raise AssertionError(f"node {other.number} has not stored {lacking}")

    @property
    def _are_paired(self) -> bool:
        """With one another, as both see it."""
        one, two = self.sides
        if any(not side.alive or side.node.state is not State.PAIRED for side in self.sides):
            return False
        return (
            one.end is not None and two.end is not None and one.end.connection is two.end.connection
        )

    def _check_kernel(self, side: Side, other: Side) -> None:
        if side.kernel is None:
            return
        direct = side.kernel.may_be_direct()
        if side.knows and any(not side.rights.own[extent] for extent in direct):
            raise AssertionError(f"the kernel of node {side.number} writes what is not its own")
        if other.knows and any(other.rights.own[extent] for extent in direct):
            raise AssertionError(f"node {other.number} owns what the other's kernel writes")
        if other.knows and not other.may_lack:
            known = other.rights.other | other.rights.owed
            if any(not known[extent] for extent in direct):
                raise AssertionError(f"node {other.number} does not know what is written")

    def _flying(self, side: Side) -> set[int]:
        ops = [op for path, op in side.ghosts if path.name == "primary"]
        if side.kernel is not None:
            ops += [op for op in side.kernel.disk.pending if op.kind == "write"]
        if side.counts:
            ops += [op for op in side.primary.pending if op.kind == "write"]
        return {
            block
            for op in ops
            for block in range(
                op.offset_bytes // BLOCK, (op.offset_bytes + op.length_bytes - 1) // BLOCK + 1
            )
        }

    def _different(self) -> set[int]:
        found = set()
        # A size that has landed counts: the next process begins with it.
        blocks = max(max(side.geometry.blocks, side.durable_blocks) for side in self.sides)
        largest = replace(GEOMETRY, size_bytes=blocks * BLOCK)
        for block in range(largest.blocks):
            at, length = largest.block_bytes_range(block, block + 1)
            here = self.primary.visible[at : at + length]
            if (
                here != self.secondary.durable[at : at + length]
                or here != self.secondary.visible[at : at + length]
            ):
                found.add(block)
        return found

    def _check_side(self, side: Side) -> None:
        rights = side.rights
        if (rights.own & (rights.other | rights.owed)).any():
            raise AssertionError("an extent is own and another's at once")
        if rights.own_extents != rights.own.count():
            raise AssertionError("the count of own extents is wrong")
        for event, fields in side.events:
            if self.lied:
                break
            if event == "partner-protocol-error" and fields["code"] in (
                1,
                2,
                3,
                4,
                5,
                6,
                7,
                10,
                11,
            ):
                raise AssertionError(f"protocol error: {fields}")
        if side.node.state is State.SPLIT_BRAIN:
            # One that is shut out, has not met a refusal yet and goes alone, too, looks like that.
            excused = self.lied or any(one.shut_out for one in self.sides)
            if not excused and not side.alarmed:
                raise AssertionError("split brain although every proof was true")
            for one in self.sides:
                one.alarmed = True
        gate = side.gate
        for extent in range(side.geometry.extents):
            first, stop = side.geometry.extent_blocks(extent, extent + 1)
            if gate.is_dirty(first, stop) and not rights.own[extent]:
                raise AssertionError(f"extent {extent} is dirty and not ours")

    # -- the end ------------------------------------------------------------------------------
    def heal(self) -> None:
        """Nothing goes wrong any more: everything has to come to rest."""
        self.healing = True
        for _ in range(400):
            split = [s for s in self.sides if s.alive and s.node.state is State.SPLIT_BRAIN]
            if len(split) == 2 and not any(side.shut_out for side in split):
                self.crash(self.rng.choice(split))
            for side in self.sides:
                outdated = side.node.state is State.OUTDATED
                if outdated:
                    side.fence_kernel()  # its process cuts its hosts off before it ends
                side.broken = False
                if side.alive and (outdated or side.shut_out or side.gone or side.joins_again):
                    self.crash(side)
                if not side.alive:
                    self.restart(side)
            for side in self.sides:
                self.notice(side)
            self.connect()
            moved = True
            while moved:
                moved = False
                for side in self.sides:
                    while self.deliver(side) or self.superblock(side):
                        moved = True
                    while self.finish(side, anything=True):
                        moved = True
                    moved |= self.let_kernel_end(side)
                self.check()
            for side in self.sides:
                for path in (side.record, side.primary, side.secondary):
                    path.fail_next = {}
                side.go_on()
                side.leaving = False
                side.compare()
                side.loop.advance(1.1)
                side.gate.policy.generous = False
                side.gate.tick()
                side.rights.tick()
                side.node.tick()
                side.look_at_record()
                self.hand_over(side)
            self.check()
            if self.at_rest:
                return
            if all(side.node.state is State.PAIRED for side in self.sides):
                self.resize(self.rng.choice(self.sides))  # what has come to nothing is done again
        raise AssertionError(f"it does not come to rest: {self.state()}")

    def let_kernel_end(self, side: Side) -> bool:
        """Its barrier, if one is under way; it is given up if it would wait for ever."""
        side.promote()
        kernel = side.kernel
        if kernel is None or kernel.busy is None:
            return False
        if kernel.can_step:
            kernel.step()
        else:
            kernel.give_up()
        side.loop.run_soon()
        return True

    @property
    def at_rest(self) -> bool:
        return (
            all(side.node.state is State.PAIRED for side in self.sides)
            and all(side.geometry.size_bytes == self.size_bytes for side in self.sides)
            and not any(side.requests or side.rights.own.any() for side in self.sides)
            and not any(side.rights.other.any() or side.rights.owed.any() for side in self.sides)
            and not self._different()
        )

    def state(self) -> str:
        return "; ".join(
            f"{side.number} {side.node.state.value} {side.node.phase.value}"
            f" own {side.rights.own.to01()} other {side.rights.other.to01()}"
            f" owed {side.rights.owed.to01()}"
            f" requests {side.requests} waiting {side.rights.waiting}"
            f" dirty {side.gate.dirty_blocks()} held {side.rights.held.to01()}"
            f" covered {list(side.pair_record.covered_runs())}"
            f" clean {[e for e in range(side.geometry.extents) if side.gate.is_clean(e)]}"
            f" unfree {side.rights._giving.unfree} embargo {side.gate._unsettled._embargoed}"
            for side in self.sides
            if side.alive
        )


class Broken(AssertionError):
    """A walk that ended where it must not."""


def walk(seed: int, troubles: frozenset[str], length: int, *, kept: bool = False) -> World:
    """So many steps, then everything heals; `Broken` says how to see it again."""
    world = World(seed, troubles, kept=kept)
    step = 0
    try:
        while step < length:
            world.step()
            world.check()
            step += 1
        world.heal()
    except Exception as error:
        told = "\n".join(world.log[-40:])
        raise Broken(
            f"seed {seed}{', kept' * kept}, {sorted(troubles)}, step {step} of {length}:"
            f" {error!r}\n{told}\n{world.state()}"
        ) from error
    return world
