"""Where the time of the mixed load goes, from an empty record on, on the simulated kernel.

    python -m tests.bench.growth [SECONDS]

9 of 10 writes to a tenth of 256 extents, the others anywhere, one at a time.  Gate, copier and
barrier are the real ones; each write takes what its class takes at depth 1 in the emulated guest
(`--only classes` of `bench_vm` measures it).  So the shares say what growth and eras do to hosts,
and the same each time.
"""

from __future__ import annotations

import random
import sys

from tests.support.mirror import Mirror, begun

EXTENTS = 256
EXTENT_BYTES, BLOCK_BYTES, PAGE_BYTES = 256 << 10, 16 << 10, 4 << 10
ERA_S, LONGEST_ERA_S = 5.0, 20.0
TAKES_S = {
    "miss": 5.7e-3,
    "hit through the gate": 2.5e-3,
    "in the kernel, first in its era": 0.6e-3,
    "in the kernel, again": 0.05e-3,
}


def main() -> None:
    seconds = float(sys.argv[1] if len(sys.argv) > 1 else "10")
    mirror = begun(
        size_bytes=EXTENTS * EXTENT_BYTES,
        extent_bytes=EXTENT_BYTES,
        block_bytes=BLOCK_BYTES,
        piece_bytes=EXTENT_BYTES,
        limit_extents=EXTENTS,
        direct=True,
    )
    mirror.path.mark_s = TAKES_S["in the kernel, first in its era"]
    rounds = mirror.copier.rounds
    rounds.era_interval_s, rounds.longest_era_s = ERA_S, LONGEST_ERA_S
    mirror.policy.kept = set(range(EXTENTS))
    rng, now_s, next_tick_s = random.Random(5), 0.0, 1.0
    counts = dict.fromkeys(TAKES_S, 0)
    pages = EXTENTS * EXTENT_BYTES // PAGE_BYTES
    while now_s < seconds:
        page = rng.randrange(pages // 10 if rng.random() < 0.9 else pages)
        kind = _write(mirror, page * PAGE_BYTES)
        counts[kind] += 1
        now_s += TAKES_S[kind]
        mirror.run(TAKES_S[kind])
        if now_s >= next_tick_s:
            mirror.gate.tick()
            next_tick_s += 1.0
    total = sum(counts.values())
    for kind, count in counts.items():
        share_s = count * TAKES_S[kind] / now_s
        print(f"{kind:32} {count:7}  {count / total:6.1%} of writes  {share_s:6.1%} of the time")
    print(f"{total / now_s:.0f} writes a second, {mirror.path.barriers} barriers,", end=" ")
    print(f"{mirror.routes.loads} tables")


def _write(mirror: Mirror, offset_bytes: int) -> str:
    gate, era = mirror.gate, mirror.kernel.era
    writes, misses = gate.writes, gate.misses
    is_new = offset_bytes // BLOCK_BYTES not in era.marks[era.current]
    mirror.kernel.write("write", offset_bytes, bytes(PAGE_BYTES), lambda error: None, False)
    mirror.run()
    if gate.misses > misses:
        return "miss"
    if gate.writes > writes:
        return "hit through the gate"
    return "in the kernel, first in its era" if is_new else "in the kernel, again"


if __name__ == "__main__":
    main()
