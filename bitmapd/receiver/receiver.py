"""The receiver's half of consistent points: what it answers a sender, and what it does meanwhile.

| state | message | next | does |
| --- | --- | --- | --- |
| waiting | HELLO2 that fits | greeting | leftovers of another incarnation are dropped, durably |
| greeting | (done) | saying | HELLO2, and HAVE by HAVE |
| saying | (all is said) | receiving | NEED if something rots |
| greeting | (does not follow) | refused | HELLO2, from which the sender concludes the same |
| receiving | BEGIN, DATA | receiving | into the journal, or at once into the image (`catchup`) |
| receiving | END, sets equal | committing | flush, commit page, COMMITTED |
| receiving | END, not equal | saying | HAVE by HAVE |
| saying to committing | APPLY-UP-TO | | what all of the group have may be applied (`held`) |
| saying to committing | VERIFY | | SUMS, when the image has what was committed then |
| receiving | COMPARE | | PIECES, likewise |
| receiving | HANDOVER that fits (`switchover`) | handing | the owner promotes it |
| any | PING | | PONG |
| any | anything else | waiting | ERROR; nothing was changed |

Points that are committed are applied beside this, whoever is connected (`applier`).

Invariants:
1. What HELLO2 and COMMITTED say of points is what the commit page on the medium says.  So a HELLO2
   is answered when no commit is under way.
2. A point is committed only if the sender's END has the count and digest of the entries that are
   here, each with its stamp.
3. What is wrong ends the connection.  Whoever is refused changes nothing.
4. A sender may send as much as there is room for in the journal: `credit`.  What is received and
   not yet written is bounded besides, by not reading.
5. An open point may have millions of blocks: what is here is said a HAVE in each turn of the loop,
   as far as the link takes it.  Nothing that the sender does not expect comes in between.

A crash loses what was said, never what was promised; see `journal` and `applier`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, cast
from uuid import UUID

from bitmapd.errors import WrongStateError
from bitmapd.media.base import Device, Scheduler
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.peer.words import Bye, Error, Goodbye, Pong
from bitmapd.points.codec import MAX_HAVE_BLOCKS, cost_bytes, haves
from bitmapd.points.lineage import FOLLOWED, Verdict, judge
from bitmapd.points.messages import (
    NIL,
    Applied,
    ApplyUpTo,
    Begin,
    Committed,
    Compare,
    Credit,
    Data,
    End,
    Feature,
    Handover,
    Have,
    Hello2,
    Map,
    Message,
    Need,
    Ping,
    Received,
    Role,
    Taken,
    Verify,
)
from bitmapd.points.pieces import Unpacker
from bitmapd.points.switchover import refusal
from bitmapd.receiver import growing
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.catchup import CatchingUp, CatchUp
from bitmapd.receiver.commit import MOST_QUEUED, PageFlag, Queued, page_figures
from bitmapd.receiver.entries import IN_IMAGE, Entries, kept
from bitmapd.receiver.image import InPlace
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import NO_KEEPER, Keeper, Keeping
from bitmapd.receiver.retention import Rules
from bitmapd.receiver.steps import Steps, run
from bitmapd.receiver.summing import Summing
from bitmapd.receiver.superblock import Line
from bitmapd.record.geometry import MIB, Geometry
from bitmapd.record.superblock import as_ids, from_ids

MOST_UNWRITTEN_BYTES: Final = 16 * MIB  # received; then the connection is not read
CREDIT_BYTES: Final = MIB  # that are worth a message
FEATURES: Final = Feature.ZSTD | Feature.PIECES | Feature.GROUP
RECEIVED_BYTES: Final = 8 * MIB  # between two RECEIVED


class State(enum.Enum):
    WAITING = "waiting"
    GREETING = "greeting"
    SAYING = "saying what is here"
    REFUSED = "refused"
    RECEIVING = "receiving"
    COMMITTING = "committing"
    HANDING = "handing"
    FAILED = "failed"


_GREETED: Final = (State.RECEIVING, State.COMMITTING)


class Wire(Protocol):
    """One connection of a sender."""

    @property
    def peer(self) -> str:
        """Its other end, for messages."""

    @property
    def has_room(self) -> bool:
        """Whether more may be sent; `Receiver.drained` when there is again."""

    def send(self, message: Message) -> int: ...

    def greeted(self, geometry: Geometry) -> None:
        """Its HELLO2 fits: blocks are those of this volume from now on."""

    def read(self, on: bool) -> None:
        """Whether more is to be received."""

    def close(self, error: PeerError | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Of this process."""

    name: str
    incarnation: bytes
    program: str


@dataclass(frozen=True, slots=True)
class _Volume:
    """What a receiver works with once it belongs to a volume."""

    unpacker: Unpacker
    in_place: InPlace
    applier: Applier
    keeping: Keeping
    catching_up: CatchingUp
    summing: Summing


class Receiver:
    """See the module docstring.  `now_s` is Unix time.  The journal's failure is its owner's
    business: nothing is answered any more after `fail`."""

    def __init__(
        self,
        journal: Journal,
        image: Device,
        scheduler: Scheduler,
        identity: Identity,
        now_s: Callable[[], int],
        emit: Callable[..., None],
        differs: Runs | None = None,
        keeper: Keeper = NO_KEEPER,
        rules: Rules = (),
        on_handover: Callable[[int], None] = lambda term: None,
        enlarge: growing.Enlarge = lambda size_bytes, done: done(None),
        catch_up: CatchUp = CatchUp.KEEP,
    ) -> None:
        """`keeper`, `rules`: how points are kept, and which.  `differs`: where the image may have
        something else than the point before the sender's generation began, if the image is an old
        primary.  `on_handover` hears the term in which this has to be the volume; `taken` or `kept`
        follows.  `enlarge` makes the image at least so large, if that can be.  `catch_up`: what
        becomes of the last point if the next one does not fit into the journal."""
        self.state = State.WAITING
        self.journal = journal
        self._image = image
        self._identity = identity
        self._now_s = now_s
        self._emit = emit
        self._wire: Wire | None = None
        self._hello: Hello2 | None = None
        self._begin: Begin | None = None
        self._busy = False  # greeting or committing, for this connection or one before
        self._credit_bytes = 0  # that the sender has left
        self._unwritten_bytes = 0
        self._in_place_bytes = 0  # of these, on their way to the image
        self._unsaid_bytes = 0  # since the last RECEIVED
        self._reading = True
        self.have_blocks = MAX_HAVE_BLOCKS
        self._saying: Iterator[Have] = iter(())
        self._say_due = False
        self._told_applied = 0  # to this sender
        self._differs = differs
        self._followed: Hello2 | None = None  # of the newest sender that was followed
        self._scheduler = scheduler
        self._keeper, self._rules, self._catch_up = keeper, rules, catch_up
        self._on_handover, self._enlarge = on_handover, enlarge
        self._volume = self._follow()
        self._allowed: dict[tuple[State, type], Callable[[Any], None]] = {
            (State.WAITING, Hello2): self._take_hello,
            (State.RECEIVING, Begin): self._take_begin,
            (State.RECEIVING, Data): self._take_data,
            (State.RECEIVING, End): self._take_end,
            (State.RECEIVING, Verify): self._take_verify,
            (State.COMMITTING, Verify): self._take_verify,
            (State.RECEIVING, Compare): self._take_compare,
            (State.RECEIVING, Handover): self._take_handover,
            (State.RECEIVING, ApplyUpTo): self._take_group,
            (State.COMMITTING, ApplyUpTo): self._take_group,
            (State.SAYING, Verify): self._take_verify,
            (State.SAYING, ApplyUpTo): self._take_group,
        }

    # -- its life -------------------------------------------------------------------------------
    def start(self) -> None:
        """Apply what is queued."""
        if self._volume is not None:
            self._volume.applier.go_on()

    def fail(self) -> None:
        """The journal can no longer be written."""
        self.state = State.FAILED
        if self._wire is not None:
            wire, self._wire = self._wire, None
            wire.close(PeerError(ErrorCode.INTERNAL, "the journal of the receiver has failed"))

    def leave(self) -> None:
        """This process stops: say so, and take nothing any more."""
        if self._wire is not None:
            wire = self._wire
            wire.send(Bye(Goodbye.STOPPED))
            self.lost(wire)
            wire.close()

    @property
    def is_idle(self) -> bool:
        """Nothing is in flight: the devices may be closed."""
        known = self._volume
        at_work = known is not None and (known.applier.is_at_work or known.summing.is_at_work)
        return not (self._busy or at_work or self._unwritten_bytes)

    @property
    def applier(self) -> Applier | None:
        """None before the first sender."""
        return None if self._volume is None else self._volume.applier

    @property
    def keeping(self) -> Keeping | None:
        """None before the first sender."""
        return None if self._volume is None else self._volume.keeping

    def _follow(self) -> _Volume | None:
        """What depends on the volume, once it is known."""
        line = self.journal.superblock.line
        if line is None:
            return None
        volume = line.volume.bytes
        keeping = Keeping(self.journal, self._keeper, self._rules, self._emit)
        applier = Applier(self.journal, self._image, line, self._scheduler, self, keeping)
        return _Volume(
            Unpacker(line.geometry, volume),
            InPlace(line.geometry, volume, self._image, lambda: applier.guarded_by),
            applier,
            keeping,
            CatchingUp(self._catch_up, self.journal, keeping, self._emit),
            Summing(self.journal, self._image, self._send),
        )

    # -- connections ----------------------------------------------------------------------------
    def connected(self, wire: Wire) -> None:
        """A sender is there; one before it is gone."""
        if self.state in (State.FAILED, State.HANDING):
            wire.close()
            return
        before = self._wire
        self._wire, self._hello, self._begin, self._reading = wire, None, None, True
        self.state = State.WAITING
        if self._volume is not None:
            self._volume.summing.forget()
        if before is not None:
            before.close()

    def lost(self, wire: Wire) -> None:
        if wire is self._wire:
            self._wire, self._hello = None, None
            if self.state is not State.HANDING:
                self.state = State.WAITING

    def drained(self, wire: Wire) -> None:
        """There is room again for what is to be sent."""
        if self.state is State.SAYING:
            self._say_soon()

    def received(self, wire: Wire, message: Message) -> None:
        if wire is not self._wire:
            return
        try:
            self._take(message)
        except PeerError as error:
            self._refuse(wire, error)

    def _refuse(self, wire: Wire, error: PeerError) -> None:
        self._emit("sender-refused", message=f"{wire.peer}: {error.text}")
        self.lost(wire)
        wire.close(error)

    def _take(self, message: Message) -> None:
        if isinstance(message, Ping):
            self._send(Pong(message.time_us))
        elif isinstance(message, Pong | Bye | Error):
            pass  # the connection's end follows by itself
        else:
            take = self._allowed.get((self.state, type(message)))
            if take is None:
                raise PeerError(
                    ErrorCode.KIND, f"{type(message).__name__} came while {self.state.value}"
                )
            take(message)

    def _send(self, message: Message) -> None:
        if self._wire is not None:
            self._wire.send(message)

    # -- the greeting ---------------------------------------------------------------------------
    def _take_hello(self, hello: Hello2) -> None:
        self._check_hello(hello)
        self._hello = hello
        self.state = State.GREETING
        self._greet()

    def _check_hello(self, hello: Hello2) -> None:
        from_demoted = hello.role is Role.DEMOTED and self.journal.page.committed > 0
        if not (hello.role is Role.SENDER or from_demoted) or hello.generations[0] == NIL:
            raise PeerError(ErrorCode.OTHER, f"{hello.role.name} has nothing to send to a receiver")
        if hello.name != self._identity.name:
            raise PeerError(
                ErrorCode.OTHER,
                f"this is the receiver of '{self._identity.name}', not of '{hello.name}'",
            )
        growing.check(hello, self.journal, self._image)

    def _greet(self) -> None:
        """Answer a HELLO2 as soon as nothing else is being done for a sender."""
        hello = self._hello
        if hello is None or self.state is not State.GREETING or self._busy:
            return
        verdict = judge(hello, self._greeting())
        if verdict not in FOLLOWED and not self._joins(verdict):
            self.state = State.REFUSED
            self._emit("sender-refused", message=verdict.value)
            self._send(self._greeting())
            return
        self._busy = True
        run(self._preparing(hello), partial(self._prepared, hello))

    def _joins(self, verdict: Verdict) -> bool:
        """Whether an image that was a primary becomes one of newer data."""
        committed = self.journal.page.committed
        return verdict is Verdict.RECEIVER_IS_OLD and self._differs is not None and not committed

    def _preparing(self, hello: Hello2) -> Steps[PeerError | None]:
        """Why it cannot be followed, after all."""
        journal = self.journal
        if journal.superblock.line is None:
            fault = yield from growing.first_image(hello, self._image, self._enlarge)
            if fault is not None:
                return fault
            generations = from_ids(hello.generations)
            line = Line(
                UUID(bytes=hello.volume), growing.geometry_of(hello), generations, hello.term
            )
            yield from journal.adopt(line, self._now_s())
            self._volume = self._follow()
        lost = yield from self._known.in_place.settle()
        if journal.page.incarnation != hello.incarnation:
            yield from journal.drop(hello.incarnation)
        elif lost:
            journal.open = Entries()
        if Feature.IN_PLACE in hello.features:
            yield from self._known.catching_up.begin()
        return (
            yield from growing.take_up(
                hello, journal, self._known.keeping, self._image, self._enlarge, self._now_s()
            )
        )

    def _prepared(self, hello: Hello2, error: OSError | None, fault: PeerError | None) -> None:
        self._busy = False
        if error is not None:
            return  # of the journal: `fail` has been called
        wire = self._wire
        if self._hello is not hello or wire is None:
            self._greet()  # of another connection
            return
        if fault is not None:
            self._refuse(wire, fault)
            return
        self._followed = hello
        self._credit_bytes = self._room_bytes
        self._unsaid_bytes = 0
        geometry = growing.geometry_of(hello)
        wire.greeted(geometry)
        self._known.summing.greeted(geometry)
        self._emit("sender-connected", peer=wire.peer)
        self._send(self._greeting())
        self._told_applied = self.journal.page.applied
        self._say_what_is_here()

    def _greeting(self) -> Hello2:
        page, line = self.journal.page, self.journal.superblock.line
        geometry = None if line is None else line.geometry
        promoted = page.flags & (PageFlag.PROMOTED | PageFlag.PROMOTING)
        return Hello2(
            volume=NIL if line is None else line.volume.bytes,
            incarnation=self._identity.incarnation,
            generations=as_ids(() if line is None else line.generations),
            size_bytes=self._image.size_bytes if geometry is None else geometry.size_bytes,
            block_bytes=0 if geometry is None else geometry.block_bytes,
            extent_bytes=0 if geometry is None else geometry.extent_bytes,
            committed=page.committed,
            applied=page.applied,
            oldest_kept=next((kept.point for kept in self.journal.directory.kept), 0),
            role=Role.PROMOTED if promoted else Role.RECEIVER,
            features=self._features,
            credit_bytes=self._room_bytes,
            term=0 if line is None else line.term,
            name=self._identity.name,
            program=self._identity.program,
        )

    @property
    def _features(self) -> Feature:
        may_ask = Feature(0) if self._catch_up is CatchUp.KEEP else Feature.CATCH_UP
        return FEATURES | may_ask | (Feature.IN_PLACE if self.journal.page.in_place else Feature(0))

    def _say_what_is_here(self) -> None:
        journal = self.journal
        point = journal.open_point if journal.open.count else 0
        self.state = State.SAYING
        stamps = journal.open.stamps()
        self._saying = haves(point, journal.page.incarnation, stamps, self.have_blocks)
        self._say()

    def _say_soon(self) -> None:
        if not self._say_due:
            self._say_due = True
            self._scheduler.call_soon(self._say)

    def _say(self) -> None:
        self._say_due = False
        wire = self._wire
        if self.state is not State.SAYING or wire is None or not wire.has_room:
            return
        have = next(self._saying)
        wire.send(have)
        if not have.last:
            self._say_soon()
            return
        self.state = State.RECEIVING
        self._say_where_it_differs()
        if self._told_applied != self.journal.page.applied:
            self._tell_applied(self.journal.page.applied)
        self._grant()
        self._ask_again()

    def _say_where_it_differs(self) -> None:
        """Also if that is nowhere: the sender waits to hear it."""
        line, hello, differs = self.journal.superblock.line, self._followed, self._differs
        if differs is None or line is None or hello is None:
            return
        if line.generations[0].bytes != hello.generations[0]:
            self._send(Map(growing.within(differs, growing.geometry_of(hello))))

    # -- the open point -------------------------------------------------------------------------
    def _take_begin(self, begin: Begin) -> None:
        journal = self.journal
        wanted = (journal.open_point, journal.page.committed, journal.page.incarnation)
        if (begin.point, begin.base, begin.incarnation) != wanted:
            raise PeerError(
                ErrorCode.ANSWER,
                f"point {begin.point} on {begin.base} does not follow {journal.page.committed}",
            )
        geometry = growing.begun(begin, journal)
        cast("Wire", self._wire).greeted(geometry)  # the one that has brought it
        self._known.unpacker.geometry = geometry
        self._known.in_place.resize(geometry)
        self._begin = begin

    def _take_data(self, data: Data) -> None:
        cost = cost_bytes(data)
        if self._begin is None:
            raise PeerError(ErrorCode.KIND, "Data came before Begin")
        if cost > self._credit_bytes:
            raise PeerError(
                ErrorCode.BUSY, f"Data costs {cost} bytes; {self._credit_bytes} were granted"
            )
        if self.journal.page.in_place:
            self._known.in_place.write(data, lambda error: self._in_image(cost, error))
            self._in_place_bytes += cost
            for entry in data.entries:
                self.journal.open.add(kept(entry, IN_IMAGE, len(entry.payload)))
        else:
            for entry in data.entries:
                self._known.unpacker.unpack(entry)
            self.journal.append(data.entries, lambda error: self._written(cost))
        self._credit_bytes -= cost
        self._unwritten_bytes += cost
        self._unsaid_bytes += cost
        if self._unsaid_bytes >= RECEIVED_BYTES:
            self._unsaid_bytes = 0
            self._send(Received(data.entries[-1].stamp))
        self._read_on()

    def _written(self, cost_bytes: int) -> None:
        self._unwritten_bytes -= cost_bytes
        self._read_on()
        self._grant()  # it may have taken less than it cost

    def _in_image(self, cost_bytes: int, error: OSError | None) -> None:
        self._in_place_bytes -= cost_bytes
        self._written(cost_bytes)
        if error is not None:
            self._image_failed(error)

    def _image_failed(self, error: OSError) -> None:
        """What was written in place may be lost: the sender has to come again."""
        self._emit("image-error", message=error.strerror or str(error))
        if self.journal.page.in_place and self._wire is not None:
            wire = self._wire
            self.lost(wire)
            wire.close(PeerError(ErrorCode.INTERNAL, "the image of the receiver has failed"))

    def _read_on(self) -> None:
        """Receive no more than can be written."""
        reading = self._unwritten_bytes < MOST_UNWRITTEN_BYTES
        if reading != self._reading and self._wire is not None:
            self._reading = reading
            self._wire.read(reading)

    @property
    def _room_bytes(self) -> int:
        return max(0, self.journal.room_bytes - self._in_place_bytes)

    def _grant(self) -> None:
        more = self._room_bytes - self._credit_bytes
        if self.state in _GREETED and more >= CREDIT_BYTES:
            self._credit_bytes += more
            self._send(Credit(more))

    # -- committing -----------------------------------------------------------------------------
    def _take_end(self, end: End) -> None:
        begin, here = self._begin, self.journal.open
        if begin is None or (end.point, end.incarnation) != (begin.point, begin.incarnation):
            raise PeerError(ErrorCode.KIND, f"the end of point {end.point}, which was not begun")
        if (end.entries, end.digest16) != (here.count, here.digest()):
            self._say_what_is_here()
            return
        self.state = State.COMMITTING
        self._busy = True
        queued = Queued(
            end.point,
            end.incarnation,
            end.entries,
            end.digest16,
            begin.wall_ns,
            begin.group,
            begin.size_bytes,
        )
        steps = self._committing(queued, begin.label)
        page = self.journal.page
        caught_up = page.in_place and bool(page.committed)
        run(steps, lambda error, _: self._committed(queued, error, caught_up=caught_up))

    def _committing(self, queued: Queued, label: str) -> Steps[None]:
        journal = self.journal
        yield from self._known.keeping.name(queued, label)
        if journal.page.in_place:
            yield from self._known.in_place.flush()
            yield from self._take_generation()
            per = journal.line.geometry.blocks_per_extent
            yield from self._known.keeping.add(block // per for block, _ in journal.open.stamps())
            yield from journal.commit_in_image(queued)
            return
        while len(journal.page.queue) >= MOST_QUEUED:
            if place := self._known.applier.make_place():
                self._emit("group-apart", point=place)
            yield self._known.applier.when_applied
        yield from journal.commit(queued)

    def _take_generation(self) -> Steps[None]:
        """The first point makes the image one of the sender's data."""
        line, hello = self.journal.superblock.line, self._followed
        if line is None or hello is None or line.generations[0].bytes == hello.generations[0]:
            return
        generations = from_ids(hello.generations)
        after = dataclasses.replace(line, generations=generations, term=hello.term)
        yield from self.journal.follow(after, self._now_s())

    def _committed(self, queued: Queued, error: OSError | None, *, caught_up: bool) -> None:
        self._busy = False
        if error is not None:
            if self.journal.failure is None:
                self._image_failed(error)
            return
        self._begin = None
        self._emit("point-committed", point=queued.point)
        if caught_up:
            self._emit("catch-up-ended", point=queued.point)
        if self.state is State.COMMITTING:
            self.state = State.RECEIVING
            self._send(Committed(queued.point, queued.incarnation))
            if self.journal.page.applied == queued.point:
                self._tell_applied(queued.point)
            self._grant()
        self._known.applier.go_on()
        self._known.summing.go_on()
        self._greet()

    # -- the role is handed over ----------------------------------------------------------------
    def _take_handover(self, handover: Handover) -> None:
        hello = self._hello
        reason = "no Hello2" if hello is None else refusal(handover.term, hello, self._greeting())
        if reason is None and self._known.applier.is_at_work:
            reason = "a copy of its last point is being made"
        if reason is not None:
            raise PeerError(ErrorCode.BUSY, reason)
        self.state = State.HANDING
        self._on_handover(handover.term)

    def taken(self, term: int) -> None:
        """This is the volume, durably: nothing is received any more."""
        self._send(Taken(term))

    def kept(self, reason: str) -> None:
        """It is the receiver that it was."""
        self.state = State.WAITING
        wire, self._wire, self._hello = self._wire, None, None
        if wire is not None:
            wire.close(PeerError(ErrorCode.INTERNAL, reason))

    # -- applying -------------------------------------------------------------------------------
    def _take_verify(self, verify: Verify) -> None:
        self._known.summing.ask(verify.runs)

    def _take_compare(self, compare: Compare) -> None:
        self._known.summing.compare(compare)

    def _take_group(self, message: ApplyUpTo) -> None:
        self._known.applier.name(message.group)

    def applied(self, point: int) -> None:
        if self.state in _GREETED:
            self._tell_applied(point)
        self._known.summing.go_on()
        self._grant()

    def _tell_applied(self, point: int) -> None:
        self._told_applied = point
        self._send(Applied(point))

    def damaged(self, missing: Runs) -> None:
        self._emit("point-damaged", blocks=sum(stop - first for first, stop in missing))
        self._ask_again()

    def image_failed(self, error: OSError) -> None:
        self._image_failed(error)

    def _ask_again(self) -> None:
        missing = self._known.applier.missing
        if missing and self.state in _GREETED:
            self._send(Need(missing))

    # -- status ---------------------------------------------------------------------------------
    def figures(self) -> dict[str, Any]:
        """The keys of `receiver` in the status."""
        journal = self.journal
        return page_figures(journal.page) | {
            "connected": self.state in (*_GREETED, State.SAYING),
            "catch_up": self._catch_up.value,
            "kept": [kept.point for kept in journal.directory.kept],
            "queued_bytes": journal.queued_bytes,
            "journal_bytes": journal.used_bytes,
            "journal_limit_bytes": journal.limit_bytes,
        }

    @property
    def _known(self) -> _Volume:
        if self._volume is None:
            raise WrongStateError("no sender has come yet")
        return self._volume
