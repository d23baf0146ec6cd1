"""Figures that are counted and not timed come out the same each time."""

from __future__ import annotations

import pytest

from dmctl.simulate.files import load_trace
from tests.bench.blocksizes import blocks
from tests.bench.prediction import RECORDED

BUILD = "ext4-build.csv.gz"


@pytest.mark.parametrize(
    ("era_s", "block_kib", "copied_mib"),
    [(5.0, 64, 150), (5.0, 256, 171), (5.0, 1024, 241), (20.0, 64, 149), (20.0, 1024, 222)],
)
def test_what_is_copied_of_a_trace_by_the_size_of_a_block(
    era_s: float, block_kib: int, copied_mib: int
) -> None:
    count = blocks(load_trace(RECORDED / BUILD), block_kib, era_s)
    assert round(count * block_kib / 1024) == copied_mib
