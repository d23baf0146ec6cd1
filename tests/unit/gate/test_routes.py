"""attach/routes: which extents are direct, what is open, and when a table is worth loading."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.gate.routes import (
    DIRECT,
    EMPTY,
    GATE,
    GROWTH_HITS,
    MAX_SEGMENTS,
    URGENT_HITS,
    Routes,
    Run,
    Table,
)

EXTENT = 1 << 20


def direct(*runs: Run, max_segments: int = MAX_SEGMENTS) -> Routes:
    """Routes with a table in force that has these extents."""
    routes = Routes(max_segments=max_segments)
    for first, stop in runs:
        routes.gated_hit(first, stop)
    assert routes.propose(runs) is not None
    routes.landed(())
    routes.landed(())
    return routes


def members(table: Table) -> set[int]:
    return {extent for run in table.extents().runs() for extent in range(*run)}


def is_open(routes: Routes, extents: int = 16) -> list[int]:
    return [extent for extent in range(extents) if routes.is_open(extent)]


# -- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "size", "segments"),
    [
        ((), 10, [(0, 10, GATE)]),
        (((0, 3),), 3 * 4, [(0, 12, DIRECT)]),
        (((0, 3),), 10, [(0, 10, DIRECT)]),
        (((1, 2),), 10, [(0, 4, GATE), (4, 8, DIRECT), (8, 10, GATE)]),
        (((0, 1), (2, 3)), 10, [(0, 4, DIRECT), (4, 8, GATE), (8, 10, DIRECT)]),
        (((0, 1), (1, 2)), 8, [(0, 4, DIRECT), (4, 8, DIRECT)]),
    ],
)
def test_segments_cover_the_volume(
    runs: tuple[Run, ...], size: int, segments: list[tuple[int, int, str]]
) -> None:
    assert Table(runs).segments(4, size) == segments


@given(st.sets(st.integers(0, 30)), st.integers(31 * 4 - 3, 31 * 4))
def test_segments_say_what_the_table_says(extents: set[int], size: int) -> None:
    table = Table(tuple((extent, extent + 1) for extent in sorted(extents)))
    assert members(table) == extents
    end = 0
    for first, stop, kind in table.segments(4, size):
        assert first == end < stop
        end = stop
        touched = set(range(first // 4, -(-stop // 4)))
        assert touched <= extents if kind == DIRECT else touched.isdisjoint(extents)
    assert end == size


# -- when a table is loaded -------------------------------------------------------------------


def test_nothing_is_loaded_for_nothing() -> None:
    routes = Routes()
    assert not routes.wants_change
    assert not routes.settling
    assert routes.propose([(0, 5)]) is None
    routes.landed([(1, 3)])
    assert (routes.loads, routes.moved, routes.count_direct) == (0, 0, 0)


def test_a_recorded_extent_that_the_gate_is_asked_for_becomes_direct_with_all_others() -> None:
    routes = Routes()
    routes.gated_hit(2, 4)
    assert routes.wants_change
    assert routes.propose([(0, 5), (9, 10)]) == Table(((0, 5), (9, 10)))
    assert is_open(routes) == [0, 1, 2, 3, 4, 9], "from the moment it is asked for"
    routes.landed([(2, 3)])
    assert is_open(routes) == [0, 1, 2, 3, 4, 9]
    assert (routes.loads, routes.moved, routes.count_direct) == (1, 6, 6)
    routes.gated_hit(2, 4)
    assert not routes.wants_change, "it was on its way to the gate before the table was loaded"


def test_what_has_left_the_record_is_no_reason_for_a_table() -> None:
    routes = Routes()
    routes.gated_hit(2, 4)
    routes.cool([2])
    routes.gone(iter([2, 3]))
    assert not routes.wants_change
    assert not routes.is_cooling(2)


def test_it_is_urgent_after_many_writes_that_could_have_been_direct() -> None:
    routes = Routes()
    for _ in range(URGENT_HITS - 1):
        routes.gated_hit(0, 1)
    assert not routes.urgent
    routes.gated_hit(0, 1)
    assert routes.urgent
    routes.cool([0])
    assert not routes.urgent, "it has to stay with the gate"
    routes.warm([0])
    assert routes.urgent
    routes.propose([(0, 1)])
    routes.landed(())
    assert not routes.urgent
    for _ in range(URGENT_HITS):
        routes.gated_hit(0, 1)
    assert not routes.urgent, "it is direct"


# -- cooling ----------------------------------------------------------------------------------


def test_a_cooled_extent_is_closed_after_the_barrier_that_follows_its_move() -> None:
    routes = direct((0, 4))
    routes.cool([1, 3])
    assert routes.is_cooling(1)
    assert routes.closed() == []
    assert routes.wants_change
    assert routes.propose([(0, 4)]) == Table(((0, 1), (2, 3)))
    assert routes.closed() == []
    routes.landed(())
    assert is_open(routes) == [0, 1, 2, 3], "what was written before the move is not known yet"
    assert routes.settling
    assert routes.propose([(0, 4)]) is None
    routes.landed([(1, 2)])
    assert is_open(routes) == [0, 2]
    assert sorted(routes.closed()) == [1, 3]
    assert not routes.settling
    routes.gone([1])
    assert routes.closed() == [3]


def test_cooling_what_is_not_direct_loads_nothing() -> None:
    routes = direct((0, 2))
    routes.cool([5])
    assert routes.closed() == [5]
    assert not routes.wants_change


def test_a_cooling_extent_that_is_written_stays_with_the_gate_until_it_is_wanted() -> None:
    routes = direct((0, 2))
    routes.cool([1])
    routes.propose([(0, 2)])
    routes.landed(())
    routes.gated_hit(1, 2)
    assert not routes.wants_change
    routes.warm([1])
    assert routes.wants_change
    assert routes.propose([(0, 2)]) == Table(((0, 2),))


# -- growth without a barrier -----------------------------------------------------------------


def grows(*runs: Run, max_segments: int = MAX_SEGMENTS) -> Routes:
    """With a table in force, and hits enough at the extent behind all of it."""
    routes = direct(*runs, max_segments=max_segments)
    assert not routes.can_grow
    for _ in range(GROWTH_HITS):
        routes.gated_hit(8, 9)
    assert routes.can_grow
    return routes


def test_a_table_grows_by_what_is_recorded_and_loses_nothing() -> None:
    routes = grows((0, 2))
    table = routes.grow([(1, 3), (8, 9)])
    assert table == Table(((0, 3), (8, 9))), "extent 0 needs a barrier to leave"
    assert is_open(routes) == [0, 1, 2, 8], "from the moment it is asked for"
    assert not routes.can_grow, "one is under way"
    routes.grew()
    assert (routes.loads, routes.moved, routes.count_direct) == (2, 4, 4)
    assert is_open(routes) == [0, 1, 2, 8]
    assert not routes.can_grow
    assert not routes.wants_change


def test_what_is_leaving_stays_open_while_the_table_grows() -> None:
    routes = direct((0, 2))
    routes.cool([1])
    routes.propose([(0, 2)])
    routes.landed(())
    for _ in range(GROWTH_HITS):
        routes.gated_hit(8, 9)
    assert routes.grow([(0, 2), (8, 9)]) == Table(((0, 1), (8, 9))), "extent 1 cools"
    routes.grew()
    assert is_open(routes) == [0, 1, 8], "what was written to 1 last comes with the next barrier"
    routes.propose([(0, 2), (8, 9)])
    routes.landed(())
    assert is_open(routes) == [0, 8]


def test_what_the_gate_was_asked_for_while_it_cools_is_known_after_growth() -> None:
    routes = grows((0, 1))
    routes.cool([5])
    routes.gated_hit(5, 6)
    routes.grow([(0, 1), (8, 9)])
    routes.grew()
    assert routes.missed() == [5]


@pytest.mark.parametrize("what", ["sealed", "gating", "adopted", "failed"])
def test_nothing_grows_when_something_has_to_leave_or_the_table_is_not_known(what: str) -> None:
    routes = grows((0, 1))
    if what == "sealed":
        routes.seal()
    elif what == "gating":
        routes.gate_all()
    elif what == "adopted":
        routes.adopt([(3, 4)])
    else:
        routes.grow([(0, 1), (8, 9)])
        routes.failed()
        assert is_open(routes) == [0, 8], "the new table may be in force"
    assert not routes.can_grow


def test_a_seal_while_the_table_grows_is_for_the_next_barrier() -> None:
    routes = grows((0, 1))
    routes.grow([(0, 1), (8, 9)])
    routes.seal()
    routes.grew()
    assert routes.settling
    assert routes.propose([(0, 1), (8, 9)]) == EMPTY
    routes.landed(())
    assert is_open(routes) == []


def test_a_table_without_room_waits_for_a_barrier_to_choose() -> None:
    routes = grows((0, 1), max_segments=3)
    assert routes.grow([(0, 1), (8, 9)]) is None
    assert not routes.can_grow
    assert is_open(routes) == [0]
    for _ in range(URGENT_HITS):
        routes.gated_hit(8, 9)
    assert routes.urgent


def test_nothing_grew_that_was_not_asked_for() -> None:
    with pytest.raises(RuntimeError, match="no table"):
        Routes().grew()


# -- failures ---------------------------------------------------------------------------------


def test_after_a_failure_both_tables_are_open_until_one_is_known_to_be_in_force() -> None:
    routes = direct((0, 4))
    routes.cool([0])
    routes.gated_hit(8, 9)
    routes.propose([(0, 4), (8, 9)])
    routes.failed()
    assert is_open(routes) == [0, 1, 2, 3, 8]
    routes.cool([8])
    assert routes.wants_change, "a table is loaded whatever it says"
    assert routes.propose([(0, 4), (8, 9)]) == Table(((1, 4),))
    routes.landed(())
    assert is_open(routes) == [0, 1, 2, 3, 8], "the last two are leaving"
    routes.landed(())
    assert is_open(routes) == [1, 2, 3]
    assert not routes.wants_change


def test_a_failure_without_a_table_changes_nothing() -> None:
    routes = direct((0, 2))
    assert routes.propose([(0, 2)]) is None
    routes.failed()
    assert not routes.wants_change
    assert is_open(routes) == [0, 1]


def test_what_is_leaving_stays_open_over_a_failure() -> None:
    routes = direct((0, 2))
    routes.cool([0])
    routes.propose([(0, 2)])
    routes.landed(())
    routes.propose([(0, 2)])
    routes.failed()
    assert is_open(routes) == [0, 1]
    assert routes.settling


# -- a table of an earlier process ------------------------------------------------------------


def test_what_was_direct_before_is_open_until_a_table_of_ones_own_is_loaded() -> None:
    routes = Routes()
    routes.adopt([(3, 5)])
    assert is_open(routes) == [3, 4]
    assert routes.wants_change
    assert routes.propose([(4, 6)]) == Table(((4, 6),))
    routes.landed(())
    assert is_open(routes) == [3, 4, 5]
    routes.landed(())
    assert is_open(routes) == [4, 5]
    assert routes.take_adopted() == [(3, 5)]
    assert routes.take_adopted() == []


# -- the end ----------------------------------------------------------------------------------


def test_sealed_the_next_barrier_closes_everything() -> None:
    routes = direct((0, 2))
    routes.cool([0])
    routes.seal()
    assert routes.settling
    assert routes.propose([(0, 2)]) == EMPTY, "the record is going to lose all of it"
    assert is_open(routes) == [0, 1]
    routes.landed([(0, 2)])
    assert is_open(routes) == []
    assert routes.closed() == [0]
    assert not routes.settling
    assert not routes.wants_change


def test_a_barrier_that_began_before_the_seal_is_not_the_last_one() -> None:
    """What was written after its snapshot is not among its blocks."""
    routes = direct((0, 2))
    routes.cool([0])
    routes.propose([(0, 2)])
    routes.seal()
    routes.landed(())
    assert is_open(routes) == [0, 1]
    assert routes.propose([(0, 2)]) == EMPTY
    routes.failed()
    assert is_open(routes) == [0, 1]
    assert routes.propose([(0, 2)]) == EMPTY
    routes.landed(())
    assert is_open(routes) == []


def test_sealed_with_nothing_direct_the_last_blocks_are_still_awaited() -> None:
    routes = direct((0, 1))
    routes.cool([0])
    routes.propose([(0, 1)])
    routes.landed(())
    routes.seal()
    assert routes.settling
    assert routes.propose([(0, 1)]) is None
    routes.landed(())
    assert is_open(routes) == []


def test_unsealed_the_table_follows_the_record_again() -> None:
    """Hosts are let in again: what a barrier brings is not the last of it any more."""
    routes = direct((0, 2))
    routes.seal()
    routes.propose([(0, 2)])
    routes.landed([(0, 2)])
    routes.unseal()
    assert routes.wants_change
    table = routes.propose([(0, 2)])
    assert table is not None
    assert list(table.extents().runs()) == [(0, 2)]
    routes.landed(())
    routes.cool([0])
    routes.propose([(0, 2)])
    routes.landed(())
    assert is_open(routes) == [0, 1], "one that was moved is open until the next barrier"


# -- everything through the gate, while hosts go on --------------------------------------------


def test_all_is_moved_to_the_gate_and_stays_open_for_another_barrier() -> None:
    routes = direct((0, 2))
    routes.gate_all()
    assert routes.wants_change
    assert not routes.all_gated
    assert routes.propose([(0, 2)]) == EMPTY
    assert not routes.all_gated, "the old table may still be in force"
    routes.landed([(0, 1)])
    assert routes.all_gated
    assert is_open(routes) == [0, 1]
    routes.gated_hit(0, 2)
    assert not routes.wants_change
    assert routes.propose([(0, 2)]) is None
    routes.landed(())
    assert is_open(routes) == []


def test_a_table_that_may_be_in_force_is_replaced_before_all_counts_as_gated() -> None:
    routes = direct((0, 1))
    routes.gate_all()
    routes.propose([(0, 1)])
    routes.failed()
    assert not routes.all_gated
    assert routes.propose([(0, 1)]) == EMPTY
    routes.landed(())
    assert routes.all_gated


def test_when_it_is_given_up_the_record_is_direct_again() -> None:
    routes = direct((0, 2))
    routes.gate_all()
    routes.propose([(0, 2)])
    routes.landed(())
    routes.gate_all(wanted=False)
    assert routes.propose([(0, 2)]) == Table(((0, 2),))
    routes.landed(())
    assert not routes.all_gated


def test_it_comes_back_without_a_barrier_once_hosts_write_it() -> None:
    routes = direct((0, 2))
    routes.gate_all()
    routes.propose([(0, 2)])
    routes.landed(())
    routes.gate_all(wanted=False)
    for _ in range(GROWTH_HITS):
        routes.gated_hit(0, 1)
    assert routes.wants_change
    assert routes.can_grow
    assert routes.grow([(0, 2)]) == Table(((0, 2),))
    routes.grew()
    assert not routes.all_gated
    assert not routes.wants_change, "a barrier has nothing to do for it"


# -- the number of segments -------------------------------------------------------------------


def test_when_runs_do_not_fit_those_written_lately_stay_and_then_the_longest() -> None:
    runs = [(0, 1), (2, 4), (5, 9), (10, 11), (12, 15)]
    routes = Routes(max_segments=7)
    routes.gated_hit(10, 11)
    assert routes.propose(runs) == Table(((5, 9), (10, 11), (12, 15)))
    routes.landed([(0, 1)])
    for _ in range(URGENT_HITS - 1):
        routes.gated_hit(2, 3)
    assert routes.propose(runs) is None, "few writes do not push out others"
    routes.gated_hit(2, 3)
    assert routes.propose(runs) == Table(((0, 1), (2, 4), (5, 9)))


def test_a_long_run_that_was_written_anywhere_stays() -> None:
    routes = Routes(max_segments=3)
    routes.gated_hit(3000, 3001)
    assert routes.propose([(0, 1), (10, 10 + 4096), (5000, 9000)]) == Table(((10, 10 + 4096),))


def test_there_is_room_for_one_run_at_least() -> None:
    routes = Routes(max_segments=1)
    routes.gated_hit(0, 1)
    assert routes.propose([(0, 1), (2, 3)]) == Table(((0, 1),))


@given(
    extents=st.sets(st.integers(0, 40)),
    cooling=st.sets(st.integers(0, 40)),
    hits=st.sets(st.integers(0, 40), min_size=1),
    max_segments=st.integers(3, 12),
)
def test_a_table_has_only_what_is_recorded_and_not_cooling(
    extents: set[int], cooling: set[int], hits: set[int], max_segments: int
) -> None:
    routes = Routes(max_segments=max_segments)
    routes.adopt((hit, hit + 1) for hit in hits)
    routes.cool(cooling)
    recorded: list[Run] = []
    for extent in sorted(extents):
        if recorded and recorded[-1][1] == extent:
            recorded[-1] = (recorded[-1][0], extent + 1)
        else:
            recorded.append((extent, extent + 1))
    table = routes.propose(iter(recorded))
    assert table is not None
    found = members(table)
    assert found <= extents - cooling
    assert len(table.segments(EXTENT, 41 * EXTENT)) <= max_segments
    if len(table.runs) < (max_segments - 1) // 2:
        assert found == extents - cooling
    assert all(map(routes.is_open, found | hits))


def test_still_is_when_nothing_is_direct_and_all_of_before_is_known() -> None:
    routes = Routes()
    assert routes.is_still
    routes.gated_hit(0, 3)
    assert routes.propose([(0, 3)]) is not None
    assert not routes.is_still
    routes.landed(())
    assert not routes.is_still
    routes.gate_all()
    assert routes.is_gating
    assert routes.propose([(0, 3)]) is not None
    routes.landed(())
    assert routes.all_gated
    assert not routes.is_still  # of what was written before the swap nothing is known
    assert routes.propose([(0, 3)]) is None
    routes.landed(())
    assert routes.is_still
