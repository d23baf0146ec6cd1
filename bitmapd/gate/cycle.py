"""The gate of a volume with consistent points: cuts, and copy-before-write (pure).

A *point* is the content of the volume at one instant, the *cut*: all writes that were submitted
before it, none that was submitted later.  At the cut the era ends, and what is in `taken` then is
*pending*: its content at the cut has not been read.  Hosts go on; a write to a pending block waits
until that block was read, which then comes before all others.  While no cut is open and no answer
withheld, a hit is what it is in a `Gate`, which is what volumes without points have.

Order of a write while a cut is open:
1. A pending block among its blocks?  Wait until they were read, then begin anew.
2. As in `Gate`: its extents are in the record, or get there.  Whatever it waited for, 1 is asked
   again: what was clean may have left the record meanwhile, and a cut may have come.
3. Nothing is pending and all is recorded: it is marked and submitted in that same event, with the
   pieces that it changes (`changes`).

Invariants:
1. A write belongs to the point if and only if it was submitted before `begin_cut`: a pending block
   is read when no write of before is in flight (`begin_cut` calls back then), and none of later is
   submitted to it before the read has ended.
2. A block is pending until the read that ended first has its content; later reads of it do not
   count.  Whoever reads asks `is_pending` in the event in which a read ends, and calls `copied` in
   that same event.
3. A host waits for a cut at most `patience_s`, once: then the cut is *given up*, as after an error
   of a read, or when there is no room for what has to be read.  What was pending is dirty as
   before, all who wait go on, and nothing that was sent is lost.
4. Nothing becomes pending after the cut.  Whoever has blocks copied again while one is open gives
   it up first.
5. A trim is a hint: it leaves pending blocks out.  A zeroing is a write.
6. While answers are withheld, for a group (`withheld`), that holds for every write that is
   submitted, in whatever way it got here.
7. Where hosts write past the gate (`direct`), a cut is made only while none does and all that was
   written so is known: then this gate sees every write, and the instant is its own.  An extent is
   not direct again before its pending blocks were read (`_may_be_direct`), and what a barrier
   brings while a cut is open is of the next era, whenever it was written.
8. Whatever marks blocks and is not a host's write says in the same event that it is not known what
   of them changed; but for `send_again`, since what was not committed is known all the while.

What was read, and what was sent, counts as copied and not settled (`unsettled`): no extent of it
leaves the record before the point is committed and the primary was flushed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.changes import PIECE_SHIFT, Changes
from bitmapd.gate.elsewhere import Elsewhere, Run
from bitmapd.gate.gate import Gate, Submit
from bitmapd.gate.withheld import Withheld
from bitmapd.media.base import Device, Done, Scheduler, Timer, after_all
from bitmapd.predict.policy import Policy
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record

PATIENCE_S = 0.05


class Void(Enum):
    """Why a cut is given up."""

    SLOW = "slow"  # a host has waited for long enough
    SPOOL = "spool"  # no room for what has to be read before a write
    READ_ERROR = "read-error"
    FLUSH_ERROR = "flush-error"  # the primary may have lost what was read
    LINK = "link"  # the receiver lacks something of it that is kept nowhere else
    JOURNAL = "journal"  # the receiver has no room for the rest of the point
    GROUP = "group"  # another volume of the group was not cut
    ASKED = "asked"  # a pause, a resync, a change of size, a stop


class Reader(Protocol):
    """Who reads what is pending; never calls back from inside."""

    def read_first(self, runs: Iterable[Run]) -> bool:
        """A write waits for these pending blocks: read them before all others.  False if there is
        no room for them; then nothing was begun."""

    def gave_up(self, reason: Void) -> None:
        """The cut is over; what is pending no longer has to be read."""


class Direct(Elsewhere, Protocol):
    """Hosts that write past the gate, and can be kept from it."""

    def still(self, *, wanted: bool) -> None:
        """Have the next barrier end all of it, and none let it begin again, as long as that is
        wanted."""

    @property
    def is_still(self) -> bool:
        """Whether nobody can write there, and the blocks of all that was written are known."""

    @property
    def is_busy(self) -> bool:
        """Whether a barrier is under way."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    first: int
    stop: int
    since_s: float
    again: Callable[[], None]


class CutGate(Gate):
    """See the module docstring; `reader` has to be set before the first cut."""

    reader: Reader

    def __init__(
        self,
        geometry: Geometry,
        primary: Device,
        store: Record,
        policy: Policy,
        scheduler: Scheduler,
        *,
        limit_extents: int,
        patience_s: float = PATIENCE_S,
        direct: Direct | None = None,
    ) -> None:
        super().__init__(
            geometry,
            primary,
            store,
            policy,
            scheduler,
            limit_extents=limit_extents,
            elsewhere=() if direct is None else (direct,),
        )
        self.direct = direct
        self.patience_s = patience_s
        self.changes = Changes(geometry, self.current)
        self._current_era.marks = self.changes.pieces
        self._mark_shift = PIECE_SHIFT
        self._cutting = False  # something may be pending
        self.answers = Withheld()
        self._waiting: list[_Waiter] = []  # oldest first
        self._timer: Timer | None = None
        self.waits = 0  # of hosts for a cut
        self.wait_s = 0.0
        self.longest_wait_s = 0.0

    # -- a cut ----------------------------------------------------------------------------
    def begin_cut(self, ready: Callable[[], None]) -> None:
        """This is the instant.  Calls back when pending blocks may be read.  To be called as
        `take_era`, which this is."""
        if self.direct is not None and not self.direct.is_still:
            raise RuntimeError("hosts write past the gate")
        self._cutting = True
        self._set_before_write()
        self.changes.cut()
        self._take_era((), ready)

    def _take_era(self, others: Sequence[Elsewhere], ready: Callable[[], None]) -> None:
        super()._take_era(others, ready)
        self.changes.begin_era(self.current)
        self._current_era.marks = self.changes.pieces

    # -- hosts that write past it ---------------------------------------------------------
    def follow(self, done: Callable[[bool], None]) -> None:
        """A barrier that ends no era here, whatever else goes on: what was written elsewhere gets
        known, as of this era, and the kernel's table follows the record.  Not while `is_busy`;
        calls back with whether it has passed, never from inside."""
        direct, begun_s = self.direct, self._scheduler.time()
        if direct is None:
            raise RuntimeError("nobody writes past the gate")

        def brought(runs: Sequence[Run] | None) -> None:
            if runs is not None:
                self._unsettled.join(runs, self._known_until)
                self._tell_policy(runs)
                for run in runs:
                    self.changes.unknown(*run)
                self._known_until = max(self._known_until, begun_s)
            self._scheduler.call_soon(done, runs is not None)

        direct.barrier(self._may_be_direct(), brought)

    def _may_be_direct(self) -> Iterable[Run]:
        recorded = super()._may_be_direct()
        if not self._cutting:
            return recorded
        per = self._geometry.blocks_per_extent
        pending = ((first // per, (stop - 1) // per + 1) for first, stop in self.taken.runs())
        return BlockSet(recorded).minus(BlockSet(pending)).runs()

    def _take_from_elsewhere(self, runs: Sequence[Run]) -> None:
        super()._take_from_elsewhere(runs)
        for run in runs:
            self.changes.unknown(*run)

    @property
    def wants_era(self) -> bool:
        """Not for the table's sake, which `follow` does without."""
        return self._unsettled.wants_era or (self.direct is not None and self.direct.written)

    @property
    def is_cutting(self) -> bool:
        """Whether a cut is open of which something may be pending."""
        return self._cutting

    def is_pending(self, block: int) -> bool:
        return self._cutting and self.taken.any(block, block + 1)

    def end_cut(self) -> None:
        """All of it was read."""
        self._cutting = False
        self._stop_timer()
        self._set_before_write()

    def withhold_answers(self) -> None:
        """Of what is submitted from now on; before `begin_cut`."""
        self.answers.begin()
        self._set_before_write()

    def release_answers(self) -> None:
        self.answers.release()
        self._set_before_write()

    def _set_before_write(self) -> None:
        self._before_write = self._in_cut if self._cutting or self.answers.is_on else None

    def give_up_cut(self, reason: Void) -> None:
        """Nothing if no cut is open.  The reader is told first, then those who wait go on."""
        if not self._cutting:
            return
        self.end_cut()
        self.reader.gave_up(reason)
        self._wake(lambda waiter: True)

    def copied(self, first: int, stop: int) -> None:
        """As in `Eras`; while a cut is open: these pending blocks have been read."""
        super().copied(first, stop)
        if self._waiting:
            self._wake(lambda waiter: not self.taken.any(waiter.first, waiter.stop))

    def send_again(self, first: int, stop: int) -> None:
        """Blocks were sent and did not arrive: dirty, as if they had been written again."""
        self._current_era.mark(first, stop, self._scheduler.time())

    def settle(self, extents: Iterable[int]) -> None:
        self.changes.committed()
        super().settle(extents)

    # -- what marks blocks, and may make some pending (invariants 4 and 8) ------------------
    def take_recorded(self) -> None:
        self.give_up_cut(Void.ASKED)
        super().take_recorded()
        self._unknown(self._store.recorded_runs())

    def take_everything(self, done: Done) -> None:
        self.give_up_cut(Void.ASKED)
        super().take_everything(done)
        self.changes.unknown(0, self._geometry.blocks)

    def mark(self, first: int, stop: int, done: Done) -> None:
        def marked(error: OSError | None) -> None:
            if error is None:
                self.changes.unknown(first, stop)
            done(error)

        super().mark(first, stop, marked)

    def grow(self, geometry: Geometry, *, mine: bool = True) -> None:
        self.give_up_cut(Void.ASKED)
        first = self._geometry.size_bytes // geometry.block_bytes
        super().grow(geometry, mine=mine)
        self.changes.unknown(first, geometry.blocks)

    def forget_copied(self) -> set[int]:
        self.give_up_cut(Void.FLUSH_ERROR)
        extents = super().forget_copied()
        self._unknown((extent, extent + 1) for extent in extents)
        return extents

    def unsettle(self, extents: Iterable[int]) -> None:
        self.give_up_cut(Void.FLUSH_ERROR)
        gone = list(extents)
        super().unsettle(gone)
        self._unknown((extent, extent + 1) for extent in gone)

    def _unknown(self, extents: Iterable[Run]) -> None:
        for first, stop in extents:
            self.changes.unknown(*self._geometry.extent_blocks(first, stop))

    def is_hot(self, first: int, stop: int) -> bool:
        """What is pending has to be read, whether or not it is to be copied once more."""
        return not self._cutting and super().is_hot(first, stop)

    # -- hosts ----------------------------------------------------------------------------
    def _in_cut(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool) -> Done | None:
        """`Before`, while a cut is open or answers are withheld."""
        if self._cutting:
            blocks = self._geometry.block_span(offset_bytes, len(buffer))
            # It begins anew after whatever it waits for, in this cut or after it.
            if self._waits(*blocks, lambda: self.write(offset_bytes, buffer, done, fua)):
                return None
        return self.answers.of(done)

    def _land(
        self,
        verb: str,
        offset_bytes: int,
        length_bytes: int,
        submit: Submit,
        done: Done,
        fua: bool,
    ) -> None:
        if not self._cutting:
            self._submit(verb, offset_bytes, length_bytes, submit, done, fua)
        elif verb == "trim":
            pieces = self._beside_pending(offset_bytes, length_bytes)
            if not pieces:
                self._scheduler.call_soon(done, None)
                return
            ended = after_all(len(pieces), done)
            for at, count in pieces:
                self._submit(verb, at, count, submit, ended, fua)
        else:
            # From the record on: what this write waits for now may let its extents be evicted.
            again = partial(self._bring, verb, offset_bytes, length_bytes, submit, done, fua)
            if not self._waits(*self._geometry.block_span(offset_bytes, length_bytes), again):
                self._submit(verb, offset_bytes, length_bytes, submit, done, fua)

    def _submit(
        self,
        verb: str,
        offset_bytes: int,
        length_bytes: int,
        submit: Submit,
        done: Done,
        fua: bool,
    ) -> None:
        """`Gate._land`, with the pieces that are changed."""
        self.changes.written(offset_bytes, length_bytes)
        super()._land(verb, offset_bytes, length_bytes, submit, self.answers.of(done), fua)

    def _beside_pending(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
        """The parts of a range that are in no pending block: (offset, length) in bytes."""
        left = BlockSet([self._geometry.block_span(offset_bytes, length_bytes)]).minus(self.taken)
        end = offset_bytes + length_bytes
        parts = []
        for run in left.runs():
            start, count = self._geometry.block_bytes_range(*run)
            at = max(start, offset_bytes)
            parts.append((at, min(start + count, end) - at))
        return parts

    # -- waiting --------------------------------------------------------------------------
    def _waits(self, first: int, stop: int, again: Callable[[], None]) -> bool:
        """Whether a change of blocks [first, stop) has to wait; `again` is called when not."""
        if not self.taken.any(first, stop):
            return False
        if not self.reader.read_first(list(self.taken.runs(first, stop))):
            self.give_up_cut(Void.SPOOL)
            return False
        self._waiting.append(_Waiter(first, stop, self._scheduler.time(), again))
        self.waits += 1
        if self._timer is None:
            self._timer = self._scheduler.call_later(self.patience_s, self._patience_over)
        return True

    def _wake(self, may_go: Callable[[_Waiter], bool]) -> None:
        now = self._scheduler.time()
        waiting, self._waiting = self._waiting, []
        going: list[_Waiter] = []
        for waiter in waiting:
            (going if may_go(waiter) else self._waiting).append(waiter)
        for waiter in going:
            waited_s = now - waiter.since_s
            self.wait_s += waited_s
            self.longest_wait_s = max(self.longest_wait_s, waited_s)
            waiter.again()

    def _patience_over(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        left_s = self._waiting[0].since_s + self.patience_s - self._scheduler.time()
        if left_s <= 0:
            self.give_up_cut(Void.SLOW)
        else:
            self._timer = self._scheduler.call_later(left_s, self._patience_over)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
