"""The copier: brings `gate.taken` to the secondary, flushes both sides, lets the gate settle.

Here is what its parts have to do with one another, and what an administrator wants of it: whether
it runs, is paused, or has lost the link.  `Rounds` says what comes when, `Transfers` copies,
`Settling` has it count, `Reconnect` brings a lost secondary back, `Passes` follows a recovery.

Invariants:
1. After any error of the secondary, or a failed flush of the primary, what was copied and not
   flushed counts as not copied, and so do the copies and the settle that were under way: the error
   may mean that a cache is gone.  Nothing is cleared on the word of a device that failed.
2. A place that the secondary refuses holds back itself only, and the link stays.  After
   `MAX_REFUSED` in a row the connection is made anew.
3. A new connection to the secondary is made only when nothing is in flight on the old one
   (`Reconnect`), and what that one may still write stays recorded (`LateWrites`).
4. A host never waits for anything here.

A crash leaves the secondary with some blocks newer than others; the record names all of them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from bitmapd.copier.ages import Ages, earliest
from bitmapd.copier.late import LateWrites
from bitmapd.copier.leaving import Free, Leaving
from bitmapd.copier.passes import Passes
from bitmapd.copier.reconnect import Reconnect
from bitmapd.copier.refusals import Refusal
from bitmapd.copier.reports import Reports
from bitmapd.copier.rounds import Rounds
from bitmapd.copier.sample import Samples
from bitmapd.copier.settling import Settling
from bitmapd.copier.throttle import Backoff, SpeedMeter, Throttle
from bitmapd.copier.transfers import Transfers
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Device, Done, Scheduler, Target, Timer
from bitmapd.media.buffers import BufferPool
from bitmapd.record.geometry import Geometry

Emit = Callable[..., None]
Places = Sequence[tuple[int, int]]  # (offset, length) in bytes

# After so many refusals in a row, with nothing written between, it may not be the places: a disk
# that has come back under its name answers only who opens it again.
MAX_REFUSED = 8


class CopyState(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    LINK_DOWN = "link-down"
    STOPPED = "stopped"


class Copier:
    """See the module docstring."""

    def __init__(
        self,
        geometry: Geometry,
        gate: Gate,
        primary: Device,
        secondary: Target,
        scheduler: Scheduler,
        pool: BufferPool,
        throttle: Throttle,
        backoff: Backoff,
        emit: Emit,
        *,
        check_secondary: Callable[[], OSError | None],  # is what was opened the right medium?
        era_interval_s: float,
        longest_era_s: float | None = None,  # the same
        late_writes_s: float = 0.0,
        piece_bytes: int = 1 << 20,
        read_primary: Callable[[int, memoryview, Done], None] | None = None,
    ) -> None:
        """`read_primary` is used instead of `primary.read`: a way that leaves hosts the loop."""
        self._geometry = geometry
        self._gate = gate
        self._primary = primary
        self._secondary = secondary
        self._scheduler = scheduler
        self._reports = Reports(emit, primary.name, secondary.name)
        self._timer: Timer | None = None
        self._draining: list[Callable[[], None]] = []
        self._ages = Ages()
        self._refused = 0  # writes, since one was taken or the secondary opened
        gate.on_flush_error = self._primary_not_flushed
        self.throttle = throttle
        self.meter = SpeedMeter()
        self.state = CopyState.STOPPED
        self.copied_bytes = 0
        self.read_errors = 0
        self.primary_failed_s = float("-inf")  # when it could not be flushed
        self.passes = Passes(geometry)
        self.on_change: Callable[[], None] | None = None
        self.on_changed_secondary: Callable[[Places], None] | None = None
        self._guarded = False  # until the first comparison is over
        self._leaving = Leaving(scheduler)
        self.late = LateWrites(
            geometry, gate, scheduler, self._leaving, self.proceed, bound_s=late_writes_s
        )
        self.samples = Samples(geometry, gate, primary, secondary, scheduler, pool, self._sampled)
        self._settling = Settling(
            gate,
            primary,
            secondary,
            scheduler,
            self._ages,
            self.passes,
            owner=self,
            block_bytes=geometry.block_bytes,
        )
        self._reconnect = Reconnect(secondary, scheduler, backoff, check_secondary, self)
        self.transfers = Transfers(
            geometry,
            gate,
            read_primary or primary.read,
            secondary,
            scheduler,
            pool,
            throttle,
            self.meter,
            self._leaving,
            owner=self,
            piece_bytes=piece_bytes,
        )
        self.rounds = Rounds(
            gate,
            scheduler,
            self._ages,
            self.late,
            self.transfers,
            self._settling,
            self.proceed,
            era_interval_s=era_interval_s,
            longest_era_s=era_interval_s if longest_era_s is None else longest_era_s,
        )

    # -- control --------------------------------------------------------------------------
    def start(self, *, paused: bool = False, guarded: bool = False) -> None:
        """Begin to copy; if the secondary is not there, begin to look for it.

        `guarded`: both sides were left equal.  So nothing is copied before some blocks have been
        compared; if they differ somebody has written the secondary, and what to do about it is for
        `on_changed_secondary` to say, with copying paused.
        """
        self._guarded = guarded
        self._settling.put_off(self._scheduler.time())
        if paused:
            self._set_state(CopyState.PAUSED)
        else:
            self._go_on()
        if self._secondary.connected:
            self._compare_samples()
        self._on_timer()

    def pause(self) -> None:
        """Copy nothing more; what is in flight finishes."""
        if self.state is not CopyState.STOPPED:
            self._set_state(CopyState.PAUSED)

    def resume(self) -> None:
        if self.state is CopyState.PAUSED:
            self._go_on()
            self.proceed()

    def _go_on(self) -> None:
        # While it is being opened a device may count as connected before it was checked.
        if self._secondary.connected and not self._reconnect.seeking:
            self.late.arrived()  # what a predecessor sent, or a device that was not opened again
            self._set_state(CopyState.RUNNING)
        else:
            self._set_state(CopyState.LINK_DOWN)
            self._reconnect.seek()

    def stop(self, done: Callable[[], None]) -> None:
        """Copy nothing more and call back when nothing is in flight."""
        self._set_state(CopyState.STOPPED)
        self.rounds.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._draining.append(done)
        self._check_stopped()

    def reconnect(self) -> None:
        """Give the secondary's connection up, when it is idle, and make a new one."""
        if self.state is CopyState.RUNNING:
            self._set_state(CopyState.LINK_DOWN)
            self._reconnect.seek()

    def wake(self) -> None:
        """There may be something to do before the next era ends: used while draining."""
        self.rounds.hurry()
        self._scheduler.call_soon(self.proceed)

    def begin_pass(self, *, compare: bool, predecessor: bool = False) -> None:
        """Follow what is in `gate.taken` now until all of it has been copied once.

        `predecessor`: another process copied before this one, and may have died doing so.
        """
        if predecessor and self._secondary.writes_late:
            self.late.predecessor_died()
            if self.state is CopyState.RUNNING:
                self.late.arrived()
        self.passes.begin(self._gate.taken)
        self._ages.joined(self._gate.taken, self.now_s)
        self.transfers.compare = compare
        self._scheduler.call_soon(self.proceed)

    def given(self, extents: Iterable[int], free: Free) -> set[int]:
        """These extents have just been given away (after `Gate.give`): nothing of them is copied.

        Returns those where something of ours may still land: a copy in flight, or one that was lost
        and may be carried out late.  `free(extents)` is called for each of them, in groups, once
        that is over.  Until then nobody may copy there, and we must not if we get them back.
        """
        gone = set(extents)
        blocks = BlockSet(self._geometry.extent_blocks(extent, extent + 1) for extent in gone)
        self.transfers.given(gone, blocks)
        self.late.given(gone)
        self._settling.given(gone)
        self.passes.given(blocks)
        self.samples.given(blocks)
        nothing_copied = not self._gate.has_copied
        self._ages.given(blocks, self._gate.taken, nothing_copied=nothing_copied)
        if not self._settling.under_way and self.passes.ended(nothing_copied=nothing_copied):
            self._scheduler.call_soon(self.pass_done)
        self._scheduler.call_soon(self.proceed)
        return self._leaving.tell(gone, free)

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on."""
        self._geometry = geometry
        self.passes.grow(geometry)
        self.late.grow(geometry)
        self.transfers.grow(geometry)
        self.samples.grow(geometry)

    @property
    def now_s(self) -> float:
        """Time of the loop that the copier, and so the gate, runs on."""
        return self._scheduler.time()

    @property
    def oldest_content_s(self) -> float | None:
        """When the oldest content was written that the secondary lacks, or earlier (`Ages`)."""
        return earliest(self._ages.oldest_s, self._gate.era_since_s)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and the barrier, if one was begun, has passed."""
        return self.rounds.idle and not self.samples.checking

    @property
    def stuck(self) -> bool:
        """Whether all that is left to copy waits to be tried again after an error of its own."""
        return self.idle and self.rounds.stuck

    @property
    def last_error(self) -> OSError | None:
        """The latest error of either side or of the record, whatever came of it."""
        return self._reports.last_error

    @property
    def in_sync(self) -> bool:
        """Whether everything is on the secondary, and nothing speaks against its having kept it."""
        return self._gate.in_sync and not self.passes.under_way and not self.samples.checking

    def _set_state(self, state: CopyState) -> None:
        if state is not self.state:
            self.state = state
            if self.on_change is not None:
                self.on_change()

    # -- what may have to be done -----------------------------------------------------------
    def _on_timer(self) -> None:
        self._timer = self._scheduler.call_later(self.rounds.era_interval_s, self._on_timer)
        if self.state is CopyState.RUNNING and not self._secondary.connected:
            self._secondary_failed(OSError(errno.ENOTCONN, "the connection was lost"))
        self.proceed()

    def proceed(self) -> None:
        """Do whatever can be done now; called after every event that may allow something."""
        if self.state is CopyState.STOPPED:
            self._check_stopped()
            return
        if self.state is CopyState.PAUSED and self.idle and self.on_change is not None:
            self.on_change()  # whoever asked for the pause waits for this
        self.rounds.step(running=self.state is CopyState.RUNNING and not self._guarded)

    # -- what became of a transfer (`TransfersOwner`) -------------------------------------
    def copied(self, first: int, stop: int, length_bytes: int) -> None:
        self.copied_bytes += length_bytes
        self._settling.copied(length_bytes)
        self._refused = 0
        self._gate.copied(first, stop)
        self._ages.copied(first, stop, self._gate.taken)
        self.samples.copied(first)
        self.passes.copied(first, stop)

    def not_read(self, first: int, stop: int, error: OSError) -> None:
        self.read_errors += 1
        self._reports.not_read(self._geometry.block_bytes_range(first, stop), error)

    def not_compared(self, error: OSError) -> None:
        self._secondary_failed(error)

    def not_written(self, first: int, stop: int, error: OSError, refusal: Refusal) -> None:
        if self._secondary.lands_late(error):
            self.late.lost(first, stop)
        if refusal is Refusal.PLACE:
            self._refused += 1
        if refusal is Refusal.GONE or self._refused >= MAX_REFUSED:
            self._secondary_failed(error)
            return
        self._reports.refused(self._geometry.block_bytes_range(first, stop), error)
        self._take_back()
        self._risk_less()

    # -- what became of a settle (`SettlingOwner`) ----------------------------------------
    def not_flushed(self, device: Device, error: OSError) -> None:
        self._reports.last_error = error
        if device is self._secondary:
            self._secondary_failed(error)
        else:
            self._gate.not_durable(error)

    def settled(self) -> None:
        self._reconnect.works()
        if self.on_change is not None:
            self.on_change()

    def pass_done(self) -> None:
        self.transfers.compare = False
        if self.passes.on_done is not None:
            self.passes.on_done()

    def _primary_not_flushed(self, error: OSError) -> None:
        """What was read from its cache may be gone; copied again soon, but not without a pause."""
        self.primary_failed_s = self._scheduler.time()
        self._reports.not_flushed(error)
        self._take_back()
        self._settling.hold()

    def _take_back(self) -> None:
        """A device failed: what was copied and not flushed, or is under way, does not count."""
        self.transfers.revoke()
        self._settling.take_back()

    def _risk_less(self) -> None:
        self._settling.risk_less(self.transfers.in_flight_bytes)

    # -- the link (`ReconnectOwner`) -----------------------------------------------------------
    def _secondary_failed(self, error: OSError) -> None:
        self._reports.last_error = error
        self._take_back()
        self._refused = 0
        if self.state is CopyState.RUNNING:
            self._risk_less()
            self._reports.link_down(error)
            self._set_state(CopyState.LINK_DOWN)
            self._reconnect.seek()

    @property
    def wants_link(self) -> bool:
        return self.state is CopyState.LINK_DOWN

    def replaced(self) -> None:
        self._take_back()
        self.late.arrived()
        self._compare_samples()

    def opened(self) -> None:
        self._reports.link_up()
        self._set_state(CopyState.RUNNING)
        self.proceed()

    def not_opened(self, error: OSError) -> None:
        self._reports.not_opened(error)

    def _compare_samples(self) -> None:
        self.samples.check()
        self._guarded = self._guarded and self.samples.checking

    def _sampled(self, places: Places) -> None:
        guarded = self._guarded
        # A comparison that the link has ended is made again with the next one.
        self._guarded = guarded and not places and not self._secondary.connected
        if places and guarded and self.on_changed_secondary is not None:
            self.pause()
            self.on_changed_secondary(places)
        elif places:
            self._reports.forgot(places[0][0])
            self._gate.take_everything(self._recorded)
            self.begin_pass(compare=True)
        if self.on_change is not None:
            self.on_change()
        self.proceed()

    def _recorded(self, error: OSError | None) -> None:
        if error is not None:  # it is copied all the same; a crash before that forgets it
            self._reports.last_error = error

    def _check_stopped(self) -> None:
        if self.idle and self._draining:
            waiting, self._draining = self._draining, []
            for done in waiting:
                self._scheduler.call_soon(done)
