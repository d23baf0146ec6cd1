"""The simulator's restatement of gate and store against both of them, on simulated devices.

Same trace, same eras, same seconds: every call that a policy gets and every answer it gives, every
write of the record, and what is recorded and stored in the end have to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from bitmapd.gate.gate import Gate
from bitmapd.media.buffers import aligned
from bitmapd.predict.lru import LruPolicy
from bitmapd.predict.policy import Policy
from bitmapd.predict.superset import SupersetPolicy
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import EXTENTS_PER_PAGE
from bitmapd.record.store import RecordStore
from dmctl.simulate.eras import plan_eras
from dmctl.simulate.model import NEVER_S
from dmctl.simulate.params import Params
from dmctl.simulate.replay import drive
from dmctl.simulate.superset import TICK_S, GateModel
from dmctl.simulate.trace import Request, Trace, make_trace
from tests.support.machines import examples
from tests.support.policies import Forgetful
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop, drain

EXTENT = 4096
EXTENTS = EXTENTS_PER_PAGE + 64  # two pages of the record
SIZE = EXTENTS * EXTENT

Call = tuple[Any, ...]


class Overheard(Forgetful):
    """A policy that writes down what it is asked and what it answers."""

    name = "overheard"

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.calls: list[Call] = []

    def wrote(self, first: int, stop: int, now_s: float, hit: bool) -> None:
        self.calls.append(("wrote", first, stop, now_s, hit))
        self.inner.wrote(first, stop, now_s, hit)

    def predict(
        self, first: int, stop: int, now_s: float, limit: int, recorded: int
    ) -> Sequence[tuple[int, int]]:
        answer = self.inner.predict(first, stop, now_s, limit, recorded)
        self.calls.append(("predict", first, stop, now_s, limit, recorded, list(answer)))
        return answer

    def added(self, first: int, stop: int, now_s: float) -> None:
        self.calls.append(("added", first, stop, now_s))
        self.inner.added(first, stop, now_s)

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        extents = list(extents)
        self.calls.append(("dropped", extents, now_s))
        self.inner.dropped(extents, now_s)

    def wants(self, extent: int, now_s: float) -> bool:
        answer = self.inner.wants(extent, now_s)
        self.calls.append(("wants", extent, now_s, answer))
        return answer

    def expired(self, now_s: float) -> Sequence[int]:
        answer = self.inner.expired(now_s)
        self.calls.append(("expired", now_s, list(answer)))
        return answer

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        answer = self.inner.victims(count, is_clean, now_s)
        self.calls.append(("victims", count, now_s, list(answer)))
        return answer


class Erratic(Forgetful):
    """A policy that says what chance tells it, against the rules too: the gate looks for itself."""

    name = "erratic"

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def some(self, most: int) -> list[int]:
        edge = EXTENTS_PER_PAGE
        pool = [*range(34), *range(edge - 8, edge + 12)]
        return self.rng.sample(pool, self.rng.randint(0, most))

    def wrote(self, first: int, stop: int, now_s: float, hit: bool) -> None:
        """Nothing is learnt."""

    def predict(
        self, first: int, stop: int, now_s: float, limit: int, recorded: int
    ) -> Sequence[tuple[int, int]]:
        return [(extent, extent + self.rng.randint(1, 3)) for extent in self.some(3)]

    def added(self, first: int, stop: int, now_s: float) -> None:
        """Nothing is learnt."""

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        """Nothing is learnt."""

    def wants(self, extent: int, now_s: float) -> bool:
        return self.rng.random() < 0.5

    def expired(self, now_s: float) -> Sequence[int]:
        return self.some(10)

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        return [*self.some(20), *self.some(2)]


class Real:
    """Gate and store with the events that the simulator's driver would make."""

    def __init__(self, trace: Trace, params: Params, policy: Policy, limit: int) -> None:
        self.geometry = Geometry(SIZE, EXTENT, EXTENT)
        image = blank_image(self.geometry)
        self.loop = SimLoop()
        self.record = SimDisk("record", len(image), image)
        self.primary = SimDisk("primary", SIZE, b"")
        self.store = RecordStore(
            self.geometry, load_image(image), self.record, self.loop, lambda *a, **k: None
        )
        self.gate = Gate(
            self.geometry, self.primary, self.store, policy, self.loop, limit_extents=limit
        )
        self.trace, self.params = trace, params
        self.eras = plan_eras(trace, params).eras
        self.ended = self.settled = self.ticks = 0

    def due(self) -> tuple[float, str]:
        ends_s = self.eras[self.ended].ended_s if self.ended < len(self.eras) else NEVER_S
        settles_s = self.eras[self.settled].settled_s if self.settled < self.ended else NEVER_S
        tick_s = (self.ticks + 1) * TICK_S
        return min((settles_s, "a settle"), (ends_s, "b end"), (tick_s, "c tick"))

    def elapse(self, until_s: float) -> None:
        while (due := self.due())[0] <= until_s:
            self.loop.now_s, what = due
            if what == "b end":
                self.gate.take_era(lambda: None)
                self.ended += 1
            elif what == "c tick":
                self.ticks += 1
                self.gate.tick()
            else:
                self.settled += 1
                for first, stop in list(self.gate.taken.runs()):
                    self.gate.copied(first, stop)
                self.gate.settle(sorted(self.gate.begin_settle()))
            drain(self.loop, self.record, self.primary)

    def run(self) -> None:
        times, at = self.trace.time_s, 0
        while at < len(times):
            self.elapse(times[at])
            self.loop.now_s = times[at]
            due_s = self.due()[0]
            answers: list[OSError | None] = []
            stop = at
            while (
                stop < len(times)
                and stop - at < self.params.queue_depth
                and times[stop] < due_s
                and times[stop] <= times[at] + self.params.record_latency_s
            ):
                first = self.trace.first_byte[stop]
                self.gate.write(first, aligned(self.trace.end_byte[stop] - first), answers.append)
                stop += 1
                if self.params.queue_depth == 1:
                    break
            drain(self.loop, self.record, self.primary)
            assert answers == [None] * (stop - at)
            at = stop
        self.elapse(self.trace.end_s)

    def recorded(self) -> set[int]:
        return {e for first, stop in self.store.recorded_runs() for e in range(first, stop)}

    def stored(self) -> set[int]:
        bits = load_image(bytes(self.record.durable)).bits
        return {extent for extent in range(EXTENTS) if bits[extent]}


# Most writes come soon after one another, at few places, before and after eras and seconds end.
places = st.one_of(
    st.integers(0, 5),
    st.integers(0, 30),
    st.integers(EXTENTS_PER_PAGE - 4, EXTENTS_PER_PAGE + 3),
)
pauses = st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.1, 0.2, 0.3, 0.45, 1.0, 1.5, 7.0, 40.0, 150.0])
writes = st.lists(st.tuples(pauses, places, st.integers(1, 4)), min_size=2, max_size=80)


def make(steps: Sequence[tuple[float, int, int]]) -> Trace:
    now_s, requests = 0.0, []
    for pause_s, extent, count in steps:
        now_s += pause_s
        requests.append(Request(now_s, True, extent * EXTENT, count * EXTENT))
    return make_trace("t", requests, SIZE)


@settings(
    max_examples=examples(120), deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
@given(
    steps=writes,
    limit=st.integers(1, 40),
    depth=st.sampled_from([1, 2, 32]),
    kind=st.sampled_from(["superset", "lru", "erratic"]),
    link=st.sampled_from([1e9, 20_000.0]),
    round_trip_s=st.sampled_from([0.0, 0.05, 0.2]),
    era_s=st.sampled_from([0.2, 1.0]),
    seed=st.integers(0, 99),
)
@example(
    steps=[
        (7.0, 21, 1),
        (0.1, 29, 1),
        (0.3, 4, 4),
        (1.0, 31487, 2),
        (0.01, 26, 3),
        (0.2, 5, 2),
        (0.45, 31487, 1),
        (0.1, 0, 3),
        (0.3, 1, 2),
        (1.5, 1, 4),
        (1.5, 5, 3),
        (0.1, 1, 4),
        (0.0, 31486, 4),
        (0.0, 21, 1),
    ],
    limit=6,
    depth=32,
    kind="superset",
    link=1e9,
    round_trip_s=0.0,
    era_s=1.0,
    seed=17,
)
def test_the_restatement_does_what_gate_and_store_do(
    steps: list[tuple[float, int, int]],
    limit: int,
    depth: int,
    kind: str,
    link: float,
    round_trip_s: float,
    era_s: float,
    seed: int,
) -> None:
    trace = make(steps)
    params = Params(
        extent_bytes=EXTENT,
        block_bytes=EXTENT,
        queue_depth=depth,
        link_bytes_per_s=link,
        link_round_trip_s=round_trip_s,
        era_interval_s=era_s,
    )

    def new_policy() -> Overheard:
        if kind == "erratic":
            return Overheard(Erratic(Random(seed)))
        geometry = Geometry(SIZE, EXTENT, EXTENT)
        return Overheard(SupersetPolicy(geometry) if kind == "superset" else LruPolicy(geometry))

    ours, theirs = new_policy(), new_policy()
    model = GateModel(trace, params, plan_eras(trace, params), ours, limit)
    drive(trace, model)
    model.elapse(trace.end_s)
    real = Real(trace, params, theirs, limit)
    real.run()
    assert ours.calls == theirs.calls
    assert model.meter.waited_updates == real.store.updates
    assert model.meter.record_writes == real.store.updates + real.store.clears
    assert model.recorded == real.store.recorded_extents
    recorded = {e for e in range(EXTENTS) if model._wanted[e]}
    assert recorded == real.recorded()
    assert {e for e in range(EXTENTS) if model.covers(e, e + 1)} == real.stored()
    assert model.meter.stored.value == len(real.stored())
    assert model.meter.violations == 0
