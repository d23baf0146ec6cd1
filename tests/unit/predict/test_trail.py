"""record/trail: the order in which extents came into use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitmapd.predict.trail import Trail


def test_an_extent_counts_where_it_stands_last() -> None:
    trail = Trail(10)
    for extent in (5, 6, 5, 7):
        trail.put(extent)
    assert trail.place(5) == 2
    assert trail.place(8) is None
    assert trail.between(0, 4) == [6, 5, 7]
    assert trail.between(2, 3) == [5]
    assert len(trail) == 3


def test_the_oldest_places_are_overwritten() -> None:
    trail = Trail(3)
    for extent in (1, 2, 3, 4):
        trail.put(extent)
    assert trail.place(1) is None
    assert trail.between(-5, 100) == [2, 3, 4]
    trail.put(3)
    assert trail.latest(10) == [4, 3]
    assert trail.latest(1) == [3]
    assert trail.latest(0) == []


def test_a_trail_is_restored_in_order() -> None:
    trail = Trail(8)
    trail.restore([4, 9, 2])
    assert trail.latest(8) == [4, 9, 2]


@given(st.integers(1, 6), st.lists(st.integers(0, 8), max_size=40))
def test_it_is_the_end_of_the_history(capacity: int, history: list[int]) -> None:
    trail = Trail(capacity)
    for extent in history:
        trail.put(extent)
    kept = list(enumerate(history))[-capacity:]
    last = {extent: place for place, extent in kept}
    assert {
        extent: trail.place(extent) for extent in range(9) if trail.place(extent) is not None
    } == last
    assert trail.between(0, len(history)) == [e for place, e in kept if last[e] == place]
    assert len(trail) == len(last)
