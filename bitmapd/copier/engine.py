"""The copier: brings `gate.taken` to the secondary, flushes both sides, lets the gate settle.

One round after another:
1. When the era is over and something was written in it: no new copies begin, those in flight
   finish, `gate.take_era`, wait for the barrier.
2. Runs of `gate.taken` are copied, several at a time (`Transfers`); `gate.copied` for each.
3. When nothing is left to copy, or every `SETTLE_INTERVAL_S` during a long pass:
   `gate.begin_settle`, flush the secondary and the primary, `gate.settle`.  Copying goes on
   meanwhile; what is copied after `begin_settle` belongs to the next one.

Invariants:
1. `take_era` is called only while no copy is in flight (the gate's condition).
2. `settle` is called only if both flushes, submitted after `begin_settle`, succeeded.
3. After any error of the secondary, or a failed flush of the primary, what was copied and not
   flushed counts as not copied, and so do the copies and the settle that were under way: the error
   may mean that a cache is gone.  Nothing is cleared on the word of a device that failed.
4. A place that the secondary refuses holds back itself only, and the link stays.  After
   `MAX_REFUSED` in a row the connection is made anew.
5. A new connection to the secondary is made only when nothing is in flight on the old one
   (`Reconnect`), and what that one may still write stays recorded (`LateWrites`).
6. A host never waits for anything here.

A crash leaves the secondary with some blocks newer than others; the record names all of them.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from enum import Enum

from bitmapd.copier.ages import Ages, earliest
from bitmapd.copier.late import LateWrites
from bitmapd.copier.reconnect import Reconnect
from bitmapd.copier.refusals import Refusal
from bitmapd.copier.sample import Samples
from bitmapd.copier.throttle import Backoff, SpeedMeter, Throttle
from bitmapd.copier.transfers import Transfers, Trouble
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Device, Done, Scheduler, Target, Timer
from bitmapd.media.buffers import BufferPool
from bitmapd.record.geometry import Geometry

Emit = Callable[..., None]

SETTLE_INTERVAL_S = 5.0
# An error of the secondary takes back what was copied since the last settle.  So after one, less is
# copied between two settles: half of what was at risk, then twice as much after each that succeeds.
BATCH_BYTES = 64 << 20

# After so many refusals in a row, with nothing written between, it may not be the places: a disk
# that has come back under its name answers only who opens it again.
MAX_REFUSED = 8

SEARCH_PAUSE_S = 0.01
# An era that ends early, because the kernel's table is to follow the record, lasts so long.
URGENT_ERA_S = 0.25


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
        self._emit = emit
        self._barrier = False
        self._settling = False
        self._timer: Timer | None = None
        self._wake: Timer | None = None
        self._not_before_s = float("-inf")
        self._draining: list[Callable[[], None]] = []
        self._next_era = 0.0
        self._next_settle = 0.0
        self._failures = 0
        self._hold_settle_until = 0.0
        self._ages = Ages()
        self._era_since_s = 0.0  # of the era that the barrier ends
        self._batch_bytes = 0  # copied since the last settle began
        self._batch_limit_bytes: int | None = None  # after an error: so much at risk at a time
        self._refused = 0  # writes, since one was taken or the secondary opened
        gate.on_flush_error = self._primary_not_flushed
        gate.when_urgent(self._urgent)
        self._urgent_timer: Timer | None = None
        self.throttle = throttle
        self.meter = SpeedMeter()
        self.era_interval_s = era_interval_s
        self.state = CopyState.STOPPED
        self.copied_bytes = 0
        self.read_errors = 0
        self.primary_failed_s = float("-inf")  # when it could not be flushed
        self.pass_blocks: BlockSet | None = None  # what is left of a recovery or resync
        self.pass_total_bytes = 0
        self.pass_copied_bytes = 0
        self.on_pass_done: Callable[[], None] | None = None
        self.on_change: Callable[[], None] | None = None
        self.last_error: OSError | None = None
        self.late = LateWrites(gate, scheduler, self.proceed, bound_s=late_writes_s)
        self.samples = Samples(geometry, gate, primary, secondary, scheduler, pool, self._sampled)
        self._reconnect = Reconnect(secondary, scheduler, backoff, check_secondary, self)
        self._transfers = Transfers(
            geometry,
            gate,
            read_primary or primary.read,
            secondary,
            scheduler,
            pool,
            throttle,
            self.meter,
            owner=self,
            piece_bytes=piece_bytes,
        )

    # -- control --------------------------------------------------------------------------
    def start(self, *, paused: bool = False) -> None:
        """Begin to copy; if the secondary is not there, begin to look for it."""
        self._next_settle = self._scheduler.time() + SETTLE_INTERVAL_S
        if paused:
            self._set_state(CopyState.PAUSED)
        else:
            self._go_on()
        if self._secondary.connected:
            self.samples.check()
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
        for timer in (self._timer, self._wake):
            if timer is not None:
                timer.cancel()
        self._timer = self._wake = None
        self._draining.append(done)
        self._check_stopped()

    def reconnect(self) -> None:
        """Give the secondary's connection up, when it is idle, and make a new one."""
        if self.state is CopyState.RUNNING:
            self._set_state(CopyState.LINK_DOWN)
            self._reconnect.seek()

    def wake(self) -> None:
        """There may be something to do before the next era ends: used while draining."""
        self._next_era = 0.0
        self._scheduler.call_soon(self.proceed)

    def begin_pass(self, *, compare: bool, predecessor: bool = False) -> None:
        """Follow what is in `gate.taken` now until all of it has been copied once.

        `predecessor`: another process copied before this one, and may have died doing so.
        """
        if predecessor and self._secondary.writes_late:
            self.late.predecessor_died()
            if self.state is CopyState.RUNNING:
                self.late.arrived()
        self.pass_blocks = BlockSet()
        self.pass_blocks.update(self._gate.taken)
        self._ages.joined(self._gate.taken, self.now_s)
        self.pass_total_bytes = self.pass_remaining_bytes
        self.pass_copied_bytes = 0
        self._transfers.compare = compare
        self._scheduler.call_soon(self.proceed)

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on."""
        self._geometry = geometry
        self._transfers.grow(geometry)
        self.samples.grow(geometry)

    @property
    def compare(self) -> bool:
        """Whether the secondary is read first, and sent only what differs."""
        return self._transfers.compare

    @property
    def sent_bytes(self) -> int:
        return self._transfers.sent_bytes

    @property
    def zero_bytes(self) -> int:
        """Those of `sent_bytes` that were zeros."""
        return self._transfers.zero_bytes

    @property
    def now_s(self) -> float:
        """Time of the loop that the copier, and so the gate, runs on."""
        return self._scheduler.time()

    @property
    def oldest_content_s(self) -> float | None:
        """When the oldest content was written that the secondary lacks, or earlier (`Ages`)."""
        return earliest(self._ages.oldest_s, self._gate.era_since_s)

    @property
    def troubles(self) -> set[Trouble]:
        """What keeps some places from being copied."""
        return self._transfers.troubles

    @property
    def pass_remaining_bytes(self) -> int:
        if self.pass_blocks is None:
            return 0
        return min(self.pass_blocks.count() * self._geometry.block_bytes, self._geometry.size_bytes)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and the barrier, if one was begun, has passed."""
        return (
            self._transfers.idle
            and not self._settling
            and not self._barrier
            and not self.samples.checking
        )

    @property
    def in_sync(self) -> bool:
        """Whether everything is on the secondary, and nothing speaks against its having kept it."""
        return self._gate.in_sync and self.pass_blocks is None and not self.samples.checking

    def _set_state(self, state: CopyState) -> None:
        if state is not self.state:
            self.state = state
            if self.on_change is not None:
                self.on_change()

    # -- the round ------------------------------------------------------------------------
    def _on_timer(self) -> None:
        self._timer = self._scheduler.call_later(self.era_interval_s, self._on_timer)
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
        running = self.state is CopyState.RUNNING
        # Where others write eras end whatever the secondary does: the kernel's table follows the
        # record at barriers.
        if self._barrier or not (running or self._gate.is_written_elsewhere):
            return
        now = self._scheduler.time()
        if self._era_is_over(now):
            if not self._transfers.idle:
                return
            self._barrier = True
            self._next_era = now + self.era_interval_s
            since_s = self._gate.era_since_s
            self._era_since_s = now if since_s is None else since_s
            self._gate.take_era(self._after_barrier)
            return
        if not running:
            return
        exhausted = self._issue(now)
        if self._settling or not self._gate.has_copied or now < self._hold_settle_until:
            return
        if (exhausted and self._transfers.idle) or now >= self._next_settle:
            self._settle(now)

    def _era_is_over(self, now: float) -> bool:
        gate = self._gate
        if now >= self._next_era:
            return gate.wants_era
        return gate.era_is_urgent and now >= self._next_era - self.era_interval_s + URGENT_ERA_S

    def _urgent(self) -> None:
        """Look when the era may end early; nothing else calls `proceed` while nothing is copied."""
        if self._urgent_timer is None:
            wait_s = self._next_era - self.era_interval_s + URGENT_ERA_S - self._scheduler.time()
            self._urgent_timer = self._scheduler.call_later(max(0.0, wait_s), self._urgent_now)

    def _urgent_now(self) -> None:
        self._urgent_timer = None
        self.proceed()

    def _after_barrier(self) -> None:
        self._barrier = False
        self._ages.joined(self._gate.taken, self._era_since_s)
        self._transfers.new_round()
        self.proceed()

    def _issue(self, now: float) -> bool:
        """Start copies; true if nothing was left that may be copied now."""
        if now < self._not_before_s or not self.late.may_copy(now):
            return False  # a timer will call again; save the search
        wait_s = self._transfers.begin(now, self._most_in_flight_bytes)
        if wait_s:
            self._wake_in(wait_s)
        return wait_s is None

    @property
    def stuck(self) -> bool:
        """Whether all that is left to copy waits to be tried again after an error of its own."""
        gate = self._gate
        left = gate.taken.count()
        return (
            self.idle
            and not gate.wants_era
            and not gate.has_copied
            and 0 < left == self._transfers.withheld_blocks
        )

    @property
    def _most_in_flight_bytes(self) -> float:
        """After an error, what was copied has to be settled before more may be lost with it."""
        if self._batch_limit_bytes is None:
            return math.inf
        if self._settling:
            return 0
        return self._batch_limit_bytes - (self._batch_bytes if self._gate.has_copied else 0)

    def _wake_in(self, delay_s: float) -> None:
        # Not for long: the rate may be changed at any time.
        self._not_before_s = self._scheduler.time() + min(delay_s, SEARCH_PAUSE_S)
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._scheduler.call_later(delay_s, self._woken)

    def _woken(self) -> None:
        # asyncio's timers may be early by the resolution of the clock.
        self._not_before_s = float("-inf")
        self.proceed()

    # -- what became of a transfer (`TransfersOwner`) -------------------------------------
    def copied(self, first: int, stop: int, length_bytes: int) -> None:
        self.copied_bytes += length_bytes
        self._batch_bytes += length_bytes
        self._refused = 0
        self._gate.copied(first, stop)
        self._ages.copied(first, stop, self._gate.taken)
        self.samples.copied(first)
        if self.pass_blocks is not None:
            self.pass_copied_bytes += self._geometry.block_bytes * self.pass_blocks.count_in(
                first, stop
            )
            self.pass_blocks.discard(first, stop)

    def not_read(self, first: int, stop: int, error: OSError) -> None:
        self.read_errors += 1
        self.last_error = error
        offset, length = self._geometry.block_bytes_range(first, stop)
        self._emit(
            "copy-error",
            device=self._primary.name,
            offset_bytes=offset,
            length_bytes=length,
            message=f"cannot read the primary: {error.strerror or error}",
        )

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
        offset, length = self._geometry.block_bytes_range(first, stop)
        self._emit(
            "secondary-error",
            secondary=self._secondary.name,
            offset_bytes=offset,
            length_bytes=length,
            message=f"the secondary refuses a write: {error.strerror or error}",
        )
        self.last_error = error
        self._take_back()
        self._risk_less()

    # -- settling -------------------------------------------------------------------------
    def _settle(self, now: float) -> None:
        self._settling = True
        self._next_settle = now + SETTLE_INTERVAL_S
        # An empty one is a pass whose last blocks this settle makes durable.
        ending = None if self.pass_blocks else self.pass_blocks
        failures = self._failures
        self._batch_bytes = 0
        extents = self._gate.begin_settle()
        self._ages.settle_began()
        results: list[OSError | None] = []

        def flushed(device: Device, error: OSError | None) -> None:
            results.append(error)
            if error is not None:
                self.last_error = error
                if device is self._secondary:
                    self._secondary_failed(error)
                else:
                    self._gate.not_durable(error)
            if len(results) < 2:
                return
            self._settling = False
            if failures == self._failures:
                self._gate.settle(extents)
                self._ages.settled()
                self._reconnect.works()
                if self._batch_limit_bytes is not None:
                    twice = 2 * self._batch_limit_bytes
                    self._batch_limit_bytes = twice if twice <= BATCH_BYTES else None
                if ending is not None and ending is self.pass_blocks:  # no other has begun
                    self._pass_done()
                if self.on_change is not None:
                    self.on_change()
            else:
                self._gate.unsettle(extents)
                self._ages.settle_failed(self._gate.taken)
                self._back_into_pass(extents)
            self.proceed()

        self._secondary.flush(lambda error: flushed(self._secondary, error))
        self._primary.flush(lambda error: flushed(self._primary, error))

    def _primary_not_flushed(self, error: OSError) -> None:
        """What was read from its cache may be gone; copied again soon, but not without a pause."""
        self.primary_failed_s = self._scheduler.time()
        self._emit(
            "copy-error",
            device=self._primary.name,
            message=f"cannot flush the primary: {error.strerror or error}",
        )
        self._take_back()
        self._hold_settle_until = self._scheduler.time() + SETTLE_INTERVAL_S

    def _take_back(self) -> None:
        """A device failed: what was copied and not flushed, or is under way, does not count."""
        self._failures += 1
        self._transfers.revoke()
        self._back_into_pass(self._gate.forget_copied())
        self._ages.forgotten(self._gate.taken)

    def _back_into_pass(self, extents: set[int]) -> None:
        """These are copied again, so a pass that has counted them is not done with them."""
        if self.pass_blocks is not None:
            for extent in extents:
                self.pass_blocks.add(*self._geometry.extent_blocks(extent, extent + 1))

    def _pass_done(self) -> None:
        self.pass_blocks = None
        self._transfers.compare = False
        if self.on_pass_done is not None:
            self.on_pass_done()

    # -- the link (`ReconnectOwner`) -----------------------------------------------------------
    def _secondary_failed(self, error: OSError) -> None:
        self.last_error = error
        self._take_back()
        self._refused = 0
        if self.state is CopyState.RUNNING:
            self._risk_less()
            self._emit(
                "link-down",
                secondary=self._secondary.name,
                message=f"the secondary failed: {error.strerror or error}",
            )
            self._set_state(CopyState.LINK_DOWN)
            self._reconnect.seek()

    def _risk_less(self) -> None:
        """After an error of the secondary has taken back what was copied since the last settle."""
        at_risk = min(self._batch_bytes + self._transfers.in_flight_bytes, BATCH_BYTES)
        self._batch_limit_bytes = max(at_risk // 2, self._geometry.block_bytes)
        self._batch_bytes = 0

    @property
    def wants_link(self) -> bool:
        return self.state is CopyState.LINK_DOWN

    def replaced(self) -> None:
        self._take_back()
        self.late.arrived()
        self.samples.check()

    def opened(self) -> None:
        self._emit("link-up", secondary=self._secondary.name)
        self._set_state(CopyState.RUNNING)
        self.proceed()

    def not_opened(self, error: OSError) -> None:
        # Why it stays away may be another reason than why it went; reported once.
        if str(error) != str(self.last_error):
            self._emit(
                "link-error",
                secondary=self._secondary.name,
                message=f"cannot open the secondary: {error.strerror or error}",
            )
        self.last_error = error

    def _sampled(self, different_offset_bytes: int | None) -> None:
        if different_offset_bytes is not None:
            self._emit(
                "secondary-forgot",
                secondary=self._secondary.name,
                offset_bytes=different_offset_bytes,
                message="it does not hold what it had confirmed; everything is compared, and copied"
                " where it differs",
            )
            self._gate.take_everything(self._recorded)
            self.begin_pass(compare=True)
        if self.on_change is not None:
            self.on_change()
        self.proceed()

    def _recorded(self, error: OSError | None) -> None:
        if error is not None:  # it is copied all the same; a crash before that forgets it
            self.last_error = error

    def _check_stopped(self) -> None:
        if self.idle and self._draining:
            waiting, self._draining = self._draining, []
            for done in waiting:
                self._scheduler.call_soon(done)
