"""When the next cut comes, and whether blocks are sent before it (pure).

The next cut comes an interval after the last one, and later after one that was given up.  What is
to be sent is read at the cut, copy-before-write holding back the hosts that write it meanwhile.  So
a set that is large beside the spool, or takes longer to send than the interval, is first *copied
ahead*: round after round like any copy, each block dirty again if it is written again.  The cut
comes when what is left is small; or when rounds no longer help, since hosts write as fast as the
link carries.

1. Copying ahead gives folding away: a block is sent as often as it is copied.  So it is done only
   where one cut would not do.
2. After a cut that was given up the next one waits 1 s, 2 s … 30 s; one that was committed ends
   that.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

FIRST_PAUSE_S: Final = 1.0
LAST_PAUSE_S: Final = 30.0
LEAST_SENDING_S: Final = 10.0
PROGRESS: Final = 0.9  # a round that leaves more than this part of what was left did not help


class Next(Enum):
    """What follows a round of copying ahead."""

    CUT = "cut"
    ROUND = "round"
    CANNOT_KEEP_UP = "cannot keep up"  # a round, though rounds do not help


class Schedule:
    """See the module docstring.  `bytes_per_s` is the speed of sending, None: unknown."""

    def __init__(self, interval_s: float, spool_bytes: int) -> None:
        self.interval_s = interval_s
        self.spool_bytes = spool_bytes
        self._cut_s = float("-inf")
        self._pause_s = FIRST_PAUSE_S
        self._not_before_s = float("-inf")
        self._hurried = False
        self._left: int | None = None  # when the round under way began
        self._enough = False  # rounds before the next cut

    @property
    def due_s(self) -> float:
        """When the next cut may come."""
        after_last_s = float("-inf") if self._hurried else self._cut_s + self.interval_s
        return max(after_last_s, self._not_before_s)

    def hurry(self) -> None:
        """The next cut need not wait for the interval."""
        self._hurried = True

    @property
    def is_hurried(self) -> bool:
        return self._hurried

    def cut(self, now_s: float) -> None:
        self._cut_s = now_s
        self._hurried = False
        self._left, self._enough = None, False

    def gave_up(self, now_s: float) -> None:
        self._cut_s = float("-inf")
        self._not_before_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)

    def committed(self) -> None:
        self._pause_s = FIRST_PAUSE_S

    # -- copying ahead ----------------------------------------------------------------------
    @property
    def copies_ahead(self) -> bool:
        """Whether a round is under way."""
        return self._left is not None

    def begin_round(self, left_bytes: int) -> None:
        self._left = left_bytes

    def end_rounds(self) -> None:
        """A cut is what comes next."""
        self._left, self._enough = None, True

    def is_much(self, left_bytes: int, bytes_per_s: float | None) -> bool:
        """Whether to begin copying ahead."""
        if self._enough:
            return False
        if 2 * left_bytes > self.spool_bytes:
            return True
        return bytes_per_s is not None and left_bytes > bytes_per_s * self.interval_s

    def after_round(self, left_bytes: int, bytes_per_s: float | None) -> Next:
        """A round is over, and so much is left or was written meanwhile."""
        before = left_bytes if self._left is None else self._left
        sending_s = max(self.interval_s / 2, LEAST_SENDING_S)
        fits = 2 * left_bytes <= self.spool_bytes
        if fits and (bytes_per_s is None or left_bytes <= bytes_per_s * sending_s):
            return Next.CUT
        if left_bytes <= before * PROGRESS:
            return Next.ROUND
        return Next.CUT if left_bytes <= self.spool_bytes else Next.CANNOT_KEEP_UP
