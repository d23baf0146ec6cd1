"""Our own record: the policies that the gate runs, under the gate's and the store's rules (pure).

The policy is the very object that a volume uses.  The rules around it are those of `gate/` and
`record/store.py`, written anew without devices, buffers and callbacks, so that a hit costs well
under a microsecond; `tests/property/test_simulate_gate.py` runs both over the same events and
compares every call of the policy, every record write and every state.

1. A hit tells the policy and marks its extents dirty in the current era.
2. A miss asks for predictions; records what is needed and, on pages that are written anyway, what
   is predicted; then waits for its pages.
3. The misses of a batch share the writes of their pages.  While these are under way, clean extents
   are evicted towards the limit.  A write whose extents were among them records them again, free
   of charge (5).
4. When an era is settled, extents that were not written since are offered to the policy, and those
   it does not want are dropped.  So are, once a second, those that have expired.
5. What was dropped stays in the stored record until its page is written again, at the latest
   with the next second; until then it comes back free of charge.
6. A violation is counted if an extent leaves the stored record that the era plan says to be
   dirty, or if a write is over that the stored record does not cover.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from bitmapd.predict.policy import EVICTIONS_PER_ADDITION, Policy
from bitmapd.record.layout import EXTENTS_PER_PAGE, PAGE_BYTES
from dmctl.simulate.eras import EraPlan
from dmctl.simulate.model import NEVER_S, BatchModel
from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace

TICK_S = 1.0


class _Page:
    """How the stored copy of a page differs from what is wanted."""

    __slots__ = ("lazy", "stale", "uncovered")

    def __init__(self) -> None:
        self.uncovered: set[int] = set()  # wanted, and not durably so
        self.stale: set[int] = set()  # durable, and not wanted
        self.lazy = False  # something was dropped since it was last written


class GateModel(BatchModel):
    """See the module docstring."""

    limit_units: int

    def __init__(
        self, trace: Trace, params: Params, plan: EraPlan, policy: Policy, limit_units: int
    ) -> None:
        super().__init__(trace, params, params.extent_bytes)
        extents = params.geometry(trace.size_bytes).extents
        self.policy = policy
        self.limit_units = limit_units
        self.recorded = 0
        self._wanted = bytearray(extents)
        self._durable = bytearray(extents)
        self._covered = bytearray(extents)
        self._pages: dict[int, _Page] = {}
        self._stored = 0
        self._brought = 0  # extents that the misses of this batch have added
        self._era_of = array("q", [-1]) * extents  # the last era in which it was written
        self._plan = plan
        self._ended = self._settled = 0  # how many eras have
        self._ticks = 0
        self._schedule()

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return self._durable.find(0, first_unit, stop_unit) < 0

    # -- time -----------------------------------------------------------------------------
    def _schedule(self) -> None:
        eras = self._plan.eras
        self._ends_s = eras[self._ended].ended_s if self._ended < len(eras) else NEVER_S
        self._settles_s = eras[self._settled].settled_s if self._settled < self._ended else NEVER_S
        self._tick_s = (self._ticks + 1) * TICK_S
        self.due_s = min(self._ends_s, self._settles_s, self._tick_s)

    def elapse(self, until_s: float) -> None:
        while (now_s := self.due_s) <= until_s:
            if self._settles_s == now_s:
                self._settle(now_s)
            elif self._ends_s == now_s:
                self._ended += 1
            else:
                self._ticks += 1
                self.tick(now_s)
            self._schedule()

    def _settle(self, now_s: float) -> None:
        era = self._plan.eras[self._settled]
        touched = set(self.first[era.first : era.stop])
        for low, high in zip(
            self.first[era.first : era.stop], self.stop[era.first : era.stop], strict=True
        ):
            if high - low > 1:
                touched.update(range(low, high))
        self._settled += 1
        self.settle(sorted(touched), now_s)

    def settle(self, extents: Iterable[int], now_s: float) -> None:
        """Both sides have been flushed after these extents were copied."""
        wants = self.policy.wants
        clean = [extent for extent in extents if self.is_clean(extent)]
        self._drop_clean((extent for extent in clean if not wants(extent, now_s)), now_s)

    def tick(self, now_s: float) -> None:
        """Once a second: cooling, the limit, lazy clears."""
        self._drop_clean(self.policy.expired(now_s), now_s)
        excess = self.recorded - self.limit_units
        if excess > 0:
            self._drop_clean(self.policy.victims(excess, self.is_clean, now_s), now_s)
        for page in self._pages.values():
            if page.lazy:
                self._write_page(page)
        self._count(now_s)

    # -- writes ---------------------------------------------------------------------------
    def run(self, first: int, stop: int) -> None:
        if self.params.queue_depth > 1:
            super().run(first, stop)
            return
        covered, era_of, wrote, era = self._covered, self._era_of, self.policy.wrote, self._ended
        for write, now_s, low, high in zip(
            range(first, stop),
            self.trace.time_s[first:stop],
            self.first[first:stop],
            self.stop[first:stop],
            strict=True,
        ):
            if high - low == 1:
                if covered[low]:
                    wrote(low, high, now_s, True)
                    era_of[low] = era
                    continue
            elif covered.find(0, low, high) < 0:
                wrote(low, high, now_s, True)
                for extent in range(low, high):
                    era_of[extent] = era
                continue
            self._together(now_s, [(write, low, high)])

    def submit(self, now_s: float, first: int, stop: int) -> None:
        writes = range(first, stop)
        self._together(
            now_s, zip(writes, self.first[first:stop], self.stop[first:stop], strict=True)
        )

    def _together(self, now_s: float, writes: Iterable[tuple[int, int, int]]) -> None:
        """Writes that are in flight at the same time, in order of arrival."""
        waiting: list[tuple[int, int, int]] = []
        ready: dict[int, _Page] = {}
        for write, low, high in writes:
            if self._covered.find(0, low, high) < 0:
                self.policy.wrote(low, high, now_s, True)
                self._land(low, high)
            elif self._miss(low, high, now_s, ready):
                waiting.append((write, low, high))
            else:
                self._land(low, high)
        self.meter.waited_updates += len(ready)
        under_way = [self._begin(page) for page in ready.values()]
        self._make_room(now_s)
        for uncovered in under_way:
            self._finish(uncovered)
        for write, low, high in waiting:
            if self._covered.find(0, low, high) >= 0:
                self._add(low, high, (), {})  # evicted, and still stored: costs nothing
            self._land(low, high)
            self.meter.waited((write,), self.params.record_latency_s)
        self._count(now_s)

    def _land(self, low: int, high: int) -> None:
        """The write is carried out and acknowledged."""
        self.meter.violations += self._durable.find(0, low, high) >= 0
        for extent in range(low, high):
            self._era_of[extent] = self._ended

    def _miss(self, low: int, high: int, now_s: float, ready: dict[int, _Page]) -> bool:
        """Whether the write has to wait for the pages in `ready`."""
        policy, limit = self.policy, self.limit_units
        policy.wrote(low, high, now_s, False)
        before = self.recorded
        missing = high - low - self._wanted.count(1, low, high)
        extra = policy.predict(low, high, now_s, limit, before + missing)
        waits = self._add(low, high, extra, ready)
        policy.added(low, high, now_s)
        for begin, end in extra:
            for run_first, run_stop in self._recorded_runs(begin, end):
                policy.added(run_first, run_stop, now_s)
        self._brought += self.recorded - before
        return waits

    def _make_room(self, now_s: float) -> None:
        most, self._brought = EVICTIONS_PER_ADDITION * self._brought, 0
        count = min(self.recorded - self.limit_units, most)
        if count <= 0:
            return
        covered, era_of, settled = self._covered, self._era_of, self._settled

        def may_go(extent: int) -> bool:  # asked often, so `is_clean` is written out
            return era_of[extent] < settled and covered[extent] == 1

        victims = self.policy.victims(count, may_go, now_s)
        self._drop_clean([extent for extent in victims if may_go(extent)], now_s)

    def is_clean(self, extent: int) -> bool:
        return self._covered[extent] == 1 and self._era_of[extent] < self._settled

    def _drop_clean(self, extents: Iterable[int], now_s: float) -> None:
        gone = [extent for extent in extents if self.is_clean(extent)]
        if gone:
            for extent in gone:
                self._drop(extent)
            self.policy.dropped(gone, now_s)

    # -- the store ------------------------------------------------------------------------
    def _add(
        self,
        low: int,
        high: int,
        extra: Iterable[tuple[int, int]],
        ready: dict[int, _Page],
    ) -> bool:
        """Whether some page has to be written; it is in `ready` then."""
        asked: set[int] = set()
        for number, first, stop in _by_page(low, high):
            page = self._pages.setdefault(number, _Page())
            self._want(page, first, stop)
            if self._durable.find(0, first, stop) < 0:
                for extent in range(first, stop):
                    self._covered[extent] = 1
                page.uncovered.difference_update(range(first, stop))
            else:
                asked.add(number)
                ready[number] = page
        for begin, end in extra:
            for number, first, stop in _by_page(begin, end):
                if number in asked:
                    self._want(self._pages[number], first, stop)
        return bool(asked)

    def _want(self, page: _Page, first: int, stop: int) -> None:
        wanted = self._wanted
        extent = wanted.find(0, first, stop)
        while extent >= 0:
            wanted[extent] = 1
            self.recorded += 1
            page.uncovered.add(extent)
            page.stale.discard(extent)
            extent = wanted.find(0, extent + 1, stop)

    def _drop(self, extent: int) -> None:
        """Of an extent that is covered, or was named twice."""
        if not self._wanted[extent]:
            return
        self._wanted[extent] = self._covered[extent] = 0
        self.recorded -= 1
        page = self._pages[extent // EXTENTS_PER_PAGE]
        page.stale.add(extent)
        page.lazy = True

    def _write_page(self, page: _Page) -> None:
        self._finish(self._begin(page))

    def _begin(self, page: _Page) -> set[int]:
        """A page is on its way; the extents that it will cover."""
        for extent in page.stale:
            self._durable[extent] = 0
            self.meter.violations += self._era_of[extent] >= self._settled
        self._stored -= len(page.stale)
        page.stale.clear()
        uncovered, page.uncovered = page.uncovered, set()
        page.lazy = False
        self.meter.wrote_record(1, PAGE_BYTES)
        return uncovered

    def _finish(self, uncovered: set[int]) -> None:
        for extent in uncovered:
            self._stored += 1 - self._durable[extent]
            self._durable[extent] = self._covered[extent] = 1

    def _recorded_runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        first = self._wanted.find(1, start, end)
        while first >= 0:
            stop = self._wanted.find(0, first, end)
            if stop < 0:
                stop = end
            yield first, stop
            first = self._wanted.find(1, stop, end)

    def _count(self, now_s: float) -> None:
        self.meter.stored.set(now_s, self._stored)
        self.meter.record.set(now_s, self.recorded)


def _by_page(first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(page, first, stop within it) of a range of extents."""
    while first < stop:
        page = first // EXTENTS_PER_PAGE
        end = min(stop, (page + 1) * EXTENTS_PER_PAGE)
        yield page, first, end
        first = end
