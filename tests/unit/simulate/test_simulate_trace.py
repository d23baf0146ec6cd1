"""Traces in memory, the copy cycle laid over them, and what is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitmapd.errors import UsageError
from bitmapd.record.geometry import MIB
from dmctl.simulate.eras import plan_eras
from dmctl.simulate.meter import Level, Meter, Watch, hit_rate
from dmctl.simulate.params import GIB, Params
from dmctl.simulate.trace import Request, Trace, make_trace

BLOCK = 64 << 10


def writes(*steps: tuple[float, int], length: int = 4096) -> Trace:
    return make_trace("t", [Request(at, True, block * BLOCK, length) for at, block in steps])


# -- traces -------------------------------------------------------------------------------
def test_only_changes_are_kept_and_time_begins_at_0() -> None:
    trace = make_trace(
        "t",
        [
            Request(99.0, False, 0, 4096),
            Request(100.0, True, 4096, 4096),
            Request(100.0, True, 4096, 0),
            Request(102.5, True, 0, 512),
        ],
    )
    assert trace.requests == 4
    assert list(trace.time_s) == [0.0, 2.5]
    assert (list(trace.first_byte), list(trace.end_byte)) == ([4096, 0], [8192, 512])
    assert len(trace) == 2
    assert trace.end_s == 2.5
    assert trace.written_bytes == 4608
    assert trace.size_bytes == 64 * MIB


def test_what_is_out_of_order_is_sorted_and_ties_stay() -> None:
    trace = writes((5.0, 1), (3.0, 2), (5.0, 3), (4.0, 4))
    assert list(trace.time_s) == [0.0, 1.0, 2.0, 2.0]
    assert [byte // BLOCK for byte in trace.first_byte] == [2, 4, 1, 3]


def test_a_trace_without_times_is_spread() -> None:
    assert list(writes((7.0, 1), (7.0, 2), (7.0, 3)).time_s) == [0.0, 0.001, 0.002]
    assert list(writes((7.0, 1)).time_s) == [0.0]


def test_the_size_is_what_is_written_or_said() -> None:
    requests = [Request(0.0, True, 64 * MIB - 512, 1024)]
    assert make_trace("t", requests).size_bytes == 128 * MIB
    assert make_trace("t", requests, 65 * MIB).size_bytes == 65 * MIB
    with pytest.raises(UsageError, match="t: byte 67109376 is beyond the volume's 67108864"):
        make_trace("t", requests, 64 * MIB)


def test_a_trace_without_writes_is_refused() -> None:
    with pytest.raises(UsageError, match="no writes"):
        make_trace("t", [Request(0.0, False, 0, 512)])


def test_spans_are_units_touched_and_are_kept_for_the_sizes_used_last() -> None:
    trace = make_trace("t", [Request(0, True, 4095, 1), Request(1, True, 4095, 2)])
    spans = trace.spans(4096)
    assert (list(spans.first), list(spans.stop)) == ([0, 0], [1, 2])
    assert trace.spans(4096) is spans
    for shift in range(13, 16):
        trace.spans(1 << shift)
    assert trace.spans(4096) is spans
    trace.spans(1 << 16)
    trace.spans(1 << 17)
    assert trace.spans(4096) is spans  # it was used after 1 << 13
    for shift in range(13, 17):
        trace.spans(1 << shift)
    assert trace.spans(4096) is not spans


# -- params -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"queue_depth": 0}, "queue depth 0 is below 1"),
        ({"record_limit_bytes": 0}, "record limit 0"),
        ({"link_bytes_per_s": 0}, "link speed 0"),
        ({"era_interval_s": 0.0}, "era interval"),
        ({"link_round_trip_s": -1.0}, "round trip"),
        ({"record_latency_s": -1.0}, "latency"),
        ({"extent_bytes": 3000}, "extent size 3000 is not a power of two"),
    ],
)
def test_params_are_judged(change: dict[str, float], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        replace(Params(), **change)  # type: ignore[arg-type]


def test_a_block_is_no_larger_than_an_extent() -> None:
    geometry = Params(extent_bytes=4096).geometry(MIB)
    assert (geometry.extent_bytes, geometry.block_bytes) == (4096, 4096)
    assert Params().geometry(GIB).block_bytes == BLOCK


def test_the_limit_in_units_is_at_least_one() -> None:
    assert Params(record_limit_bytes=10 * MIB).units(4 * MIB) == 2
    assert Params(record_limit_bytes=MIB).units(4 * MIB) == 1


# -- eras ---------------------------------------------------------------------------------
LINK = Params(link_bytes_per_s=BLOCK, link_round_trip_s=0.5)  # a block a second


def test_an_era_ends_at_the_interval_after_its_first_write() -> None:
    trace = writes((0.0, 1), (0.9, 1), (1.0, 2), (5.25, 3))
    eras = plan_eras(trace, replace(LINK, link_bytes_per_s=1e12, link_round_trip_s=0.0)).eras
    assert [(e.first, e.stop, e.ended_s, e.blocks) for e in eras] == [
        (0, 2, 1.0, 1),
        (2, 3, 2.0, 1),
        (3, 4, 6.0, 1),
    ]


def test_an_era_waits_for_the_copy_of_the_one_before() -> None:
    trace = writes((0.0, 1), (0.5, 2), (0.5, 2), (2.0, 3), (3.5, 4), (4.5, 5))
    eras = plan_eras(trace, LINK).eras
    # The first has two blocks: two seconds, and two round trips.
    assert [(e.first, e.stop, e.ended_s, e.settled_s) for e in eras] == [
        (0, 3, 1.0, 4.0),
        (3, 5, 4.0, 7.0),
        (5, 6, 7.0, 9.0),
    ]


def test_large_writes_count_each_block_once() -> None:
    trace = make_trace("t", [Request(0, True, 0, 3 * BLOCK), Request(0.5, True, BLOCK, 3 * BLOCK)])
    (era,) = plan_eras(trace, LINK).eras
    assert era.blocks == 4


def test_mean_dirty_bytes_is_over_the_time_of_the_trace() -> None:
    # One block dirty from 0 to 2 (end of era 1, copy 0.5, two round trips of 0.25), one never
    # counted since the trace ends with it: 2 of 4 seconds.
    params = Params(link_bytes_per_s=2 * BLOCK, link_round_trip_s=0.25)
    plan = plan_eras(writes((0.0, 1), (0.5, 1), (4.0, 2)), params)
    assert plan.mean_dirty_bytes == pytest.approx(BLOCK / 2)
    assert plan_eras(writes((0.0, 1)), params).mean_dirty_bytes == 0.0


def test_a_plan_is_laid_out_once() -> None:
    trace = writes((0.0, 1), (4.0, 2))
    assert plan_eras(trace, LINK) is plan_eras(trace, replace(LINK, queue_depth=8))
    assert plan_eras(trace, LINK) is not plan_eras(trace, Params())


def test_rounding_never_makes_an_empty_era() -> None:
    params = Params(era_interval_s=0.1, link_bytes_per_s=1e15, link_round_trip_s=0.0)
    steps = [(i * 0.1, i) for i in range(200)] + [
        (20 + 3 * (1 / 3 + i) * 0.1, i) for i in range(99)
    ]
    eras = plan_eras(writes(*steps), params).eras
    assert [e.first for e in eras][1:] == [e.stop for e in eras][:-1]
    assert all(e.first < e.stop for e in eras)


def test_an_end_that_rounds_to_its_own_first_write_is_moved_on() -> None:
    # 4.3 / 0.1 is 42.99…, and 43 * 0.1 is 4.3 again.
    trace = writes((0.0, 1), (4.3, 2), (9.0, 3))
    assert int(4.3 / 0.1) + 1 == 43
    eras = plan_eras(trace, Params(era_interval_s=0.1)).eras
    assert eras[1].ended_s == pytest.approx(4.4)


# -- measuring ----------------------------------------------------------------------------
def test_a_level_is_weighed_by_time() -> None:
    level = Level()
    assert level.mean() == 0
    assert level.quantile(0.99) == 0
    level.set(1.0, 10)  # 0 for one second
    level.set(1.0, 4)  # 10 for no time at all
    level.set(4.0, 4)
    level.set(4.0, 8)  # 4 for three seconds
    level.hold(5.0)  # 8 for one
    assert level.mean() == pytest.approx((0 + 12 + 8) / 5)
    assert level.quantile(0.2) == 0
    assert level.quantile(0.8) == 4
    assert level.quantile(0.81) == 8
    assert level.highest == 10
    level.hold(4.0)
    assert level.mean() == pytest.approx(4.0)


def test_a_quantile_is_found_in_spite_of_rounding() -> None:
    level = Level()
    level.set(0.1, 1)
    level.set(0.3, 2)
    level.hold(0.9)
    assert level.quantile(1.0 + 1e-9) == 2


def test_a_watch_counts_what_leaves_dirty() -> None:
    meter = Meter()
    watch = Watch(meter)
    watch.written(7, 5.0)
    watch.removed(7, 5.0)
    watch.removed(7, 0.0)
    assert meter.violations == 0
    watch.written(7, 5.0)
    watch.removed(7, 4.9)
    assert meter.violations == 1


def test_a_meter_adds_up() -> None:
    meter = Meter()
    meter.wrote_record(3, 4096, flushes=2)
    meter.waited((4, 5), 0.25)
    meter.waited((7,), 0.125)
    meter.both(2.0, 9)
    assert (meter.record_writes, meter.record_flushes) == (3, 2)
    assert meter.record_written_bytes == 3 * 4096
    assert meter.wait_s == 0.625
    assert meter.longest_wait_s == 0.25
    assert list(meter.waits) == [4, 5, 7]
    assert (meter.stored.value, meter.record.value) == (9, 9)


def test_the_hit_rate_is_by_part_of_the_time() -> None:
    trace = writes((0.0, 1), (0.5, 1), (1.0, 1), (3.0, 1), (4.0, 1))
    rate = hit_rate(trace, [4, 0], parts=4)
    assert rate.part_s == 1.0
    assert rate.values == (0.5, 1.0, None, 0.5)
    assert hit_rate(writes((0.0, 1)), (), parts=2).values == (None, 1.0)
