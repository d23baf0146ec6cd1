"""Candidates: which extents a miss makes likely, by kind (pure).

Near in space: up to `REACH` extents on either side.  Near in time: extents that stood within
`STEPS` of this one on the trail when it was used before (`predict/trail.py`).  Which of them are
worth a place in the record is not decided here but by the odds of their kind, which are learnt.

A kind in space says: forwards or backwards; how far, as a power of two; whether the candidate was
ever written; and whether there was other activity near the miss in the last `RECENT_S`, on the
candidate's side or on the other (a stream, or a region at work).  A kind in time says: before or
after on the trail; how far; and whether an earlier miss of the last `RECENT_S` came from the same
part of the trail, so that this one looks like a repetition.

1. Candidates lie inside the volume and are not recorded.
2. One bit for each extent says whether it was ever written: 128 KiB per TiB at 1 MiB extents.
   Nothing takes it back, short of a new session without hints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from bitarray import bitarray

from bitmapd.predict.trail import Trail

REACH_BITS = 6
REACH = (1 << REACH_BITS) - 1
STEP_BITS = 5
STEPS = (1 << STEP_BITS) - 1
RECENT = 16
RECENT_S = 5.0

FORWARDS, BACKWARDS = 0, 1
ALONE, OTHER_SIDE, THIS_SIDE = 0, 1, 2
_SIDES = 3
_IN_SPACE = 2 * REACH_BITS * 2 * _SIDES
KINDS = _IN_SPACE + 2 * STEP_BITS * 2

_ONE = bitarray("1")
_BELOW = 2  # the first window of what is backwards


def kind_in_space(direction: int, bits: int, ever: int, side: int) -> int:
    """`bits`: the distance is in [2**bits, 2**(bits + 1)), 1 for the next extent."""
    return ((direction * REACH_BITS + bits) * 2 + ever) * _SIDES + side


def kind_in_time(direction: int, bits: int, repeats: int) -> int:
    return _IN_SPACE + (direction * STEP_BITS + bits) * 2 + repeats


def _looks(forwards: int, backwards: int) -> list[tuple[int, int, int, int]]:
    """All kinds in space with these sides, the nearest first: kind, which of the four windows of
    `_in_space`, and the distances in it, less one, as a range."""
    sides = ((FORWARDS, forwards), (BACKWARDS, backwards))
    return [
        (kind_in_space(direction, bits, ever, side), 2 * direction + ever, near - 1, 2 * near - 1)
        for bits, near in ((bits, 1 << bits) for bits in range(REACH_BITS))
        for direction, side in sides
        for ever in (1, 0)
    ]


# By side, as seen forwards and backwards.
_LOOKS = [[_looks(forwards, backwards) for backwards in (0, 1, 2)] for forwards in (0, 1, 2)]


class Nearby:
    """What was written where and when, as far as it matters for candidates."""

    def __init__(self, extents: int, trail: Trail) -> None:
        self.trail = trail
        self.ever = bitarray(extents)
        self._extents = extents
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # extents that came into use
        self._recalled: deque[tuple[int, float]] = deque(maxlen=RECENT)  # places on the trail

    def used(self, extent: int) -> None:
        """The extent came into use: a miss, a prediction that came true, or after a pause."""
        self.trail.put(extent)
        self.ever[extent] = True

    def active(self, extent: int, now_s: float) -> None:
        """The extent was not recorded, or not written since it was, and is written now."""
        self._recent.append((extent, now_s))

    def restore(self, trail: Iterable[int], ever: bitarray) -> None:
        """Begin with what was known before a restart, of a volume that may have grown since."""
        self.trail.restore(trail)
        self.ever[: len(ever)] |= ever

    def groups(
        self,
        low: int,
        high: int,
        place: int | None,
        now_s: float,
        recorded: bitarray,
        odds: Sequence[float],
        floor: float,
    ) -> Iterator[tuple[int, list[int]]]:
        """(kind, candidates, the nearest first) for a miss of extents [low, high).

        `place` is where the extent stood on the trail before this miss.  Kinds with odds below
        `floor` are left out, since looking for them is most of the work.
        """
        in_space = self._in_space(low, high, now_s, recorded, odds, floor)
        if place is None:
            return in_space
        return chain(self._in_time(place, now_s, recorded, odds, floor), in_space)

    def _in_time(
        self, place: int, now_s: float, recorded: bitarray, odds: Sequence[float], floor: float
    ) -> Iterator[tuple[int, list[int]]]:
        repeats = any(
            abs(other - place) <= STEPS and now_s - at_s <= RECENT_S
            for other, at_s in self._recalled
        )
        self._recalled.append((place, now_s))
        between = self.trail.between
        for bits in range(STEP_BITS):
            near, far = 1 << bits, 2 << bits
            kind = kind_in_time(FORWARDS, bits, repeats)
            if odds[kind] >= floor:
                after = [e for e in between(place + near, place + far) if not recorded[e]]
                if after:
                    yield kind, after
            kind = kind_in_time(BACKWARDS, bits, repeats)
            if odds[kind] >= floor:
                before = [e for e in between(place - far + 1, place - near + 1) if not recorded[e]]
                if before:
                    yield kind, before[::-1]

    def _in_space(
        self,
        low: int,
        high: int,
        now_s: float,
        recorded: bitarray,
        odds: Sequence[float],
        floor: float,
    ) -> Iterator[tuple[int, list[int]]]:
        forwards, backwards = self._sides(low, high, now_s)
        looks = [look for look in _LOOKS[forwards][backwards] if odds[look[0]] >= floor]
        if not looks:
            return
        # Not recorded, by distance: above and never written, above and written, the same below.
        above = slice(high, min(high + REACH, self._extents))
        below = slice(max(low - REACH, 0), low)
        fresh_above, written_above = ~recorded[above], self.ever[above]
        fresh_below, written_below = ~recorded[below], self.ever[below]
        fresh_below.reverse()
        written_below.reverse()
        written_above &= fresh_above
        fresh_above ^= written_above
        written_below &= fresh_below
        fresh_below ^= written_below
        windows = (fresh_above, written_above, fresh_below, written_below)
        for kind, window, near, far in looks:
            at = windows[window].search(_ONE, near, far)
            if window < _BELOW:
                found = [high + distance for distance in at]
            else:
                found = [low - 1 - distance for distance in at]
            if found:
                yield kind, found

    def _sides(self, low: int, high: int, now_s: float) -> tuple[int, int]:
        """Where there is activity, as seen by candidates forwards and backwards."""
        below = above = False
        for extent, at_s in self._recent:
            if now_s - at_s <= RECENT_S:
                if low - REACH <= extent < low:
                    below = True
                elif high <= extent < high + REACH:
                    above = True
        if not below and not above:
            return ALONE, ALONE
        return THIS_SIDE if below else OTHER_SIDE, THIS_SIDE if above else OTHER_SIDE
