"""Some rounds of `tests.soak.pair`: hosts at two nodes see what one disk could have shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.soak.pair import play

ROUNDS = int(os.environ.get("PAIR_ROUNDS", "4"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_hosts_at_two_nodes_see_one_disk(short_path: Path, seed: int) -> None:
    struck, answered = play(short_path, 1000 + seed, 4.0)
    assert sum(struck.values()) > 0
    assert answered > 0
