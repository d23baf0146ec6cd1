"""copier/holding: whatever comes, growth holds writes for a part of the time only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitmapd.copier.holding import HELD_SHARE, SAVED_S, Holding

steps = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 0.2), st.floats(0, 0.3)))


@given(steps)
def test_growth_begins_only_while_time_has_brought_what_it_is_expected_to_take(
    steps: list[tuple[float, float, float]],
) -> None:
    """`steps`: time that passes, what barriers hold meanwhile, what a growth holds if it may."""
    holding, now_s, held_s, expected_s = Holding(0.0), 0.0, 0.0, 0.0
    for passes_s, barriers_s, growth_s in steps:
        now_s += passes_s
        held_s += barriers_s
        if not holding.wait_s(now_s, held_s, expected_s):
            wanted_s = min(expected_s, SAVED_S)
            assert held_s + wanted_s <= HELD_SHARE * now_s + SAVED_S + 1e-5
            held_s += growth_s
            expected_s = growth_s


@given(steps, st.floats(0, 10))
def test_who_waits_as_long_as_it_takes_may_grow_then(
    steps: list[tuple[float, float, float]], expected_s: float
) -> None:
    holding, now_s, held_s = Holding(0.0), 0.0, 0.0
    for passes_s, barriers_s, _ in steps:
        now_s += passes_s
        held_s += barriers_s
        holding.wait_s(now_s, held_s, expected_s)
    now_s += holding.wait_s(now_s, held_s, expected_s)
    assert holding.wait_s(now_s, held_s, expected_s) == 0


def test_the_first_ones_do_not_wait_and_nothing_more_is_saved_in_a_quiet_time() -> None:
    holding = Holding(0.0)
    assert holding.wait_s(0.0, 0.0, SAVED_S) == 0
    assert holding.wait_s(1e6, SAVED_S, SAVED_S) > 0, "it was used after all this time"
    assert holding.wait_s(1e6, SAVED_S, 10 * SAVED_S) == holding.wait_s(1e6, SAVED_S, SAVED_S)


def test_a_path_whose_counters_begin_anew_pays_nothing_back() -> None:
    holding = Holding(0.0)
    holding.wait_s(0.0, 1.0, 0.0)
    before = holding.wait_s(0.0, 1.0, 0.0)
    assert holding.wait_s(0.0, 0.0, 0.0) == before
