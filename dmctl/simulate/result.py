"""What a replay found (pure).

All times are over the trace, from its first write to its last; `idle_resync_bytes` is what a power
cut leaves to be copied an hour after the last write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dmctl.simulate.meter import HitRate


@dataclass(frozen=True, slots=True)
class Result:
    """Counts are of the whole trace.  `waited_updates`: record updates that a write waited for,
    those that several writes waited for counted once."""

    trace: str
    policy: str
    extent_size_bytes: int
    record_limit_bytes: int
    limited: bool  # whether the policy keeps to the limit
    queue_depth: int
    requests: int
    writes: int
    hits: int  # writes that waited for nothing
    waited_writes: int
    waited_updates: int
    record_writes: int
    record_flushes: int
    record_written_bytes: int
    mean_wait_s: float  # of those that waited
    longest_wait_s: float
    stalls: int
    stall_s: float
    mean_record_bytes: float
    mean_resync_bytes: float
    p99_resync_bytes: int
    max_resync_bytes: int
    idle_resync_bytes: int
    mean_dirty_bytes: float
    violations: int
    hit_rate: HitRate

    @property
    def updates_per_1000(self) -> float:
        """Waited-for record updates per 1,000 writes: what policies are compared by."""
        return 1000 * self.waited_updates / self.writes

    @property
    def waits_per_1000(self) -> float:
        return 1000 * self.waited_writes / self.writes

    @property
    def superset_ratio(self) -> float | None:
        """Mean of what would be copied to the mean of what is truly dirty."""
        if not self.mean_dirty_bytes:
            return None
        return self.mean_resync_bytes / self.mean_dirty_bytes

    def to_json(self) -> dict[str, Any]:
        """The keys of the command-line contract, and more."""
        ratio = self.superset_ratio
        return {
            "trace": self.trace,
            "policy": self.policy,
            "extent_size_bytes": self.extent_size_bytes,
            "record_limit_bytes": self.record_limit_bytes,
            "limited": self.limited,
            "queue_depth": self.queue_depth,
            "requests": self.requests,
            "writes": self.writes,
            "hits": self.hits,
            "waited_writes": self.waited_writes,
            "waited_updates": self.waited_updates,
            "updates_per_1000_writes": round(self.updates_per_1000, 3),
            "record_writes": self.record_writes,
            "record_flushes": self.record_flushes,
            "record_written_bytes": self.record_written_bytes,
            "mean_wait_seconds": round(self.mean_wait_s, 9),
            "longest_wait_seconds": round(self.longest_wait_s, 9),
            "stalls": self.stalls,
            "stall_seconds": round(self.stall_s, 6),
            "mean_record_bytes": round(self.mean_record_bytes),
            "mean_resync_bytes": round(self.mean_resync_bytes),
            "p99_resync_bytes": self.p99_resync_bytes,
            "max_resync_bytes": self.max_resync_bytes,
            "idle_resync_bytes": self.idle_resync_bytes,
            "mean_dirty_bytes": round(self.mean_dirty_bytes),
            "superset_ratio": None if ratio is None else round(ratio, 3),
            "violations": self.violations,
            "hit_rate": {
                "part_seconds": self.hit_rate.part_s,
                "values": [None if v is None else round(v, 4) for v in self.hit_rate.values],
            },
        }
