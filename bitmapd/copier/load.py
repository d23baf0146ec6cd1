"""How busy hosts are, and what copying may take while they are (pure).

Reads, copies and hosts share one thread and one disk.  While hosts are at work, copying takes no
more than `YIELD_BYTES_PER_S` and a share of what they write, in pieces of `YIELD_PIECE_BYTES`; the
reasons are in docs/decisions/0003.  That is 512 blocks of 64 KiB a second.  Where blocks are larger
it is as many of them, up to those of `YIELD_PIECE_BYTES`: scattered writes dirty one each.
"""

from __future__ import annotations

from bitmapd.copier.throttle import Throttle

YIELD_BYTES_PER_S = 32 << 20
YIELD_BLOCK_BYTES = 64 << 10
YIELD_SHARE = 0.25
YIELD_PIECE_BYTES = 256 << 10
_YIELD_BURST_BYTES = 1 << 20
_HOST_QUIET_S = 0.01  # hosts that asked for nothing for so long are not at work
_HOST_SAMPLE_S = 0.1


class HostLoad:
    """How busy hosts are, from the gate's counters (pure)."""

    def __init__(self, block_bytes: int) -> None:
        counted_bytes = max(YIELD_BLOCK_BYTES, min(block_bytes, YIELD_PIECE_BYTES))
        self._least_bytes_per_s = YIELD_BYTES_PER_S * counted_bytes // YIELD_BLOCK_BYTES
        self._requests = 0
        self._active_s = float("-inf")
        self._sample_s = float("-inf")
        self._sample_bytes = 0
        self.throttle = Throttle(self._least_bytes_per_s, _YIELD_BURST_BYTES)

    def active(self, now_s: float, requests: int, written_bytes: int) -> bool:
        """Whether hosts are at work; sets the throttle's rate to what copying may take then."""
        if requests != self._requests:
            self._requests = requests
            self._active_s = now_s
        passed_s = now_s - self._sample_s
        if passed_s >= _HOST_SAMPLE_S:
            rate = (written_bytes - self._sample_bytes) / passed_s
            self.throttle.set_rate(self._least_bytes_per_s + rate * YIELD_SHARE)
            self._sample_s = now_s
            self._sample_bytes = written_bytes
        return now_s - self._active_s < _HOST_QUIET_S
