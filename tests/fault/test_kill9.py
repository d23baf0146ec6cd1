"""Case 4 of the fault list: kill -9 under load.  The bounded version of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.soak import Model, SoakFailure, block_content, block_generation, soak


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_acknowledged_write_is_lost_when_the_daemon_is_killed(short_path: Path) -> None:
    counts = soak(short_path, cycles=5, seed=20260401)
    assert counts.cycles == 5
    # The load was real: requests were acknowledged, and some died unanswered.
    assert counts.acked_requests > 100
    assert counts.in_doubt > 0


def test_the_soak_notices_a_lost_write() -> None:
    model = Model([0, 7])
    with pytest.raises(SoakFailure, match="block 1: found generation 3, allowed \\[7\\]"):
        model.check(1, block_content(1, 3))


def test_the_soak_accepts_a_write_in_doubt_and_holds_to_what_it_read() -> None:
    model = Model([4], doubt={0: {5}})
    model.check(0, block_content(0, 5))
    assert model.acked == [5]
    with pytest.raises(SoakFailure):
        model.check(0, block_content(0, 4))


def test_the_soak_notices_torn_and_misplaced_blocks() -> None:
    whole = block_content(3, 9)
    assert block_generation(3, whole) == 9
    assert block_generation(4, whole) is None
    assert block_generation(3, whole[:2048] + block_content(3, 8)[2048:]) is None
