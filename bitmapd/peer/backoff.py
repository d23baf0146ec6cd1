"""When to dial the other node again (pure).

A node that is not there is tried often at first, then every five seconds, each time after a little
less than that, so that two that lost one another do not stay in step.  One that is there and says
things that are wrong is tried once in 30 s after five of them in a minute: whatever it is, it does
not go away by itself, and neither side is to be kept busy by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

FIRST_S: Final = 0.1
LONGEST_S: Final = 5.0
JITTER: Final = 0.5  # at most this part is taken off
MOST_ERRORS: Final = 5
ERRORS_WITHIN_S: Final = 60.0
AFTER_ERRORS_S: Final = 30.0


class Backoff:
    """`chance` returns numbers in [0, 1)."""

    def __init__(self, chance: Callable[[], float]) -> None:
        self._chance = chance
        self._base_s = FIRST_S
        self._errors_s: deque[float] = deque(maxlen=MOST_ERRORS)

    def succeeded(self) -> None:
        """The other was greeted."""
        self._base_s = FIRST_S

    def erred(self, now_s: float) -> None:
        """A connection ended with ERROR."""
        self._errors_s.append(now_s)

    def slow(self, now_s: float) -> bool:
        """Whether there were too many errors lately."""
        return len(self._errors_s) == MOST_ERRORS and now_s < self._errors_s[0] + ERRORS_WITHIN_S

    def next_s(self, now_s: float) -> float:
        """How long to wait before the next attempt."""
        base_s = self._base_s
        self._base_s = min(2 * base_s, LONGEST_S)
        if self.slow(now_s):
            return AFTER_ERRORS_S
        return base_s * (1 - JITTER * self._chance())
