"""record/superset: what rides along with a miss, how long it stays, and what goes first."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from bitarray import bitarray

from bitmapd.predict.nearby import KINDS
from bitmapd.predict.stays import BULK_EXTENTS, IDLE_S
from bitmapd.predict.superset import (
    FRESH_MISSES,
    FRESH_S,
    MAX_PREDICTED,
    ONCE,
    ROOM_PART,
    STAYS_S,
    Options,
    SupersetPolicy,
)
from bitmapd.record.geometry import MIB, Geometry

EXTENTS = 100_000
FAR = 90_000  # from everything else that these tests write


class Record:
    """Does what the gate does, with every extent clean at once unless it is in `dirty`."""

    def __init__(
        self, extents: int = EXTENTS, options: Options | None = None, limit: int = 1000
    ) -> None:
        self.policy = SupersetPolicy(Geometry(extents * MIB), options)
        self.recorded: set[int] = set()
        self.dirty: set[int] = set()
        self.limit = limit
        self.misses = 0
        self.now_s = 0.0

    def write(self, first: int, stop: int | None = None, after_s: float = 0.1) -> set[int]:
        """One write; what was predicted with it."""
        self.now_s += after_s
        stop = first + 1 if stop is None else stop
        hit = all(extent in self.recorded for extent in range(first, stop))
        self.policy.wrote(first, stop, self.now_s, hit)
        predicted: set[int] = set()
        if hit:
            return predicted
        self.misses += 1
        needed = len(self.recorded.union(range(first, stop)))
        for low, high in self.policy.predict(first, stop, self.now_s, self.limit, needed):
            predicted.update(range(low, high))
        room = max(self.limit - needed, 0) + self.limit // ROOM_PART
        assert len(predicted) <= min(room, MAX_PREDICTED)
        assert not predicted & self.recorded.union(range(first, stop))
        self.policy.added(first, stop, self.now_s)
        for extent in sorted(predicted):
            self.policy.added(extent, extent + 1, self.now_s)
        self.recorded.update(predicted, range(first, stop))
        self.evict(first, stop)
        return predicted

    def evict(self, first: int, stop: int) -> None:
        def may_go(extent: int) -> bool:
            return extent not in self.dirty and not first <= extent < stop

        excess = len(self.recorded) - self.limit
        if excess > 0:
            self.drop(*self.policy.victims(excess, may_go, self.now_s))

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
            self.write(FAR, after_s=1.0)
            gone |= self.cool()
        return gone

    def guests(self) -> int:
        return self.policy._guests()


# -- what is predicted --------------------------------------------------------------------


def test_the_first_misses_predict_what_is_near() -> None:
    predicted = Record().write(500)
    assert {499, 501} <= predicted
    assert all(abs(extent - 500) < 64 for extent in predicted)


def test_streams_cost_few_misses() -> None:
    for step in (1, -1):
        record = Record()
        for number in range(1000):
            record.write(20_000 + step * number)
        assert record.misses <= 1000 / 25


def write_runs(record: Record, count: int) -> None:
    """Short runs forwards, in different places."""
    for number in range(count):
        start = 1000 + 140 * number
        for extent in range(start, start + 3):
            record.write(extent)


def test_directions_are_learnt() -> None:
    record = Record()
    write_runs(record, 500)
    predicted = record.write(80_000)
    assert {80_001, 80_002} <= predicted
    assert not any(extent < 80_000 for extent in predicted)


def test_what_was_used_together_comes_back_together() -> None:
    record = Record()
    chance = random.Random(1)
    places = [chance.randrange(0, EXTENTS, 200) for _ in range(40)]
    for _ in range(6):
        for place in places:
            record.write(place)
        record.keep_busy(10)
        record.drop(*record.recorded)
    before = record.misses
    chance.shuffle(places)
    for place in places:
        record.write(place)
    assert record.misses - before <= len(places) // 4


def test_random_writes_on_a_large_volume_are_left_alone() -> None:
    chance = random.Random(2)
    record = Record(extents=1 << 20, limit=256)
    for _ in range(1500):
        record.write(chance.randrange(1 << 20))
    predicted = sum(len(record.write(chance.randrange(1 << 20))) for _ in range(400))
    assert predicted <= 400


@pytest.mark.parametrize("limit", [64, 256, 1000])
def test_random_writes_miss_no_more_than_with_the_lru(limit: int) -> None:
    chance = random.Random(3)
    record, kept, lru_misses = Record(extents=2000, limit=limit), dict[int, None](), 0
    for _ in range(6000):
        extent = chance.randrange(2000)
        record.write(extent)
        lru_misses += extent not in kept
        kept.pop(extent, None)
        kept[extent] = None
        if len(kept) > limit:
            del kept[next(iter(kept))]
    assert record.misses <= 1.05 * lru_misses


def test_predictions_end_with_the_volume() -> None:
    record = Record(extents=100)
    assert max(record.write(98)) == 99
    assert min(record.write(0)) == 1


@pytest.mark.parametrize(
    ("limit", "recorded", "room"),
    [(0, 1, 0), (3, 3, 0), (4, 4, 1), (20, 18, 7), (28, 28, 7), (28, 30, 7), (10_000, 1, 64)],
)
def test_predictions_keep_to_the_room(limit: int, recorded: int, room: int) -> None:
    policy = SupersetPolicy(Geometry(EXTENTS * MIB))
    policy.wrote(500, 501, 0.0, False)
    predicted = policy.predict(500, 501, 0.0, limit, recorded)
    assert sum(stop - first for first, stop in predicted) == room


def test_bulk_teaches_nothing_and_has_no_stay() -> None:
    record = Record(limit=5000)
    last = BULK_EXTENTS + 1
    assert record.write(0, last) == set()
    assert record.cool() == set(range(last))


def test_predict_without_the_write_it_belongs_to() -> None:
    policy = SupersetPolicy(Geometry(1000 * MIB))
    predicted = policy.predict(500, 502, 0.0, 100, 2)
    assert all(stop <= 500 or first >= 502 for first, stop in predicted)


def test_a_miss_whose_extents_are_all_recorded_here() -> None:
    # The record may have lost an extent between the gate's look and the policy's.
    record = Record()
    record.write(500)
    record.policy.wrote(500, 501, record.now_s, False)
    predicted = record.policy.predict(500, 501, record.now_s, 1000, 9)
    assert all(stop <= 500 or first > 500 for first, stop in predicted)


def test_predictions_not_recorded_are_forgotten() -> None:
    policy = SupersetPolicy(Geometry(EXTENTS * MIB))
    policy.wrote(500, 501, 0.0, False)
    policy.predict(500, 501, 0.0, 1000, 1)
    policy.wrote(700, 701, 0.1, False)
    policy.predict(700, 701, 0.1, 4, 4)
    policy.added(501, 502, 0.2)
    assert policy.victims(9, lambda extent: True, 0.2) == [501]
    assert policy._guests() == 0


# -- stays --------------------------------------------------------------------------------


def test_guests_leave_before_what_was_written() -> None:
    record = Record()
    predicted = record.write(500)
    gone = record.keep_busy(STAYS_S[0] + 5)
    assert predicted <= gone
    assert 500 in record.recorded


def test_old_guests_do_not_outnumber_what_was_written() -> None:
    record = Record()
    record.write(1000)
    record.cool(FRESH_S + 1)
    assert record.guests() > 1  # fresh as long as there are no further misses
    for extent in range(2000, 8000, 500):
        record.write(extent, after_s=3.0)
        record.cool()
    fresh = FRESH_MISSES * MAX_PREDICTED
    assert record.guests() <= len(record.recorded) - record.guests() + fresh
    assert not record.recorded & set(range(1001, 1064))


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


def test_a_write_that_is_recorded_in_part() -> None:
    record = Record()
    record.write(500)
    record.drop(*(record.recorded - {500}))
    record.write(500, 502)
    assert record.policy.wants(500, record.now_s)
    assert record.policy.wants(501, record.now_s)


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
    record.write(FAR, after_s=STAYS_S[-1] - 1)
    assert 500 not in record.policy.expired(record.now_s)
    record.write(FAR, after_s=2.0)
    assert 500 in record.policy.expired(record.now_s)


def test_a_prediction_that_is_written_counts_as_written() -> None:
    record = Record()
    predicted = record.write(500)
    record.write(503)
    gone = record.keep_busy(STAYS_S[0] + 5)
    assert 503 in record.recorded
    assert predicted - {503} <= gone


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
    record.cool(IDLE_S + 2)
    assert record.recorded == set()
    assert not record.policy.wants(599, record.now_s)


def test_hit_on_an_extent_that_was_named_gives_it_a_new_stay() -> None:
    record = Record()
    record.write(500)
    record.now_s += 100
    assert 500 in record.policy.expired(record.now_s)  # dirty: it stays in the record
    assert 500 not in record.policy.expired(record.now_s)
    assert not record.policy.wants(500, record.now_s)
    record.write(500)
    assert record.policy.wants(500, record.now_s)


def test_full_table_names_what_it_forgets() -> None:
    record = Record(options=Options(stays=10))
    for number in range(5):
        record.write(100 + 500 * number)
    forgotten = len(record.recorded) - len(record.policy._stays)
    assert forgotten > 0
    assert len(record.cool()) >= forgotten


# -- victims ------------------------------------------------------------------------------


def written_only(record: Record, *extents: int) -> None:
    """Have these recorded without predictions."""
    for extent in extents:
        record.now_s += 5.0
        record.policy.wrote(extent, extent + 1, record.now_s, False)
        record.policy.added(extent, extent + 1, record.now_s)
        record.recorded.add(extent)


def test_what_was_written_goes_by_last_use() -> None:
    record = Record()
    written_only(record, 500, 700, 900)
    record.write(500, after_s=5.0)
    now_s = record.now_s
    assert record.policy.victims(5, lambda extent: True, now_s) == [700, 900, 500]
    assert record.policy.victims(1, lambda extent: extent != 700, now_s) == [900]
    assert record.policy.victims(0, lambda extent: True, now_s) == []


def test_stale_guests_go_first_and_fresh_ones_not_at_all() -> None:
    record = Record()
    written_only(record, 9000, 9500)
    guests = record.write(500)
    everything = len(record.recorded)
    fresh = record.policy.victims(everything, lambda extent: True, record.now_s)
    assert set(fresh) == {9000, 9500, 500}
    record.now_s += FRESH_S + 1
    for number in range(FRESH_MISSES):
        record.write(20_000 + 500 * number)
    stale = record.policy.victims(len(guests), lambda extent: True, record.now_s)
    assert set(stale) <= guests
    kept = stale[0]
    others = record.policy.victims(len(guests), lambda extent: extent != kept, record.now_s)
    assert kept not in others


def test_guests_above_their_share_go_before_what_was_written() -> None:
    record = Record(limit=64)
    written_only(record, *range(1000, 40_000, 1000))
    for extent in (50_000, 50_500, 51_000):
        record.write(extent, after_s=0.0)
    assert record.guests() <= 32
    assert len(record.recorded) <= 64


def test_guests_may_exceed_a_limit_that_what_is_dirty_exceeds() -> None:
    record = Record(limit=64)
    for extent in range(1000, 1400):
        record.dirty.add(extent)
        record.write(extent, after_s=0.001)
    assert record.misses <= 400 / 8
    assert len(record.recorded) <= 400 + 200


def test_guests_do_not_heap_up_where_nothing_can_leave() -> None:
    record = Record(limit=64)
    record.dirty = set(range(EXTENTS))
    for extent in range(1000, 80_000, 200):
        record.write(extent, after_s=0.001)
    written = len(record.recorded) - record.guests()
    assert record.guests() <= 3 * written


def test_the_share_of_guests_follows_what_is_missed() -> None:
    record = Record(limit=64)
    before = record.policy._share
    for _ in range(40):  # a working set that fits without guests, and neighbours never written
        for extent in range(1000, 61_000, 1000):
            record.write(extent, after_s=0.05)
    assert record.policy._share < before
    shrunk = record.policy._share
    policy = record.policy
    for extent in range(70_000, 70_030):
        policy._gone[True][extent] = None
        policy.wrote(extent, extent + 1, record.now_s, False)
    assert policy._share > shrunk


# -- hints --------------------------------------------------------------------------------


def test_hints_carry_what_was_learnt_over_a_restart() -> None:
    record = Record()
    write_runs(record, 500)
    fresh = Record()
    assert fresh.policy.recall(record.policy.hints())
    predicted = fresh.write(80_000)
    assert {80_001, 80_002} <= predicted
    assert not any(extent < 80_000 for extent in predicted)


def test_a_volume_that_has_grown_keeps_what_was_learnt() -> None:
    record = Record()
    write_runs(record, 500)
    learnt = record.policy.hints()
    larger = SupersetPolicy(Geometry((EXTENTS + 1) * MIB))
    assert larger.recall(learnt)
    assert larger.hints() == replace(learnt, extents=EXTENTS + 1, ever=learnt.ever + bitarray(1))


@pytest.mark.parametrize(
    "change",
    [{"extents": EXTENTS + 1, "ever": bitarray(EXTENTS + 1)}, {"odds": (0.5,) * (KINDS + 1)}],
    ids=["of a larger volume", "of other kinds"],
)
def test_hints_that_do_not_fit_change_nothing(change: dict[str, Any]) -> None:
    record = Record()
    write_runs(record, 5)
    policy = SupersetPolicy(Geometry(EXTENTS * MIB))
    before = policy.hints()
    assert not policy.recall(replace(record.policy.hints(), **change))
    assert policy.hints() == before
