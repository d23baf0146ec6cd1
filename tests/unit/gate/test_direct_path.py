"""attach/direct: what a barrier asks of the kernel, and what its answer means."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bitmapd.gate.direct import (
    BarrierDone,
    Counters,
    DirectPath,
    HostCounters,
    Landed,
    PutOffError,
    SwapDone,
)
from bitmapd.gate.routes import DIRECT, GATE, GROWTH_HITS, Routes, Run, Segment
from bitmapd.record.geometry import Geometry

BLOCK = 4096
EXTENT = 2 * BLOCK
GEOMETRY = Geometry(5 * EXTENT - BLOCK - 512, EXTENT, BLOCK)  # 9 blocks; the last ones are short


class Helper:
    """A `Kernel` that is answered by hand."""

    def __init__(self) -> None:
        self.now = Counters(0, 0)
        self.in_flight = 0
        self.asked: list[tuple[Sequence[Segment] | None, int]] = []
        self.done: BarrierDone = lambda error, landed: None
        self.swaps: list[Sequence[Segment]] = []
        self.swapped: SwapDone = lambda error, window_s: None

    def counters(self) -> Counters:
        return self.now

    def host_counters(self) -> HostCounters:
        return HostCounters(2, 2 * BLOCK, 1, 3, self.in_flight)

    def barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        self.asked.append((segments, since_era))
        self.done = done

    def swap(self, segments: Sequence[Segment], done: SwapDone) -> None:
        self.swaps.append(segments)
        self.swapped = done


MARK_S = 0.001


class Bench:
    """A direct path on a helper, and what it said."""

    def __init__(self) -> None:
        self.helper = Helper()
        self.routes = Routes()
        self.events: list[dict[str, Any]] = []
        self.path = DirectPath(
            GEOMETRY, self.helper, self.routes, self.emit, since_era=7, mark_s=MARK_S
        )
        self.got: list[Sequence[Run] | None] = []
        self.ended = 0
        self.path.on_ended = self.count

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def count(self) -> None:
        self.ended += 1

    def begin(self, *recorded: Run) -> None:
        self.path.barrier(recorded, self.got.append)

    def land(self, *runs: Run, era: int = 7, window_s: float = 0.0, skipped: bool = False) -> None:
        self.helper.done(None, Landed(runs, era, window_s, skipped))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_eras_are_collected_without_a_gap(bench: Bench) -> None:
    assert bench.path.collected_era == 6
    bench.begin()
    bench.land(era=7)
    bench.begin()
    bench.helper.done(OSError(errno.ETIMEDOUT, "a write hangs"), None)
    bench.begin()
    bench.land(era=9)
    bench.begin()
    assert bench.helper.asked == [(None, 7), (None, 8), (None, 8), (None, 10)]
    assert bench.path.collected_era == 9


def test_the_blocks_come_as_they_are_but_for_what_is_beyond_the_end(bench: Bench) -> None:
    bench.routes.adopt([])
    bench.begin((0, 5))
    bench.land((0, 1), (3, 4), (8, 10), (10, 12))
    assert bench.got == [[(0, 1), (3, 4), (8, 9)]]
    assert bench.ended == 1


def test_a_table_is_asked_for_in_segments(bench: Bench) -> None:
    bench.routes.gated_hit(4, 5)
    bench.begin((4, 5))
    ((segments, _),) = bench.helper.asked
    assert segments == [(0, 4 * EXTENT, GATE), (4 * EXTENT, GEOMETRY.size_bytes, DIRECT)]
    assert bench.routes.is_open(4)
    bench.land()
    assert bench.routes.count_direct == 1


def test_what_the_kernel_did_not_count_may_have_been_written(bench: Bench) -> None:
    for _ in range(2):
        bench.begin()
        bench.land()
    assert not bench.path.written
    bench.helper.now = Counters(0, 0, lapses=1)
    assert bench.path.written
    for _ in range(2):
        bench.begin()
        bench.land()
    assert not bench.path.written


def test_2_after_a_barrier_that_failed_anything_may_have_been_written(bench: Bench) -> None:
    """It may have begun to count again what was not counted, and its answer did not arrive."""
    for _ in range(2):
        bench.begin()
        bench.land()
    assert not bench.path.written
    bench.begin()
    bench.helper.done(OSError(errno.EPIPE, "the helper has died"), None)
    assert bench.path.written
    bench.begin()
    bench.land()
    assert bench.path.written
    assert bench.path.at_rest
    bench.begin()
    bench.land()
    assert not bench.path.written


def test_what_is_told_of_the_extents_written_decides_which_runs_stay() -> None:
    bench = Bench()
    bench.routes = bench.path.routes = Routes(max_segments=3)
    bench.begin((0, 1), (2, 4))
    bench.land((0, 1))  # the first block of extent 0
    bench.routes.adopt([])
    bench.begin((0, 1), (2, 4))
    assert bench.routes.is_open(0)
    assert not bench.routes.is_open(2)


def test_a_write_that_is_not_counted_before_it_ends_is_seen_in_flight(bench: Bench) -> None:
    for era in (7, 8):
        bench.begin()
        bench.land(era=era)
    assert not bench.path.being_written
    bench.helper.in_flight = 1
    assert bench.path.being_written
    assert not bench.path.written
    bench.helper.in_flight = 0
    bench.helper.now = Counters(BLOCK, 0)
    assert bench.path.being_written


def test_one_barrier_at_a_time(bench: Bench) -> None:
    bench.begin()
    with pytest.raises(RuntimeError, match="under way"):
        bench.begin()
    bench.land()
    bench.begin()
    assert len(bench.helper.asked) == 2


def test_marks_that_cannot_be_read_mean_that_all_of_the_record_was_written(bench: Bench) -> None:
    bench.begin((0, 2), (4, 5))
    bench.helper.done(None, Landed((), 7, 0.0, damage="bad checksum"))
    assert bench.got == [[(0, 4), (8, 9)]]
    (event,) = bench.events
    assert event["event"] == "era-damaged"
    assert "bad checksum" in event["message"]
    bench.begin()
    assert bench.helper.asked[-1] == (None, 8)


def test_what_lies_beyond_the_kernels_devices_goes_into_no_table(bench: Bench) -> None:
    size, beyond = GEOMETRY.size_bytes, (GEOMETRY.extents, GEOMETRY.extents + 3)
    bench.routes.gated_hit(0, 1)
    bench.begin((0, 1), (4, 9), beyond)
    table = [(0, EXTENT, DIRECT), (EXTENT, 4 * EXTENT, GATE), (4 * EXTENT, size, DIRECT)]
    assert bench.helper.asked[-1][0] == table
    bench.helper.done(None, Landed((), 7, 0.0, damage="bad checksum"))
    assert bench.got == [[(0, 2), (8, 9)]]
    for _ in range(GROWTH_HITS):
        bench.routes.gated_hit(1, 2)
    bench.path.grow([(0, 2), (4, 9), beyond], lambda: None)
    table = [(0, 2 * EXTENT, DIRECT), (2 * EXTENT, 4 * EXTENT, GATE), (4 * EXTENT, size, DIRECT)]
    assert bench.helper.swaps == [table]


def test_larger_devices_take_the_place_of_those_that_hosts_have(bench: Bench) -> None:
    path, old = bench.path, bench.helper
    bench.routes.gated_hit(0, 1)
    bench.begin((0, 1))
    bench.land()
    with pytest.raises(RuntimeError, match="past the gate"):
        path.let_go()
    path.is_closing = True
    path.still(wanted=False)
    for _ in range(2):
        bench.begin((0, 1))
        bench.land()
    assert path.is_still
    path.let_go()
    bench.got.clear()
    bench.routes.gated_hit(0, 1)
    old.now, asked = Counters(BLOCK, 0), len(old.asked)
    assert (path.wants_barrier, path.is_urgent, path.can_grow) == (False, False, False)
    bench.begin((0, 1))  # there is nothing that it could bring
    assert (bench.got, len(old.asked)) == ([()], asked)
    assert path.host_load == (6, 2 * BLOCK)

    new = Helper()
    larger = replace(GEOMETRY, size_bytes=GEOMETRY.size_bytes + EXTENT)
    path.go_on(larger, new, since_era=3, mark_s=MARK_S)
    assert path.written, "nothing is known of them"
    assert path.wants_barrier
    bench.begin((0, 1), (4, 9))
    ((segments, since_era),) = new.asked
    assert segments is not None
    assert (segments[0][2], segments[-1][1], since_era) == (DIRECT, larger.size_bytes, 3)


def test_a_barrier_that_is_put_off_is_no_failure_and_is_told_once(bench: Bench) -> None:
    bench.routes.gated_hit(0, 1)
    for _ in range(2):
        bench.begin((0, 1))
        bench.helper.done(PutOffError(errno.ENOBUFS, "at work"), None)
    assert bench.got == [None, None]
    assert [event["event"] for event in bench.events] == ["barrier-put-off"]
    assert (bench.path.put_off, bench.path.failures, bench.path.tried) == (2, 0, 2)
    assert bench.routes.is_open(0)
    bench.begin((0, 1))
    bench.land()
    bench.begin((0, 1))
    bench.helper.done(PutOffError(errno.ENOBUFS, "at work"), None)
    assert len(bench.events) == 2
    assert {asked for _, asked in bench.helper.asked} == {7, 8}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ETIMEDOUT, "a write hangs"), "a write hangs"),
        (OSError("it ended"), "it ended"),
        (None, "no reason"),
    ],
)
def test_a_failure_is_told_and_brings_nothing(
    bench: Bench, error: OSError | None, reason: str
) -> None:
    bench.routes.gated_hit(0, 1)
    bench.begin((0, 1))
    bench.helper.done(error, None)
    assert bench.got == [None]
    (event,) = bench.events
    assert event["event"] == "barrier-error"
    assert event["message"].endswith(reason)
    assert bench.routes.is_open(0), "its table may be in force"
    assert (bench.path.barriers, bench.path.failures, bench.path.tried) == (0, 1, 1)
    assert bench.ended == 1


def rest(bench: Bench, *recorded: Run) -> None:
    """Barriers until nothing is unknown."""
    for _ in range(2):
        bench.begin(*recorded)
        bench.land()
    assert not bench.path.written


def test_nothing_is_unknown_after_two_barriers_and_as_many_equal_readings(bench: Bench) -> None:
    path, helper = bench.path, bench.helper
    assert path.written, "nothing is known at first"
    assert not path.at_rest
    bench.begin()
    bench.land()
    assert path.written, "something may have been counted and not marked yet"
    assert path.at_rest
    bench.begin()
    helper.done(OSError(errno.EPIPE, "the helper died"), None)
    assert path.written
    for _ in range(2):
        bench.begin()
        bench.land()
    assert not path.written
    assert not path.at_rest
    helper.now = Counters(BLOCK, 0)
    assert path.written
    assert not path.at_rest
    bench.begin()
    helper.now = Counters(2 * BLOCK, 0)
    bench.land()
    assert path.written
    assert not path.at_rest, "something came after the reading"
    bench.begin()
    bench.land()
    assert path.written
    assert path.at_rest
    bench.begin()
    bench.land(skipped=True)
    assert not path.written
    helper.now = Counters(2 * BLOCK, 1)
    assert path.written, "a discard is a write"


def test_counters_are_the_kernels(bench: Bench) -> None:
    bench.helper.now = Counters(512, 3)
    assert bench.path.counters == Counters(512, 3)
    assert bench.path.host_counters == HostCounters(2, 2 * BLOCK, 1, 3)


def test_a_barrier_is_wanted_for_writes_tables_and_what_is_leaving(bench: Bench) -> None:
    path, routes = bench.path, bench.routes
    rest(bench, (0, 2))
    assert not path.wants_barrier
    routes.gated_hit(0, 2)
    assert path.wants_barrier
    bench.begin((0, 2))
    bench.land()
    assert not path.wants_barrier
    routes.cool([0])
    assert path.wants_barrier
    bench.begin((0, 2))
    bench.land()
    assert path.wants_barrier, "what was written before the move is not known"
    bench.begin((0, 2))
    bench.land(skipped=True)
    assert routes.closed() == [0]
    assert not path.wants_barrier
    bench.helper.now = Counters(512, 0)
    assert path.wants_barrier


def test_all_that_was_direct_before_counts_as_written_once(bench: Bench) -> None:
    """A write that was in flight at the start may be marked in an era that is not collected."""
    bench.routes.adopt([(0, 2), (4, 5)])
    bench.begin((0, 5))
    bench.helper.done(OSError(errno.ETIMEDOUT, "a write hangs"), None)
    bench.begin((0, 5))
    bench.land((3, 5), (6, 7))
    assert bench.got == [None, [(0, 5), (6, 7), (8, 9)]]
    bench.begin((0, 5))
    bench.land((6, 7))
    assert bench.got[-1] == [(6, 7)]


def test_what_another_one_takes_over_stays_at_the_gate(bench: Bench) -> None:
    bench.path.is_closing = True
    bench.path.still(wanted=True)
    bench.path.still(wanted=False)
    assert bench.routes.is_gating


def test_figures(bench: Bench) -> None:
    for window_s, skipped in ((0.5, False), (0.25, False), (0.0, True)):
        bench.begin()
        bench.land(window_s=window_s, skipped=skipped)
    path = bench.path
    assert (path.barriers, path.skipped, path.failures) == (3, 1, 0)
    assert (path.window_s_total, path.window_s_last, path.window_s_max) == (0.75, 0.0, 0.5)


def test_nobody_needs_to_be_told_that_a_barrier_ended() -> None:
    bench = Bench()
    bench.path = DirectPath(GEOMETRY, bench.helper, bench.routes, bench.emit, since_era=1)
    bench.begin()
    bench.land()
    assert bench.got == [[]]


def test_the_table_grows_and_no_era_ends(bench: Bench) -> None:
    grown: list[str] = []
    for _ in range(GROWTH_HITS):
        bench.routes.gated_hit(1, 2)
    assert bench.path.can_grow
    bench.path.grow([(0, 2)], lambda: grown.append("grown"))
    assert not bench.path.can_grow, "one at a time"
    with pytest.raises(RuntimeError, match="under way"):
        bench.begin()
    with pytest.raises(RuntimeError, match="under way"):
        bench.path.grow([(0, 2)], lambda: None)
    assert not grown
    bench.helper.swapped(None, 0.25)
    assert grown == ["grown"]
    extents = 2 * GEOMETRY.extent_bytes
    assert bench.helper.swaps == [
        [(0, min(extents, GEOMETRY.size_bytes), DIRECT)]
        + ([(extents, GEOMETRY.size_bytes, GATE)] if extents < GEOMETRY.size_bytes else [])
    ]
    assert (bench.path.held_s, bench.path.collected_era, bench.path.barriers) == (
        (0.25, 0.25),
        6,
        0,
    )
    bench.begin((0, 2))
    assert bench.helper.asked == [(None, 7)]


def test_growth_that_failed_is_told_and_a_barrier_loads_the_table(bench: Bench) -> None:
    for _ in range(GROWTH_HITS):
        bench.routes.gated_hit(1, 2)
    grown: list[str] = []
    bench.path.grow([(0, 2)], lambda: grown.append("ended"))
    bench.helper.swapped(OSError(errno.ETIMEDOUT, "a write hangs"), 0.0)
    assert grown == ["ended"]
    assert bench.events[-1]["event"] == "barrier-error"
    assert not bench.path.can_grow
    bench.begin((0, 2))
    assert bench.helper.asked[0][0] is not None


def test_nothing_grows_while_another_node_waits(bench: Bench) -> None:
    bench.routes.gated_hit(0, 1)
    bench.begin((0, 1))
    bench.land()
    for _ in range(GROWTH_HITS):
        bench.routes.gated_hit(1, 2)
    assert bench.path.can_grow
    bench.path.leave([0], lambda: None)
    assert not bench.path.can_grow
