"""The age of the newest committed point: the time since its cut (pure).

The loop's clock tells it where this process made the cut.  One that an earlier process made is told
by Unix time, from the record: less certain, since somebody may have set the clock meanwhile, and
far better than not to know, for a restart while the link is away is when people look.
"""

from __future__ import annotations

from collections.abc import Callable

_NS_PER_S = 10**9


class PointAge:
    """`before_s`: Unix time of the cut of the point that an earlier process has committed, in whole
    seconds; 0: there is none, or nobody knows."""

    def __init__(
        self, clock: Callable[[], float], wall_ns: Callable[[], int], before_s: int
    ) -> None:
        self._clock = clock
        self._wall_ns = wall_ns
        self._before_s = before_s
        self._cut_s: float | None = None

    def committed(self, cut_s: float) -> None:
        """A point that was cut at this time of the loop is the newest one."""
        self._cut_s = cut_s

    @property
    def seconds(self) -> float | None:
        """None if nobody knows."""
        if self._cut_s is not None:
            return round(self._clock() - self._cut_s, 3)
        if self._before_s:
            return round(max(0.0, self._wall_ns() / _NS_PER_S - self._before_s), 3)
        return None

    @property
    def is_from_clock(self) -> bool:
        """Whether it relies on Unix time."""
        return self._cut_s is None and self._before_s > 0
