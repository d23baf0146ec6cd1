"""The Spin models of consistent points hold; seeded mistakes give counterexamples.

`points.pml` is the protocol of a volume and its receiver, with promote and failback; `group.pml`
the cut of several volumes at one instant, and `apart.pml` what their receivers hold when one lacks
what another has; `still.pml` the cut by device-mapper.  MODEL_FULL=1 adds
the larger searches (minutes, and up to 3 GB of memory).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import spin

pytestmark = pytest.mark.skipif(spin.IS_MISSING, reason=spin.MISSING)

Search = tuple[str, str]  # a model, and its definitions: NAME or NAME=NUMBER, parted by blanks


def points(*defines: str) -> Search:
    return "points.pml", " ".join(defines)


GROUP, STILL, APART = ("group.pml", ""), ("still.pml", ""), ("apart.pml", "")
USUAL = points()
AHEAD = points("AHEAD=1", "CRASHES=0")

HOLDS = [
    points("POINTS=1", "WRITES=1"),
    points("CRASHES=0", "FALLS=0", "POINTS=3"),
    points("FALLS=0", "LINKS=0", "CRASHES=2", "WRITES=1"),
    points("CRASHES=0", "LINKS=0", "FALLS=2", "WRITES=1"),
    points("CRASHES=0", "FALLS=0", "LINKS=2", "AHEAD=1"),
    GROUP,
    APART,
    STILL,
]
FULL = [USUAL, points("AHEAD=1", "FALLS=0"), points("AHEAD=1", "CRASHES=0"), points("POINTS=3")]
MISTAKES = {
    "BUG_AHEAD_OVERTAKEN": [AHEAD],
    "BUG_APPLIED_EARLY": [USUAL],
    "BUG_BLOCKS_NOT_STAMPS": [AHEAD],
    "BUG_CLEAR_AT_SENT": [USUAL],
    "BUG_CLEAR_WHILE_DIRTY": [USUAL],
    "BUG_COMMIT_BEFORE_FLUSH": [USUAL],
    "BUG_END_UNCHECKED": [points("BUG_HAVE_IGNORED")],  # either check is enough by itself
    "BUG_FAILBACK_ONE_RECORD": [USUAL],
    "BUG_HAVE_IGNORED": [points("BUG_END_UNCHECKED")],
    "BUG_HELLO_WHILE_COMMITTING": [USUAL],
    "BUG_NO_CBW": [USUAL, STILL],
    "BUG_NO_PRIMARY_FLUSH": [USUAL],
    "BUG_OLD_WITHOUT_LIST": [USUAL],
    "BUG_RESUME_OTHER": [USUAL],
    "BUG_TOLD_EARLY": [USUAL],
    "BUG_NOT_WITHHELD": [GROUP],
    "BUG_RELEASED_EARLY": [GROUP],
    "BUG_TIMER_KEEPS_THE_CUT": [GROUP],
    "BUG_ALL_AT_ONCE": [APART],
    "BUG_WAITS": [APART],
    "BUG_DIRECT": [STILL],
    "BUG_LATER_PENDING": [STILL],
    "BUG_ONE_BARRIER": [STILL],
    "BUG_PENDING_DIRECT": [STILL],
    "BUG_GROW_PENDING": [STILL],
}
# Else a model could hold because nothing ever happens in it.
WITNESSES = {
    "WITNESS_BACK": [USUAL],
    "WITNESS_RESUMED": [USUAL],
    "WITNESS_TWO_POINTS": [USUAL],
    "WITNESS_CUT": [GROUP],
    "WITNESS_LAST": [APART],
    "WITNESS_POINTS": [STILL],
}
FOUND = spin.searches(MISTAKES | WITNESSES)


def errors(folder: Path, search: Search, *defines: str) -> int:
    """How many errors an exhaustive search finds; it ends at the first one."""
    model, scope = search
    return spin.errors(
        folder, model, [*scope.split(), *defines], ends_early=bool(defines), collapse=True
    )


@pytest.mark.parametrize("search", HOLDS, ids=" ".join)
def test_the_models_hold(tmp_path: Path, search: Search) -> None:
    assert errors(tmp_path, search) == 0


@pytest.mark.skipif(not spin.FULL, reason="MODEL_FULL is not set: takes minutes")
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("search", FULL, ids=" ".join)
def test_the_models_hold_at_large(tmp_path: Path, search: Search) -> None:
    assert errors(tmp_path, search) == 0


@pytest.mark.parametrize(("search", "name"), FOUND, ids="".join)
def test_a_mistake_or_a_good_end_is_found(tmp_path: Path, search: Search, name: str) -> None:
    assert errors(tmp_path, search, name) == 1


@pytest.mark.parametrize("model", ["points.pml", "group.pml", "still.pml"])
def test_every_mistake_and_good_end_is_tried(model: str) -> None:
    assert spin.mistakes_and_ends(model) == {name for search, name in FOUND if search[0] == model}
