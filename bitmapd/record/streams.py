"""The policy `superset`: what is written next is recorded together with a miss (pure).

Four observations say what rides along with a miss, and what stays:

- *Streams*: a miss at, or a little past, the end of a window that an earlier miss opened goes on
  in that direction, with a window twice as long.  Forwards and backwards, several at a time.
- *Neighbours*: two misses of the same aligned pair within a minute make later misses in their
  region take the aligned pair, then the group of four, and so on.  A neighbour that leaves
  without having been written makes the group smaller again.
- *Successors*: extents that were missed within two seconds of one another are recorded together
  when one of them is missed again; their successors too, as many as the share of such
  predictions that came true allows.
- *Rewriting*: an extent that comes back is kept for three times the interval it came back after,
  whether it was still in the record or not.

Invariants:
1. A prediction lies inside the volume, is not recorded yet, and all of them together are at most
   `room` and `MAX_PREDICTED`.
2. Uniformly random writes give no evidence, so they get no predictions worth mentioning.
3. An extent enters with a short stay if it was predicted, with a longer one once it was written;
   see `record/stays.py` for how stays end.  Nothing outlasts `IDLE_S` on a volume at rest.
4. An eighth of the limit is kept free: without room nothing can be predicted.
5. Memory is bounded by the table sizes below (12 MiB together) plus the two bits for each
   extent that the stay table has.

`docs/prediction.md` has the figures behind the constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bitmapd.record.geometry import Geometry
from bitmapd.record.stays import BULK_EXTENTS, CAPACITY, StayTable, as_runs

MAX_PREDICTED = 64

# Stays by level: predicted and not written, written once, and doubling for what comes back.
STAYS_S = (120.0, 300.0, 600.0, 1200.0, 2400.0, 4800.0)
PREDICTED = 0
ONCE = 1
STAY_PER_INTERVAL = 3.0
SAME_MOMENT_S = 2.0

MAX_STREAMS = 64
STREAM_AGE_S = 60.0
FIRST_WINDOW = 8
MAX_WINDOW = 32

REGION_SHIFT = 4
MAX_REGIONS = 4096
NEIGHBOUR_AGE_S = 60.0

TOGETHER_S = 2.0
TOGETHER = 3
SUCCESSORS = 4
MAX_CHAIN = 16

# The share of an observation's latest predictions that were written: how much it may predict.
FIRST_ACCURACY = 0.25
ACCURACY_GAIN = 1 / 64
FULL_ACCURACY = 0.25
TRY_EVERY = 16  # an observation that is always wrong gets a chance at one miss in so many

RESERVE = 8  # one part in this many of the record is kept free for predictions


@dataclass(frozen=True, slots=True)
class Options:
    """Sizes of the tables: how much may be remembered."""

    stays: int = CAPACITY
    past: int = 16384  # written extents that left the record
    successors: int = 8192
    sources: int = 8192  # predictions that have neither come true nor failed


@dataclass(slots=True)
class _Stream:
    """Extents [low, high) were written or predicted; `window` is 0 until a second miss."""

    low: int
    high: int
    window: int
    direction: int  # +1, -1, or 0 while it is not known
    at_s: float


@dataclass(slots=True)
class _Region:
    """Misses in this region take the aligned group of 2**level extents."""

    level: int
    last: int
    at_s: float


_FROM_STREAM = -1
_FROM_SUCCESSOR = -2
_NOT_PREDICTED = -3  # anything else is the number of the region that predicted it


class StreamsPolicy:
    """See the module docstring; `bitmapd.record.policy.Policy` is the contract."""

    name = "superset"

    def __init__(self, geometry: Geometry, options: Options | None = None) -> None:
        self._options = options or Options()
        self._extents = geometry.extents
        self._stays = StayTable(self._extents, STAYS_S, self._options.stays)
        self._past: dict[int, tuple[int, float]] = {}  # level and last use, oldest first
        self._streams: dict[int, _Stream] = {}  # by serial number, oldest first
        self._serial = 0
        self._regions: dict[int, _Region] = {}
        self._successors: dict[int, list[int]] = {}
        self._recent: list[tuple[int, float]] = []  # the latest misses
        self._accuracy = {_FROM_STREAM: FIRST_ACCURACY, _FROM_SUCCESSOR: FIRST_ACCURACY}
        self._source: dict[int, int] = {}  # predicted extent -> what predicted it
        self._missing = (0, 0)  # of the latest miss: the extents that were not recorded
        self._limit = 0  # of the record, as far as the latest `room` tells
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
                self._settle_source(extent, used=True)
        if not hit:
            self._missing = (missing[0], missing[-1] + 1) if missing else (first, stop)

    def added(self, first: int, stop: int, now_s: float) -> None:
        stays = self._stays
        if stop - first > BULK_EXTENTS:
            stays.enter(first, stop)
            return
        for extent in range(first, stop):
            if stays.level(extent) is None:
                stays.enter(extent, extent + 1)
                if extent in self._source:
                    self._place(extent, PREDICTED, now_s)
                else:
                    self._touch(extent, now_s)

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        for extent in extents:
            state = self._stays.leave(extent)
            if state is not None:
                self._left(extent, *state)

    # -- stays ----------------------------------------------------------------------------
    def _touch(self, extent: int, now_s: float) -> None:
        """A recorded extent was written."""
        stays = self._stays
        level = stays.level(extent)
        if level is None or level == PREDICTED:
            self._settle_source(extent, used=True)
            level, used_s = self._past.pop(extent, (PREDICTED, now_s))
        else:
            used_s = stays.used_s(extent)
        if level == PREDICTED:
            level = ONCE
        elif now_s - used_s >= SAME_MOMENT_S:
            level = max(level - 1, _level_for(now_s - used_s))
        self._fresh.add(extent)
        self._place(extent, level, now_s)

    def _place(self, extent: int, level: int, now_s: float) -> None:
        for cold in self._stays.place(extent, level, now_s):
            self._left(*cold)

    def _left(self, extent: int, level: int, used_s: float) -> None:
        """An extent's stay has ended: learn from it."""
        self._fresh.discard(extent)
        if level == PREDICTED:
            self._settle_source(extent, used=False)
            return
        self._past[extent] = (level, used_s)
        if len(self._past) > self._options.past:
            del self._past[next(iter(self._past))]

    def wants(self, extent: int, now_s: float) -> bool:
        return self._stays.wants(extent, now_s)

    def expired(self, now_s: float) -> Sequence[int]:
        named = self._stays.due(now_s)
        for extent in named:
            self._left(extent, *self._stays.forget(extent))
        surplus = len(self._stays) - (self._limit - self._limit // RESERVE)
        if surplus > 0 and self._limit:
            cold = self._stays.coldest(surplus, lambda extent: True)
            for extent in cold:
                self._left(extent, *self._stays.forget(extent))
            named += cold
        return named + self._stays.take_loose()

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        return self._stays.coldest(count, is_clean)

    # -- predictions ----------------------------------------------------------------------
    def predict(self, first: int, stop: int, now_s: float, room: int) -> Sequence[tuple[int, int]]:
        if stop - first > BULK_EXTENTS:
            return ()
        self._limit = len(self._stays) + max(room, 0)
        low, high = self._missing
        if not first <= low < high <= stop:
            low, high = first, stop
        budget = min(room, MAX_PREDICTED)
        share = max(1, room // 4)  # no single observation takes all there is
        picks: dict[int, int] = {}
        self._follow(low, high, now_s, share, picks)
        self._gather(low, now_s, share, picks)
        self._recall(low, now_s, picks)
        chosen = [extent for extent in picks if not first <= extent < stop][: max(budget, 0)]
        for extent in chosen:
            self._source[extent] = picks[extent]
        while len(self._source) > self._options.sources:
            del self._source[next(iter(self._source))]
        return as_runs(chosen)

    def _pick(self, first: int, stop: int, source: int, picks: dict[int, int]) -> None:
        recorded = self._stays.recorded
        for extent in range(max(first, 0), min(stop, self._extents)):
            if not recorded[extent]:
                picks.setdefault(extent, source)

    def _follow(self, low: int, high: int, now_s: float, share: int, picks: dict[int, int]) -> None:
        """Go on with the stream that this miss belongs to, or begin one."""
        first_window = self._worth(_FROM_STREAM, FIRST_WINDOW)
        found = None
        best = -1
        for serial, stream in self._streams.items():
            if stream.window <= best or now_s - stream.at_s > STREAM_AGE_S:
                continue
            slack = max(first_window // 2, stream.window)
            if stream.direction >= 0 and stream.high <= low <= stream.high + slack:
                found, best, direction = serial, stream.window, 1
            elif stream.direction <= 0 and stream.low - slack <= high <= stream.low:
                found, best, direction = serial, stream.window, -1
        if found is None:
            stream = _Stream(low, high, 0, 0, now_s)
        else:
            del self._streams[found]
            window = min(max(first_window, 2 * best, 1), MAX_WINDOW, share)
            if direction > 0:
                stream = _Stream(low, high + window, window, 1, now_s)
                self._pick(high, high + window, _FROM_STREAM, picks)
            else:
                stream = _Stream(low - window, high, window, -1, now_s)
                self._pick(low - window, low, _FROM_STREAM, picks)
        self._serial += 1
        self._streams[self._serial] = stream
        if len(self._streams) > MAX_STREAMS:
            del self._streams[next(iter(self._streams))]

    def _gather(self, extent: int, now_s: float, share: int, picks: dict[int, int]) -> None:
        """Take the aligned neighbours, if earlier misses in the region say so."""
        number = extent >> REGION_SHIFT
        region = self._regions.pop(number, None)
        if region is None:
            region = _Region(0, extent, now_s)
            if len(self._regions) >= MAX_REGIONS:
                del self._regions[next(iter(self._regions))]
        else:
            wider = region.level + 1
            near = extent >> wider == region.last >> wider and extent != region.last
            if near and now_s - region.at_s < NEIGHBOUR_AGE_S:
                region.level = min(wider, REGION_SHIFT)
            region.last, region.at_s = extent, now_s
        self._regions[number] = region
        level = min(region.level, share.bit_length())
        first = extent >> level << level
        self._pick(first, first + (1 << level), number, picks)

    def _recall(self, extent: int, now_s: float, picks: dict[int, int]) -> None:
        """Take what was missed soon after this extent before, and learn from this miss."""
        table = self._successors
        limit = self._worth(_FROM_SUCCESSOR, MAX_CHAIN)
        chain = [extent]
        for member in chain:
            for after in table.get(member, ()):
                if len(chain) <= limit and after not in chain:
                    chain.append(after)
        for member in chain[1:]:
            self._pick(member, member + 1, _FROM_SUCCESSOR, picks)
        self._recent = [pair for pair in self._recent if now_s - pair[1] <= TOGETHER_S]
        for before, _ in self._recent[-TOGETHER:]:
            if before != extent:
                known = table.pop(before, [])
                table[before] = [extent, *(e for e in known if e != extent)][:SUCCESSORS]
                if len(table) > self._options.successors:
                    del table[next(iter(table))]
        self._recent = [*self._recent[-TOGETHER:], (extent, now_s)]

    def _worth(self, source: int, most: int) -> int:
        """How many of `most` extents this observation may predict, going by its success."""
        allowed = int(most * self._accuracy[source] / FULL_ACCURACY)
        return min(most, allowed or self._serial % TRY_EVERY == 0)

    def _settle_source(self, extent: int, *, used: bool) -> None:
        """A prediction came true or failed."""
        source = self._source.pop(extent, _NOT_PREDICTED)
        if source in self._accuracy:
            self._accuracy[source] += (used - self._accuracy[source]) * ACCURACY_GAIN
        elif source in self._regions:
            region = self._regions[source]
            region.level = min(region.level + 1, REGION_SHIFT) if used else max(region.level - 1, 0)


def _level_for(interval_s: float) -> int:
    """The shortest stay that outlasts the interval well enough."""
    for level in range(ONCE, len(STAYS_S)):
        if STAYS_S[level] >= STAY_PER_INTERVAL * interval_s:
            return level
    return len(STAYS_S) - 1
