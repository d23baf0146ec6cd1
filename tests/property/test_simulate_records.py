"""What holds for every model, whatever the trace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bitmapd.record.geometry import MIB
from dmctl.simulate.eras import plan_eras
from dmctl.simulate.model import Link, Model
from dmctl.simulate.paging import Belady, Lru
from dmctl.simulate.params import Params
from dmctl.simulate.replay import POLICIES, drive, make_model, replay
from dmctl.simulate.trace import Request, Trace, make_trace
from tests.support.machines import examples

SIZE = 256 * MIB
PIECE = 64 << 10

# Most writes lie close together; some are large, some cross the edges of any unit.
places = st.one_of(st.integers(0, 40), st.integers(0, SIZE // PIECE - 90))
lengths = st.sampled_from([512, 4096, PIECE, 3 * PIECE, 5 * MIB])
pauses = st.sampled_from([0.0, 0.0, 0.0001, 0.0005, 0.1, 1.0, 3.0, 6.0, 31.0, 90.0])
steps = st.lists(st.tuples(pauses, places, lengths), min_size=1, max_size=50)
params = st.builds(
    Params,
    record_limit_bytes=st.sampled_from([8 * MIB, 24 * MIB, 128 * MIB]),
    queue_depth=st.sampled_from([1, 4, 32]),
    link_bytes_per_s=st.sampled_from([1e15, 1e6, 2e5]),
    link_round_trip_s=st.sampled_from([0.0, 0.01, 2.0]),
    record_latency_s=st.sampled_from([0.0001, 0.01]),
    era_interval_s=st.sampled_from([0.2, 1.0, 5.0]),
)


def make(moves: Sequence[tuple[float, int, int]]) -> Trace:
    now_s, requests = 0.0, []
    for pause_s, place, length in moves:
        now_s += pause_s
        requests.append(Request(now_s, True, place * PIECE + 1024, length))
    return make_trace("t", requests, SIZE)


# Without shrinking, which takes longer than a test may last.
QUICK = settings(
    max_examples=examples(40), deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)


class Truth:
    """When each write is durable on both sides, found out beside the model."""

    def __init__(self, trace: Trace, model: Model, wanted: Params) -> None:
        self.trace, self.unit = trace, model.unit_bytes
        self.dirty: list[tuple[float, int, int]] = []
        link = getattr(model, "_link", None)
        if isinstance(link, Link):
            # The model says when it sends, the link when that arrives.
            send = link.send

            def noted(now_s: float, length: int, first: int, stop: int) -> float:
                until_s = send(now_s, length, first, stop)
                self.dirty.append((until_s, first, stop))
                return until_s

            link.send = noted  # type: ignore[method-assign]
        self.eras = None if isinstance(link, Link) else plan_eras(trace, wanted).eras

    def landed(self, first: int, stop: int) -> None:
        for era in self.eras or ():
            for write in range(max(first, era.first), min(stop, era.stop)):
                low = self.trace.first_byte[write] // self.unit
                high = (self.trace.end_byte[write] - 1) // self.unit + 1
                self.dirty.append((era.settled_s, low, high))

    def check(self, model: Model, now_s: float) -> None:
        now_s = max(now_s, model.clock_s)
        self.dirty = [entry for entry in self.dirty if entry[0] > now_s]
        for _, first, stop in self.dirty:
            assert model.covers(first, stop), (now_s, first, stop)


BOUNDED = ("lru", "belady")  # theirs is a perfect link: nothing is ever dirty


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in BOUNDED] + ["predictor:lru"])
@QUICK
@given(moves=steps, wanted=params)
def test_what_is_dirty_is_in_the_stored_record(
    policy: str, moves: list[tuple[float, int, int]], wanted: Params
) -> None:
    trace = make(moves)
    model = make_model(trace, policy, wanted)
    truth = Truth(trace, model, wanted)
    times, first = trace.time_s, 0
    while first < len(trace):
        for part in (0.3, 0.6, 1.0):
            before_s = times[max(first - 1, 0)]
            now_s = before_s + part * (times[first] - before_s) if part < 1 else times[first]
            model.elapse(now_s)
            truth.check(model, now_s)
        stop = bisect_left(times, model.due_s, first)
        if wanted.queue_depth == 1:
            stop = first + 1
        model.run(first, stop)
        truth.landed(first, stop)
        truth.check(model, times[stop - 1])
        first = stop
    for later_s in (0.1, 1, 3, 10, 40, 100, 4000):
        model.elapse(trace.end_s + later_s)
        truth.check(model, trace.end_s + later_s)
    assert model.meter.violations == 0


@pytest.mark.parametrize("policy", POLICIES)
@QUICK
@given(moves=steps, wanted=params)
def test_a_replay_adds_up_and_is_the_same_twice(
    policy: str, moves: list[tuple[float, int, int]], wanted: Params
) -> None:
    trace = make(moves)
    result = replay(trace, policy, wanted)
    assert result == replay(make(moves), policy, wanted)
    assert result.violations == 0
    assert result.writes == len(moves) == result.hits + result.waited_writes
    assert result.waited_updates <= result.record_writes
    assert (result.waited_updates > 0) == (result.waited_writes > 0)
    assert result.mean_resync_bytes <= result.max_resync_bytes + 1
    assert result.p99_resync_bytes <= result.max_resync_bytes
    assert all(v is None or 0 <= v <= 1 for v in result.hit_rate.values)
    if wanted.queue_depth == 1 and policy in BOUNDED:
        assert result.waited_updates == result.waited_writes


@QUICK
@given(touched=st.lists(st.integers(0, 12), min_size=2, max_size=120), slots=st.integers(1, 8))
def test_nothing_pages_better_than_belady(touched: list[int], slots: int) -> None:
    requests = [Request(float(i), True, e * MIB, 4096) for i, e in enumerate(touched)]
    trace = make_trace("t", requests)
    wanted = Params(record_limit_bytes=slots * MIB)
    lru, belady = Lru(trace, wanted), Belady(trace, wanted)
    drive(trace, lru)
    drive(trace, belady)
    assert len(set(touched)) <= belady.faults <= lru.faults
    assert belady.count() == lru.count() == min(slots, len(set(touched)))
    larger = Belady(trace, replace(wanted, record_limit_bytes=(slots + 1) * MIB))
    drive(trace, larger)
    assert larger.faults <= belady.faults
