"""Random walks of the simulated machine: `python -m tests.soak.walks --steps 2000000`.

The machine is that of `tests/property/test_wide.py`.  Every step is judged: whatever a power cut
leaves at that moment, what may differ is in the stored record, and what counts as in sync is equal
or watched.  A walk that fails is named by its seed, which repeats it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.property.test_wide import walk

STEPS = 1000  # of one walk


def attempt(seed: int) -> str | None:
    """What went wrong, if anything did."""
    try:
        walk(seed, STEPS)
    except AssertionError:
        return traceback.format_exc()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2_000_000, help="of all walks together")
    parser.add_argument("--seed", type=int, default=1000, help="of the first walk")
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + max(1, given.steps // STEPS))
    failed, began_s = 0, time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        walks = {pool.submit(attempt, seed): seed for seed in seeds}
        for done, future in enumerate(as_completed(walks), 1):
            if (problem := future.result()) is not None:
                failed += 1
                print(f"seed {walks[future]}:\n{problem}", flush=True)
            if done % 200 == 0:
                print(f"{done * STEPS:,} steps, {failed} walks failed", flush=True)
    seconds = time.monotonic() - began_s
    print(f"{len(seeds) * STEPS:,} steps in {seconds:.0f} s: {failed} of {len(seeds)} walks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
