"""How many blocks the recorded traces mark and how much of them is copied, by the size of a block.

    python -m tests.bench.blocksizes [TRACE...]

With device-mapper a block costs hosts a commit of dm-era's metadata when it is first written in an
era, and is copied whole after it.  Counted, not timed: each era's distinct blocks, over a link that
keeps up.  Both are set against blocks of 64 KiB; the last line has geometric means.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Final

from dmctl.simulate.eras import plan_eras
from dmctl.simulate.files import load_trace
from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace
from tests.bench.prediction import RECORDED

BLOCKS_KIB: Final = (64, 256, 1024)
ERAS_S: Final = (5.0, 20.0)
FAST_BYTES_PER_S: Final = 1e12


def blocks(trace: Trace, block_kib: int, era_s: float) -> int:
    """How many are marked in all eras, and copied."""
    params = Params(
        block_bytes=block_kib << 10, era_interval_s=era_s, link_bytes_per_s=FAST_BYTES_PER_S
    )
    return sum(era.blocks for era in plan_eras(trace, params).eras)


def main() -> None:
    parser = argparse.ArgumentParser(description="marks and copies by the size of a block")
    parser.add_argument("traces", nargs="*", type=Path)
    traces = parser.parse_args().traces or sorted(RECORDED.glob("*.csv.gz"))
    print(f"{'trace':24}{'era':>6}{'block':>10}{'marks':>10}{'copied MiB':>12}  of 64 KiB")
    found: dict[tuple[float, int], list[float]] = {}
    for path in traces:
        trace = load_trace(path)
        for era_s in ERAS_S:
            base = blocks(trace, BLOCKS_KIB[0], era_s)
            for kib in BLOCKS_KIB:
                count = blocks(trace, kib, era_s)
                found.setdefault((era_s, kib), []).append(count / base)
                print(f"{path.name.removesuffix('.csv.gz'):24}{era_s:5g}s{kib:6} KiB", end="")
                print(f"{count:10}{count * kib >> 10:12}", end="  ")
                print(f"{count / base:.2f} marks, {count / base * kib / BLOCKS_KIB[0]:.2f} copied")
    for (era_s, kib), shares in found.items():
        mean = statistics.geometric_mean(shares)
        print(f"{'mean':24}{era_s:5g}s{kib:6} KiB{'':24}", end="")
        print(f"{mean:.2f} marks, {mean * kib / BLOCKS_KIB[0]:.2f} copied")


if __name__ == "__main__":
    main()
