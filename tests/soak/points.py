"""Consistent points for as many simulated steps as wanted: `python -m tests.soak.points`.

Worlds take turns (`WORLDS`), each run with another seed: some steps with everything that can go
wrong, then none until all is at rest and equal.  A run that fails is named by its world and seed,
which `--world` and `--seed` with `--steps 1` repeat.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest

from bitmapd.receiver import receiver
from tests.property.test_failback import Failback
from tests.support import simpoints
from tests.support.simdmpoints import DmWorld
from tests.support.simpoints import Growing, World
from tests.support.simreceiver import BLOCK

STEPS_OF_A_RUN = 500
RUNS_OF_A_TASK = 5

Patch = pytest.MonkeyPatch


def _moving(patch: Patch) -> None:
    simpoints.small(patch)
    simpoints.moving(patch)


def _failing_back(patch: Patch) -> None:
    simpoints.small(patch)
    patch.setattr(receiver, "CREDIT_BYTES", BLOCK)


WORLDS: dict[str, tuple[type[World], Callable[[Patch], None]]] = {
    "usual": (World, simpoints.small),
    "growing": (Growing, simpoints.small),
    "growing, the journal moves": (Growing, _moving),
    "device-mapper": (DmWorld, simpoints.small),
    "failback": (Failback, _failing_back),
}


def attempt(name: str, seeds: range) -> tuple[Counter[str], list[str]]:
    """What happened, and what went wrong."""
    total: Counter[str] = Counter()
    problems: list[str] = []
    made, prepare = WORLDS[name]
    for seed in seeds:
        with Patch.context() as patch:
            prepare(patch)
            world = made(seed)
            try:
                world.run(STEPS_OF_A_RUN)
            except AssertionError as error:
                problems.append(f"{name}, seed {seed}, step {world.count['steps']}: {error}")
            world.end()
        total.update(world.count)
    return total, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="of all runs together")
    parser.add_argument("--seed", type=int, default=1, help="of the first runs")
    parser.add_argument("--world", choices=WORLDS, action="append", help="not all of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    names = given.world or list(WORLDS)
    runs = -(-given.steps // (STEPS_OF_A_RUN * len(names)))  # of each world
    end = given.seed + runs
    tasks = [
        (name, range(seed, min(seed + RUNS_OF_A_TASK, end)))
        for seed in range(given.seed, end, RUNS_OF_A_TASK)
        for name in names
    ]
    total: Counter[str] = Counter()
    failed = 0
    with ProcessPoolExecutor(given.jobs) as pool:
        waiting = [pool.submit(attempt, *task) for task in tasks]
        for done, future in enumerate(as_completed(waiting), 1):
            counts, problems = future.result()
            total.update(counts)
            failed += len(problems)
            for problem in problems:
                print(problem, flush=True)
            if not done % 100:
                print(f"{total['steps']:,} steps, {failed} runs failed", flush=True)
    print(f"{runs * len(names)} runs, {failed} failed: {dict(total)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
