"""Which points stay: the policy of a receiver (pure).

A rule is a number and an interval, such as 24 x 1h: of the newest 24 hours that have a point, the
first point of each.  Time is divided at multiples of the interval, so a rule keeps the same points
however often it is asked, while the clock goes forward.

1. A point with a label stays until it is taken away by name.
2. Points are in order of their numbers, whatever the clock of the sender did.
3. Whether a point is due and which are no longer needed is one question: a point is due if the
   rules would keep it.
"""

from __future__ import annotations

from collections.abc import Iterable

from bitmapd.receiver.directory import Keep, KeptPoint

Rules = tuple[tuple[int, float], ...]  # how many, and of which interval in seconds


def needed(points: Iterable[KeptPoint], rules: Rules) -> frozenset[int]:
    """The numbers of those that stay."""
    known = sorted(
        (kept for kept in points if kept.state is not Keep.GOING),
        key=lambda kept: kept.point,
        reverse=True,
    )
    stay = {kept.point for kept in known if kept.label}
    for most, interval_s in rules:
        interval_ns = int(interval_s * 1e9)
        first_of: dict[int, int] = {}
        for kept in known:
            bucket = kept.wall_ns // interval_ns
            if bucket not in first_of and len(first_of) == most:
                break
            first_of[bucket] = kept.point  # the walk is from new to old: the last one stands
        stay.update(first_of.values())
    return frozenset(stay)
