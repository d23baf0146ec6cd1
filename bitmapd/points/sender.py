"""The sender: brings a volume to its receiver, one consistent point after another.

It stands where `copier.engine` does for a plain secondary, reads the primary through the same
`Transfers`, and is treated by the volume like a `Copier`.  What was read goes to the spool, from
there to the receiver; what a flush of the secondary is to a copier, END and COMMITTED are here.

| phase | on | goes to | does |
| --- | --- | --- | --- |
| open | the cut is due | cutting | the era ends; what is dirty is pending |
| open | much is dirty | open | copies ahead, round after round, into the same open point |
| cutting | writes of before have landed | reading | |
| reading | everything was read | sending | hosts no longer wait for anything |
| sending | the spool is empty | ended | END; the primary is flushed |
| ended | `Closing` is done | open | what was sent is settled: it may leave the record |
| cutting, reading | `CutGate` gives the cut up | open | what was read goes on as if copied ahead |
| cutting … ended | the receiver lacks what was sent | open | that is dirty again |

Invariants:
1. An era ends, at a cut or in a round, only while nothing is being read (the gate's condition).
2. Something is in flight only in the phases *open* and *reading*: so nothing that is read later
   than the cut, and was not pending, gets into its point, and nothing at all from the last read
   until the point is closed.
3. No host waits for the receiver, the link, or the superblock.
4. A volume of a group is cut by the group's leader (`group`), but for what is left at a stop.
5. A file that the spool has beside memory decides nothing: what fails there is dirty again.

A crash loses spool and phase.  The record names all that is not settled, the next process has
another incarnation, and its first point has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Final

from bitmapd.copier.engine import CopyState
from bitmapd.copier.passes import Passes
from bitmapd.copier.reports import Reports
from bitmapd.copier.throttle import SpeedMeter, Throttle
from bitmapd.copier.transfers import Transfers
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.cycle import CutGate, Void
from bitmapd.gate.elsewhere import Run
from bitmapd.media.base import Device, Done, Scheduler, Timer, after_all
from bitmapd.media.buffers import BufferPool
from bitmapd.peer.payloads import Runs
from bitmapd.points.age import PointAge
from bitmapd.points.closing import Closing, Ledger
from bitmapd.points.differences import Differences
from bitmapd.points.following import Following
from bitmapd.points.group import ALONE, Member
from bitmapd.points.lineage import Verdict
from bitmapd.points.messages import Hello2, Message, Pieces, Sums
from bitmapd.points.overflow import Overflow
from bitmapd.points.reading import Reading, ReadPrimary
from bitmapd.points.room import Room
from bitmapd.points.schedule import Next, Schedule
from bitmapd.points.spool import Spool
from bitmapd.points.sums import ImageSums
from bitmapd.points.uplink import Identity, Uplink, Wire
from bitmapd.record.geometry import Geometry

Emit = Callable[..., None]

LOOK_S: Final = 1.0
ASK_AGAIN_S: Final = 60.0  # whether a point that does not fit may go into the image
COUNTED_BLOCKS: Final = 2048  # one by one: 4 ms
AHEAD_BYTES: Final = 8 << 20  # that are read ahead of the link without a cut
SPOOL_BYTES: Final = 256 << 20
INTERVAL_S: Final = 30.0


class Phase(Enum):
    OPEN = "open"
    CUTTING = "cutting"
    READING = "reading"
    SENDING = "sending"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Settings:
    interval_s: float = INTERVAL_S
    spool_bytes: int = SPOOL_BYTES
    compress: bool = True


class Sender:
    """See the module docstring.  `wall_ns` is Unix time, which only people look at."""

    def __init__(
        self,
        geometry: Geometry,
        gate: CutGate,
        primary: Device,
        scheduler: Scheduler,
        pool: BufferPool,
        throttle: Throttle,
        identity: Identity,
        ledger: Ledger,
        settings: Settings,
        emit: Emit,
        wall_ns: Callable[[], int],
        *,
        secondary: str,
        piece_bytes: int = 1 << 20,
        read_primary: ReadPrimary | None = None,
        spool_file: Device | None = None,
        committed_cut_s: int = 0,
    ) -> None:
        """`secondary` names the receiver in events; `read_primary` is used instead of
        `primary.read`: a way that leaves hosts the loop.  `spool_file` takes what memory has no
        room for; what is in it means nothing.  `committed_cut_s`: `before_s` of `PointAge`."""
        self._geometry = geometry
        self._gate = gate
        self._scheduler = scheduler
        self._emit = emit
        self._wall_ns = wall_ns
        self._secondary = secondary
        self._reports = Reports(emit, primary.name, secondary)
        self.throttle = throttle
        self.meter = SpeedMeter()
        self.passes = Passes(geometry)
        self.spool = Spool(settings.spool_bytes)
        self.overflow: Overflow | None = None
        if spool_file is not None:
            self.overflow = Overflow(self.spool, spool_file, scheduler.time, self)
            self.spool.beyond = self.overflow
        self.schedule = Schedule(settings.interval_s, settings.spool_bytes)
        self._count_room()
        self.uplink = Uplink(
            geometry,
            identity,
            self.spool,
            throttle,
            self.meter,
            self,
            partial(scheduler.call_soon, self._work_of_uplink),
            compress=settings.compress,
        )
        self.sums = ImageSums(self.uplink.send)
        self.differences = Differences(
            geometry,
            gate,
            read_primary or primary.read,
            pool,
            throttle,
            self.uplink.send,
            self.passes.copied,
            self._soon,
            int.from_bytes(identity.incarnation[:8], "little"),
        )
        self.reading = Reading(
            geometry,
            gate,
            read_primary or primary.read,
            scheduler,
            pool,
            self.spool,
            self,
            piece_bytes=piece_bytes,
        )
        self.room = Room(gate, self.spool, self.uplink, geometry.block_bytes, emit)
        self.closing = Closing(gate, primary, ledger, self.passes, self._closed, self._soon)
        self.following: Following | None = None
        if gate.direct is not None:
            self.following = Following(gate, gate.direct, scheduler, self._soon)
        self._wants_cut = False  # that of `following`
        gate.reader = self
        gate.on_flush_error = self._primary_not_flushed
        self.state = CopyState.STOPPED
        self._away_since_s = scheduler.time()
        self.phase = Phase.OPEN
        self.on_change: Callable[[], None] | None = None
        self.on_other: Callable[[Message], None] | None = None
        self.on_not_followed: Callable[[Verdict, Hello2], None] | None = None
        self.copied_bytes = 0
        self.read_errors = 0
        self.primary_failed_s = float("-inf")
        self.voids = dict.fromkeys(Void, 0)
        self.points = 0  # committed by this process
        self.precopied_bytes = 0  # sent ahead of a cut
        self.changed_bytes = 0  # between them, in pieces
        self._point_changed_bytes = 0
        self._age = PointAge(scheduler.time, wall_ns, committed_cut_s)
        self._point_cut_s = 0.0
        self._point_wall_ns = 0
        self.label = ""
        self.member: Member | None = None  # of a group
        self.is_leaving = False  # no point is cut any more: the receiver takes the volume's place
        self._wanted = False  # a point, changed or not
        self._barrier = False
        self._compares: Callable[[], None] | None = None  # waits for a barrier to pass
        self._told_slow = False
        self._told_in_place = False
        self._ask_again_s = float("-inf")
        self._stepping = False
        self._timer: Timer | None = None
        self._wake: Timer | None = None
        self._draining: list[Callable[[], None]] = []

    # -- control --------------------------------------------------------------------------
    def start(self, *, paused: bool = False) -> None:
        self._set_state(CopyState.PAUSED if paused else self._linked_state)
        self._on_timer()

    def pause(self) -> None:
        """Send nothing more; a cut that is open is given up."""
        if self.state is not CopyState.STOPPED:
            self._set_state(CopyState.PAUSED)
            self._gate.give_up_cut(Void.ASKED)
            self._soon()

    def resume(self) -> None:
        if self.state is CopyState.PAUSED:
            self._set_state(self._linked_state)
            self.proceed()

    def stop(self, done: Callable[[], None]) -> None:
        """Send nothing more and call back when nothing is in flight."""
        self._set_state(CopyState.STOPPED)
        self._gate.give_up_cut(Void.ASKED)
        for timer in (self._timer, self._wake):
            if timer is not None:
                timer.cancel()
        self._timer = self._wake = None
        if self.following is not None:
            self.following.stop()
        self._draining.append(done)
        self._check_stopped()

    def reconnect(self) -> None:
        """Give the connection to the receiver up; who dials makes a new one."""
        self.uplink.close()

    def wake(self) -> None:
        """The next cut need not wait for its time: used while draining."""
        self.schedule.hurry()
        if self.following is not None:
            self.following.hurry()
        self._soon()

    def cut(self, label: str = "") -> None:
        """Have a point cut as soon as may be, whether anything changed or not."""
        self._wanted, self.label = True, label
        self.wake()

    def withdraw(self) -> None:
        """The point that was asked for is not wanted any more, unless it is cut already: its label
        was of that moment."""
        if self.phase is Phase.OPEN:
            self._wanted, self.label = False, ""

    def limit_spool(self, limit_bytes: int) -> None:
        """Memory that it may take from now on."""
        self.spool.limit_bytes = limit_bytes
        self._count_room()

    def _count_room(self) -> None:
        self.schedule.spool_bytes = self.spool.limit_bytes + (self.file_limit_bytes or 0)

    def begin_pass(self, *, compare: bool, predecessor: bool = False) -> None:
        """Follow what is in `gate.taken` now until all of it is in a committed point.  Nothing is
        compared, since nobody reads the image past the receiver; nor does anything land late."""
        self.passes.begin(self._gate.taken)
        self._soon()

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on, as the receiver is already; a cut that is open has the
        size of before.  A last block that was short comes again, as a whole."""
        self.give_up(Void.ASKED)
        last, before = self._geometry.blocks - 1, self._geometry.size_bytes
        if before % geometry.block_bytes:
            self.reading.revoke()
            self.spool.forget(last)
        self._geometry = geometry
        self.passes.grow(geometry)
        self.reading.grow(geometry)
        self.differences.grow(geometry)
        self.uplink.resized(geometry)

    @property
    def _linked_state(self) -> CopyState:
        return CopyState.RUNNING if self.uplink.is_ready else CopyState.LINK_DOWN

    def _set_state(self, state: CopyState) -> None:
        if state is not self.state:
            if self.state is CopyState.RUNNING:
                self._away_since_s = self.now_s
            self.state = state
            self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    # -- what it says of itself -------------------------------------------------------------
    @property
    def now_s(self) -> float:
        return self._scheduler.time()

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight here, whatever the receiver does.  Asked at each batch of
        requests of hosts (`Parts._may_spin`)."""
        return (
            not self._in_barrier
            and self.reading.idle
            and self.closing.idle
            and self.differences.idle
            and (self.overflow is None or self.overflow.idle)
        )

    @property
    def _in_barrier(self) -> bool:
        return self._barrier or (self.following is not None and self.following.under_way)

    @property
    def is_linked(self) -> bool:
        """Whether the receiver can be asked something."""
        return self.uplink.is_ready

    @property
    def stuck(self) -> bool:
        """Whether all that is left waits to be read again after an error of its own."""
        return self.phase is Phase.OPEN and self.idle and self.reading.is_blocked

    @property
    def last_error(self) -> OSError | None:
        return self._reports.last_error

    @property
    def in_sync(self) -> bool:
        """Whether the newest committed point has everything."""
        return self._gate.in_sync and not self.passes.under_way

    @property
    def oldest_content_s(self) -> float | None:
        """When the oldest content was written that no committed point has, or earlier."""
        return self._gate.oldest_dirty_s()

    @property
    def left_bytes(self) -> int:
        """What is dirty and not in the open point, or more: pieces that changed count until the
        point is committed."""
        blocks_bytes = self._gate.dirty_blocks() * self._geometry.block_bytes
        return min(blocks_bytes, self._gate.changes.most_bytes, self._geometry.size_bytes)

    @property
    def _left_now_bytes(self) -> int:
        """The same as exactly as can be told without holding up hosts."""
        gate = self._gate
        if gate.dirty_blocks() > COUNTED_BLOCKS:
            return self.left_bytes
        dirty = gate.current.minus(BlockSet())
        dirty.update(gate.taken)
        return gate.changes.bytes_in(dirty.runs())

    @property
    def file_limit_bytes(self) -> int | None:
        """How much there may be beside what memory has; None without a file."""
        if self.overflow is None:
            return None
        return self.overflow.limit_bytes if self.overflow.works else 0

    @property
    def transfers(self) -> Transfers:
        return self.reading.transfers

    # -- what may have to be done -----------------------------------------------------------
    def _on_timer(self) -> None:
        self._timer = self._scheduler.call_later(LOOK_S, self._on_timer)
        self.proceed()

    def _soon(self) -> None:
        if not self._stepping:
            self._stepping = True
            self._scheduler.call_soon(self._step)

    def _step(self) -> None:
        self._stepping = False
        self.proceed()

    def _work_of_uplink(self, work: Callable[[], None]) -> None:
        work()
        self._soon()

    def _wake_in(self, delay_s: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._scheduler.call_later(delay_s, self.proceed)

    def proceed(self) -> None:
        """Do whatever can be done now; called after every event that may allow something."""
        if self.state is CopyState.STOPPED:
            self._check_stopped()
            return
        now = self._scheduler.time()
        self._wants_cut = False
        if self.state is not CopyState.PAUSED:
            self._go_forward(now)
        elif self.idle:
            self._changed()  # whoever asked for the pause waits for this
        if self.following is not None:
            self.following.step(now, wants_cut=self._wants_cut)

    def _go_forward(self, now: float) -> None:
        if self.overflow is not None:
            self.overflow.proceed()
        if self.phase is Phase.OPEN and self.state is CopyState.RUNNING:
            self._go_on(now)
        elif self.phase is Phase.READING:
            self._read_cut(now)
        elif self._compares is not None:
            if not self._in_barrier:  # one for the table's sake; comparing begins with another
                done, self._compares = self._compares, None
                self.differences.begin(done)
                self._soon()
        elif wait_s := self.differences.go_on(now):
            self._wake_in(wait_s)
        if not self._only_reads:
            self._send(now)

    def _check_stopped(self) -> None:
        if self.idle and self._draining:
            waiting, self._draining = self._draining, []
            for done in waiting:
                self._scheduler.call_soon(done)

    # -- before the cut -----------------------------------------------------------------------
    def _go_on(self, now: float) -> None:
        """No cut is open: cut, or copy ahead, or wait."""
        if self._in_barrier or self.reading.is_revoked:
            return
        if self.schedule.copies_ahead or self.reading.is_blocked:
            self._copy_ahead(now)
        elif not self.reading.idle or not self._has_something:
            return  # an era ends only while nothing is being read
        elif self.room.refuses(now):
            self._make_room(now)
        elif not self.room.is_tight and self.schedule.is_much(
            self.left_bytes, self.meter.bytes_per_s
        ):
            self._next_round()
        elif self.schedule.due_s <= now:
            self._wants_cut = self._may_cut_alone
            if self._wants_cut and (self.following is None or self.following.may_cut(now)):
                self.uplink.group = 0 if self.member is None else ALONE
                self._cut(now)
        else:
            self._wake_in(min(self.schedule.due_s - now, LOOK_S))

    def _make_room(self, now: float) -> None:
        uplink = self.uplink
        if not self.room.is_hopeless(now):
            return
        if uplink.has_leftovers:
            # What the receiver holds of this point counts no more, and takes the room of it.
            self._drop_point()
        elif uplink.may_ask_in_place and now >= self._ask_again_s:
            self._ask_again_s = now + ASK_AGAIN_S
            uplink.ask_in_place()

    @property
    def _has_something(self) -> bool:
        gate = self._gate
        wanted = self._wanted or self.uplink.lacks_first
        return bool(wanted or gate.wants_era or gate.taken or gate.has_copied)

    def _next_round(self) -> None:
        self.schedule.begin_round(self._left_now_bytes)
        self._barrier = True
        self._gate.take_era(self._round_began)

    def _round_began(self) -> None:
        self._barrier = False
        self.reading.new_round()
        self.proceed()

    def _copy_ahead(self, now: float) -> None:
        most = min(AHEAD_BYTES, self.spool.ahead_bytes)
        tight = self.room.is_tight
        if tight and not self.reading.is_blocked:
            most = 0  # what cannot be read keeps points away, and has to be tried all the same
        wait_s = self.reading.begin(now, most)
        if wait_s:
            self._wake_in(wait_s)
        over = wait_s is None and self.reading.idle and not len(self.spool)
        if not over or self.reading.is_blocked or not self.schedule.copies_ahead:
            return
        following = self.schedule.after_round(self._left_now_bytes, self.meter.bytes_per_s)
        if tight:
            following = Next.CUT
        if following is Next.CANNOT_KEEP_UP and not self._told_slow:
            self._told_slow = True
            self._emit(
                "cannot-keep-up",
                left_bytes=self.left_bytes,
                bytes_per_second=round(self.meter.bytes_per_s or 0),
                message="hosts write as fast as the link carries; points wait until it is less",
            )
        if following is not Next.CUT:
            self._next_round()
        else:
            self.schedule.end_rounds()
            self._soon()

    # -- of a group (`group.Cuttable`) ----------------------------------------------------------
    @property
    def _may_cut_alone(self) -> bool:
        member, left = self.member, self.schedule.is_hurried and not self._wanted
        return member is None or (left and member.may_cut_alone)

    @property
    def cut_obstacle(self) -> str:
        if self.is_leaving:
            return "it gives its role away"
        if self.state is not CopyState.RUNNING or not self.uplink.can_group:
            return "its receiver is away, or of a version without groups"
        if self.reading.is_blocked:
            return "something of it cannot be read"
        if self.schedule.copies_ahead:
            return "it copies ahead"
        if self.room.refuses(self._scheduler.time()):
            return "the journal of its receiver is full"
        much = self.schedule.is_much(self.left_bytes, self.meter.bytes_per_s)
        return "it begins to copy ahead" if much and not self.room.is_tight else ""

    @property
    def may_be_cut(self) -> bool:
        busy = self._barrier or self.reading.is_revoked or not self.reading.idle
        return self.phase is Phase.OPEN and not busy

    @property
    def is_still(self) -> bool:
        return self.following is None or self.following.is_still

    def still(self) -> None:
        if self.following is not None:
            self.following.hold(self._scheduler.time())
            self._soon()

    @property
    def is_due(self) -> bool:
        return self._has_something and self.schedule.due_s <= self._scheduler.time()

    @property
    def unapplied(self) -> int:
        return max(0, self.uplink.known_committed - self.uplink.applied)

    @property
    def away_s(self) -> float:
        return 0.0 if self.state is CopyState.RUNNING else self.now_s - self._away_since_s

    def cut_now(self, number: int, wall_ns: int, label: str) -> None:
        self.uplink.group, self.label = number, label
        self._cut(self._scheduler.time())
        self._point_wall_ns = wall_ns

    def give_up(self, reason: Void) -> None:
        """The cut that is open and not ended, if one is."""
        self._gate.give_up_cut(reason)
        if self.phase is Phase.SENDING:
            self._void(reason)

    def say(self, message: Message) -> None:
        if self.uplink.is_ready:
            self.uplink.send(message)

    # -- the cut ------------------------------------------------------------------------------
    def _cut(self, now: float) -> None:
        self.phase = Phase.CUTTING
        self.schedule.cut(now)
        self._wanted = False
        self._point_cut_s, self._point_wall_ns = now, max(1, self._wall_ns())
        if self.following is not None:
            self.following.cut(now)
        self._barrier = True
        self._gate.begin_cut(self._landed)

    def _landed(self) -> None:
        self._barrier = False
        if self.phase is Phase.CUTTING:
            self.phase = Phase.READING
            self.reading.new_round()
            self.reading.landed()
        self.proceed()

    def _read_cut(self, now: float) -> None:
        if self._gate.taken:
            wait_s = self.reading.begin(now, self.spool.ahead_bytes)
            if wait_s:
                self._wake_in(wait_s)
        elif self.reading.idle:
            self._gate.end_cut()
            self.reading.end_cut()
            self.phase = Phase.SENDING
            self._changed()

    @property
    def _only_reads(self) -> bool:
        """Whether a cut is read as far as the spool takes it before more of it is sent.  Where
        hosts write past the gate they cannot until their extents were read, and this loop answers
        them meanwhile."""
        reads = self.phase is Phase.READING and bool(self._gate.taken)
        room = self.spool.held_bytes < self.spool.ahead_bytes
        return self.following is not None and reads and room

    def read_first(self, runs: Iterable[Run]) -> bool:
        """As `gate.cycle.Reader`."""
        return self.reading.read_first(runs)

    def gave_up(self, reason: Void) -> None:
        """As `gate.cycle.Reader`: the cut is over.  What was read is not lost."""
        self.reading.end_cut()
        self._void(reason)

    def _void(self, reason: Void) -> None:
        self.phase = Phase.OPEN
        self.closing.give_up()
        if self.member is not None:
            self.member.gave_up()
        self.voids[reason] += 1
        self.schedule.gave_up(self._scheduler.time())
        label, self.label = self.label, ""  # the next cut is of another moment
        if reason is not Void.ASKED or label:
            self._emit("point-void", point=self.uplink.point, reason=reason.value, label=label)
        self._changed()
        self._soon()

    # -- what was read (`ReadingOwner`) -------------------------------------------------------
    def has_read(self, first: int, stop: int) -> None:
        self.passes.copied(first, stop)
        self.copied_bytes += self._geometry.block_bytes_range(first, stop)[1]

    def not_read(self, first: int, stop: int, error: OSError) -> None:
        self.read_errors += 1
        self._reports.not_read(self._geometry.block_bytes_range(first, stop), error)
        self._gate.give_up_cut(Void.READ_ERROR)

    # -- sending, and the end of a point ----------------------------------------------------
    def _send(self, now: float) -> None:
        if (
            self.phase is Phase.OPEN
            and self.uplink.may_send
            and len(self.spool)
            and self.room.refuses(now)
        ):  # what a cut that was given up has left in the spool would begin the point
            self._make_room(now)
            return
        sent_bytes = self.uplink.sent_bytes
        wait_s = self.uplink.step(now)
        if self.phase is Phase.OPEN:
            self.precopied_bytes += self.uplink.sent_bytes - sent_bytes
        if wait_s is not None:
            if wait_s:
                self._wake_in(wait_s)
            else:
                self._soon()
        elif self.uplink.lacks_credit and self.uplink.is_ready:
            if self.room.is_hopeless(now):
                self._drop_point()
        elif (
            self.phase is Phase.SENDING
            and not len(self.spool)
            and self.uplink.is_ready
            and self.state is CopyState.RUNNING
            and (self.member is None or self.member.may_end())
        ):
            self._end()

    def _drop_point(self) -> None:
        """The open point fills the journal with what was sent more than once: it can neither be
        committed nor applied, so all of it is dirty again."""
        self.room.next_point()
        self.give_up(Void.JOURNAL)
        self.uplink.begin_anew()

    def _end(self) -> None:
        self.phase = Phase.ENDED
        self._point_changed_bytes = self._gate.changes.cut_bytes
        self.uplink.end(self._point_wall_ns, self.label)
        self.closing.begin(self.uplink.point, self._point_wall_ns)

    def _closed(self, error: OSError | None) -> None:
        if error is not None:
            self._reports.last_error = error
        self.phase = Phase.OPEN
        self.points += 1
        self.changed_bytes += self._point_changed_bytes
        self._age.committed(self._point_cut_s)
        self._emit("point-committed", point=self.uplink.point)
        self.label = ""
        self._told_slow = self._told_in_place = False
        self._count_room()
        self.room.next_point()
        self.uplink.next_point()
        self.schedule.committed()
        if self.passes.ended(nothing_copied=not self._gate.has_copied) and self.passes.on_done:
            self.passes.on_done()
        self._changed()
        self.proceed()

    def _primary_not_flushed(self, error: OSError) -> None:
        """What was read from its cache may be gone: nothing that was read counts."""
        self.primary_failed_s = self._scheduler.time()
        self._reports.not_flushed(error)
        self.closing.not_flushed()
        self.reading.revoke()
        self.passes.again(self._gate.forget_copied())
        if self.phase is Phase.SENDING:
            self._void(Void.FLUSH_ERROR)

    # -- connections (`points.wire.PointEnd`) -------------------------------------------------
    def connected(self, wire: Wire) -> None:
        """Somebody who may come in is there; a connection of before is given up."""
        self.uplink.connected(wire)

    def received(self, wire: Wire, message: Message) -> None:
        self.uplink.received(wire, message)
        self._soon()

    def drained(self, wire: Wire) -> None:
        """There is room again for what is to be sent."""
        self._soon()

    def lost(self, wire: Wire, reason: str) -> None:
        self.uplink.lost(wire, reason)

    def failed(self, reason: str) -> None:
        """The receiver could not be reached, or somebody was refused."""
        self._reports.not_opened(OSError(reason))

    # -- the receiver (`UplinkOwner`) ---------------------------------------------------------
    def linked(self, lost: BlockSet) -> None:
        self._send_again(lost, Void.LINK)
        if self.phase is Phase.ENDED:
            self.uplink.end(self._point_wall_ns, self.label)
        self._link_is_up()
        if self.member is not None:
            self.member.linked()
        if self.uplink.is_in_place and not self._told_in_place:
            self._told_in_place = True
            self.room.next_point()
            if self.uplink.point > 1:
                self._emit(
                    "catch-up-begun",
                    point=self.uplink.point,
                    message="there is no room for it in the receiver's journal: it goes into the"
                    " image, which is between two points until then",
                )
        self._soon()

    def _send_again(self, lost: BlockSet, reason: Void) -> None:
        """What was read of these is nowhere any more."""
        per = self._geometry.blocks_per_extent
        for first, stop in lost.runs():
            self.passes.again(range(first // per, (stop - 1) // per + 1))
            self._gate.send_again(first, stop)
        if lost and self.phase in (Phase.CUTTING, Phase.READING):
            self._gate.give_up_cut(reason)
        elif lost and self.phase in (Phase.SENDING, Phase.ENDED):
            self._void(reason)

    # -- the spool's file (`OverflowOwner`) ---------------------------------------------------
    def spool_failed(self, error: OSError, lost: BlockSet) -> None:
        self._emit("spool-error", blocks=lost.count(), message=error.strerror or str(error))
        self._count_room()
        self._send_again(lost, Void.SPOOL)

    def _link_is_up(self) -> None:
        if self.state is CopyState.LINK_DOWN:
            self._reports.link_up()
            self._set_state(CopyState.RUNNING)

    def committed(self) -> None:
        self._link_is_up()
        if self.member is not None:
            self.member.has_committed()
        self.closing.committed()
        self._soon()

    def needed(self, runs: Runs) -> None:
        for run in runs:
            self._gate.mark(*run, self._marked)

    def differs(self, extents: Runs, done: Done) -> None:
        def ended(error: OSError | None) -> None:
            done(error)
            self._soon()

        marked = after_all(len(extents), ended)
        for first, stop in extents:
            self._gate.mark(*self._geometry.extent_blocks(first, stop), marked)
        if not extents:
            self._scheduler.call_soon(ended, None)

    def compare(self, done: Callable[[], None]) -> None:
        if self.phase is Phase.OPEN and self.reading.idle and not self._barrier:
            self._compares = done
            self._soon()
        else:
            self._scheduler.call_soon(done)

    def _marked(self, error: OSError | None) -> None:
        if error is not None:  # the receiver asks again with the next connection
            self._reports.last_error = error
        self._soon()

    def not_followed(self, verdict: Verdict, receiver: Hello2) -> None:
        if self.on_not_followed is not None:
            self.on_not_followed(verdict, receiver)
        if verdict is Verdict.WENT_BACK:
            self._emit(
                "receiver-went-back",
                secondary=self._secondary,
                committed=self.uplink.known_committed,
                theirs=receiver.committed,
            )
        else:
            self._emit("receiver-refused", secondary=self._secondary, message=verdict.value)

    def unlinked(self, reason: str) -> None:
        self.sums.lost()
        self._compares = None
        self.differences.lost()
        if self.state is CopyState.RUNNING:
            self._reports.link_down(OSError(reason))
            self._set_state(CopyState.LINK_DOWN)

    def other(self, message: Message) -> None:
        if isinstance(message, Sums):
            self.sums.take(message)
        elif isinstance(message, Pieces):
            self.differences.take(message)
        elif self.on_other is not None:
            self.on_other(message)

    # -- status -------------------------------------------------------------------------------
    def figures(self) -> dict[str, Any]:
        """`points` of the status."""
        speed = self.meter.bytes_per_s
        phase = "none" if self.phase is Phase.OPEN else self.phase.value
        if self.differences.is_under_way:
            phase = "comparing"
        in_sync = self.in_sync
        return {
            "number": self.uplink.closed_point,
            "state": "blocked" if self.reading.is_blocked else phase,
            "age_seconds": 0.0 if in_sync else self._age.seconds,
            "age_from_clock": self._age.is_from_clock and not in_sync,
            "interval_seconds": self.schedule.interval_s,
            "committed_total": self.points,
            "void_total": {reason.value: count for reason, count in self.voids.items()},
            "sent_bytes_total": self.uplink.sent_bytes,
            "precopied_bytes_total": self.precopied_bytes,
            "compared_bytes_total": self.differences.compared_bytes,
            "equal_bytes_total": self.differences.equal_bytes,
            "sums_bytes_total": self.differences.sums_bytes,
            "wire_bytes_total": self.uplink.wire_bytes,
            "changed_bytes_total": self.changed_bytes,
            "cbw_total": self.reading.copies_before_write,
            "cbw_wait_seconds_total": round(self._gate.wait_s, 3),
            "cbw_wait_seconds_max": round(self._gate.longest_wait_s, 3),
            "spool_bytes": self.spool.held_bytes,
            "spool_limit_bytes": self.spool.limit_bytes,
            "spool_file_bytes": None if self.overflow is None else self.overflow.held_bytes,
            "spool_file_limit_bytes": self.file_limit_bytes,
            "eta_seconds": None if not speed else round(self.left_bytes / speed, 1),
        }
