"""Random walks of two appliances: `python -m tests.soak.pairwalks --steps 20000000`.

The world is that of `tests/support/simpair.py`, with every kind of trouble of
`tests/property/test_pair.py` in turn; with one of four seeds node 2 is a keeper.  Every step is
judged, and at the end of each walk everything has to heal.  A walk that fails is named by its seed,
troubles and length, which repeat it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.property.test_pair import LENGTHS, TROUBLES
from tests.support.simpair import Broken, walk

BATCH = 5000  # steps of one task, at least


def walks(steps: int, seed: int) -> Iterator[tuple[int, str, int]]:
    """Seed, troubles and length of walks that make up so many steps."""
    while steps > 0:
        for troubles in TROUBLES:
            for length in LENGTHS:
                yield seed, troubles, length
                steps -= length
        seed += 1


def is_kept(seed: int, troubles: str) -> bool:
    """Whether node 2 of these walks is a keeper.  With device-mapper there is none."""
    return seed % 4 == 3 and troubles != "kernels"


def attempt(tasks: list[tuple[int, str, int]]) -> list[str]:
    """What went wrong."""
    problems = []
    for seed, troubles, length in tasks:
        try:
            walk(seed, frozenset(TROUBLES[troubles]), length, kept=is_kept(seed, troubles))
        except Broken as error:
            problems.append(str(error))
    return problems


def batches(tasks: Iterator[tuple[int, str, int]]) -> Iterator[list[tuple[int, str, int]]]:
    batch: list[tuple[int, str, int]] = []
    for task in tasks:
        batch.append(task)
        if sum(length for _, _, length in batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000_000, help="of all walks together")
    parser.add_argument("--seed", type=int, default=100_000, help="of the first walks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    failed, walked, began_s = 0, 0, time.monotonic()
    with ProcessPoolExecutor(given.jobs) as pool:
        running = {
            pool.submit(attempt, batch): sum(length for _, _, length in batch)
            for batch in batches(walks(given.steps, given.seed))
        }
        for done, future in enumerate(as_completed(running), 1):
            walked += running[future]
            for problem in future.result():
                failed += 1
                print(problem, flush=True)
            if done % 200 == 0:
                print(f"{walked:,} steps, {failed} walks failed", flush=True)
    seconds = time.monotonic() - began_s
    print(f"{walked:,} steps in {seconds:.0f} s: {failed} walks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
