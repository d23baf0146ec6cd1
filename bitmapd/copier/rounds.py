"""Rounds: when an era ends, when copies begin, when a settle is due (pure).

What hosts write gathers in the gate's current era.  One round after another brings it over:
1. Every `era_interval_s`, if something was written, no new copies begin, those in flight finish,
   `gate.take_era`; the barrier is waited for.
2. Runs of `gate.taken` are copied, several at a time (`Transfers`).
3. When nothing is left to copy, the interval of settles is over, or much was copied since the last,
   both sides are flushed and the gate settles (`Settling`).  Copying goes on meanwhile.

Invariants:
1. `take_era` is called only while no copy is in flight (the gate's condition).
2. One barrier at a time, and nothing begins before it has passed.
3. Where others write (`gate/elsewhere`) eras end whether or not anything is copied, since the
   kernel's table follows the record at barriers; so they do while another node takes over what is
   to be copied (`hands_over`).  They end early when somebody there has a reason not to
   wait, but not before `URGENT_ERA_S`, for a barrier has its price.  Where it is enough that the
   kernel's table grows, no era ends for it, and copying goes on; how often is up to `holding`.
4. An era that may end, or a rate that allows the next copy, is looked at though nothing else
   happens then.
5. The kernel lets a host wait at its first write to a block in an era.  After an era in which that
   took more than `MARKS_SHARE` of the time the next ones are longer, up to `longest_era_s`; but
   not while the record is over its limit and could lose something after two barriers.

A crash at any point leaves some blocks of the secondary newer; the record names all of them.
"""

from __future__ import annotations

from collections.abc import Callable

from bitmapd.copier.ages import Ages
from bitmapd.copier.holding import Holding
from bitmapd.copier.late import LateWrites
from bitmapd.copier.settling import Settling
from bitmapd.copier.transfers import Transfers
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Scheduler, Timer

SEARCH_PAUSE_S = 0.01
URGENT_ERA_S = 0.25
# dm-era commits its metadata for a block's first write in an era: 1.2 ms in the emulated guest, as
# long as 20 other writes.  A load that goes everywhere would spend most of a short era on that.
MARKS_SHARE = 0.02


class Rounds:
    """See the module docstring.  `look` is called when `step` may have something to do."""

    def __init__(
        self,
        gate: Gate,
        scheduler: Scheduler,
        ages: Ages,
        late: LateWrites,
        transfers: Transfers,
        settling: Settling,
        look: Callable[[], None],
        *,
        era_interval_s: float,
        longest_era_s: float,
    ) -> None:
        self._gate = gate
        self._scheduler = scheduler
        self._ages = ages
        self._late = late
        self._transfers = transfers
        self._settling = settling
        self._look = look
        self.era_interval_s = era_interval_s
        self.longest_era_s = longest_era_s
        self.hands_over = False
        self._barrier = False
        self._growing = False
        self._holding = Holding(scheduler.time())
        self._began_s = float("-inf")  # the present era
        self._era_since_s = 0.0  # of the era that the barrier ends
        self._urgent: Timer | None = None
        self._wake: Timer | None = None
        self._not_before_s = float("-inf")
        gate.when_urgent(self._became_urgent)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and the barrier, if one was begun, has passed."""
        waits = self._barrier or self._growing
        return self._transfers.idle and not self._settling.under_way and not waits

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

    def step(self, *, running: bool) -> None:
        """Do whatever can be done now; `running`: copies may begin."""
        if self._barrier or not (running or self._gate.is_written_elsewhere or self.hands_over):
            return
        now = self._scheduler.time()
        if not self._growing and self._era_is_over(now):
            if not self._transfers.idle:
                return
            self._end_era(now)
            return
        self._grow(now)
        if not running:
            return
        exhausted = self._copy(now)
        settling = self._settling
        if settling.may_begin(now) and (
            (exhausted and self._transfers.idle) or settling.is_due(now)
        ):
            settling.begin(now)

    def stop(self) -> None:
        """No timer calls `look` any more."""
        for timer in (self._urgent, self._wake):
            if timer is not None:
                timer.cancel()
        self._urgent = self._wake = None

    # -- eras -----------------------------------------------------------------------------
    def hurry(self) -> None:
        """The present era need not last any longer."""
        self._began_s = float("-inf")

    def _era_is_over(self, now: float) -> bool:
        if now >= self._began_s + self._lasts_s:
            return self._gate.wants_era
        gate = self._gate
        return gate.era_is_urgent and not gate.can_grow_direct and now >= self._urgent_s

    def _end_era(self, now: float) -> None:
        self._barrier = True
        self._began_s = now
        since_s = self._gate.era_since_s
        self._era_since_s = now if since_s is None else since_s
        self._gate.take_era(self._after_barrier)

    def _after_barrier(self) -> None:
        self._barrier = False
        self._ages.joined(self._gate.taken, self._era_since_s)
        self._transfers.new_round()
        self._look()

    def _grow(self, now: float) -> None:
        """Have the kernel's table grow if that is worth it, and not too often."""
        gate = self._gate
        if self._growing or not gate.can_grow_direct:
            return
        wait_s = self._holding.wait_s(now, *gate.held_s)
        if wait_s:
            self._look_in(wait_s)
            return
        self._growing = True
        gate.grow_direct(self._grown)

    def _grown(self) -> None:
        self._growing = False
        self._look_again()

    @property
    def _urgent_s(self) -> float:
        """When the present era may end at the earliest."""
        return self._began_s + URGENT_ERA_S

    @property
    def _lasts_s(self) -> float:
        """How long the present era is to last: the interval, doubled as often as needed."""
        lasts_s = self.era_interval_s
        if self._gate.is_shedding:
            return lasts_s
        while lasts_s < self.longest_era_s and self._gate.marks_s > MARKS_SHARE * lasts_s:
            lasts_s *= 2
        return max(self.era_interval_s, min(lasts_s, self.longest_era_s))

    def _became_urgent(self) -> None:
        if self._gate.can_grow_direct:
            self._look_in(0.0)
        else:
            self._look_in(max(0.0, self._urgent_s - self._scheduler.time()))

    def _look_in(self, wait_s: float) -> None:
        if self._urgent is None:
            self._urgent = self._scheduler.call_later(wait_s, self._urgent_now)

    def _urgent_now(self) -> None:
        self._urgent = None
        self._look_again()

    def _look_again(self) -> None:
        """Now; and what growth could not do waits until the era may end, which is later."""
        self._look()
        wait_s = self._urgent_s - self._scheduler.time()
        if wait_s > 0 and self._gate.era_is_urgent:
            self._look_in(wait_s)

    # -- copies ---------------------------------------------------------------------------
    def _copy(self, now: float) -> bool:
        """Start copies; true if nothing was left that may be copied now."""
        if now < self._not_before_s or not self._late.may_copy(now):
            return False  # a timer will call again; save the search
        wait_s = self._transfers.begin(now, self._settling.most_in_flight_bytes)
        if wait_s:
            self._wake_in(wait_s)
        return wait_s is None

    def _wake_in(self, delay_s: float) -> None:
        # Not for long: the rate may be changed at any time.
        self._not_before_s = self._scheduler.time() + min(delay_s, SEARCH_PAUSE_S)
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._scheduler.call_later(delay_s, self._woken)

    def _woken(self) -> None:
        # asyncio's timers may be early by the resolution of the clock.
        self._not_before_s = float("-inf")
        self._look()
