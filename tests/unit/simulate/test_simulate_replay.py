"""Replaying by name, our own record, recommendations and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bitmapd.errors import UsageError
from bitmapd.predict.superset import SupersetPolicy
from bitmapd.record.geometry import MIB, Geometry
from bitmapd.record.layout import EXTENTS_PER_PAGE
from dmctl.simulate.chart import bar, hit_rate_chart, limit_text, sparkline, updates_chart
from dmctl.simulate.eras import plan_eras
from dmctl.simulate.meter import HitRate
from dmctl.simulate.params import Params
from dmctl.simulate.recommend import recommend
from dmctl.simulate.replay import POLICIES, drive, make_model, replay
from dmctl.simulate.result import Result
from dmctl.simulate.superset import GateModel
from dmctl.simulate.svg import render
from dmctl.simulate.trace import Request, Trace, make_trace
from tests.support.mirror import ScriptedPolicy

PERFECT = Params(link_bytes_per_s=1e18, link_round_trip_s=0.0, record_latency_s=0.001)


def extents(steps: Sequence[tuple[float, int]], unit: int = MIB, count: int = 1) -> Trace:
    return make_trace("t", [Request(at, True, e * unit, count * unit) for at, e in steps])


# -- our own record -----------------------------------------------------------------------
def scripted(
    trace: Trace, params: Params = PERFECT, limit: int = 100
) -> tuple[GateModel, ScriptedPolicy]:
    policy = ScriptedPolicy()
    return GateModel(trace, params, plan_eras(trace, params), policy, limit), policy


def test_what_is_predicted_rides_along() -> None:
    trace = extents([(0.0, 1), (0.1, 5), (0.2, 1), (0.3, 8)])
    model, policy = scripted(trace)
    policy.predictions = [(4, 7)]
    policy.kept = {1, 4, 5, 6}
    drive(trace, model)
    assert model.meter.waited_updates == 2
    assert list(model.meter.waits) == [0, 3]
    assert ("predict", 1, 2, 100, 1) in policy.told
    assert ("added", 4, 7) in policy.told
    model.elapse(3.0)  # 8 was not wanted and is gone by the next second
    assert model.covers(4, 7)
    assert not model.covers(8, 9)
    assert model.meter.record_writes == 3
    assert model.meter.violations == 0


def test_predictions_enter_on_pages_that_are_written_anyway() -> None:
    edge = EXTENTS_PER_PAGE
    requests = [Request(0.0, True, (edge - 1) * 4096, 512), Request(2.0, True, 2 * edge * 4096, 1)]
    trace = make_trace("t", requests)
    model, policy = scripted(trace, replace(PERFECT, extent_bytes=4096, block_bytes=4096))
    policy.predictions = [(edge - 3, edge + 3)]
    model.run(0, 1)
    assert ("added", edge - 3, edge) in policy.told
    assert model.recorded == 3


def test_what_was_dropped_comes_back_free_until_the_page_is_written() -> None:
    # Eras are settled half a second after their end, and what was written in them is dropped: at
    # 1.5, 2.5 and 4.5.  The page is written at 2 and 3.
    slow = replace(PERFECT, link_round_trip_s=0.25)
    trace = extents([(0.0, 1), (1.6, 1), (3.9, 1), (4.5, 1)])
    model, _ = scripted(trace, slow)
    drive(trace, model)
    assert list(model.meter.waits) == [0, 2]
    assert model.meter.waited_updates == 2
    assert model.meter.record_writes == 4
    assert model.meter.violations == 0


def test_what_came_back_free_and_was_dropped_again_leaves_with_the_next_write() -> None:
    trace = extents([(0.0, 1), (0.3, 1), (0.5, 2), (9.0, 2)])
    model, _ = scripted(trace, replace(PERFECT, era_interval_s=0.2))
    model.run(0, 1)
    model.elapse(0.3)
    model.run(1, 2)
    model.elapse(0.5)
    model.run(2, 3)
    assert list(model.meter.waits) == [0, 2]
    assert not model.covers(1, 2)
    assert model.meter.stored.value == 1


def test_what_is_over_the_limit_goes_when_it_is_clean() -> None:
    trace = extents([(0.0, 1), (0.1, 2), (2.5, 3), (9.0, 3)])
    model, policy = scripted(trace, limit=1)
    policy.kept = {1, 2, 3}
    policy.unloved = [1, 2, 3]
    model.run(0, 2)
    assert model.recorded == 2
    model.elapse(2.0)
    assert model.recorded == 1
    assert ("victims", 1) in policy.told
    drive(trace, model)
    assert not model.covers(1, 2)
    assert model.meter.violations == 0


def test_a_large_write_spans_pages_and_marks_all_of_its_extents() -> None:
    size = EXTENTS_PER_PAGE + 10
    requests = [
        Request(0.0, True, 0, size * 4096),
        Request(0.5, True, 0, size * 4096),
        Request(0.7, True, 4096, 8192),
        Request(9.0, True, 0, 512),
    ]
    trace = make_trace("t", requests)
    params = replace(PERFECT, extent_bytes=4096, block_bytes=4096)
    model, policy = scripted(trace, params, limit=2 * size)
    policy.kept = set(range(size))
    drive(trace, model)
    assert model.meter.waited_updates == 2
    assert model.meter.stored.value == size
    model.elapse(100.0)
    assert model.recorded == size


def test_a_batch_shares_the_pages_it_waits_for() -> None:
    trace = extents([(0.0, 1), (0.0, 2), (0.0, 1), (9.0, 1)])
    model, policy = scripted(trace, replace(PERFECT, queue_depth=8))
    policy.kept = {1, 2}
    drive(trace, model)
    assert model.meter.waited_updates == 1
    assert len(model.meter.waits) == 3
    assert model.meter.wait_s == pytest.approx(0.003)


def test_a_batch_may_hold_a_miss_that_costs_nothing() -> None:
    slow = replace(PERFECT, link_round_trip_s=0.25, queue_depth=8)
    trace = extents([(0.0, 1), (1.6, 1), (1.6, 2), (9.0, 1)])
    model, _ = scripted(trace, slow)
    drive(trace, model)
    assert list(model.meter.waits) == [0, 2, 3]


def test_a_write_whose_extents_were_evicted_while_it_waited_records_them_again() -> None:
    requests = [
        Request(0.0, True, MIB, 4096),
        Request(5.0, True, MIB, 2 * MIB),  # extent 1 is clean, 2 is not recorded
        Request(5.0, True, 5 * MIB, 4096),  # room for both is made by evicting 1
        Request(9.0, True, 0, 512),
    ]
    trace = make_trace("t", requests)
    model, policy = scripted(trace, replace(PERFECT, queue_depth=8), limit=2)
    policy.kept, policy.unloved = {1, 2, 5}, [1]
    model.elapse(0.0)
    model.run(0, 1)
    model.elapse(5.0)
    model.run(1, 3)
    assert model.covers(1, 3)
    assert model.meter.waited_updates == 1 + 1, "it is still in the stored copy"
    assert ("dropped", 1) in policy.told
    assert model.meter.violations == 0


def test_a_volume_at_rest_leaves_nothing_to_copy() -> None:
    trace = extents([(float(i), i % 7) for i in range(50)])
    result = replay(trace, "superset")
    assert result.max_resync_bytes > 0
    assert result.idle_resync_bytes == 0
    assert replay(trace, "drbd-al:16").idle_resync_bytes == 2 * 4 * MIB


def test_a_policy_that_breaks_the_rules_breaks_nothing() -> None:
    trace = extents([(0.0, 1), (0.1, 1), (5.0, 2)])
    model, policy = scripted(trace)
    policy.kept = {1}
    policy.expiring = [1, 1, 2, 3]
    drive(trace, model)
    assert model.meter.violations == 0
    assert model.recorded == 1


# -- by name ------------------------------------------------------------------------------
TRACE = extents([(i * 0.3, (i * i) % 40) for i in range(200)])


@pytest.mark.parametrize("policy", [*POLICIES, "predictor:lru", "drbd-al:9", "drbd-pmem:9"])
def test_every_policy_has_a_name(policy: str) -> None:
    result = replay(TRACE, policy, replace(PERFECT, record_limit_bytes=16 * MIB))
    assert result.policy == policy
    assert result.violations == 0
    found = result.to_json()
    assert found["policy"] == policy
    assert found["updates_per_1000_writes"] == result.waited_updates * 5
    assert len(found["hit_rate"]["values"]) == 60
    assert result.waits_per_1000 == result.waited_writes * 5


def test_limits_are_those_that_a_policy_keeps_to() -> None:
    params = Params(record_limit_bytes=18 * MIB, extent_bytes=2 * MIB)

    def limits(policy: str) -> tuple[int, int, bool]:
        found = replay(TRACE, policy, params)
        return found.extent_size_bytes, found.record_limit_bytes, found.limited

    assert limits("superset") == (2 * MIB, 18 * MIB, True)
    assert limits("belady") == (2 * MIB, 18 * MIB, True)
    assert limits("drbd-al") == (4 * MIB, 16 * MIB, True)
    assert limits("drbd-al:9") == (4 * MIB, 36 * MIB, True)
    assert limits("md-bitmap") == (64 * MIB, 18 * MIB, False)


def test_a_policy_may_be_given_as_a_function() -> None:
    seen: list[Geometry] = []

    def factory(geometry: Geometry) -> SupersetPolicy:
        seen.append(geometry)
        return SupersetPolicy(geometry)

    found = replay(TRACE, factory)
    assert found == replay(TRACE, "superset")
    assert seen == [Geometry(64 * MIB, MIB, 64 << 10)]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("drdb-al", "policy 'drdb-al' is not known", "did you mean 'drbd-al'?"),
        ("xyzzy", "policy 'xyzzy' is not known", "known are: superset, drbd-al,"),
        ("lru:9", "policy 'lru:9' is not known", "did you mean 'lru'?"),
        ("drbd-al:x", "'x' is not a number of slots", ""),
        ("drbd-al:0", "'0' is not a number of slots", ""),
        ("predictor:supreset", "predictor 'supreset' is not known", "did you mean 'superset'?"),
    ],
)
def test_a_name_that_is_not_known(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_model(TRACE, name, PERFECT)
    assert message in caught.value.message
    assert hint in str(caught.value.hint or "")


def test_without_dirty_bytes_there_is_no_ratio() -> None:
    result = replay(extents([(0.0, 1)]), "lru")
    assert result.superset_ratio is None
    assert result.to_json()["superset_ratio"] is None
    assert replay(TRACE, "lru").to_json()["superset_ratio"] > 1


# -- recommendations ----------------------------------------------------------------------
def streams() -> Trace:
    """Four sequential streams, and places that come back: large extents pay off."""
    requests = []
    for i in range(1500):
        requests.append(Request(i * 0.05, True, (i % 4) * 256 * MIB + i // 4 * 65536, 65536))
        if i % 3 == 0:
            requests.append(Request(i * 0.05, True, 1024 * MIB + (i % 30) * MIB, 4096))
    return make_trace("streams", requests)


def test_settings_are_those_that_were_best() -> None:
    trace, told = streams(), list[float]()
    found = recommend(trace, 512 * MIB, Params(), tell=told.append)
    assert found.record_limit_bytes <= 512 * MIB
    assert found.record_limit_bytes >= 64 * found.extent_size_bytes
    assert found.predictor in ("superset", "lru")
    assert told == sorted(told)
    assert told[-1] == 1.0
    best = min(result.waited_updates for result in found.tried)
    assert found.chosen.waited_updates <= max(best * 1.03, best + len(trace) / 1000)
    assert found.chosen.extent_size_bytes == found.extent_size_bytes
    text = "\n".join(found.reasons)
    assert "extent_size: record updates that a write waits for" in text
    assert "512 MiB" in text
    # A larger extent than the budget has room for 64 of was not tried.
    assert max(r.extent_size_bytes for r in found.tried) == 4 * MIB


def test_settings_that_hardly_ever_wait_are_alike_and_the_least_to_copy_is_chosen() -> None:
    """A share of one update would make large extents, and much to copy, of a second one."""
    trace = extents([(i * 0.01, i % 2 * 3) for i in range(6000)])
    found = recommend(trace, 6720 * MIB, Params(), predictors=["lru"])
    by_size = {r.extent_size_bytes: r.waited_updates for r in reversed(found.tried)}
    assert by_size[16 * MIB] == 1 < by_size[MIB] <= 7
    assert found.extent_size_bytes < 16 * MIB
    assert found.chosen.waited_updates <= 1 + 6
    assert found.chosen.mean_resync_bytes == min(
        r.mean_resync_bytes for r in found.tried if r.waited_updates <= 1 + 6
    )


def test_what_a_crash_may_make_us_copy_is_the_limit_that_was_chosen() -> None:
    trace = extents([(i * 0.01, i % 3) for i in range(1200)])
    found = recommend(trace, 1024 * MIB, Params(), extent_sizes=[MIB], predictors=["lru"])
    (said,) = [reason for reason in found.reasons if reason.startswith("record_limit: ")]
    assert found.record_limit_bytes == 64 * MIB
    assert "a crash may make us copy 64.0 MiB, where 1.0 GiB would be accepted" in said
    assert not any("says little" in reason for reason in found.reasons)


def test_a_short_trace_says_little() -> None:
    trace = extents([(i * 0.01, i % 3) for i in range(999)])
    found = recommend(trace, 1024 * MIB, Params(), extent_sizes=[MIB], predictors=["lru"])
    assert "a trace of 999 writes says little" in found.reasons[-1]


def test_the_limit_is_halved_while_that_costs_nothing() -> None:
    trace = extents([(i * 0.01, i % 3) for i in range(600)])
    found = recommend(trace, 1024 * MIB, Params(), extent_sizes=[MIB], predictors=["lru"])
    assert found.record_limit_bytes == 64 * MIB
    assert [r.record_limit_bytes // MIB for r in found.tried] == [1024, 512, 256, 128, 64]


def test_halving_ends_when_it_costs_something() -> None:
    trace = extents([(i * 0.5, i % 100) for i in range(900)])
    found = recommend(trace, 256 * MIB, Params(), extent_sizes=[MIB], predictors=["lru"])
    assert found.record_limit_bytes == 128 * MIB
    assert found.tried[-1].record_limit_bytes == 64 * MIB


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="not enough for a record of 64 extents") as caught:
        recommend(TRACE, MIB, Params())
    assert "at least 4.0 MiB" in str(caught.value.hint)


def test_extents_that_a_volume_cannot_have_are_not_tried() -> None:
    trace = make_trace("t", [Request(0, True, 8 << 40, 4096), Request(5, True, 0, 4096)])
    found = recommend(trace, 1 << 30, Params(), extent_sizes=[65536, MIB], predictors=["lru"])
    assert {result.extent_size_bytes for result in found.tried} == {MIB}


# -- pictures -----------------------------------------------------------------------------
def results() -> list[Result]:
    return [
        replay(TRACE, policy, replace(PERFECT, record_limit_bytes=limit * MIB, queue_depth=depth))
        for depth in (1, 32)
        for policy in ("superset", "drbd-al", "dm-mirror", "md-bitmap")
        for limit in (4, 16)
    ]


def test_bars_are_in_eighths_and_cut_off() -> None:
    assert bar(0.0, 4) == ""
    assert bar(0.5, 4) == "██"
    assert bar(1.0, 4) == "████"
    assert bar(0.53125, 4) == "██▏"
    assert bar(1.01, 4) == "███▶"


def test_a_sparkline_has_a_character_for_each_value() -> None:
    assert sparkline([0.0, 0.5, 0.99, 1.0, None]) == "▁▅██ "


def test_the_chart_of_updates() -> None:
    found = results()
    lines = list(updates_chart(found))
    assert lines[0] == "t: record updates waited for, per 1,000 writes, queue depth 1"
    assert lines[1].split()[:3] == ["4", "MiB", "superset"]
    assert sum("dm-mirror" in line for line in lines) == 4
    assert "▶" in next(line for line in lines if "dm-mirror" in line)
    assert limit_text(found[0]) == "4 MiB"
    only = [r for r in found if r.policy == "dm-mirror"][:1]
    assert "█" * 40 + " 1000.0" in list(updates_chart(only))[1]
    nothing = replace(only[0], waited_updates=0)
    assert list(updates_chart([nothing]))[1].endswith("0.0")


def test_the_chart_of_hit_rates() -> None:
    lines = list(hit_rate_chart(results()))
    assert sum("superset" in line for line in lines) == 2
    assert lines[0].endswith("queue depth 1")
    assert lines[3].rstrip().endswith("0.0%")


def test_the_picture_is_well_formed_and_shows_everything() -> None:
    found = [*results(), replay(extents([(0.0, 1), (9.0, 2)]), "lru")]
    found[0] = replace(found[0], trace="<a & b>")
    root = ElementTree.fromstring(render(found))  # noqa: S314  (our own text)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    for policy in ("superset", "drbd-al", "dm-mirror", "md-bitmap", "lru"):
        assert policy in texts
    assert "<a & b>, queue depth 1" in texts
    assert "t, queue depth 32" in texts
    for name in ("x", "y", "cx", "cy", "width", "height"):
        for element in root.iter():
            if name in element.attrib:
                assert -50 <= float(element.attrib[name]) <= 3000


def test_a_picture_of_nothing_much() -> None:
    empty = replace(
        replay(extents([(0.0, 1)]), "lru"),
        waited_updates=0,
        mean_resync_bytes=0.0,
        p99_resync_bytes=0,
        hit_rate=HitRate(0.0, (None, None)),
    )
    ElementTree.fromstring(render([empty]))  # noqa: S314
