"""How fast to copy, how fast it goes, and when to try again (pure; time is given).

`Throttle` is a token bucket.  A copy may start when there is credit for it; one that is larger
than the bucket starts when the bucket is full and leaves a debt, so the debt is never more than
one request and the mean rate holds.  Credit for idle time ends at the size of the bucket.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

DEFAULT_BURST_BYTES = 4 << 20


class Throttle:
    """At most `rate_bytes_per_s` on average; `None` is no limit."""

    def __init__(
        self, rate_bytes_per_s: float | None, burst_bytes: int = DEFAULT_BURST_BYTES
    ) -> None:
        if burst_bytes <= 0:
            raise ValueError(f"burst of {burst_bytes} bytes is not positive")
        self._rate = _checked(rate_bytes_per_s)
        self._burst_bytes = burst_bytes
        self._credit_bytes = float(burst_bytes)
        self._at_s: float | None = None

    @property
    def rate_bytes_per_s(self) -> float | None:
        return self._rate

    def set_rate(self, rate_bytes_per_s: float | None) -> None:
        """Change the limit; it holds from the latest request on, whose debt or credit stays."""
        self._rate = _checked(rate_bytes_per_s)

    def delay_s(self, now_s: float, length_bytes: int) -> float:
        """How long from now a request of this length has to wait; 0 if it may start."""
        if self._rate is None:
            return 0.0
        self._earn(now_s)
        needed = min(length_bytes, self._burst_bytes) - self._credit_bytes
        # Less than a byte is rounding; waiting for it would be a timer that changes nothing.
        return needed / self._rate if needed >= 1.0 else 0.0

    def take(self, now_s: float, length_bytes: int) -> None:
        """A request of this length starts; the caller waited as long as `delay_s` said."""
        self._earn(now_s)
        if self._rate is not None:
            # A caller that did not wait owes no more than its latest request.
            self._credit_bytes = max(self._credit_bytes, 0.0) - length_bytes

    def _earn(self, now_s: float) -> None:
        if self._rate is None:
            # No limit: nothing is owed, and a limit that comes later begins with a full bucket.
            self._credit_bytes = float(self._burst_bytes)
        elif self._at_s is not None and now_s > self._at_s:
            earned = self._credit_bytes + (now_s - self._at_s) * self._rate
            self._credit_bytes = min(earned, float(self._burst_bytes))
        self._at_s = now_s if self._at_s is None else max(now_s, self._at_s)


def _checked(rate_bytes_per_s: float | None) -> float | None:
    if rate_bytes_per_s is not None and not (0 < rate_bytes_per_s < math.inf):
        raise ValueError(f"rate of {rate_bytes_per_s} bytes/s is not positive and finite")
    return rate_bytes_per_s


class SpeedMeter:
    """The speed of copying, as a mean in which `half_life_s` of copying halves what was before.

    Pauses do not count: the figure answers "how fast can it be copied", not "how much was there to
    copy".  `begin` says that copying starts after a pause.  A caller that never says so has gaps
    of more than `GAP_S` between two copies taken for pauses.
    """

    GAP_S = 0.5

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._half_life_s = half_life_s
        self._bytes = 0.0
        self._seconds = 0.0
        self._last_s: float | None = None
        self._told = False

    def begin(self, now_s: float) -> None:
        """A copy starts and no other is in flight."""
        self._told = True
        self._last_s = now_s

    def add(self, now_s: float, length_bytes: int) -> None:
        """So many bytes have been copied by now."""
        if self._last_s is None or (not self._told and now_s - self._last_s > self.GAP_S):
            # When this burst began is not known, so its first copy says nothing about the speed.
            self._last_s = now_s
            return
        passed_s = max(now_s - self._last_s, 0.0)
        kept = 0.5 ** (passed_s / self._half_life_s)
        self._bytes = self._bytes * kept + length_bytes
        self._seconds = self._seconds * kept + passed_s
        self._last_s = now_s

    @property
    def bytes_per_s(self) -> float | None:
        """`None` while it is not known."""
        return self._bytes / self._seconds if self._seconds > 0 else None

    def eta_s(self, remaining_bytes: int) -> float | None:
        """How long that many bytes take at this speed; `None` if it is not known."""
        if remaining_bytes <= 0:
            return 0.0
        speed = self.bytes_per_s
        return remaining_bytes / speed if speed else None


class Backoff:
    """Waiting times between attempts: doubling up to a limit, shortened at random by up to half.

    `jitter` gives numbers in [0, 1).  Without it many volumes that lost the same secondary would
    all come back in the same moment.
    """

    def __init__(
        self,
        first_s: float = 0.5,
        limit_s: float = 30.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < first_s <= limit_s:
            raise ValueError(f"first wait {first_s} s is not between 0 and the limit {limit_s} s")
        self._jitter = jitter
        self.first_s = first_s
        self.limit_s = limit_s
        self._next_s = first_s

    def next_s(self) -> float:
        """How long to wait before the next attempt."""
        wait_s = self._next_s
        self._next_s = min(wait_s * 2, self.limit_s)
        return wait_s * (1 - self._jitter() / 2)

    def reset(self) -> None:
        """An attempt succeeded."""
        self._next_s = self.first_s
