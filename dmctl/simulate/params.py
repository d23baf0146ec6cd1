"""What a replay assumes of the machine: the same for every policy (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from bitmapd.errors import UsageError
from bitmapd.record.geometry import MIB, Geometry

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Params:
    """Sizes in bytes; `extent_bytes` is that of policies that have no size of their own.

    `queue_depth`: so many writes are in flight together if they arrive within the time of one
    record update; 1 means that each write is over before the next one begins.
    `era_interval_s`: the copy cycle; what was written in it is copied over the link at its end.
    """

    extent_bytes: int = MIB
    record_limit_bytes: int = GIB
    queue_depth: int = 1
    block_bytes: int = 64 << 10
    era_interval_s: float = 1.0
    link_bytes_per_s: float = 112 * MIB
    link_round_trip_s: float = 0.001
    record_latency_s: float = 0.0001

    def __post_init__(self) -> None:
        for label, value, least in (
            ("queue depth", self.queue_depth, 1),
            ("record limit", self.record_limit_bytes, 1),
            ("link speed", self.link_bytes_per_s, 1),
            ("era interval", self.era_interval_s, 0.001),
            ("round trip of the link", self.link_round_trip_s, 0),
            ("latency of the record", self.record_latency_s, 0),
        ):
            if value < least:
                raise UsageError(f"{label} {value} is below {least}")
        self.geometry(MIB)

    def geometry(self, size_bytes: int) -> Geometry:
        """Of a volume; a block is never larger than an extent."""
        return Geometry(size_bytes, self.extent_bytes, min(self.block_bytes, self.extent_bytes))

    def units(self, unit_bytes: int) -> int:
        """How many extents of a size the record limit allows."""
        return max(1, self.record_limit_bytes // unit_bytes)
