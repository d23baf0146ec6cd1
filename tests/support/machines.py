"""How many examples, and the settings of the stateful tests.

`EXAMPLES_PART=N` has an N-th of the examples tried, as `make test-fast` does, and
`STATEFUL_EXAMPLES` raises those of stateful tests, as `make soak` does.  A counterexample is shown
as it was found: to make it smaller takes longer than a test may last.  It is kept below
`.hypothesis`, where the next run of the same test finds it first; to shrink it, run

    SHRINK=1 .venv/bin/python -m pytest --timeout 0 tests/property/test_mirror.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

KEPT = Path(__file__).resolve().parents[2] / ".hypothesis" / "examples"


def examples(full: int) -> int:
    """So many, or the part of them that is asked for."""
    return max(1, full // int(os.environ.get("EXAMPLES_PART", "1")))


def sim_seeds(full: int) -> list[object]:
    """Of a simulation: the first is a test among others, the rest are walks."""
    return [pytest.param(seed, marks=[pytest.mark.walk] if seed else []) for seed in range(full)]


def machine_settings(full: int, steps: int) -> settings:
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    if "SHRINK" in os.environ:
        phases.append(Phase.shrink)
    return settings(
        max_examples=max(examples(full), int(os.environ.get("STATEFUL_EXAMPLES", "0"))),
        stateful_step_count=steps,
        deadline=None,
        phases=phases,
        database=DirectoryBasedExampleDatabase(KEPT),
    )
