"""Another version of this project beside this one: hits, misses, start, memory.

    python -m tests.bench.trees /path/to/the/other/tree

The other tree has its own `.venv`.  Both volumes lie in memory; the two take turns, pair by pair,
in one run, so that what the machine does besides hits both.  A ratio is this tree's figure divided
by the other's in the same pair, and what is printed is the median of the pairs with their
quartiles: below 1 is quicker or smaller.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.bench import loads, machine
from tests.bench.bench import TIB, TMPFS, folder_in, only_misses
from tests.bench.loads import KIB, MIB, Load
from tests.support.volumes import DMCTL, Volume, make_file

SIZE_BYTES = 1024 * MIB
REGION_BYTES = 64 * MIB
BIG_BYTES = 16 * TIB
HITS = (
    Load("hit, depth 1", "randwrite", 4 * KIB, 1, REGION_BYTES),
    Load("hit, depth 16", "randwrite", 4 * KIB, 16, REGION_BYTES),
    Load("read, depth 1", "randread", 4 * KIB, 1, REGION_BYTES),
)
MISS = Load("miss", "randwrite", 4 * KIB, 1, SIZE_BYTES, align_bytes=64 * KIB, requests=3000)

Figures = dict[str, list[float]]


class Tree:
    """One version, serving a volume."""

    def __init__(self, dmctl: Path, folder: Path, media: Path, stack: ExitStack) -> None:
        self.figures: Figures = {}
        self._dmctl = dmctl
        secondary = make_file(media / "away", SIZE_BYTES)
        options = ["--initial-sync", "skip", "--extent-size", "64KiB"]
        options += ["--record-limit", f"{SIZE_BYTES // 2}B", "--predictor", "lru"]
        self._volume = stack.enter_context(
            Volume(folder, SIZE_BYTES, "trees", options, str(secondary), media, program=dmctl)
        )
        self._volume.create()
        self._volume.start()
        loads.fill(self._volume.uri, SIZE_BYTES)
        self._volume.wait_in_sync()

    def measure(self, pair: int, seconds: int) -> None:
        volume, found = self._volume, {}
        for load in HITS:
            found[load.name] = loads.over_nbd(volume.uri, load, seconds, pair).mean_us
            volume.wait_in_sync()
        volume.stop()
        began = time.perf_counter()
        volume.start()
        found["start"] = time.perf_counter() - began
        before = counters_of(volume)
        miss = loads.over_nbd(volume.uri, MISS, 0, pair)
        after = counters_of(volume)
        share = 1 - (after[1] - before[1]) / max(1, after[0] - before[0])
        hit = loads.over_nbd(volume.uri, HITS[0], seconds, pair)
        found["miss"] = only_misses(miss, hit, share)
        found["memory"] = machine.resident_bytes(volume.pid)[0]
        volume.wait_in_sync()
        for name, value in found.items():
            self.figures.setdefault(name, []).append(value)

    def measure_big(self, media: Path) -> None:
        """Start and memory of a clean volume of 16 TiB."""
        options = ["--initial-sync", "skip"]
        with (
            folder_in(Path(tempfile.gettempdir())) as folder,
            Volume(
                folder, BIG_BYTES, "big", options, media_folder=media, program=self._dmctl
            ) as volume,
        ):
            volume.create()
            began = time.perf_counter()
            volume.start()
            self.figures.setdefault("start, 16 TiB", []).append(time.perf_counter() - began)
            resident = machine.resident_bytes(volume.pid)[0]
            self.figures.setdefault("memory, 16 TiB", []).append(resident)
            volume.stop()


def counters_of(volume: Volume) -> tuple[int, int]:
    status = volume.status()
    return status["writes_total"], status["hits_total"]


def told(name: str, ours: list[float], theirs: list[float]) -> str:
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (
        f"{name:16} {middle:5.3f}  ({low:5.3f} to {high:5.3f})"
        f"   {statistics.median(ours):12.6g} {statistics.median(theirs):12.6g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="compare this tree with another version")
    parser.add_argument("other", type=Path, help="its folder, with a .venv that is ready")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args()
    with ExitStack() as stack:
        trees = []
        for dmctl in (DMCTL, options.other / ".venv" / "bin" / "dmctl"):
            folder = stack.enter_context(folder_in(Path(tempfile.gettempdir())))
            trees.append(Tree(dmctl, folder, stack.enter_context(folder_in(TMPFS)), stack))
        for pair in range(options.pairs):
            for tree in trees[pair % 2 :] + trees[: pair % 2]:
                tree.measure(pair, options.seconds)
        for pair in range(options.pairs):
            for tree in trees[pair % 2 :] + trees[: pair % 2]:
                with folder_in(TMPFS) as media:
                    tree.measure_big(media)
        print("this / the other; then the medians (us, s, bytes)")
        for name, ours in trees[0].figures.items():
            print(told(name, ours, trees[1].figures[name]))


if __name__ == "__main__":
    main()
