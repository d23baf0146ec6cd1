"""What a hit costs in the gate of a volume with points, and of another: `make bench-points`.

The difference is far below what hosts' requests swing by from turn to turn on any machine, so it is
measured where nothing else happens: the same writes through both gates, over a primary that answers
at once, in many short turns; and set against the processor time of a host's request.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any, Final

from bitmapd.gate.cycle import CutGate
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Done
from bitmapd.predict.lru import LruPolicy
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from tests.bench.loads import KIB, MIB
from tests.bench.pointtraces import RecordDisk
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop

REGION_BYTES: Final = 64 * MIB
WRITES: Final = 2_000  # in a turn


class Primary(SimDisk):
    """Answers at once, and holds nothing."""

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        done(None)


def make_gate(kind: type[Gate]) -> Gate:
    """With a whole region in its record."""
    geometry = Geometry(1024 * MIB, 64 * KIB, 64 * KIB)
    loop, image = SimLoop(), blank_image(geometry)
    store = RecordStore(
        geometry, load_image(image), RecordDisk(loop, image), loop, lambda *_, **__: None
    )
    primary = Primary("primary", 512)
    policy = LruPolicy(geometry)
    gate = kind(geometry, primary, store, policy, loop, limit_extents=geometry.extents // 2)
    answers: list[OSError | None] = []
    gate.write(0, memoryview(bytes(REGION_BYTES)), answers.append)
    loop.advance(1)
    assert answers == [None]
    return gate


def hit_ns(gate: Gate, offsets: list[int], buffer: memoryview) -> float:
    """Processor time of a write to these places."""

    def ended(error: OSError | None) -> None:
        assert error is None

    hits, begun_ns = gate.hits, time.thread_time_ns()
    for offset in offsets:
        gate.write(offset, buffer, ended)
    took_ns = time.thread_time_ns() - begun_ns
    assert gate.hits - hits == len(offsets)
    return took_ns / len(offsets)


def measure(turns: int) -> dict[str, Any]:
    """Medians of turns; ns."""
    rng = random.Random(1)
    gates = make_gate(CutGate), make_gate(Gate)
    buffer = memoryview(bytes(4 * KIB))
    pairs = []
    for turn in range(turns):
        order = 1 - 2 * (turn % 2)
        offsets = [rng.randrange(REGION_BYTES // (4 * KIB)) * 4 * KIB for _ in range(WRITES)]
        pairs.append([hit_ns(gate, offsets, buffer) for gate in gates[::order]][::order])
    with_points, without = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "with points, ns": with_points,
        "without, ns": without,
        "more, ns": statistics.median(one - other for one, other in pairs),
    }
