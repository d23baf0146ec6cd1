"""The serving site is lost while it is not in sync, and what is promoted is whole.

See `tests.soak.failover`: some rounds for each kind of load.  `make soak` makes a hundred.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.failover import run_rounds

ROUNDS = {"ext4": 7, "xfs": 7, "postgres": 6}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", list(ROUNDS))
def test_what_is_promoted_is_whole_and_has_what_was_durable(short_path: Path, kind: str) -> None:
    short_path.chmod(0o755)
    count = run_rounds(short_path, kind, ROUNDS[kind], seed=1)
    assert count["lines"]
