"""Tables of docs/prediction.md: what every policy needs, on every trace, at equal record bytes.

    make bench-prediction [TRACES="FILE ..."]

The traces below tests/data/traces that were recorded from real programs, over which the means are
taken; before them the traces that are given; and writes at uniformly random places.  Markdown on
standard output; everything in it can be had again.
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path

from bitmapd.record.geometry import MIB
from dmctl.simulate import Params, Request, Result, Trace, make_trace, replay
from dmctl.simulate.files import load_trace

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "traces"
GIB = 1024 * MIB
LIMITS = (64 * MIB, 256 * MIB, 1024 * MIB)
POLICIES = ("superset", "drbd-al", "lru", "belady")
ACTIVITY_LOG = "drbd-al:1237"
DEFAULT_LIMITS = (*LIMITS, 2048 * MIB, 4096 * MIB, 8192 * MIB)
SPEED = 100e6  # bytes a second
RANDOM_GIB = (0.125, 1, 64, 1024)


def uniform(size_gib: float, count: int = 8000, rate_per_s: float = 200.0) -> Trace:
    chance = random.Random(1)
    size_bytes, now_s, requests = int(size_gib * GIB), 0.0, []
    for _ in range(count):
        now_s += chance.expovariate(rate_per_s)
        offset = chance.randrange(size_bytes // 4096) * 4096
        requests.append(Request(now_s, True, offset, 4096))
    return make_trace(f"random {size_gib:g} GiB", requests, size_bytes)


def size(count: float) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def updates(others: list[Trace], recorded: list[Trace]) -> None:
    """Waited-for updates, and what a power cut would leave."""
    print("\nRecord updates that a write waited for, per 1,000 writes, one request at a time.\n")
    row(
        "trace",
        "limit",
        *POLICIES,
        "to DRBD",
        "to Belady",
        "mean record",
        "mean resync to DRBD 1237",
    )
    row(*["---"] * 10)
    to_drbd: dict[int, list[float]] = {limit: [] for limit in LIMITS}
    resync: dict[int, list[float]] = {limit: [] for limit in LIMITS}
    for trace in others + recorded:
        for limit in LIMITS:
            params = Params(record_limit_bytes=limit)
            results = {name: replay(trace, name, params) for name in POLICIES}
            log = replay(trace, ACTIVITY_LOG, params)
            ours = results["superset"]
            drbd = part(ours, results["drbd-al"])
            left = ours.mean_resync_bytes / log.mean_resync_bytes
            if trace in recorded:
                to_drbd[limit].append(drbd)
                resync[limit].append(left)
            row(
                trace.name,
                size(limit),
                *(f"{result.updates_per_1000:.1f}" for result in results.values()),
                f"{drbd:.2f}",
                f"{part(ours, results['belady']):.2f}",
                size(ours.mean_record_bytes),
                f"{left:.2f}",
            )
            if ours.violations or ours.idle_resync_bytes:
                raise SystemExit(f"{trace.name}: {ours.violations} violations, or never at rest")
    print(f"\nGeometric means over the {len(recorded)} recorded traces:\n")
    row("limit", "updates to DRBD", "mean resync to DRBD 1237")
    row(*["---"] * 3)
    for limit in LIMITS:
        row(
            size(limit),
            *(f"{statistics.geometric_mean(ratios[limit]):.2f}" for ratios in (to_drbd, resync)),
        )


def default_limit(traces: list[Trace]) -> None:
    """What a larger limit saves, and what it would have copied after a power cut."""
    print("\nUpdates per 1,000 writes, then mean and p99 of what a power cut leaves, in seconds at")
    print("100 MB/s.\n")
    row("trace", *map(size, DEFAULT_LIMITS))
    row(*["---"] * (1 + len(DEFAULT_LIMITS)))
    for trace in traces:
        cells = []
        for limit in DEFAULT_LIMITS:
            found = replay(trace, "superset", Params(record_limit_bytes=limit))
            mean_s, p99_s = found.mean_resync_bytes / SPEED, found.p99_resync_bytes / SPEED
            cells.append(f"{found.updates_per_1000:.1f}; {mean_s:.1f} {p99_s:.1f}")
        row(trace.name, *cells)


def part(ours: Result, other: Result) -> float:
    return ours.updates_per_1000 / other.updates_per_1000


def without_pattern() -> None:
    print("\nUniformly random writes: updates of `superset` as a part of those of the plain LRU.\n")
    row("volume", *map(size, LIMITS))
    row(*["---"] * 4)
    for size_gib in RANDOM_GIB:
        trace = uniform(size_gib)
        found = []
        for limit in LIMITS:
            params = Params(record_limit_bytes=limit)
            found.append(part(replay(trace, "superset", params), replay(trace, "lru", params)))
        row(trace.name, *(f"{ratio:.3f}" for ratio in found))


def main() -> None:
    recorded = sorted(RECORDED.glob("*-*.csv.gz"))
    others, traces = list(map(load_trace, sys.argv[1:])), [load_trace(str(p)) for p in recorded]
    updates(others, traces)
    default_limit(others + traces)
    without_pattern()


if __name__ == "__main__":
    main()
