"""Whether a stop waits for a medium that does not answer (pure).

A stop takes as long as there is something to copy, so it has no bound in time.  Its bound is the
time for which something is asked of a medium and no figure moves.  A server is not meant: what is
asked of one ends by itself (`nbd/client/pipeline`).
"""

from __future__ import annotations

from collections.abc import Hashable

from bitmapd.errors import TimeOutError


class StalledError(TimeOutError):
    """A medium has not answered for so long that the process ends without it, as by a crash."""


class Stall:
    """Is shown, now and then, what moves."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._figures: Hashable = None
        self._since_s = 0.0

    def seen(self, now_s: float, figures: Hashable) -> bool:
        """Whether the figures have been the same for too long; None while nothing is asked."""
        if figures is None or figures != self._figures:
            self._figures, self._since_s = figures, now_s
        return figures is not None and now_s - self._since_s >= self._patience_s
