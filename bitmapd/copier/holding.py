"""How often the writes of hosts may be held so that the kernel's table grows (pure).

A growth holds all writes until those in flight have landed: 2 to 8 ms in the emulated guest.  What
it wins is won at once, and the more the earlier it comes, so the first ones after a quiet time
need not wait.

1. Whatever held writes is paid from what time has brought: `HELD_SHARE` of it, of which at most
   `SAVED_S` is saved.  So in any time of `t` seconds growth begins only while less than
   `HELD_SHARE * t + SAVED_S` was used.
2. A growth begins only when what it is expected to take, as long as the latest one, is there; but
   one that took longer than can be saved keeps no other from coming.
3. Barriers are paid for, too, and never kept waiting.

Nothing of it outlives the process.
"""

from __future__ import annotations

HELD_SHARE = 0.01
SAVED_S = 0.25
_NOTHING_S = 1e-6  # sums of floats


class Holding:
    """See the module docstring."""

    def __init__(self, now_s: float) -> None:
        self._saved_s = SAVED_S
        self._now_s = now_s
        self._held_s = 0.0

    def wait_s(self, now_s: float, held_s: float, expected_s: float) -> float:
        """How long the next growth has to wait; 0 if it may begin.

        `held_s`: for how long writes were held since the start.  `expected_s`: how long this one
        will hold them.
        """
        gained_s = HELD_SHARE * (now_s - self._now_s)
        self._saved_s = min(SAVED_S, self._saved_s + gained_s) - max(0.0, held_s - self._held_s)
        self._now_s, self._held_s = now_s, held_s
        short_s = min(expected_s, SAVED_S) - self._saved_s
        return short_s / HELD_SHARE if short_s > _NOTHING_S else 0.0
