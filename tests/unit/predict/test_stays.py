"""record/stays: how long recorded extents stay."""

from __future__ import annotations

import pytest

from bitmapd.predict import stays as stays_module
from bitmapd.predict.stays import IDLE_S, StayTable, as_runs


def table(*, capacity: int = 100, stays_s: tuple[float, ...] = (10.0, 40.0)) -> StayTable:
    made = StayTable(1000, stays_s, capacity)
    made.last_write_s = 0.0
    return made


def test_stay_ends_after_the_length_of_its_level() -> None:
    stays = table()
    stays.enter(5, 7)
    stays.place(5, 0, 0.0)
    stays.place(6, 1, 0.0)
    stays.last_write_s = 25.0
    assert stays.due(9.9) == []
    assert stays.due(10.0) == [5]
    assert (stays.level(6), stays.used_s(6)) == (1, 0.0)
    assert stays.forget(5) == (0, 0.0)
    assert stays.due(39.9) == []
    assert stays.due(40.0) == [6]
    assert stays.wants(6, 39.9)
    assert not stays.wants(6, 40.0)
    assert not stays.wants(5, 1.0)


def test_use_renews_a_stay() -> None:
    stays = table()
    stays.enter(5, 6)
    stays.place(5, 0, 0.0)
    stays.place(5, 0, 8.0)
    assert stays.due(17.9) == []
    stays.place(5, 1, 9.0)
    assert stays.due(20.0) == []
    assert len(stays) == 1


def test_idle_volume_keeps_nothing() -> None:
    stays = table(stays_s=(10.0, 1e9))
    stays.enter(0, 2)
    stays.place(0, 1, 0.0)
    stays.place(1, 1, 0.0)
    assert stays.wants(0, IDLE_S - 0.1)
    assert stays.due(IDLE_S - 0.1) == []
    assert sorted(stays.due(IDLE_S)) == [0, 1]
    assert not stays.wants(0, IDLE_S)


def test_extents_without_a_stay_are_named_once() -> None:
    stays = table()
    stays.enter(3, 6)
    stays.place(4, 0, 0.0)
    assert stays.take_loose() == [3, 5]
    assert stays.take_loose() == []
    stays.enter(3, 4)
    stays.leave(3)
    assert stays.take_loose() == []


def test_an_extent_that_has_a_stay_is_not_named_as_loose() -> None:
    stays = table()
    stays.enter(4, 5)
    stays.place(4, 0, 0.0)
    stays.enter(2, 7)
    assert stays.take_loose() == [2, 3, 5, 6]
    stays.enter(2, 7)
    stays.forget(4)  # named by its stay
    assert stays.take_loose() == [2, 3, 5, 6]


def test_loose_extents_are_named_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stays_module, "LOOSE_BATCH", 4)
    stays = table()
    stays.enter(10, 19)
    assert stays.take_loose() == [10, 11, 12, 13]
    assert stays.take_loose() == [14, 15, 16, 17]
    assert stays.take_loose() == [18]
    assert stays.take_loose() == []


def test_full_table_forgets_the_least_recently_used() -> None:
    stays = table(capacity=3)
    stays.enter(0, 5)
    assert stays.place(0, 1, 1.0) == []
    assert stays.place(1, 0, 2.0) == []
    assert stays.place(2, 1, 3.0) == []
    assert stays.place(3, 0, 4.0) == [(0, 1, 1.0)]
    assert stays.place(1, 1, 5.0) == []
    assert stays.place(4, 0, 6.0) == [(2, 1, 3.0)]
    assert len(stays) == 3
    # What was forgotten is still recorded, so it is named.
    assert stays.take_loose() == [0, 2]


def test_leaving_gives_back_what_was_known() -> None:
    stays = table()
    stays.enter(1, 3)
    stays.place(1, 1, 7.0)
    assert stays.recorded[1]
    assert stays.leave(1) == (1, 7.0)
    assert stays.leave(2) is None
    assert not stays.recorded.any()
    assert len(stays) == 0


def test_coldest_are_clean_and_in_order_of_use() -> None:
    stays = table()
    stays.enter(0, 6)
    for extent, level, used_s in ((3, 0, 1.0), (1, 1, 2.0), (0, 0, 3.0), (4, 1, 4.0)):
        stays.place(extent, level, used_s)
    assert stays.coldest(9, lambda extent: True) == [3, 1, 0, 4]
    assert stays.coldest(2, lambda extent: extent != 1) == [3, 0]
    assert stays.coldest(0, lambda extent: True) == []
    assert stays.coldest(-1, lambda extent: True) == []


def test_search_for_clean_extents_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stays_module, "LOOKS", 5)
    stays = table()
    stays.enter(0, 50)
    for extent in range(50):
        stays.place(extent, 0, float(extent))
    looked: list[int] = []

    def dirty(extent: int) -> bool:
        looked.append(extent)
        return False

    assert stays.coldest(1, dirty) == []
    assert looked == list(range(9))


def test_runs() -> None:
    assert as_runs([]) == []
    assert as_runs([5, 3, 4, 9]) == [(3, 6), (9, 10)]
