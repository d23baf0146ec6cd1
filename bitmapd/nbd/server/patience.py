"""How long a client may take over one message, or over taking its answers (pure).

Two limits, so that neither silence nor a trickle holds memory for ever: a time without any
progress, and a time for the whole, which grows with its length by `SLOWEST_BYTES_PER_S`.
"""

from __future__ import annotations

SLOWEST_BYTES_PER_S = 256 << 10


class Transfer:
    """One transfer that may be under way; times are those of the loop, in seconds."""

    __slots__ = ("_moved_bytes", "_progress_s", "_since_s", "active")

    def __init__(self) -> None:
        self.active = False
        self._since_s = 0.0
        self._progress_s = 0.0
        self._moved_bytes = 0

    def begin(self, now_s: float) -> None:
        self.active = True
        self._since_s = self._progress_s = now_s
        self._moved_bytes = 0

    def advance(self, now_s: float, moved_bytes: int) -> None:
        self._progress_s = now_s
        self._moved_bytes += moved_bytes

    def end(self) -> None:
        self.active = False

    def overdue(
        self, now_s: float, remaining_bytes: int, whole_s: float, silence_s: float
    ) -> str | None:
        """What the client has failed to do, if it has had more than its time."""
        if not self.active:
            return None
        if now_s - self._progress_s > silence_s:
            return f"nothing moved for {silence_s:g} s"
        allowed_s = whole_s + (self._moved_bytes + remaining_bytes) / SLOWEST_BYTES_PER_S
        if now_s - self._since_s > allowed_s:
            return f"it took more than {allowed_s:.0f} s"
        return None
