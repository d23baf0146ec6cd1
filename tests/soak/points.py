"""Consistent points for as many simulated steps as wanted; see `tests.support.simpoints`.

    python -m tests.soak.points --steps 1000000 [--seed 1]

Each run is another seed: some steps with everything that can go wrong, then none until all is at
rest and equal.  What was wrong names its seed, and `--seed` begins there.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import pytest

from tests.support import simpoints
from tests.support.simpoints import World

STEPS_OF_A_RUN = 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    total: Counter[str] = Counter()
    seed = arguments.seed
    with pytest.MonkeyPatch.context() as monkeypatch:
        simpoints.small(monkeypatch)
        while total["steps"] < arguments.steps:
            world = World(seed)
            try:
                world.run(STEPS_OF_A_RUN)
            except AssertionError as error:
                print(f"seed {seed}, step {world.count['steps']}: {error}")
                return 1
            world.note()
            total.update(world.count)
            seed += 1
            if not seed % 100:
                print(f"up to seed {seed}: {dict(total)}", flush=True)
    print(f"{seed - arguments.seed} runs: {dict(total)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
