"""record/nearby: which extents a miss makes likely, and how they are told apart."""

from __future__ import annotations

from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.predict.nearby import (
    ALONE,
    BACKWARDS,
    FORWARDS,
    KINDS,
    OTHER_SIDE,
    REACH,
    REACH_BITS,
    RECENT_S,
    STEP_BITS,
    STEPS,
    THIS_SIDE,
    Nearby,
    kind_in_space,
    kind_in_time,
)
from bitmapd.predict.trail import Trail

EXTENTS = 1000
EVERYTHING = [1.0] * KINDS


def nearby(extents: int = EXTENTS) -> Nearby:
    return Nearby(extents, Trail(200))


def groups(
    found: Nearby,
    low: int,
    high: int,
    *,
    place: int | None = None,
    now_s: float = 0.0,
    recorded: bitarray | None = None,
) -> dict[int, list[int]]:
    """By kind."""
    bits = bitarray(len(found.ever)) if recorded is None else recorded
    listed = list(found.groups(low, high, place, now_s, bits, EVERYTHING, 1.0))
    assert len({kind for kind, _ in listed}) == len(listed)
    return dict(listed)


def test_kinds_are_numbered_without_gaps() -> None:
    numbers = [
        kind_in_space(direction, bits, ever, side)
        for direction in (FORWARDS, BACKWARDS)
        for bits in range(REACH_BITS)
        for ever in (0, 1)
        for side in (ALONE, OTHER_SIDE, THIS_SIDE)
    ] + [
        kind_in_time(direction, bits, repeats)
        for direction in (FORWARDS, BACKWARDS)
        for bits in range(STEP_BITS)
        for repeats in (0, 1)
    ]
    assert sorted(numbers) == list(range(KINDS))


def test_both_sides_by_distance() -> None:
    found = groups(nearby(), 500, 502)
    assert found[kind_in_space(FORWARDS, 0, 0, ALONE)] == [502]
    assert found[kind_in_space(FORWARDS, 1, 0, ALONE)] == [503, 504]
    assert found[kind_in_space(FORWARDS, 2, 0, ALONE)] == [505, 506, 507, 508]
    assert found[kind_in_space(BACKWARDS, 0, 0, ALONE)] == [499]
    assert found[kind_in_space(BACKWARDS, 1, 0, ALONE)] == [498, 497]
    everything = {extent for extents in found.values() for extent in extents}
    assert everything == {*range(500 - REACH, 500), *range(502, 502 + REACH)}


def test_candidates_lie_inside_the_volume() -> None:
    everything = {e for extents in groups(nearby(10), 0, 9).values() for e in extents}
    assert everything == {9}
    assert groups(nearby(10), 0, 10) == {}


def test_what_was_ever_written_is_told_apart() -> None:
    found = nearby()
    found.used(504)
    kinds = groups(found, 500, 502)
    assert kinds[kind_in_space(FORWARDS, 1, 1, ALONE)] == [504]
    assert kinds[kind_in_space(FORWARDS, 1, 0, ALONE)] == [503]


def test_what_is_recorded_is_no_candidate() -> None:
    recorded = bitarray(EXTENTS)
    recorded[502] = recorded[503] = True
    found = groups(nearby(), 500, 502, recorded=recorded)
    assert kind_in_space(FORWARDS, 0, 0, ALONE) not in found
    assert found[kind_in_space(FORWARDS, 1, 0, ALONE)] == [504]


def test_activity_nearby_changes_the_kind() -> None:
    found = nearby()
    found.active(495, 0.0)
    kinds = groups(found, 500, 501, now_s=RECENT_S)
    assert kinds[kind_in_space(FORWARDS, 0, 0, THIS_SIDE)] == [501]  # a stream from below
    assert kinds[kind_in_space(BACKWARDS, 0, 0, OTHER_SIDE)] == [499]
    found.active(505, 0.0)
    kinds = groups(found, 500, 501)
    assert kinds[kind_in_space(FORWARDS, 0, 0, THIS_SIDE)] == [501]
    assert kinds[kind_in_space(BACKWARDS, 0, 0, THIS_SIDE)] == [499]


def test_activity_that_is_old_or_far_away_does_not() -> None:
    found = nearby()
    found.active(495, 0.0)
    found.active(500 - REACH - 1, 10.0)
    found.active(501 + REACH, 10.0)
    found.active(500, 10.0)
    kinds = groups(found, 500, 501, now_s=RECENT_S + 0.1)
    assert kinds[kind_in_space(FORWARDS, 0, 0, ALONE)] == [501]


def test_what_was_used_at_the_same_time() -> None:
    found = nearby()
    for extent in (10, 700, 20, 800, 30, 900):
        found.used(extent)
    kinds = groups(found, 20, 21, place=2)
    assert kinds[kind_in_time(FORWARDS, 0, 0)] == [800]
    assert kinds[kind_in_time(FORWARDS, 1, 0)] == [30, 900]
    assert kinds[kind_in_time(BACKWARDS, 0, 0)] == [700]
    assert kinds[kind_in_time(BACKWARDS, 1, 0)] == [10]


def test_a_second_miss_from_the_same_part_of_the_trail_is_a_repetition() -> None:
    found = nearby()
    for extent in range(0, 1000, 10):
        found.used(extent)
    groups(found, 100, 101, place=10)
    kinds = groups(found, 300, 301, place=10 + STEPS, now_s=RECENT_S)
    assert kinds[kind_in_time(FORWARDS, 0, 1)] == [10 * (11 + STEPS)]
    kinds = groups(found, 300, 301, place=80, now_s=2 * RECENT_S + 0.1)
    assert kind_in_time(FORWARDS, 0, 1) not in kinds


def test_recorded_extents_of_the_trail_are_no_candidates() -> None:
    found = nearby()
    for extent in (700, 20, 800):
        found.used(extent)
    recorded = bitarray(EXTENTS)
    recorded[700] = recorded[800] = True
    kinds = groups(found, 20, 21, place=1, recorded=recorded)
    assert all(kind < kind_in_time(FORWARDS, 0, 0) for kind in kinds)


def test_kinds_with_bad_odds_are_left_out() -> None:
    found = nearby()
    for extent in (10, 700, 20, 800, 503):
        found.used(extent)
    wanted = {
        kind_in_space(FORWARDS, 1, 1, ALONE),
        kind_in_space(BACKWARDS, 2, 0, ALONE),
        kind_in_time(BACKWARDS, 0, 0),
    }
    odds = [0.5 if kind in wanted else 0.25 for kind in range(KINDS)]
    listed = dict(found.groups(500, 502, 2, 0.0, bitarray(EXTENTS), odds, 0.5))
    assert set(listed) == wanted
    assert listed[kind_in_space(FORWARDS, 1, 1, ALONE)] == [503]
    assert list(found.groups(500, 502, 2, 0.0, bitarray(EXTENTS), odds, 0.6)) == []


def test_memory_is_restored() -> None:
    found = nearby()
    found.used(5)
    ever = bitarray(EXTENTS)
    ever[6] = True
    found.restore((9, 6), ever)
    assert found.trail.latest(10) == [5, 9, 6]
    assert [e for e in range(20) if found.ever[e]] == [5, 6]


def test_memory_of_a_smaller_volume_is_restored() -> None:
    found = nearby()
    found.restore((6,), bitarray("0000001"))
    assert len(found.ever) == EXTENTS
    assert [e for e in range(20) if found.ever[e]] == [6]


def one_by_one(
    found: Nearby, low: int, high: int, recorded: bitarray, odds: list[float], floor: float
) -> list[tuple[int, list[int]]]:
    """Candidates in space as the module's text has them, each extent looked at by itself."""
    active = [extent for extent, _ in found._recent]
    below = any(low - REACH <= extent < low for extent in active)
    above = any(high <= extent < high + REACH for extent in active)
    elsewhere = OTHER_SIDE if below or above else ALONE
    sides = (
        (FORWARDS, THIS_SIDE if below else elsewhere),
        (BACKWARDS, THIS_SIDE if above else elsewhere),
    )
    listed: list[tuple[int, list[int]]] = []
    for bits in range(REACH_BITS):
        for direction, side in sides:
            for ever in (1, 0):
                kind = kind_in_space(direction, bits, ever, side)
                near = [
                    extent
                    for distance in range(1 << bits, 2 << bits)
                    for extent in [high - 1 + distance if direction == FORWARDS else low - distance]
                    if 0 <= extent < len(recorded)
                    and not recorded[extent]
                    and found.ever[extent] == ever
                ]
                if near and odds[kind] >= floor:
                    listed.append((kind, near))
    return listed


@given(
    st.lists(st.integers(0, 149), max_size=120),
    st.lists(st.integers(0, 149), max_size=6),
    st.integers(0, 149),
    st.integers(1, 5),
    st.lists(st.booleans(), min_size=150, max_size=150),
    st.lists(st.sampled_from((0.1, 0.9)), min_size=KINDS, max_size=KINDS),
)
def test_what_is_found_at_one_look_is_what_looking_one_by_one_finds(
    written: list[int],
    active: list[int],
    low: int,
    size: int,
    held: list[bool],
    odds: list[float],
) -> None:
    found = nearby(150)
    for extent in written:
        found.used(extent)
    for extent in active:
        found.active(extent, 0.0)
    high, recorded = min(low + size, 150), bitarray(held)
    for floor in (0.0, 0.5):
        expected = one_by_one(found, low, high, recorded, odds, floor)
        assert list(found.groups(low, high, None, 0.0, recorded, odds, floor)) == expected


@given(
    st.lists(st.integers(0, 99), max_size=80),
    st.integers(0, 99),
    st.integers(1, 5),
    st.lists(st.booleans(), min_size=100, max_size=100),
)
def test_candidates_are_sound(history: list[int], low: int, size: int, held: list[bool]) -> None:
    found = nearby(100)
    for extent in history:
        found.used(extent)
        found.active(extent, 0.0)
    high = min(low + size, 100)
    recorded = bitarray(held)
    place = found.trail.place(low)
    for kind, extents in found.groups(low, high, place, 0.0, recorded, EVERYTHING, 1.0):
        assert 0 <= kind < KINDS
        assert extents
        assert len(set(extents)) == len(extents)
        assert all(0 <= extent < 100 and not recorded[extent] for extent in extents)
        if kind < kind_in_time(FORWARDS, 0, 0):
            assert not set(range(low, high)) & set(extents)
