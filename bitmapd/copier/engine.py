"""The copier: brings `gate.taken` to the secondary, flushes both sides, lets the gate settle.

One round after another:
1. When the era is over and something was written in it: no new copies begin, those in flight
   finish, `gate.take_era`, wait for the barrier.
2. Runs of `gate.taken` are copied, several at a time: read from the primary, zeros found, written
   to the secondary, `gate.copied`.
3. When nothing is left to copy, or every `SETTLE_INTERVAL_S` during a long pass:
   `gate.begin_settle`, flush the secondary and the primary, `gate.settle`.  Copying goes on
   meanwhile; what is copied after `begin_settle` belongs to the next one.

Invariants:
1. `take_era` is called only while no copy is in flight (the gate's condition).
2. `settle` is called only if both flushes, submitted after `begin_settle`, succeeded.
3. After any error of the secondary, or a failed flush of the primary, what was copied and not
   flushed counts as not copied, and so do the copies and the settle that were under way: the error
   may mean that a cache is gone.  Nothing is cleared on the word of a device that failed.
4. A server whose connection was lost may carry out late what it had received.  Blocks whose write
   ended in an error are copied as usual after the reconnection and once more `LATE_WRITES_S` later;
   until then their extents do not count as clean.  Nothing is known of what a process that died had
   sent: after it, the first copy waits so long.
5. A read error of the primary holds back its own block only.  The block stays dirty, its extent
   stays in the record.
6. A host never waits for anything here.  While hosts are at work copying is held to a rate
   (`HostLoad`), unless the record has outgrown its limit.

A crash leaves the secondary with some blocks newer than others; the record names all of them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import Enum
from functools import partial

from bitmapd.copier.load import YIELD_PIECE_BYTES, HostLoad
from bitmapd.copier.plan import Plan, Window
from bitmapd.copier.throttle import Backoff, SpeedMeter, Throttle
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

SEARCH_PAUSE_S = 0.01
# An era that ends early, because the kernel's table is to follow the record, lasts so long.
URGENT_ERA_S = 0.25

# How long a server whose connection was lost may take over the writes it had received.
LATE_WRITES_S = 10.0


class CopyState(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    LINK_DOWN = "link-down"
    STOPPED = "stopped"


class _Copy:
    """One run of blocks on its way."""

    __slots__ = ("buffer", "error", "failures", "first", "other", "parts", "stop")

    def __init__(self, first: int, stop: int, buffer: memoryview, failures: int) -> None:
        self.first = first
        self.stop = stop
        self.buffer = buffer
        self.failures = failures  # of either side when it began
        self.other: memoryview | None = None  # the secondary's content, when comparing
        self.parts = 0  # writes to the secondary that have not answered
        self.error: OSError | None = None


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
        piece_bytes: int = 1 << 20,
        read_primary: Callable[[int, memoryview, Done], None] | None = None,
    ) -> None:
        """`read_primary` is used instead of `primary.read`: a way that leaves hosts the loop."""
        self._geometry = geometry
        self._gate = gate
        self._primary = primary
        self._read_primary = read_primary or primary.read
        self._secondary = secondary
        self._scheduler = scheduler
        self._pool = pool
        self._backoff = backoff
        self._load = HostLoad()
        self._late = BlockSet()  # blocks whose write ended in an error and may yet be carried out
        self._emit = emit
        self._check_secondary = check_secondary
        self._piece_blocks = max(1, piece_bytes // geometry.block_bytes)
        self._plan = Plan(self._piece_blocks)
        self._zero_block = bytearray(geometry.block_bytes)
        self._window = Window()
        self._barrier = False
        self._settling = False
        self._reopening = False
        self._timer: Timer | None = None
        self._wake: Timer | None = None
        self._not_before_s = float("-inf")
        self._pool_wait = False
        self._draining: list[Callable[[], None]] = []
        self._next_era = 0.0
        self._next_settle = 0.0
        self._failures = 0
        self._hold_settle_until = 0.0
        self._hold_copies_until = float("-inf")
        self._batch_bytes = 0  # copied since the last settle began
        self._batch_limit_bytes: int | None = None  # after an error: so much at risk at a time
        gate.on_flush_error = self._primary_not_flushed
        gate.when_urgent(self._urgent)
        self._urgent_timer: Timer | None = None
        self.throttle = throttle
        self.meter = SpeedMeter()
        self.era_interval_s = era_interval_s
        self.compare = False
        self.state = CopyState.STOPPED
        self.copied_bytes = 0
        self.sent_bytes = 0
        self.zero_bytes = 0
        self.read_errors = 0
        self.pass_blocks: BlockSet | None = None  # what is left of a recovery or resync
        self.pass_total_bytes = 0
        self.pass_copied_bytes = 0
        self.on_pass_done: Callable[[], None] | None = None
        self.on_change: Callable[[], None] | None = None
        self.last_error: OSError | None = None

    # -- control --------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to copy; if the secondary is not there, begin to look for it."""
        self._next_settle = self._scheduler.time() + SETTLE_INTERVAL_S
        if self._secondary.connected:
            self._set_state(CopyState.RUNNING)
        else:
            self._set_state(CopyState.LINK_DOWN)
            self._reopen()
        self._on_timer()

    def pause(self) -> None:
        """Copy nothing more; what is in flight finishes."""
        if self.state is not CopyState.STOPPED:
            self._set_state(CopyState.PAUSED)

    def resume(self) -> None:
        if self.state is CopyState.PAUSED:
            if self._secondary.connected:
                self._set_state(CopyState.RUNNING)
            else:
                self._set_state(CopyState.LINK_DOWN)
                self._reopen()
            self._pump()

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
            self._reopen()

    def wake(self) -> None:
        """There may be something to do before the next era ends: used while draining."""
        self._next_era = 0.0
        self._scheduler.call_soon(self._pump)

    def begin_pass(self, *, compare: bool, predecessor: bool = False) -> None:
        """Follow what is in `gate.taken` now until all of it has been copied once.

        `predecessor`: another process copied before this one, and may have died doing so.
        """
        if predecessor and self._secondary.writes_late:
            self._hold_copies_until = self._scheduler.time() + LATE_WRITES_S
            self._scheduler.call_later(LATE_WRITES_S, self._pump)
        self.pass_blocks = BlockSet()
        self.pass_blocks.update(self._gate.taken)
        self.pass_total_bytes = self.pass_remaining_bytes
        self.pass_copied_bytes = 0
        self.compare = compare
        self._scheduler.call_soon(self._pump)

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on."""
        self._geometry = geometry

    @property
    def now_s(self) -> float:
        """Time of the loop that the copier, and so the gate, runs on."""
        return self._scheduler.time()

    @property
    def pass_remaining_bytes(self) -> int:
        if self.pass_blocks is None:
            return 0
        return min(self.pass_blocks.count() * self._geometry.block_bytes, self._geometry.size_bytes)

    @property
    def idle(self) -> bool:
        return not self._window.copies and not self._settling and not self._barrier

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
        self._pump()

    def _pump(self) -> None:
        """Do whatever can be done now; called after every event that may allow something."""
        if self.state is CopyState.STOPPED:
            self._check_stopped()
            return
        running = self.state is CopyState.RUNNING
        # With a direct path eras end whatever the secondary does: the kernel's table follows the
        # record at barriers.
        if self._barrier or not (running or self._gate.has_direct):
            return
        now = self._scheduler.time()
        if self._era_is_over(now):
            if self._window.copies:
                return
            self._barrier = True
            self._next_era = now + self.era_interval_s
            self._gate.take_era(self._after_barrier)
            return
        if not running:
            return
        exhausted = self._issue(now)
        if self._settling or not self._gate.has_copied or now < self._hold_settle_until:
            return
        if (exhausted and not self._window.copies) or now >= self._next_settle:
            self._settle(now)

    def _era_is_over(self, now: float) -> bool:
        gate = self._gate
        if now >= self._next_era:
            return gate.wants_era
        return gate.era_is_urgent and now >= self._next_era - self.era_interval_s + URGENT_ERA_S

    def _urgent(self) -> None:
        """Look when the era may end early; nothing else calls `_pump` while nothing is copied."""
        if self._urgent_timer is None:
            wait_s = self._next_era - self.era_interval_s + URGENT_ERA_S - self._scheduler.time()
            self._urgent_timer = self._scheduler.call_later(max(0.0, wait_s), self._urgent_now)

    def _urgent_now(self) -> None:
        self._urgent_timer = None
        self._pump()

    def _after_barrier(self) -> None:
        self._barrier = False
        self._plan.new_round()
        self._pump()

    def _issue(self, now: float) -> bool:
        """Start copies; true if nothing was left that may be copied now."""
        if now < self._not_before_s or now < self._hold_copies_until:
            return False  # a timer will call again; save the search
        gate = self._gate
        yielding = self._load.active(now, *gate.host_load) and not gate.over_limit
        throttles = (self.throttle, self._load.throttle) if yielding else (self.throttle,)
        self._plan.max_blocks = (
            max(1, min(self._piece_blocks, YIELD_PIECE_BYTES // self._geometry.block_bytes))
            if yielding
            else self._piece_blocks
        )
        while self.state is CopyState.RUNNING and self._window.may_start(1):
            if self._batch_full:
                return True
            run = self._plan.next(self._gate.taken, now, self._gate.is_hot)
            if run is None:
                return True
            first, stop = run
            offset, length = self._geometry.block_bytes_range(first, stop)
            if not self._window.may_start(length):
                self._plan.returned(first, stop)
                return False
            delay_s = max(throttle.delay_s(now, length) for throttle in throttles)
            if delay_s > 0:
                self._plan.returned(first, stop)
                self._wake_in(delay_s)
                return False
            buffer = self._pool.take(length)
            if buffer is None:
                self._plan.returned(first, stop)
                if not self._pool_wait:
                    self._pool_wait = True
                    self._pool.when_free(self._pool_freed)
                return False
            for throttle in throttles:
                throttle.take(now, length)
            if not self._window.copies:
                self.meter.begin(now)
            self._window.started(length)
            copy = _Copy(first, stop, buffer, self._failures)
            self._read_primary(offset, buffer, partial(self._was_read, copy))
        return False

    @property
    def stuck(self) -> bool:
        """Whether all that is left to copy waits to be tried again after an error of its own."""
        gate = self._gate
        left = gate.taken.count()
        return (
            self.idle
            and not gate.wants_era
            and not gate.has_copied
            and 0 < left == self._plan.busy_blocks
        )

    @property
    def _batch_full(self) -> bool:
        """Whether what was copied has to be settled before more may be lost with it."""
        limit = self._batch_limit_bytes
        at_risk = self._window.bytes + (self._batch_bytes if self._gate.has_copied else 0)
        return limit is not None and (self._settling or at_risk >= limit)

    def _pool_freed(self) -> None:
        self._pool_wait = False
        self._pump()

    def _wake_in(self, delay_s: float) -> None:
        # Not for long: the rate may be changed at any time.
        self._not_before_s = self._scheduler.time() + min(delay_s, SEARCH_PAUSE_S)
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._scheduler.call_later(delay_s, self._woken)

    def _woken(self) -> None:
        # asyncio's timers may be early by the resolution of the clock.
        self._not_before_s = float("-inf")
        self._pump()

    # -- one copy -------------------------------------------------------------------------
    def _was_read(self, copy: _Copy, error: OSError | None) -> None:
        if error is not None:
            self.read_errors += 1
            self.last_error = error
            offset, length = self._geometry.block_bytes_range(copy.first, copy.stop)
            self._emit(
                "copy-error",
                device=self._primary.name,
                offset_bytes=offset,
                length_bytes=length,
                message=f"cannot read the primary: {error.strerror or error}",
            )
            self._plan.failed(copy.first, copy.stop, self._scheduler.time())
            self._end(copy)
        elif self.compare:
            self._read_secondary(copy)
        else:
            self._send(copy)

    def _read_secondary(self, copy: _Copy) -> None:
        other = self._pool.take(len(copy.buffer))
        if other is None:
            self._send(copy)  # sending what may be equal is always right
            return
        copy.other = other
        offset, _ = self._geometry.block_bytes_range(copy.first, copy.stop)

        def was_read(error: OSError | None) -> None:
            if error is not None:
                self._secondary_failed(error)
                self._plan.returned(copy.first, copy.stop)
                self._end(copy)
            else:
                self._send(copy)

        self._secondary.read(offset, other, was_read)

    def _send(self, copy: _Copy) -> None:
        """Write the run in as few pieces as zeros and equal blocks allow."""
        offset, length = self._geometry.block_bytes_range(copy.first, copy.stop)
        block = self._geometry.block_bytes
        pieces: list[tuple[int, int, bool]] = []  # start, end within the buffer; zeros?
        for start in range(0, length, block):
            end = min(start + block, length)
            data = copy.buffer[start:end]
            # A bytearray compares with any buffer by memcmp: 1.4 us for 64 KiB of zeros, 60 ns for
            # data; a memoryview compares element by element, 125 us.
            if copy.other is not None and bytearray(data) == copy.other[start:end]:
                continue
            zeros = self._zero_block if end - start == block else bytearray(end - start)
            zero = zeros == data
            if pieces and pieces[-1][1] == start and pieces[-1][2] == zero:
                pieces[-1] = (pieces[-1][0], end, zero)
            else:
                pieces.append((start, end, zero))
        copy.parts = len(pieces)
        if not pieces:
            self._scheduler.call_soon(self._was_sent, copy)
            return
        for start, end, zero in pieces:
            self.sent_bytes += end - start

            def written(error: OSError | None) -> None:
                copy.error = copy.error or error
                copy.parts -= 1
                if not copy.parts:
                    self._was_sent(copy)

            if zero:
                self.zero_bytes += end - start
                self._secondary.zero(offset + start, end - start, written)
            else:
                self._secondary.write(offset + start, copy.buffer[start:end], written)

    def _was_sent(self, copy: _Copy) -> None:
        if copy.error is not None:
            if self._secondary.writes_late:
                self._late.add(copy.first, copy.stop)
            self._secondary_failed(copy.error)
            if self._secondary.connected:
                # It answers: the place is bad, or was for the moment.  Others go first.
                self._plan.failed(copy.first, copy.stop, self._scheduler.time())
            else:
                self._plan.returned(copy.first, copy.stop)
        elif copy.failures != self._failures:
            self._plan.returned(copy.first, copy.stop)
        else:
            length = self._geometry.block_bytes_range(copy.first, copy.stop)[1]
            self.copied_bytes += length
            self._batch_bytes += length
            self.meter.add(self._scheduler.time(), length)
            self._plan.done(copy.first, copy.stop)
            self._gate.copied(copy.first, copy.stop)
            if self.pass_blocks is not None:
                self.pass_copied_bytes += self._geometry.block_bytes * self.pass_blocks.count_in(
                    copy.first, copy.stop
                )
                self.pass_blocks.discard(copy.first, copy.stop)
        self._end(copy)

    def _end(self, copy: _Copy) -> None:
        if copy.other is not None:
            self._pool.give(copy.other)
        self._window.ended(len(copy.buffer))
        self._pool.give(copy.buffer)
        self._pump()

    # -- settling -------------------------------------------------------------------------
    def _settle(self, now: float) -> None:
        self._settling = True
        self._next_settle = now + SETTLE_INTERVAL_S
        pass_complete = self.pass_blocks is not None and not self.pass_blocks
        failures = self._failures
        self._batch_bytes = 0
        extents = self._gate.begin_settle()
        results: list[OSError | None] = []

        def flushed(device: Device, error: OSError | None) -> None:
            results.append(error)
            if error is not None:
                self.last_error = error
                if device is self._secondary:
                    self._secondary_failed(error)
                else:
                    self._primary_not_flushed(error)
            if len(results) < 2:
                return
            self._settling = False
            if failures == self._failures:
                self._gate.settle(extents)
                self._backoff.reset()
                if self._batch_limit_bytes is not None:
                    twice = 2 * self._batch_limit_bytes
                    self._batch_limit_bytes = twice if twice <= BATCH_BYTES else None
                if pass_complete:
                    self._pass_done()
                if self.on_change is not None:
                    self.on_change()
            else:
                self._gate.unsettle(extents)
                self._back_into_pass(extents)
            self._pump()

        self._secondary.flush(lambda error: flushed(self._secondary, error))
        self._primary.flush(lambda error: flushed(self._primary, error))

    def _primary_not_flushed(self, error: OSError) -> None:
        """What was read from its cache may be gone; copied again soon, but not without a pause."""
        self._emit(
            "copy-error",
            device=self._primary.name,
            message=f"cannot flush the primary: {error.strerror or error}",
        )
        self._failures += 1
        self._back_into_pass(self._gate.forget_copied())
        self._hold_settle_until = self._scheduler.time() + SETTLE_INTERVAL_S

    def _back_into_pass(self, extents: set[int]) -> None:
        """These are copied again, so a pass that has counted them is not done with them."""
        if self.pass_blocks is not None:
            for extent in extents:
                self.pass_blocks.add(*self._geometry.extent_blocks(extent, extent + 1))

    def _pass_done(self) -> None:
        self.pass_blocks = None
        self.compare = False
        if self.on_pass_done is not None:
            self.on_pass_done()

    # -- the link -------------------------------------------------------------------------
    def _secondary_failed(self, error: OSError) -> None:
        self.last_error = error
        self._failures += 1
        self._back_into_pass(self._gate.forget_copied())
        if self.state is CopyState.RUNNING:
            at_risk = min(self._batch_bytes + self._window.bytes, BATCH_BYTES)
            self._batch_limit_bytes = max(at_risk // 2, self._geometry.block_bytes)
            self._emit(
                "link-down",
                secondary=self._secondary.name,
                message=f"the secondary failed: {error.strerror or error}",
            )
            self._batch_bytes = 0
            self._set_state(CopyState.LINK_DOWN)
            self._reopen()

    def _reopen(self) -> None:
        if not self._reopening:
            self._reopening = True
            self._scheduler.call_later(self._backoff.next_s(), self._try_open)

    def _try_open(self) -> None:
        if self.state is not CopyState.LINK_DOWN:
            self._reopening = False
        elif not self.idle:
            # Requests of the old connection must have ended before a new one begins.
            self._scheduler.call_later(self._backoff.first_s, self._try_open)
        else:
            if self._secondary.connected:
                self._secondary.close()
            self._secondary.open(self._was_opened)

    def _was_opened(self, error: OSError | None) -> None:
        self._reopening = False
        if error is None:
            error = self._check_secondary()
            if error is not None:
                # A medium that was refused must not pass for a connected one after a pause.
                self._secondary.close()
        if self.state is not CopyState.LINK_DOWN:
            return
        if error is not None:
            # Why it stays away may be another reason than why it went; told once.
            if str(error) != str(self.last_error):
                self._emit(
                    "link-error",
                    secondary=self._secondary.name,
                    message=f"cannot open the secondary: {error.strerror or error}",
                )
            self.last_error = error
            self._reopen()
            return
        # Copies that succeeded between the failure and now were not seen by `_secondary_failed`.
        self._gate.forget_copied()
        if self._late:
            late, self._late = self._late, BlockSet()
            self._gate.hold(late)
            self._scheduler.call_later(LATE_WRITES_S, self._copy_again, late)
        self._emit("link-up", secondary=self._secondary.name)
        self._set_state(CopyState.RUNNING)
        self._pump()

    def _copy_again(self, late: BlockSet) -> None:
        """Writes that the old connection may have left behind have landed by now: cover them."""
        self._gate.release(late)
        self._pump()

    def _check_stopped(self) -> None:
        if self.idle and self._draining:
            waiting, self._draining = self._draining, []
            for done in waiting:
                self._scheduler.call_soon(done)
