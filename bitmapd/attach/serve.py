"""Bringing a volume's device up for hosts, and what only the kernel knows of it (edge).

Hosts can write from `serve_kernel` on.  What they can write directly is in the record by then: if
the layers were found alive, with a table of an earlier process, whatever is direct in it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from bitmapd.attach.direct import DirectPath
from bitmapd.attach.kernel import KernelAttachment
from bitmapd.attach.routes import DIRECT
from bitmapd.gate.gate import Gate
from bitmapd.nbd.server import NbdServer

Covers = Callable[[int, int], bool]  # whether the record has all of extents [first, stop)
Mark = Callable[[int, int], Awaitable[None]]  # record and copy blocks [first, stop)


async def serve_kernel(
    kernel: KernelAttachment, direct: DirectPath, server: NbdServer, *, covers: Covers, mark: Mark
) -> None:
    geometry = direct.geometry
    await kernel.connect(server)
    extent_bytes = geometry.extent_bytes
    in_force = [
        (first // extent_bytes, -(-end // extent_bytes))
        for first, end, kind in await kernel.attach()
        if kind == DIRECT
    ]
    if not in_force:
        return
    direct.routes.adopt(extent for run in in_force for extent in range(*run))
    missing = [run for run in in_force if not covers(*run)]
    if missing:
        kernel.emit(
            "record-damaged",
            message="hosts write directly to extents that the record does not name; added",
        )
    for run in missing:
        await mark(*geometry.extent_blocks(*run))


def direct_status(direct: DirectPath, gate: Gate) -> dict[str, Any]:
    """What hosts did, whatever way it took, and what following the record in the table costs."""
    hosts, routes = direct.host_counters, direct.routes
    writes = hosts.writes + hosts.discards
    return {
        "writes_total": writes,
        "hits_total": max(0, writes - gate.misses),
        "written_bytes_total": hosts.written_bytes,
        "direct_extents": routes.count_direct,
        "gate_writes_total": gate.writes,
        "barriers_total": direct.barriers,
        "barriers_skipped_total": direct.skipped,
        "barrier_errors_total": direct.failures,
        "barriers_put_off_total": direct.put_off,
        "suspended_seconds_total": round(direct.window_s_total, 6),
        "suspended_seconds_max": round(direct.window_s_max, 6),
        "table_loads_total": routes.loads,
        "table_moves_total": routes.moved,
    }
