"""record/streams: what the policy `superset` predicts, keeps and gives up."""

from __future__ import annotations

import random

import pytest

from bitmapd.record import streams
from bitmapd.record.geometry import MIB, Geometry
from bitmapd.record.stays import BULK_EXTENTS, IDLE_S
from bitmapd.record.streams import (
    FIRST_WINDOW,
    MAX_PREDICTED,
    MAX_STREAMS,
    MAX_WINDOW,
    NEIGHBOUR_AGE_S,
    ONCE,
    STAYS_S,
    STREAM_AGE_S,
    Options,
    StreamsPolicy,
)

EXTENTS = 100_000


class Record:
    """Does what the gate does, with every extent clean at once."""

    def __init__(self, extents: int = EXTENTS, options: Options | None = None) -> None:
        self.policy = StreamsPolicy(Geometry(extents * MIB), options)
        self.recorded: set[int] = set()
        self.room = 1000
        self.misses = 0
        self.now_s = 0.0

    def write(self, first: int, stop: int | None = None, after_s: float = 0.1) -> set[int]:
        """One write; what was predicted with it."""
        self.now_s += after_s
        stop = first + 1 if stop is None else stop
        hit = all(extent in self.recorded for extent in range(first, stop))
        self.policy.wrote(first, stop, self.now_s, hit)
        predicted: set[int] = set()
        if not hit:
            self.misses += 1
            for low, high in self.policy.predict(first, stop, self.now_s, self.room):
                predicted.update(range(low, high))
                self.policy.added(low, high, self.now_s)
            self.policy.added(first, stop, self.now_s)
        self.recorded.update(predicted, range(first, stop))
        return predicted

    def drop(self, *extents: int) -> None:
        self.policy.dropped(extents, self.now_s)
        self.recorded.difference_update(extents)

    def cool(self, after_s: float = 0.0) -> set[int]:
        """Once a second, as long as `after_s` lasts; what left."""
        gone: set[int] = set()
        end_s = self.now_s + after_s
        while True:
            self.now_s = min(self.now_s + 1.0, end_s) if after_s else self.now_s
            named = self.policy.expired(self.now_s)
            assert len(set(named)) == len(named)
            assert set(named) <= self.recorded
            self.drop(*named)
            gone.update(named)
            if self.now_s >= end_s:
                return gone

    def keep_busy(self, for_s: float) -> set[int]:
        """Time passes while one far extent is written all the time."""
        gone: set[int] = set()
        end_s = self.now_s + for_s
        while self.now_s < end_s:
            self.write(90_000, after_s=1.0)
            gone |= self.cool()
        return gone


# -- streams ------------------------------------------------------------------------------


def test_first_miss_predicts_nothing() -> None:
    assert Record().write(500) == set()


def test_forward_stream() -> None:
    record = Record()
    record.write(500)
    assert record.write(501) == set(range(502, 502 + FIRST_WINDOW))


def test_backward_stream() -> None:
    record = Record()
    record.write(500)
    assert record.write(499) == set(range(499 - FIRST_WINDOW, 499))


def test_windows_grow_so_long_streams_cost_few_misses() -> None:
    record = Record()
    sizes = [len(record.write(extent)) for extent in range(1000, 1200)]
    windows = [size for size in sizes if size]
    assert windows[:3] == [FIRST_WINDOW, 2 * FIRST_WINDOW, 4 * FIRST_WINDOW]
    assert set(windows[2:]) == {MAX_WINDOW}
    assert record.misses <= 2 + 2 + 200 // (MAX_WINDOW + 1) + 1


def test_backward_windows_grow_too() -> None:
    record = Record()
    for extent in range(1200, 1000, -1):
        record.write(extent)
    assert record.misses <= 2 + 2 + 200 // (MAX_WINDOW + 1) + 1


def test_interleaved_streams_do_not_disturb_one_another() -> None:
    record = Record()
    for step in range(100):
        record.write(1000 + step)
        record.write(50_000 - step)
        record.write(70_000 + step)
    assert record.misses <= 3 * 9


def test_stream_survives_a_gap_and_a_write_across_the_edge_of_its_window() -> None:
    record = Record()
    record.write(500)
    record.write(501)
    edge = 502 + FIRST_WINDOW
    assert record.write(edge + 2) >= set(range(edge + 3, edge + 3 + 2 * FIRST_WINDOW))
    edge += 3 + 2 * FIRST_WINDOW
    assert record.write(edge - 1, edge + 1) == set(range(edge + 1, edge + 1 + MAX_WINDOW))


def test_old_stream_is_not_continued() -> None:
    record = Record()
    record.write(500)
    assert record.write(501, after_s=STREAM_AGE_S + 1) == set()


def test_the_number_of_streams_is_bounded() -> None:
    record = Record()
    for number in range(MAX_STREAMS + 1):
        record.write(1000 * number)
    assert record.write(1) == set()
    assert record.write(1000 * MAX_STREAMS + 1) != set()


# -- bounds -------------------------------------------------------------------------------


def test_predictions_end_with_the_volume() -> None:
    record = Record(extents=1000)
    record.write(998)
    assert record.write(999) == set()
    record.write(1)
    assert record.write(0) == set()


@pytest.mark.parametrize("room", [-5, 0, 1, 3, 10])
def test_predictions_keep_to_the_room(room: int) -> None:
    record = Record()
    record.room = room
    for extent in range(1000, 1100):
        assert len(record.write(extent)) <= max(room, 0)


def test_one_observation_takes_a_quarter_of_the_room() -> None:
    record = Record()
    record.room = 16
    record.write(500)
    assert len(record.write(501)) == 4


def test_all_observations_together_are_bounded() -> None:
    record = Record()
    record.room = 10**9
    assert max(len(record.write(extent)) for extent in range(1000, 3000)) <= MAX_PREDICTED


def test_bulk_teaches_nothing_and_has_no_stay() -> None:
    record = Record()
    last = BULK_EXTENTS + 1
    assert record.write(0, last) == set()
    assert not record.policy.wants(5, record.now_s)
    assert record.cool() == set(range(last))
    assert record.write(last) == set()


def test_predict_without_the_write_it_belongs_to() -> None:
    policy = StreamsPolicy(Geometry(1000 * MIB))
    assert policy.predict(5, 6, 0.0, 100) == []
    assert policy.predict(6, 7, 0.1, 100) == [(7, 7 + FIRST_WINDOW)]


# -- neighbours ---------------------------------------------------------------------------


def scattered(record: Record, *extents: int) -> set[int]:
    """Writes that no stream explains: each long after the stream before it, but one."""
    predicted: set[int] = set()
    for extent in extents:
        predicted = record.write(extent, after_s=1.0)
    return predicted


def test_locality_in_a_region_makes_its_misses_take_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "STREAM_AGE_S", 0.0)
    record = Record()
    assert scattered(record, 1600, 1601) == set()
    assert scattered(record, 1604) == {1605}
    # The miss of 1607 is near that of 1604, so the region's groups are of four by now.
    assert scattered(record, 1607) == {1606}
    assert scattered(record, 1610) == {1608, 1609, 1611}


def test_old_misses_say_nothing_about_locality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_AGE_S", 0.0)
    record = Record()
    record.write(1600)
    record.write(1601, after_s=NEIGHBOUR_AGE_S + 1)
    assert record.write(1604, after_s=1.0) == set()


def test_neighbours_that_are_not_written_make_the_group_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "STREAM_AGE_S", 0.0)
    record = Record()
    scattered(record, 1600, 1601)
    assert scattered(record, 1604) == {1605}
    assert 1605 in record.keep_busy(STAYS_S[0] + 2)
    assert scattered(record, 1608) == set()


def test_neighbours_that_are_written_make_the_group_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "STREAM_AGE_S", 0.0)
    record = Record()
    scattered(record, 1600, 1601)
    assert scattered(record, 1604, 1605) == set()
    assert scattered(record, 1608) == {1609, 1610, 1611}


def test_regions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_REGIONS", 2)
    monkeypatch.setattr(streams, "STREAM_AGE_S", 0.0)
    record = Record()
    scattered(record, 1600, 1601)
    assert scattered(record, 1604) == {1605}
    scattered(record, 5000, 6000)
    assert scattered(record, 1608) == set()
    assert 1605 in record.keep_busy(STAYS_S[0] + 2)  # its region is not known any more


@pytest.mark.parametrize(("extents", "pause_s"), [(65536, 0.01), (4096, 1.0)])
def test_uniformly_random_writes_do_not_inflate_the_record(extents: int, pause_s: float) -> None:
    record = Record(extents)
    chooser = random.Random(5)
    predicted = 0
    next_s = 1.0
    for _ in range(6000):
        predicted += len(record.write(chooser.randrange(extents), after_s=pause_s))
        if record.now_s >= next_s:
            record.cool()
            next_s = record.now_s + 1.0
    assert predicted < record.misses


# -- successors ---------------------------------------------------------------------------


def test_extents_missed_together_are_predicted_together() -> None:
    record = Record()
    for extent in (10_000, 20_000, 30_000):
        record.write(extent)
    record.keep_busy(STAYS_S[ONCE] + 5)
    assert not {10_000, 20_000, 30_000} & record.recorded
    assert record.write(10_000) == {20_000, 30_000}


def test_successors_of_successors() -> None:
    record = Record()
    for extent in (10_000, 20_000):
        record.write(extent)
    record.write(20_000, after_s=50.0)
    record.drop(20_000)
    record.write(20_000)
    record.write(30_000)
    record.drop(10_000, 20_000, 30_000)
    assert record.write(10_000, after_s=50.0) == {20_000, 30_000}


def test_misses_far_apart_in_time_are_no_successors() -> None:
    record = Record()
    record.write(10_000)
    record.write(20_000, after_s=5.0)
    record.drop(10_000, 20_000)
    assert record.write(10_000, after_s=5.0) == set()


def test_successor_table_is_bounded() -> None:
    record = Record(options=Options(successors=1))
    record.write(10_000)
    record.write(20_000)
    record.write(40_000, after_s=10.0)
    record.write(50_000)
    record.drop(10_000, 20_000, 40_000, 50_000)
    assert record.write(10_000, after_s=10.0) == set()
    assert record.write(40_000, after_s=10.0) == {50_000}


def test_a_repeated_miss_is_not_its_own_successor() -> None:
    record = Record()
    for _ in range(5):
        record.write(10_000)
        record.drop(10_000)
    assert record.write(10_000) == set()


def test_predictions_that_fail_become_few_and_come_back_with_success() -> None:
    record = Record()
    policy = record.policy
    for extent in range(10_000, 60_000, 500):
        record.write(extent, after_s=0.5)
    for _ in range(8):  # every prediction fails
        record.drop(*record.recorded)
        for extent in range(10_000, 60_000, 500):
            record.write(extent, after_s=5.0)
            record.drop(*record.recorded)
    poor = policy._worth(streams._FROM_SUCCESSOR, 16)
    assert poor <= 2
    for _ in range(20):  # every prediction comes true
        for extent in range(10_000, 60_000, 500):
            for true in record.write(extent, after_s=5.0):
                record.write(true)
            record.drop(*record.recorded)
    assert policy._worth(streams._FROM_SUCCESSOR, 16) > 4


# -- stays --------------------------------------------------------------------------------


def test_what_was_predicted_in_vain_leaves_first() -> None:
    record = Record()
    record.write(500)
    predicted = record.write(501)
    assert record.keep_busy(STAYS_S[0] + 2) == predicted
    assert {500, 501} <= record.recorded


def test_one_shot_leaves_and_rewritten_stays() -> None:
    record = Record()
    record.write(500)
    record.write(700)
    record.keep_busy(STAYS_S[ONCE] - 20)
    record.write(700)
    assert record.policy.wants(700, record.now_s)
    gone = record.keep_busy(STAYS_S[ONCE] + 100)
    assert 500 in gone
    assert 700 in record.recorded
    assert not record.policy.wants(500, record.now_s)
    assert 700 in record.keep_busy(3 * STAYS_S[ONCE])


def test_writes_of_the_same_moment_are_one_use() -> None:
    record = Record()
    record.write(500)
    for _ in range(30):
        record.write(500, after_s=0.5)
    assert 500 in record.keep_busy(STAYS_S[ONCE] + 1)


def test_stay_shrinks_step_by_step_when_rewrites_come_sooner() -> None:
    record = Record()
    record.write(500)
    record.drop(500)
    record.write(500, after_s=1e6)  # the longest stay
    for _ in range(len(STAYS_S)):
        record.write(500, after_s=5.0)
    assert 500 in record.keep_busy(STAYS_S[ONCE] + 1)


def test_what_comes_back_after_it_left_is_kept_longer() -> None:
    record = Record()
    record.write(500)
    assert 500 in record.keep_busy(STAYS_S[ONCE] + 10)
    record.write(500)
    assert 500 not in record.keep_busy(2 * STAYS_S[ONCE])


def test_longest_stay_is_limited() -> None:
    record = Record()
    record.write(500)
    record.drop(500)
    record.write(500, after_s=1e6)
    record.write(500, after_s=1e6)
    record.write(90_000, after_s=STAYS_S[-1] - 1)
    assert 500 not in record.policy.expired(record.now_s)
    record.write(90_000, after_s=2.0)
    assert 500 in record.policy.expired(record.now_s)


def test_predicted_extent_that_is_written_counts_as_written() -> None:
    record = Record()
    record.write(500)
    record.write(501)
    record.write(503)
    record.keep_busy(STAYS_S[0] + 2)
    assert 503 in record.recorded
    assert 504 not in record.recorded


def test_past_is_bounded() -> None:
    record = Record(options=Options(past=1))
    for extent in (500, 700):
        record.write(extent)
    record.drop(500, 700)
    record.write(500, after_s=1000.0)
    record.write(700)
    gone = record.keep_busy(STAYS_S[ONCE] + 10)
    assert 500 in gone
    assert 700 not in gone


def test_idle_volume_empties_its_record() -> None:
    record = Record()
    for extent in range(500, 600):
        record.write(extent)
    record.write(50_000)
    for _ in range(5):
        record.keep_busy(50)
        record.write(50_000)
    record.cool(IDLE_S + 2)
    assert record.recorded == set()
    assert not record.policy.wants(50_000, record.now_s)


def test_hit_on_an_extent_that_was_named_gives_it_a_new_stay() -> None:
    record = Record()
    record.write(500)
    record.now_s += 100
    assert record.policy.expired(record.now_s) == [500]  # dirty: it stays in the record
    assert record.policy.expired(record.now_s) == []
    assert not record.policy.wants(500, record.now_s)
    record.write(500)
    assert record.policy.wants(500, record.now_s)


def test_full_table_names_what_it_forgets() -> None:
    record = Record(options=Options(stays=10))
    for number in range(30):
        record.write(100 + 50 * number)
    assert record.cool() == {100 + 50 * number for number in range(20)}


def test_an_eighth_of_the_limit_is_kept_free() -> None:
    record = Record()
    record.room = 0
    written = [100 + 50 * number for number in range(80)]
    for extent in written:
        record.write(extent)
    assert record.cool() == set(written[:10])
    assert record.cool() == set()


def test_victims_are_clean_and_least_recently_used_first() -> None:
    record = Record()
    for extent in (500, 700, 900):
        record.write(extent, after_s=5.0)
    record.write(500, after_s=5.0)
    assert record.policy.victims(5, lambda extent: True, 20.0) == [700, 900, 500]
    assert record.policy.victims(1, lambda extent: extent != 700, 20.0) == [900]


def test_predictions_not_recorded_are_forgotten() -> None:
    policy = StreamsPolicy(Geometry(EXTENTS * MIB), Options(sources=4))
    for step in range(3):
        policy.wrote(500 + step, 501 + step, 0.1 * step, False)
        policy.predict(500 + step, 501 + step, 0.1 * step, 1000)
    assert len(policy._source) == 4
    policy.wrote(503, 504, 1.0, False)
    policy.added(503, 504, 1.0)
    assert policy.expired(1.0) == []
    assert policy.victims(9, lambda extent: True, 1.0) == [503]


def test_a_miss_whose_extents_are_all_recorded_here() -> None:
    # The record may have lost an extent between the gate's look and the policy's.
    record = Record()
    record.write(500)
    record.policy.wrote(500, 501, record.now_s, False)
    assert record.policy.predict(500, 501, record.now_s, 100) == []
