"""The policy `superset`: what is likely to be written next is recorded together with a miss (pure).

A miss makes other extents likely: its neighbours on the disk, and what was used at the same time
when it was used before (`predict/nearby.py`).  Each belongs to a kind, and how often candidates of
a kind come true is learnt on line (`predict/odds.py`).  The best of them ride along.

Most predictions come true within seconds or never, so they are guests: fresh for a while, in which
they keep their place as long as all guests together have no more than their share of the record;
then stale, the first to go.  The share follows what is missed: an evicted guest that is written
after all raises it, an evicted extent that was written and is again lowers it.  Extents that were
written go by last use, and cool as `predict/stays.py` says: one that comes back is kept for three
times the interval it came back after.

Invariants:
1. A prediction lies inside the volume, is not recorded yet, and all of them together are at most
   `MAX_PREDICTED`, and what is free below the record's limit and a `ROOM_PART`th of the limit
   besides: a record that is full, or overfull of what is dirty, would else never predict.  What
   displaces others is at most `CROWDED`: it makes the miss longer by its own time and theirs.
2. What has odds below `FLOOR` is not predicted: so uniformly random writes on a volume that is
   large compared to the record soon get no predictions at all.
3. Guests displace what was written only up to `MOST_GUESTS` of the record, and stale ones are never
   more than the extents that were written.  Nothing outlasts `IDLE_S` on a volume at rest.
4. Memory is bounded: about 20 MiB when every table is full, three bits for each extent of the
   volume.
5. Hints are what was learnt, for the next session (`record/hints.py`).  They only change which
   predictions are made.

`docs/prediction.md` has the figures behind the constants.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bitmapd.predict import odds as odds_module
from bitmapd.predict import trail as trail_module
from bitmapd.predict.nearby import KINDS, Nearby
from bitmapd.predict.odds import Odds
from bitmapd.predict.stays import BULK_EXTENTS, CAPACITY, LOOKS, StayTable, as_runs
from bitmapd.predict.trail import Trail
from bitmapd.record.geometry import Geometry
from bitmapd.record.hints import TRAIL_EXTENTS, Hints

MAX_PREDICTED = 64
CROWDED = 32  # as many where others have to go for them
ROOM_PART = 4
FLOOR = 1 / 64
FRESH_S = 2.0
FRESH_MISSES = 4
MOST_GUESTS = 1 / 2
FEWEST_GUESTS = 1 / 16

# Stays by level.  Predicted and not written, in classes by odds; written once; and doubling for
# what comes back.
CLASS_ODDS = (1 / 16, 1 / 4)
CLASSES = len(CLASS_ODDS) + 1
ONCE = CLASSES
STAYS_S = (120.0,) * CLASSES + (300.0, 600.0, 1200.0, 2400.0, 4800.0)
WRITTEN = range(ONCE, len(STAYS_S))
STAY_PER_INTERVAL = 3.0
SAME_MOMENT_S = 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """Sizes of the tables: how much may be remembered."""

    stays: int = CAPACITY
    past: int = 16384  # written extents that left the record
    trail: int = trail_module.CAPACITY
    watched: int = odds_module.CAPACITY


class SupersetPolicy:
    """See the module docstring; `bitmapd.predict.policy.Policy` is the contract."""

    name = "superset"

    def __init__(self, geometry: Geometry, options: Options | None = None) -> None:
        self._options = options or Options()
        self._geometry = geometry
        self._stays = StayTable(geometry.extents, STAYS_S, self._options.stays)
        self._past: dict[int, tuple[int, float]] = {}  # level and last use, oldest first
        self._nearby = Nearby(geometry.extents, Trail(self._options.trail))
        self._odds = Odds(KINDS, self._options.watched)
        self._offered: dict[int, int] = {}  # the latest miss's predictions: their class
        self._missing = (0, 0)  # of the latest miss: the extents that were not recorded
        self._place: int | None = None  # and where the last of them stood on the trail
        self._misses_s = deque([float("-inf")] * FRESH_MISSES, maxlen=FRESH_MISSES)
        self._size = 0  # of the record: its limit, or what it holds if that is more
        self._gone: tuple[OrderedDict[int, None], ...] = (OrderedDict(), OrderedDict())
        self._share = MOST_GUESTS  # of the record that guests may take from what was written
        self._fresh: set[int] = set()  # touched in this second
        self._fresh_until_s = float("-inf")

    # -- events ---------------------------------------------------------------------------
    def wrote(self, first: int, stop: int, now_s: float, hit: bool) -> None:
        if hit and now_s < self._fresh_until_s and first in self._fresh and stop - first == 1:
            return
        stays = self._stays
        stays.last_write_s = now_s
        if now_s >= self._fresh_until_s:
            self._fresh.clear()
            self._fresh_until_s = now_s + 1.0
        if stop - first > BULK_EXTENTS:
            self._missing = (first, stop)
            return
        missing = []
        for extent in range(first, stop):
            if stays.recorded[extent]:
                self._touch(extent, now_s)
            else:
                missing.append(extent)
        if not hit:
            self._missing = (missing[0], missing[-1] + 1) if missing else (first, stop)
            self._place = self._nearby.trail.place(self._missing[1] - 1)
        for extent in missing:
            self._odds.written(extent)
            self._nearby.used(extent)
            self._regret(extent)

    def added(self, first: int, stop: int, now_s: float) -> None:
        stays = self._stays
        if stop - first > BULK_EXTENTS:
            stays.enter(first, stop)
            return
        offered = self._offered
        for extent in range(first, stop):
            if stays.level(extent) is None:
                level = offered.pop(extent, None)
                if level is None:
                    stays.enter(extent, extent + 1)
                    self._touch(extent, now_s)
                else:
                    self._gone[True].pop(extent, None)
                    for cold in stays.admit(extent, level, now_s):
                        self._left(*cold)

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        leave, most = self._stays.leave, min(self._size, self._options.stays)
        for extent in extents:
            state = leave(extent)
            if state is not None:
                level, used_s = state
                if level >= ONCE:
                    self._left(extent, level, used_s)
                gone = self._gone[level < ONCE]
                gone[extent] = None
                if len(gone) > most:
                    gone.popitem(last=False)

    def _regret(self, extent: int) -> None:
        """A miss: if it is of an extent that was evicted lately, its like should have more room."""
        step = 1 / max(self._size, 1)
        if self._gone[True].pop(extent, self) is not self:
            self._share = min(self._share + step, MOST_GUESTS)
        if self._gone[False].pop(extent, self) is not self:
            self._share = max(self._share - step, FEWEST_GUESTS)

    # -- stays ----------------------------------------------------------------------------
    def _touch(self, extent: int, now_s: float) -> None:
        """A recorded extent was written."""
        stays = self._stays
        level = stays.level(extent)
        if level is None or level < ONCE:
            if level is not None:  # a prediction has come true
                self._odds.written(extent)
                self._nearby.used(extent)
                self._nearby.active(extent, now_s)
            level, used_s = self._past.pop(extent, (ONCE, now_s))
        else:
            used_s = stays.used_s(extent)
            if now_s - used_s >= SAME_MOMENT_S:
                self._nearby.used(extent)
        if now_s - used_s >= SAME_MOMENT_S:
            level = max(level - 1, _level_for(now_s - used_s))
        self._fresh.add(extent)
        self._settle(extent, level, now_s)

    def _settle(self, extent: int, level: int, now_s: float) -> None:
        for cold in self._stays.place(extent, level, now_s):
            self._left(*cold)

    def _left(self, extent: int, level: int, used_s: float) -> None:
        """An extent's stay has ended."""
        self._fresh.discard(extent)
        if level < ONCE:
            return
        self._past[extent] = (level, used_s)
        if len(self._past) > self._options.past:
            del self._past[next(iter(self._past))]

    def wants(self, extent: int, now_s: float) -> bool:
        return self._stays.wants(extent, now_s)

    def expired(self, now_s: float) -> Sequence[int]:
        self._odds.settle(now_s)
        stays = self._stays
        named = stays.due(now_s)
        for extent in named:
            self._left(extent, *stays.forget(extent))
        guests = self._guests()
        stale = self._stale(2 * guests - len(stays), now_s)
        for extent in stale:
            self._left(extent, *stays.forget(extent))
        return named + stale + stays.take_loose()

    def _guests(self) -> int:
        """How many unwritten predictions are recorded."""
        return sum(map(self._stays.count, range(CLASSES)))

    def _stale(
        self, count: int, now_s: float, is_clean: Callable[[int], bool] = lambda extent: True
    ) -> list[int]:
        """Up to `count` guests that are not fresh any more, those with the worst odds first."""
        found: list[int] = []
        stale_s = min(now_s - FRESH_S, self._misses_s[0])
        for level in range(CLASSES):
            for extent, since_s in self._stays.oldest(level, LOOKS):
                if len(found) >= count or since_s >= stale_s:
                    break
                if is_clean(extent):
                    found.append(extent)
        return found

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        """Stale guests, then guests above their share, then what was written.

        Fewer than asked for where only fresh guests are clean: they were worth an update a moment
        ago, and will be stale in a moment.  Looks at a bounded number of extents, like
        `StayTable.coldest`.
        """
        found = dict.fromkeys(self._stale(count, now_s, is_clean))
        surplus = self._guests() - len(found) - int(self._size * self._share)
        wanted = min(count, len(found) + surplus)
        for level in range(CLASSES):
            for extent, _ in self._stays.oldest(level, LOOKS):
                if len(found) >= wanted:
                    break
                if extent not in found and is_clean(extent):
                    found[extent] = None
        if len(found) < count:
            written = self._stays.coldest(count - len(found), is_clean, WRITTEN)
            found.update(dict.fromkeys(written))
        return list(found)

    # -- predictions ----------------------------------------------------------------------
    def predict(
        self, first: int, stop: int, now_s: float, limit: int, recorded: int
    ) -> Sequence[tuple[int, int]]:
        self._offered.clear()
        if stop - first > BULK_EXTENTS:
            return ()
        low, high = self._missing
        if not first <= low < high <= stop:
            low, high = first, stop
        before = recorded - (high - low)
        self._size = max(limit, before)
        self._misses_s.append(now_s)
        odds = self._odds
        odds.settle(now_s)
        watch = odds.due()
        worthy: list[tuple[float, list[int]]] = []
        for kind, extents in self._nearby.groups(
            low,
            high,
            self._place,
            now_s,
            self._stays.recorded,
            odds.of,
            0.0 if watch else FLOOR,
        ):
            if watch:
                odds.watch(extents, kind, now_s)
            if odds.of[kind] >= FLOOR:
                worthy.append((odds.of[kind], extents))
        worthy.sort(key=lambda group: -group[0])
        self._nearby.active(high - 1, now_s)
        budget = min(max(limit - recorded, 0) + limit // ROOM_PART, MAX_PREDICTED)
        if recorded + CROWDED > limit:
            budget = min(budget, max(CROWDED, limit - recorded))
        if before > limit:
            # Where leaving takes time, as under device-mapper, guests must not heap up.
            guests = self._guests()
            most = int(max(limit, before - guests) * MOST_GUESTS) + limit // ROOM_PART
            budget = min(budget, most - guests)
        offered = self._offered
        for chance, extents in worthy:
            level = sum(chance >= bound for bound in CLASS_ODDS)
            for extent in extents:
                if len(offered) >= budget:
                    return as_runs(offered)
                if extent not in offered and not first <= extent < stop:
                    offered[extent] = level
        return as_runs(offered)

    # -- hints ----------------------------------------------------------------------------
    def hints(self) -> Hints:
        nearby = self._nearby
        trail = nearby.trail.latest(TRAIL_EXTENTS)
        return Hints(self._geometry.extents, tuple(self._odds.of), tuple(trail), nearby.ever.copy())

    def recall(self, hints: Hints) -> bool:
        if hints.extents > self._geometry.extents or len(hints.odds) != KINDS:
            return False
        self._odds.restore(hints.odds)
        self._nearby.restore(hints.trail, hints.ever)
        return True


def _level_for(interval_s: float) -> int:
    """The shortest stay that outlasts the interval well enough."""
    for level in WRITTEN:
        if STAYS_S[level] >= STAY_PER_INTERVAL * interval_s:
            return level
    return WRITTEN[-1]
