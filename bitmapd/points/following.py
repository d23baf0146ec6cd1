"""Barriers for hosts that write past the gate: when the kernel's table follows, and cuts (pure).

With device-mapper hosts write recorded extents in the kernel, and what they wrote is known at
barriers.  dm-era's eras end at a snapshot that comes before the drain, so what one brings is the
volume's content at no instant: a point made of it would have writes of two eras.  So a cut is not
one of the kernel's.  Before it, one barrier moves everything to the gate, and the next brings what
was written until the first one's drain had ended.  Then the gate sees every write in the order of
submission, and cuts as it does where hosts use NBD.

| state | on | goes to | does |
| --- | --- | --- | --- |
| none | a cut is due | stilling | the next barriers end what is direct |
| stilling | a barrier has passed, and all is known | still | the cut may be made in that event |
| stilling, still | no cut is due any more | none | extents get direct again: the table grows |
| still | the cut was made | none | the same, but for extents with pending blocks |
| none | a group is to be cut | stilling | as for a cut, and stays still for `HELD_S` |

For the table's sake it grows, which ends no era of the kernel's: hosts reach extents through the
gate that could be direct.  A barrier comes where it has to lose some, or nothing was written lately
and one more would make that known.

Invariants:
1. A cut is made only when nothing is direct and nothing that was is unknown (the gate's condition).
2. One barrier or growth at a time, and that of a round is one of them.
3. Barriers for the table's sake are `URGENT_ERA_S` apart, and growth as `holding` allows; while a
   cut is being read both are as far apart as it has lasted, for each of them moves only what was
   read meanwhile.  After a barrier that failed the next waits `AGAIN_S`.
4. What a cut took out of the table comes back whatever that holds, so there are few such growths
   for each cut: until then every write of a host passes the gate, which costs more.  With a table
   that took 0.1 s to change, waiting for that to be paid was a third of the writes at depth 16.
5. They come whatever the receiver does, since misses would stay in the gate as long as it is away.
6. None begins while the gate withholds answers for a group: from the cut until then every write of
   a host is one that the gate answers.

A crash leaves a table, and the next process counts all that is direct in it as written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from bitmapd.copier.holding import Holding
from bitmapd.copier.rounds import URGENT_ERA_S
from bitmapd.gate.cycle import CutGate, Direct
from bitmapd.media.base import Scheduler, Timer

AGAIN_S: Final = 1.0
HELD_S: Final = 1.0  # for the leader of a group to say it again, or to cut
QUIET_S: Final = 1.0  # without a write, before a barrier is worth having for knowing that


class Following:
    """See the module docstring.  `look` is called when something may have to be done."""

    def __init__(
        self, gate: CutGate, direct: Direct, scheduler: Scheduler, look: Callable[[], None]
    ) -> None:
        self._gate = gate
        self._direct = direct
        self._scheduler = scheduler
        self._look = look
        self._under_way = False
        self._hurried = False
        self._began_s = float("-inf")  # of the latest barrier or growth
        self._cut_s = float("-inf")
        self._not_before_s = float("-inf")
        self._held_until_s = float("-inf")
        self._written_bytes = 0  # by hosts, when that was seen to change
        self._written_s = scheduler.time()
        self._holding = Holding(scheduler.time())
        self._comes_back = False  # what was moved to the gate for a cut
        self._urgent: Timer | None = None
        direct.when_urgent(self._became_urgent)

    @property
    def under_way(self) -> bool:
        """Whether a barrier of its own is, or growth: no era may end meanwhile."""
        return self._under_way

    def hurry(self) -> None:
        """A barrier is wanted though nothing is urgent."""
        self._hurried = True

    @property
    def is_still(self) -> bool:
        return self._direct.is_still

    def hold(self, now_s: float) -> None:
        """A cut of the group is due: be still for `HELD_S`."""
        self._held_until_s = now_s + HELD_S

    def cut(self, now_s: float) -> None:
        """The cut is made in this event; all is still."""
        self._direct.still(wanted=False)  # from the next barrier on
        self._comes_back = True
        self._cut_s, self._held_until_s = now_s, float("-inf")

    def may_cut(self, now_s: float) -> bool:
        """A cut is due.  If it cannot be made in this event, what it takes is begun."""
        if self._direct.is_still:
            return True
        self._direct.still(wanted=True)
        self._comes_back = True
        self._begin(now_s)
        return False

    def step(self, now_s: float, *, wants_cut: bool) -> None:
        """For the table's sake; `wants_cut`: one is due, and may be as soon as all is still."""
        if wants_cut or self._under_way:
            return
        held = now_s < self._held_until_s
        self._direct.still(wanted=held)
        if held:
            self._comes_back = True
            if not self._direct.is_still:
                self._begin(now_s)
            return
        if self._may_grow(now_s):
            self._grow(now_s)
        elif self._is_due(now_s):
            self._begin(now_s)

    def stop(self) -> None:
        """No timer calls `look` any more."""
        if self._urgent is not None:
            self._urgent.cancel()
            self._urgent = None

    def _is_due(self, now_s: float) -> bool:
        direct = self._direct
        if not direct.wants_barrier:
            self._hurried = False
            return False
        if self._hurried or self._is_quiet(now_s):
            return True
        return direct.is_urgent and not self._gate.can_grow_direct and now_s >= self._next_s

    def _is_quiet(self, now_s: float) -> bool:
        _, written_bytes = self._direct.host_load
        if written_bytes != self._written_bytes:
            self._written_bytes, self._written_s = written_bytes, now_s
        return now_s >= max(self._written_s, self._began_s) + QUIET_S

    @property
    def _next_s(self) -> float:
        pause_s = URGENT_ERA_S
        if self._gate.is_cutting:
            pause_s = max(pause_s, self._began_s - self._cut_s)
        return self._began_s + pause_s

    def _begin(self, now_s: float) -> None:
        withheld = self._gate.answers.is_on
        if withheld or self._direct.is_busy or now_s < self._not_before_s:
            return
        self._under_way, self._hurried = True, False
        self._began_s = now_s
        self._gate.follow(self._passed)

    def _may_grow(self, now_s: float) -> bool:
        """Whether it is worth it, and now; a timer calls when it is."""
        if not self._gate.can_grow_direct or self._gate.answers.is_on:
            return False
        wait_s = self._holding.wait_s(now_s, *self._gate.held_s)
        if self._comes_back:
            wait_s = self._next_s - now_s
        if wait_s > 0:
            self._look_in(wait_s)
        return wait_s <= 0

    def _grow(self, now_s: float) -> None:
        self._under_way, self._began_s = True, now_s
        self._comes_back = self._gate.is_cutting
        self._gate.grow_direct(partial(self._passed, True))

    def _passed(self, passed: bool) -> None:
        self._under_way = False
        if not passed:
            self._not_before_s = self._scheduler.time() + AGAIN_S
        self._look()

    def _became_urgent(self) -> None:
        if self._gate.can_grow_direct:
            self._look_in(0.0)
        else:
            self._look_in(max(0.0, self._next_s - self._scheduler.time()))

    def _look_in(self, wait_s: float) -> None:
        if self._urgent is None:
            self._urgent = self._scheduler.call_later(wait_s, self._urgent_now)

    def _urgent_now(self) -> None:
        self._urgent = None
        self._look()
