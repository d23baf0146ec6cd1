"""record/lru and record/predictors: the policy for comparison, and the names."""

from __future__ import annotations

import pytest

from bitmapd.errors import UsageError
from bitmapd.predict.lru import LruPolicy
from bitmapd.predict.predictors import DEFAULT_PREDICTOR, PREDICTORS, make_policy
from bitmapd.predict.stays import BULK_EXTENTS, IDLE_S
from bitmapd.record.geometry import MIB, Geometry

GEOMETRY = Geometry(4000 * MIB)


def record(policy: LruPolicy, extent: int, now_s: float) -> None:
    policy.wrote(extent, extent + 1, now_s, False)
    assert policy.predict(extent, extent + 1, now_s, 100, 1) == ()
    policy.added(extent, extent + 1, now_s)


def test_least_recently_used_goes_first() -> None:
    policy = LruPolicy(GEOMETRY)
    for now, extent in enumerate((5, 6, 7)):
        record(policy, extent, now)
    policy.wrote(5, 6, 3.0, True)
    assert policy.victims(2, lambda extent: True, 4.0) == [6, 7]
    assert policy.victims(2, lambda extent: extent != 6, 4.0) == [7, 5]


def test_stays_while_the_volume_is_written_and_leaves_at_rest() -> None:
    policy = LruPolicy(GEOMETRY)
    record(policy, 5, 0.0)
    record(policy, 6, 10_000.0)
    assert policy.wants(5, 10_000.0)
    assert policy.expired(10_000.0 + IDLE_S - 1) == []
    assert sorted(policy.expired(10_000.0 + IDLE_S)) == [5, 6]
    policy.dropped([5, 6], 10_031.0)
    assert policy.expired(10_100.0) == []
    assert not policy.wants(5, 10_100.0)


def test_written_while_dropped_is_not_remembered() -> None:
    policy = LruPolicy(GEOMETRY)
    record(policy, 5, 0.0)
    policy.dropped([5], 1.0)
    policy.wrote(5, 6, 2.0, False)
    assert policy.victims(9, lambda extent: True, 2.0) == []


def test_bulk_has_no_stay() -> None:
    policy = LruPolicy(GEOMETRY)
    policy.wrote(0, BULK_EXTENTS + 1, 0.0, False)
    policy.added(0, BULK_EXTENTS + 1, 0.0)
    assert not policy.wants(0, 0.0)
    assert policy.expired(1.0) == list(range(BULK_EXTENTS + 1))


def test_memory_is_bounded() -> None:
    policy = LruPolicy(GEOMETRY, capacity=10)
    for extent in range(50):
        record(policy, extent, float(extent))
    assert policy.victims(99, lambda extent: True, 50.0) == list(range(40, 50))
    assert policy.expired(50.0) == list(range(40))


def test_every_name_makes_its_policy() -> None:
    for name in PREDICTORS:
        assert make_policy(name, GEOMETRY).name == name
    assert DEFAULT_PREDICTOR in PREDICTORS


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'supreset' is not known") as caught:
        make_policy("supreset", GEOMETRY)
    assert caught.value.hint == "did you mean 'superset'? known are: lru, superset"
    with pytest.raises(UsageError) as caught:
        make_policy("xyz", GEOMETRY)
    assert caught.value.hint == "known are: lru, superset"
