"""The Spin model of the direct path: it holds, and every seeded mistake gives a counterexample.

MODEL_FULL=1 adds the larger searches (minutes, and up to 3 GB of memory).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import spin

SUPERSET = spin.MODELS / "superset.pml"

pytestmark = pytest.mark.skipif(spin.IS_MISSING, reason=spin.MISSING)

# Extents, kills of bitmapd, failed barriers, writes of the first host (the second writes once).
HOLDS = [(1, 1, 1, 0), (1, 1, 0, 1), (1, 0, 1, 1), (2, 0, 1, 0), (2, 1, 0, 0)]
FULL = [(1, 1, 1, 1), (1, 0, 1, 2), (2, 0, 0, 1), (2, 1, 1, 0)]
ONE_EXTENT = (1, 1, 1, 0)
DISCARDS = (2, 0, 1, 0)
RESTART = (1, 1, 0, 0)
MISTAKES = {
    "BUG_NO_DRAIN": ONE_EXTENT,
    "BUG_DROP_WHILE_DIRECT": ONE_EXTENT,
    "BUG_DROP_EARLY": ONE_EXTENT,
    "BUG_NO_WIDENING": DISCARDS,
    "BUG_WIDEN_BY_OWN_DISCARDS": DISCARDS,
    "BUG_NO_PRIMARY_FLUSH": ONE_EXTENT,
    "BUG_NO_SECONDARY_FLUSH": ONE_EXTENT,
    "BUG_CLEAR_BEFORE_MOVE": ONE_EXTENT,
    "BUG_UNRECORDED_DIRECT": ONE_EXTENT,
    "BUG_WRONG_ERA": ONE_EXTENT,
    "BUG_DATA_BEFORE_RECORD": ONE_EXTENT,
    "BUG_NO_GATE_BARRIER": ONE_EXTENT,
    "BUG_COUNTERS_READ_LATE": ONE_EXTENT,
    "BUG_COUNTERS_OF_ONE_BARRIER": ONE_EXTENT,
    "BUG_COUNTERS_AFTER_FAILURE": ONE_EXTENT,
    "BUG_FORGETS_MAYBE": ONE_EXTENT,
    "BUG_ADOPTED_NOT_TAKEN": RESTART,
    "BUG_TWO_HELPERS": RESTART,
    "BUG_RESTART_FORGETS_TABLE": RESTART,
    "BUG_RESTART_COPIES_NOTHING": RESTART,
}


def errors(folder: Path, scope: tuple[int, int, int, int], *defines: str) -> int:
    """How many errors an exhaustive search finds; it ends at the first one."""
    names = ("EXTENTS", "KILLS", "FAILURES", "WRITES")
    bounds = [f"{name}={value}" for name, value in zip(names, scope, strict=True)]
    early = any(name.startswith("BUG_") for name in defines)
    return spin.errors(folder, SUPERSET.name, [*bounds, *defines], ends_early=early)


@pytest.mark.parametrize("scope", HOLDS)
def test_the_model_holds(tmp_path: Path, scope: tuple[int, int, int, int]) -> None:
    assert errors(tmp_path, scope) == 0


@pytest.mark.parametrize("scope", [ONE_EXTENT, DISCARDS])
def test_it_holds_where_the_kernel_counts_requests_at_their_end(
    tmp_path: Path, scope: tuple[int, int, int, int]
) -> None:
    assert errors(tmp_path, scope, "COUNTED_AT_END") == 0


@pytest.mark.skipif(not spin.FULL, reason="MODEL_FULL is not set: takes minutes")
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("scope", FULL)
def test_the_model_holds_at_large(tmp_path: Path, scope: tuple[int, int, int, int]) -> None:
    assert errors(tmp_path, scope) == 0


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_gives_a_counterexample(tmp_path: Path, mistake: str) -> None:
    assert errors(tmp_path, MISTAKES[mistake], mistake) == 1


def test_every_seeded_mistake_is_tried() -> None:
    assert set(re.findall(r"\bBUG_[A-Z_]+[A-Z]", SUPERSET.read_text())) == set(MISTAKES)


@pytest.mark.parametrize("scope", [ONE_EXTENT, DISCARDS])
def test_the_good_end_is_reached(tmp_path: Path, scope: tuple[int, int, int, int]) -> None:
    """Else the model could hold because nothing ever happens in it."""
    assert errors(tmp_path, scope, "WITNESS") == 1
