"""Two appliances in a simulated world (`tests/support/simpair`), at random.

docs/partner-protocol.md names the rules that hold after every step.

`PAIR_STEPS` is the number of steps of each kind of trouble.
"""

from __future__ import annotations

import os

import pytest

from tests.support.simpair import walk

STEPS = int(os.environ.get("PAIR_STEPS", "24000"))
LENGTHS = (60, 400, 1500)  # of one walk

TROUBLES = {
    "nothing": (),
    "cuts": ("cut",),
    "hand-overs": ("cut", "hand-over"),
    "crashes": ("crash",),
    "takeovers": ("cut", "takeover"),
    "fencing": ("cut", "crash", "takeover"),
    "stops": ("cut", "stop"),
    "planned": ("cut", "take"),
    "errors": ("cut", "errors", "hand-over"),
    "records": ("cut", "records", "crash", "takeover"),
    "growth": ("cut", "resize", "crash"),
    "lies": ("lie", "hand-over"),
    "everything": (
        *("cut", "crash", "takeover", "hand-over", "stop", "take", "errors", "records", "resize"),
    ),
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("troubles", TROUBLES)
def test_the_rules_hold_whatever_happens(troubles: str, length: int) -> None:
    for seed in range(max(1, STEPS // len(LENGTHS) // length)):
        walk(seed, frozenset(TROUBLES[troubles]), length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("troubles", sorted(TROUBLES.keys() - {"lies", "hand-overs"}))
def test_they_hold_for_a_keeper_and_its_host_whose_record_is_lost_again_and_again(
    troubles: str, length: int
) -> None:
    for seed in range(max(1, STEPS // len(LENGTHS) // length // 3)):
        walk(seed, frozenset(TROUBLES[troubles]), length, kept=True)


@pytest.mark.parametrize(
    ("seed", "troubles", "length"),
    [
        # The first exchange, while the record of node 1 cannot be written: node 2 has the flag.
        pytest.param(7000282, "errors", 60, id="only-one-can-say-VOLATILE"),
        pytest.param(7000284, "errors", 1500, id="the-other-says-it-of-what-is-on-its-way"),
        # One has READY and may go on in a cut, before the other has come up with it.
        pytest.param(7000634, "cuts", 400, id="gone-on-before-the-other-is-up"),
    ],
)
def test_walks_that_have_shown_something(seed: int, troubles: str, length: int) -> None:
    walk(seed, frozenset(TROUBLES[troubles]), length)
