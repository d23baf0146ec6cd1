"""The sender's side of one connection after another: greeting, what is there, credit (pure).

| state | message | next | does |
| --- | --- | --- | --- |
| away | (connection) | greeting | HELLO2 |
| greeting | HELLO2 that is followed | comparing | takes credit, features, the number of the point |
| greeting | HELLO2 that is not | away | ERROR; the owner hears of the verdict |
| comparing, ready | HAVE, last | ready | tells the owner what is lost, or of the commit |
| ready | COMMITTED of the point that was ended | ready | tells the owner |
| comparing | MAP of older data | comparing | what it names is compared, and what differs sent |
| any | anything else, or anything wrong | away | ERROR |

Invariants:
1. Stamps grow over all connections of this process, also when it gives itself another incarnation.
2. What was sent counts as sent as long as the receiver does not say otherwise: the latest entry of
   each block is in `sent`.  After each HAVE that is what both have; the rest is lost, and the owner
   has it sent again.
3. No more is sent than the receiver has given credit for, the rate allows, and the link takes.
4. Only a receiver that `lineage.judge` lets us follow is sent anything but HELLO2.
5. Entries are those of a volume of the size that the BEGIN before them says; that of an END is the
   size at the cut.
6. After a promotion the record names what was written since, and no more.  So before the first
   point of the new generation is committed a receiver has to say in which extents it may differ
   (MAP); one that has no data, or nobody knows which, differs in all of them.
7. What is not known to differ is compared only before anything of the point was sent, and nothing
   is sent meanwhile (`differences`).
8. An open point may have millions of blocks: what both have is found a slice at a time, each in a
   turn of the loop, 1.5 us a block.  Nothing is sent meanwhile, and what comes waits.

A crash ends the incarnation: the receiver drops what it has of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Final, Protocol

from bitmapd.copier.throttle import SpeedMeter, Throttle
from bitmapd.gate.blockset import BlockSet
from bitmapd.media.base import Done
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.peer.words import Bye, Error, Pong
from bitmapd.points.codec import MAX_ENTRIES, MAX_HAVE_BLOCKS, cost_bytes, cost_of
from bitmapd.points.lineage import FOLLOWED, Generations, Verdict, judge
from bitmapd.points.messages import (
    NIL,
    Applied,
    Begin,
    Committed,
    Credit,
    Data,
    Encoding,
    End,
    Feature,
    Have,
    Hello2,
    Map,
    Message,
    Need,
    Pieces,
    Ping,
    Received,
    Role,
)
from bitmapd.points.pieces import Packer
from bitmapd.points.sent import Sent
from bitmapd.points.spool import Spool
from bitmapd.record.geometry import Geometry

FRAME_BYTES: Final = 256 << 10  # raw; packing it takes a millisecond of the loop


class Wire(Protocol):
    """One connection to the receiver.  It never calls back from inside."""

    @property
    def has_room(self) -> bool:
        """Whether more may be sent."""

    def send(self, message: Message) -> int:
        """Returns the bytes on the wire."""

    def greeted(self, geometry: Geometry) -> None:
        """The other's HELLO2 fits: blocks are those of this volume from now on."""

    def read(self, on: bool) -> None:
        """Whether more is to be received."""

    def close(self, error: PeerError | None = None) -> None:
        """Nothing of it is heard any more."""


class UplinkOwner(Protocol):
    """What the owner hears; it may call `end` and `send` from inside."""

    def linked(self, lost: BlockSet) -> None:
        """The receiver has all of the open point but these blocks."""

    def committed(self) -> None:
        """The point that was ended is the receiver's."""

    def needed(self, runs: Runs) -> None:
        """These blocks have to be sent with the next point, changed or not."""

    def not_followed(self, verdict: Verdict, receiver: Hello2) -> None:
        """The receiver was found to be another one than it has to be."""

    def differs(self, extents: Runs, done: Done) -> None:
        """These may differ at the receiver: call back, not from inside, when the record names them
        and they are to be sent."""

    def compare(self, done: Callable[[], None]) -> None:
        """Find out which of it differs: call back, not from inside, when that is known as well as
        can be.  Not if the connection is lost before."""

    def unlinked(self, reason: str) -> None:
        """The connection is gone."""

    def other(self, message: Message) -> None:
        """What has to do with no point."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Of the sender: `committed` is the newest point that the record knows to be."""

    volume: bytes
    incarnation: bytes  # random, of this process
    generations: Generations  # four
    term: int
    committed: int
    name: str
    program: str
    promoted: bool = False  # invariant 5


class _State(Enum):
    AWAY = "away"
    GREETING = "greeting"
    COMPARING = "comparing"
    READY = "ready"


class Uplink:
    """See the module docstring."""

    def __init__(
        self,
        geometry: Geometry,
        identity: Identity,
        spool: Spool,
        throttle: Throttle,
        meter: SpeedMeter,
        owner: UplinkOwner,
        soon: Callable[[Callable[[], None]], object],
        *,
        compress: bool,
    ) -> None:
        """`soon`: call this in the next turn of the loop."""
        self._geometry = geometry
        self._identity = identity
        self._spool = spool
        self._throttle = throttle
        self._meter = meter
        self._resting = True  # nothing was left to send, or nobody was there
        self._owner = owner
        self._soon = soon
        self._work: Iterator[None] | None = None  # of this connection, a slice at a time
        self._later: deque[Message] = deque()  # that came meanwhile
        self.slice_blocks = MAX_HAVE_BLOCKS
        self.compress = compress
        self._state = _State.AWAY
        self._wire: Wire | None = None
        self._packer = Packer(geometry, identity.volume, compress=False)
        self._sent = Sent()
        self._kept = BlockSet()  # of `_sent`: what HAVE has named so far
        self._stamp = 0
        self._begun_bytes = 0  # size in the point's latest BEGIN over this connection; 0: none
        self._cut_bytes = 0  # size of the volume at the cut, once it was ended
        self._offered_bytes = 0  # that the volume is to have
        self._ended = False  # END was sent, over whichever
        self._committed = False  # and the receiver has it
        self.has_leftovers = False  # the receiver may hold entries of this point, counted or not
        self.group = 0  # number of the open point in its group, once it was cut
        self.in_group = False  # whether the volume is of one
        self.point = 0  # the open one; 0: not known before the first greeting
        self.credit_bytes = 0
        self.lacks_credit = False
        self.receiver: Hello2 | None = None  # as it said last
        self.applied = 0
        self._asks_in_place = False
        self._in_place = 0  # the point that goes into the receiver's image at once
        self._joins = False  # MAP is waited for, or carried out
        self._is_old = False  # the receiver's data are, and ours descend from them
        self._joined: set[bytes] = set()  # generations whose differences are to be sent
        self.sent_bytes = 0  # raw
        self.zero_bytes = 0
        self.wire_bytes = 0

    @property
    def is_ready(self) -> bool:
        """Whether the receiver is there, and follows."""
        return self._state is _State.READY

    @property
    def may_send(self) -> bool:
        """Not while it is found what of the open point the receiver has."""
        return self.is_ready and self._work is None

    @property
    def can_group(self) -> bool:
        """Whether the receiver is there, and knows what a point of a group is."""
        theirs = self.receiver
        return self.is_ready and theirs is not None and bool(theirs.features & Feature.GROUP)

    @property
    def entries(self) -> int:
        """How many blocks of the open point have been sent."""
        return len(self._sent)

    @property
    def known_committed(self) -> int:
        newest = self.point if self._committed else self.point - 1
        return max(self._identity.committed, newest)

    @property
    def closed_point(self) -> int:
        """The newest one that is over, as far as is known before the receiver is there."""
        return max(self._identity.committed, self.point - 1)

    @property
    def lacks_first(self) -> bool:
        """Whether there has to be a point although nothing may have changed: a receiver of a volume
        that was promoted can be promoted in its turn only when it has one."""
        return self.is_ready and self._identity.promoted and not self.known_committed

    @property
    def is_in_place(self) -> bool:
        """Whether the open point goes into the receiver's image at once, so that nothing of it has
        to fit into a journal."""
        return self.point <= 1 or self._in_place == self.point

    @property
    def may_ask_in_place(self) -> bool:
        """Whether the receiver, all of whose points are applied, can be asked for that.  Not by one
        of a group: its point would be applied whether the others have theirs or not."""
        theirs = self.receiver
        may = theirs is not None and Feature.CATCH_UP in theirs.features
        return may and self.is_ready and not self.in_group and self.applied == self.point - 1

    def ask_in_place(self) -> None:
        """The open point, of which nothing counts yet, does not fit: have it written in place.  The
        next HELLO2 of the receiver says whether it is."""
        self._asks_in_place = True
        self.begin_anew()

    def offer(self, size_bytes: int) -> None:
        """Have the next receiver make room for a larger volume; 0: no longer."""
        self._offered_bytes = size_bytes

    def resized(self, geometry: Geometry) -> None:
        """The volume is larger; a point that was ended is not."""
        self._geometry = geometry
        self._packer.geometry = geometry
        self._offered_bytes = 0
        if self._wire is not None and self._state is not _State.GREETING:
            self._wire.greeted(geometry)

    def begin_anew(self) -> None:
        """Have the receiver forget the open point: what comes next is of another incarnation."""
        number = int.from_bytes(self._identity.incarnation, "little") + 1
        incarnation = (number % (1 << 128) or 1).to_bytes(16, "little")
        self._identity = replace(self._identity, incarnation=incarnation)
        self.has_leftovers = False
        self.close(reason="the open point is dropped")

    # -- the connection ---------------------------------------------------------------------
    def connected(self, wire: Wire) -> None:
        """A new connection; an older one is given up."""
        if self._wire is not None:
            self._wire.close()
        self._drop_work()
        self._wire, self._state = wire, _State.GREETING
        self._begun_bytes, self.credit_bytes, self._resting = 0, 0, True
        wire.send(self.hello())

    def hello(self, role: Role = Role.SENDER) -> Hello2:
        identity, geometry = self._identity, self._geometry
        return Hello2(
            volume=identity.volume,
            incarnation=identity.incarnation,
            generations=identity.generations,
            size_bytes=max(geometry.size_bytes, self._offered_bytes),
            block_bytes=geometry.block_bytes,
            extent_bytes=geometry.extent_bytes,
            committed=self.known_committed,
            applied=0,
            oldest_kept=0,
            role=role,
            features=(Feature.ZSTD if self.compress else Feature(0))
            | (Feature.GROUP if self.in_group else Feature(0))
            | (Feature.IN_PLACE if self._asks_in_place else Feature(0)),
            credit_bytes=0,
            term=identity.term,
            name=identity.name,
            program=identity.program,
        )

    def lost(self, wire: Wire, reason: str) -> None:
        """The connection is gone."""
        if wire is self._wire:
            self._drop_work()
            self._wire, self._state = None, _State.AWAY
            self._owner.unlinked(reason)

    def close(self, error: PeerError | None = None, reason: str = "closed") -> None:
        """Give the connection up."""
        wire = self._wire
        if wire is not None:
            wire.close(error)
            self.lost(wire, reason if error is None else error.text)

    def received(self, wire: Wire, message: Message) -> None:
        if wire is not self._wire:
            return
        if self._work is not None and not isinstance(message, Ping):
            self._later.append(message)
            return
        try:
            self._take(wire, message)
        except PeerError as error:
            self.close(error)

    def _work_on(self, work: Iterator[None]) -> None:
        """Go on with it in the next turn, as often as it yields."""
        self._work = work
        self._go_on(work)

    def _go_on(self, work: Iterator[None]) -> None:
        wire = self._wire
        if wire is None or work is not self._work:
            return  # of a connection that is gone
        try:
            has_ended = next(work, self) is self
        except PeerError as error:
            self.close(error)
            return
        if work is not self._work:
            return  # it has begun another one, or ended the connection
        if not has_ended:
            wire.read(False)
            self._soon(partial(self._go_on, work))
            return
        self._work = None
        while self._later and self._work is None:
            self.received(wire, self._later.popleft())
        if self._work is None:
            wire.read(True)

    def _drop_work(self) -> None:
        self._work = None
        self._later.clear()

    def _take(self, wire: Wire, message: Message) -> None:
        state = self._state
        if isinstance(message, Ping):
            self.send(Pong(message.time_us))
        elif isinstance(message, Pong | Bye | Error):
            pass  # the end of the connection follows by itself
        elif isinstance(message, Hello2) and state is _State.GREETING:
            self._greeted(wire, message)
        elif isinstance(message, Have) and state in (_State.COMPARING, _State.READY):
            self._work_on(self._have(message))
        elif isinstance(message, Pieces) and state is _State.COMPARING:
            self._owner.other(message)
        elif isinstance(message, Map) and state is not _State.GREETING and self.receiver:
            if self._joins:
                self._join(message.runs, {self.receiver.generations[0]})
        elif state is not _State.READY:
            raise PeerError(ErrorCode.KIND, f"{type(message).__name__} came while {state.value}")
        elif isinstance(message, Committed):
            wanted = (self.point, self._identity.incarnation)
            if not self._ended or (message.point, message.incarnation) != wanted:
                raise PeerError(ErrorCode.ANSWER, f"point {message.point} was not ended")
            self._committed = True
            self._owner.committed()
        elif isinstance(message, Credit):
            self.credit_bytes += message.bytes
            self.lacks_credit = False
        elif isinstance(message, Applied):
            self.applied = message.point
        elif isinstance(message, Need):
            self._owner.needed(message.runs)
        elif not isinstance(message, Received):
            self._owner.other(message)

    def send(self, message: Message) -> int:
        """The bytes on the wire: none, if there is none."""
        wire = self._wire
        if wire is None:
            return 0
        count = wire.send(message)
        self.wire_bytes += count
        return count

    # -- greeting, and what is there --------------------------------------------------------
    def _greeted(self, wire: Wire, theirs: Hello2) -> None:
        self.receiver, self.applied = theirs, theirs.applied
        verdict = judge(self.hello(), theirs)
        theirs_now = theirs.generations[0]
        may_join = self._may_join(verdict, theirs)
        self._joins = may_join and theirs_now not in self._joined
        self._is_old = verdict is Verdict.RECEIVER_IS_OLD
        if verdict not in FOLLOWED and not may_join:
            self._owner.not_followed(verdict, theirs)
            self.close(PeerError(ErrorCode.SPLIT_BRAIN, verdict.value))
            return
        if not self.point:
            self.point = theirs.committed + 1
        if not self.point - 1 <= theirs.committed <= self.point - 1 + self._ended:
            raise PeerError(
                ErrorCode.OTHER,
                f"the receiver has point {theirs.committed}, and {self.point} is the open one",
            )
        self._asks_in_place = False
        self._in_place = self.point if Feature.IN_PLACE in theirs.features else 0
        wire.greeted(self._geometry)
        self.credit_bytes, self.lacks_credit = theirs.credit_bytes, False
        packs = self.compress and bool(theirs.features & Feature.ZSTD)
        self._packer = Packer(self._geometry, self._identity.volume, compress=packs)
        self._kept = BlockSet()
        self._state = _State.COMPARING

    def _may_join(self, verdict: Verdict, theirs: Hello2) -> bool:
        """Whether it becomes the first receiver of this generation."""
        first = self._identity.promoted and not self.known_committed and not theirs.committed
        return first and verdict in (*FOLLOWED, Verdict.RECEIVER_IS_OLD)

    def _join(self, extents: Runs, generations: set[bytes]) -> None:
        wire = self._wire

        def marked(error: OSError | None) -> None:
            if error is None:
                self._joined |= generations
            if wire is not self._wire:
                return
            if error is not None:
                self.close(PeerError(ErrorCode.INTERNAL, "the record cannot be written"))
                return
            self._joins = False
            self._compare()

        self._owner.differs(extents, marked)

    def _have(self, have: Have) -> Iterator[None]:
        if (have.point, have.incarnation) == (self.point, self._identity.incarnation):
            for first, count, stamp in have.runs:
                for at in range(count):
                    line = self._sent.get(first + at)
                    if line is not None and line[1] == stamp + at:
                        self._kept.add(first + at, first + at + 1)
        elif have.runs:
            raise PeerError(ErrorCode.ANSWER, f"the receiver has point {have.point} open")
        theirs = self.receiver
        if not have.last:
            yield  # one for each turn
        elif self._joins and theirs is not None:
            if theirs.generations[0] in (NIL, self._identity.generations[0]):
                everything = ((0, self._geometry.extents),)
                self._join(everything, {NIL, *self._identity.generations})
        elif self._state is _State.COMPARING:
            self._compare()
        else:
            self._work_on(self._compared())

    def _compare(self) -> None:
        """Before anything is sent to an old primary."""
        wire, theirs = self._wire, self.receiver

        def compared() -> None:
            if wire is self._wire:
                self._work_on(self._compared())

        may_differ = theirs is not None and bool(theirs.features & Feature.PIECES)
        if may_differ and self._is_old and not self.has_leftovers:
            self._owner.compare(compared)
        else:
            compared()

    def _compared(self) -> Iterator[None]:
        greeted = self._state is _State.COMPARING
        if greeted and self.receiver is not None and self.receiver.committed == self.point:
            self._state = _State.READY
            self._committed = True
            self._owner.committed()
            return
        lost, kept, self._kept = BlockSet(), self._kept, BlockSet()
        for number, (block, *_) in enumerate(self._sent.lines(), 1):
            if not kept.any(block, block + 1):
                lost.add(block, block + 1)
            if not number % self.slice_blocks:
                yield
        # At once: what is no longer among what was sent has to be sent again, whatever comes.
        self._state = _State.READY
        for run in lost.runs():
            for block in range(*run):
                self._sent.drop(block)
        if not lost and not greeted:
            raise PeerError(
                ErrorCode.DIGEST, f"the receiver has all of point {self.point}, and refuses it"
            )
        if lost:
            self._ended = False
        self._owner.linked(lost)

    # -- sending ----------------------------------------------------------------------------
    def step(self, now_s: float) -> float | None:
        """Send a frame of the spool.  None: no more can be sent for now; otherwise the seconds
        after which more can be, 0: in the next turn of the loop."""
        wire = self._wire
        self._resting |= not len(self._spool)
        if wire is None or not self.may_send or not len(self._spool) or not wire.has_room:
            return None
        spooled = sorted(self._spool.first(FRAME_BYTES, MAX_ENTRIES), key=lambda entry: entry.block)
        if not spooled:
            return None  # it comes back to memory
        raw_bytes = sum(len(entry.raw) for entry in spooled)
        if self.credit_bytes < cost_of(raw_bytes):
            self.lacks_credit = True
            return None
        wait_s = self._throttle.delay_s(now_s, raw_bytes)
        if wait_s > 0:
            return wait_s
        if self._resting:
            self._resting = False
            self._meter.begin(now_s)
        count = self._begin(self._geometry.size_bytes, 0, "")
        entries = []
        for item in spooled:
            self._stamp += 1
            entry = self._packer.pack(item.block, self._stamp, item.mask, item.raw)
            self._sent.put(entry.block, entry.stamp, entry.mask, entry.sum64)
            self._spool.drop(item.block)
            if entry.encoding is Encoding.ZEROS:
                self.zero_bytes += len(item.raw)
            entries.append(entry)
        data = Data(tuple(entries))
        self.has_leftovers = True
        self.credit_bytes -= cost_bytes(data)
        self.sent_bytes += raw_bytes
        count += self.send(data)
        self._throttle.take(now_s, count)
        self._meter.add(now_s, raw_bytes)
        return 0.0

    def _begin(self, size_bytes: int, wall_ns: int, label: str) -> int:
        if self._begun_bytes == size_bytes and not wall_ns:
            return 0
        self._begun_bytes = size_bytes
        identity = self._identity
        base, group = self.point - 1, self.group if wall_ns else 0
        return self.send(
            Begin(self.point, identity.incarnation, base, wall_ns, group, size_bytes, label)
        )

    def end(self, wall_ns: int, label: str) -> None:
        """All of the point has been sent; `wall_ns` is the time of its cut."""
        if not self._ended:
            self._cut_bytes = self._geometry.size_bytes
        self._ended = True
        sent = self._sent
        self._begin(self._cut_bytes, wall_ns, label)
        self.send(End(self.point, self._identity.incarnation, len(sent), sent.digest()))

    def next_point(self) -> None:
        """The point was committed: the next one is open, and empty."""
        self._sent = Sent()
        self.point += 1
        self._begun_bytes = 0
        self._ended = self._committed = self.has_leftovers = False
