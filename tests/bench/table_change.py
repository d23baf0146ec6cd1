"""What a change of the kernel's table costs bitmapd's loop when the record names all of a volume.

    python -m tests.bench.table_change [TIB]

Every part of a barrier that runs on the loop, with the helper's answer at once: a full initial copy
of TIB (1) TiB at 1 MiB has just ended, one extent is cooled, and one block was written.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

from bitmapd.gate.direct import BarrierDone, Counters, DirectPath, HostCounters, Landed, SwapDone
from bitmapd.gate.routes import Routes, Segment
from bitmapd.record.geometry import Geometry

CHANGES = 5


class AtOnce:
    """A `Kernel` that has done everything already."""

    def counters(self) -> Counters:
        return Counters(0, 0)

    def host_counters(self) -> HostCounters:
        return HostCounters(0, 0, 0, 0)

    def barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        done(None, Landed([(5, 6)], since_era, 0.0))

    def swap(self, segments: Sequence[Segment], done: SwapDone) -> None:
        done(None, 0.0)


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else "1") << 40
    geometry = Geometry(size, 1 << 20, 1 << 16)
    routes = Routes()
    path = DirectPath(geometry, AtOnce(), routes, lambda *_, **__: None, since_era=1)
    recorded = [(0, size >> 20)]
    routes.gated_hit(0, 1)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for change in range(CHANGES):
        if change:
            routes.cool([change])
        start = time.perf_counter()
        path.barrier(recorded, lambda runs: None)
        times.append(time.perf_counter() - start)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    assert routes.loads == CHANGES
    print(f"table changes of {size >> 40} TiB: {', '.join(f'{1e3 * t:.1f} ms' for t in times)};")
    print(f"the process has grown by {grown_mib:.0f} MiB")


if __name__ == "__main__":
    main()
