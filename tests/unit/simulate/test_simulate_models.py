"""The records of others, on sequences that were worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

from bitmapd.record.geometry import MIB
from dmctl.simulate.dm import Era, MirrorLog
from dmctl.simulate.drbd import ActivityLog, PmemLog
from dmctl.simulate.eras import plan_eras
from dmctl.simulate.llbitmap import LocklessBitmap, chunk_bytes
from dmctl.simulate.md import IntentBitmap
from dmctl.simulate.model import BatchModel, Model
from dmctl.simulate.paging import Belady, Lru, Paging
from dmctl.simulate.params import GIB, Params
from dmctl.simulate.replay import drive
from dmctl.simulate.trace import Request, Trace, make_trace

PERFECT = Params(link_bytes_per_s=1e18, link_round_trip_s=0.0, record_latency_s=0.001)
M = TypeVar("M", bound=Model)
SLOW = replace(PERFECT, link_round_trip_s=10.0)


def units(unit_bytes: int, steps: Sequence[tuple[float, int]], size: int = GIB) -> Trace:
    """A write of 4 KiB into each of these units, at these times."""
    requests = [Request(at, True, unit * unit_bytes, 4096) for at, unit in steps]
    return make_trace("t", requests, size)


def at_once(model: M, writes: int) -> M:
    """Run the first writes, which come at the same time; others show that time goes on."""
    model.elapse(0.0)
    model.run(0, writes)
    return model


def sequence(unit_bytes: int, *numbers: int) -> Trace:
    """One unit a second."""
    return units(unit_bytes, list(enumerate(numbers)))


def ran(model: M, trace: Trace) -> M:
    drive(trace, model)
    return model


# -- DRBD ---------------------------------------------------------------------------------
AL = 4 * MIB


def test_the_activity_log_is_an_lru() -> None:
    trace = sequence(AL, 1, 2, 1, 3, 1, 2)  # 3 takes the place of 2, and 2 that of 3
    log = ran(ActivityLog(trace, PERFECT, 2), trace)
    assert log.meter.waited_updates == 4
    assert list(log.meter.waits) == [0, 1, 3, 5]
    assert log.meter.record_writes == log.meter.record_flushes == 4
    assert log.meter.record_written_bytes == 4 * 4096
    assert log.covers(1, 3)
    assert not log.covers(1, 4)
    assert log.meter.stored.value == 2
    assert log.meter.violations == 0


def test_a_transaction_holds_64_changes() -> None:
    trace = units(AL, [(0.0, i) for i in range(70)] + [(1.0, 0)])
    log = ran(ActivityLog(trace, replace(PERFECT, queue_depth=128), 100), trace)
    assert log.meter.waited_updates == 2
    assert len(log.meter.waits) == 70
    assert log.meter.wait_s == pytest.approx(64 * 0.001 + 6 * 0.002)
    assert log.meter.longest_wait_s == pytest.approx(0.002)


def test_a_write_keeps_what_it_has_while_the_transaction_is_full() -> None:
    requests = [Request(0.0, True, i * 30 * AL, 30 * AL) for i in range(3)]
    trace = make_trace("t", [*requests, Request(9.0, True, 0, 512)])
    log = at_once(ActivityLog(trace, replace(PERFECT, queue_depth=3), 100), 3)
    assert log.meter.waited_updates == 2  # 30 + 30 + 4, then 26
    assert log.meter.wait_s == pytest.approx(2 * 0.001 + 0.002)
    assert log.covers(0, 90)


def test_a_hit_of_several_extents_needs_no_transaction() -> None:
    trace = make_trace("t", [Request(at, True, AL - 4096, 8192) for at in (0.0, 1.0)])
    log = ran(ActivityLog(trace, PERFECT, 8), trace)
    assert log.meter.waited_updates == 1
    assert len(log.meter.waits) == 1


def test_everything_waits_while_the_log_is_starving() -> None:
    # Both slots are held for 10 s; the third write waits for the first, and the hit behind it too.
    trace = units(AL, [(0.0, 1), (1.0, 2), (2.0, 3), (3.0, 2)])
    log = ran(ActivityLog(trace, SLOW, 2), trace)
    assert log.meter.stalls == 1
    assert log.meter.stall_s == pytest.approx(8.0, abs=0.01)
    assert log.meter.longest_wait_s == pytest.approx(8.001, abs=0.01)
    assert not log.covers(1, 2)
    assert log.meter.violations == 0
    log.elapse(100.0)
    assert log.covers(2, 4)  # idle extents stay


def test_an_extent_in_use_is_not_given_up() -> None:
    trace = units(AL, [(0.0, 1), (0.0, 2), (10.5, 1), (11.0, 3), (11.5, 4)])
    log = ran(ActivityLog(trace, SLOW, 3), trace)
    assert log.meter.stalls == 0
    assert log.covers(1, 2)  # 2 went, though 1 was recorded before it
    assert not log.covers(2, 3)


def test_a_discard_comes_in_pieces() -> None:
    trace = make_trace("t", [Request(0.0, True, 0, 40 * AL), Request(1.0, True, 0, 4096)])
    log = ran(ActivityLog(trace, PERFECT, 100), trace)
    assert log.meter.waited_updates == 1
    assert len(log.meter.waits) == 1
    small = ran(ActivityLog(trace, PERFECT, 10), trace)
    assert small.meter.waited_updates == 5  # four pieces of ten, then extent 0 again
    assert small.meter.stalls == 3


def test_on_persistent_memory_each_change_is_a_store() -> None:
    trace = units(AL, [(0.0, i) for i in range(70)] + [(9.0, 0)])
    log = at_once(PmemLog(trace, replace(PERFECT, queue_depth=128), 100), 70)
    assert log.meter.waited_updates == log.meter.record_writes == 70
    assert log.meter.record_written_bytes == 70 * 64
    assert log.meter.record_flushes == 0
    # Of one transaction's 64, then of the rest as well.
    assert log.meter.longest_wait_s == pytest.approx(70e-6)


# -- md -----------------------------------------------------------------------------------
CHUNK = 64 * MIB


def test_a_bit_is_cleared_after_two_passes_and_written_with_the_third() -> None:
    # Passes at 5 (aged), 10 (aged again after the write at 6), 15 (cleared), 20 (written).
    trace = units(CHUNK, [(0.0, 3), (1.0, 3), (6.0, 3), (100.0, 3)])
    bitmap = IntentBitmap(trace, PERFECT)
    bitmap.run(0, 2)
    assert bitmap.meter.waited_updates == 1
    bitmap.elapse(6.0)
    bitmap.run(2, 3)
    bitmap.elapse(19.9)
    assert bitmap.meter.waited_updates == 1
    assert bitmap.covers(3, 4)
    assert bitmap.meter.record.value == 0
    bitmap.elapse(20.0)
    assert not bitmap.covers(3, 4)
    bitmap.elapse(100.0)
    bitmap.run(3, 4)
    assert bitmap.meter.waited_updates == 2
    assert bitmap.meter.record_writes == 3
    assert bitmap.meter.violations == 0


def test_a_write_between_clearing_and_writing_pays() -> None:
    trace = units(CHUNK, [(0.0, 3), (12.0, 3), (40.0, 3)])
    bitmap = IntentBitmap(trace, PERFECT)
    bitmap.run(0, 1)
    bitmap.elapse(12.0)  # cleared at 10, on disk until 15
    assert bitmap.covers(3, 4)
    bitmap.run(1, 2)
    assert bitmap.meter.waited_updates == 2
    assert bitmap.meter.record_writes == 2
    bitmap.elapse(15.0)
    assert bitmap.meter.record_writes == 2
    bitmap.elapse(24.0)
    assert bitmap.covers(3, 4)
    bitmap.elapse(25.0)
    assert not bitmap.covers(3, 4)


def test_a_chunk_does_not_age_while_a_leg_is_behind() -> None:
    trace = units(CHUNK, [(0.0, 3), (1.0, 3), (99.0, 1)])
    bitmap = IntentBitmap(trace, replace(PERFECT, link_round_trip_s=12.0))
    bitmap.run(0, 2)  # durable at 12 and 13
    bitmap.elapse(24.9)
    assert bitmap.covers(3, 4)
    bitmap.elapse(25.0)  # aged at 15, cleared at 20
    assert not bitmap.covers(3, 4)
    assert bitmap.meter.violations == 0


def test_a_page_of_the_bitmap_is_32768_chunks() -> None:
    trace = units(4096, [(0.0, 0), (0.0, 32767), (0.0, 32768), (9.0, 0)])
    bitmap = at_once(IntentBitmap(trace, replace(PERFECT, queue_depth=3), 4096), 3)
    assert bitmap.meter.waited_updates == bitmap.meter.record_writes == 2
    assert len(bitmap.meter.waits) == 3


def test_a_page_without_new_bits_is_not_written() -> None:
    trace = units(4096, [(0.0, 0), (1.0, 32768), (2.0, 1)])
    bitmap = ran(IntentBitmap(trace, PERFECT, 4096), trace)
    assert bitmap.meter.waited_updates == bitmap.meter.record_writes == 3


# -- md llbitmap --------------------------------------------------------------------------
LL = 64 << 10
LL_SIZE = 256 * MIB  # 4,096 chunks: blocks of 512, pages of 3,072 and the rest


def test_chunks_double_until_there_are_few_enough() -> None:
    assert chunk_bytes(GIB) == 64 << 10
    assert chunk_bytes(31 * GIB) == 256 << 10
    assert chunk_bytes(1 << 40) == 16 * MIB


def test_the_second_dirty_chunk_of_a_block_infects_it() -> None:
    trace = units(LL, [(0.0, 0), (1.0, 0), (2.0, 5), (3.0, 100), (4.0, 600)], LL_SIZE)
    bitmap = ran(LocklessBitmap(trace, PERFECT), trace)
    assert bitmap.meter.waited_updates == bitmap.meter.record_writes == 3
    assert list(bitmap.meter.waits) == [0, 2, 4]
    assert bitmap.covers(0, 512)
    assert not bitmap.covers(512, 513)
    assert bitmap.meter.stored.value == 513
    assert bitmap.meter.record_written_bytes == 3 * 512


def test_the_last_block_ends_with_the_array() -> None:
    trace = units(LL, [(0.0, 600), (1.0, 700)], 50 * MIB)
    bitmap = ran(LocklessBitmap(trace, PERFECT), trace)
    assert bitmap.meter.stored.value == 800 - 512


def test_the_daemon_cleans_idle_pages_in_memory_only() -> None:
    trace = units(LL, [(0.0, 0), (1.0, 1), (27.0, 4000), (70.0, 2), (99.0, 2)], LL_SIZE)
    bitmap = LocklessBitmap(trace, PERFECT)
    bitmap.run(0, 2)
    bitmap.elapse(27.0)
    bitmap.run(2, 3)
    assert bitmap.due_s == 30.0
    bitmap.elapse(30.0)  # page 0 is idle, page 1 is not
    assert bitmap.meter.record.value == 1
    assert bitmap.due_s == 60.0
    bitmap.elapse(60.0)
    assert bitmap.meter.record.value == 0
    assert bitmap.meter.stored.value == 513
    assert bitmap.meter.record_writes == 3
    bitmap.elapse(70.0)
    bitmap.run(3, 4)  # the block is written with what is dirty now
    assert bitmap.meter.stored.value == 2
    assert bitmap.covers(2, 3)
    assert not bitmap.covers(0, 1)
    assert bitmap.meter.violations == 0


def test_the_timer_rests_when_every_page_was_idle() -> None:
    trace = units(LL, [(0.0, 0), (50.0, 1)], LL_SIZE)
    bitmap = LocklessBitmap(trace, PERFECT)
    bitmap.run(0, 1)
    bitmap.elapse(45.0)
    assert bitmap.due_s == float("inf")
    bitmap.elapse(50.0)
    bitmap.run(1, 2)
    assert bitmap.due_s == 80.0


def test_a_page_in_flight_is_left_out() -> None:
    trace = units(LL, [(0.0, 0), (1.0, 0), (99.0, 0)], LL_SIZE)
    bitmap = LocklessBitmap(trace, replace(PERFECT, link_round_trip_s=40.0))
    bitmap.run(0, 2)
    bitmap.elapse(30.0)
    assert bitmap.meter.record.value == 1
    bitmap.elapse(60.0)
    assert bitmap.meter.record.value == 0


# -- device-mapper ------------------------------------------------------------------------
REGION = 2 * MIB


def test_the_mirror_log_pays_twice_for_an_isolated_write() -> None:
    trace = sequence(REGION, 1, 1, 2)
    log = ran(MirrorLog(trace, PERFECT), trace)
    log.elapse(3.0)
    assert log.meter.waited_updates == 3
    assert log.meter.record_writes == 6
    assert log.meter.record_written_bytes == 6 * (1024 + 512)
    assert not log.covers(2, 3)
    assert log.meter.violations == 0


def test_the_mirror_log_pays_twice_for_a_batch() -> None:
    trace = units(REGION, [(0.0, 1), (0.0, 2), (0.0, 1), (9.0, 1)])
    log = at_once(MirrorLog(trace, replace(PERFECT, queue_depth=8)), 3)
    assert log.covers(1, 3)
    assert log.meter.stored.value == 2
    log.elapse(0.1)
    log.elapse(0.2)
    assert log.meter.record_writes == 2
    assert len(log.meter.waits) == 3
    assert log.meter.stored.value == 0


def test_a_mirror_waits_for_its_slowest_leg() -> None:
    trace = units(REGION, [(0.0, 1), (1.0, 2)])
    log = ran(MirrorLog(trace, SLOW), trace)
    assert list(log.meter.waits) == [0, 1]
    assert not log.covers(1, 2)
    assert log.covers(2, 3)


BLOCK = 64 << 10


def era_of(trace: Trace, params: Params) -> Era:
    return Era(trace, params, plan_eras(trace, params))


def test_every_era_pays_again() -> None:
    trace = units(BLOCK, [(0.0, 1), (0.5, 1), (0.6, 2), (1.0, 1), (9.0, 1)])
    era = ran(era_of(trace, PERFECT), trace)
    assert list(era.meter.waits) == [0, 2, 3, 4]
    assert era.meter.waited_updates == 4
    # Two checkpoints: that of the era that ended at 1, and that of the one that ended at 2.
    assert era.meter.record_writes == (4 + 2) * 5
    assert era.meter.record_flushes == (4 + 2) * 2
    assert era.meter.violations == 0


def test_blocks_of_an_era_count_until_they_were_copied() -> None:
    params = replace(PERFECT, link_round_trip_s=1.0)
    trace = units(BLOCK, [(0.0, 1), (0.0, 2), (2.0, 1), (2.0, 3), (20.0, 9)])
    era = era_of(trace, params)
    era.run(0, 2)
    era.elapse(2.0)
    assert era.covers(1, 3)
    era.run(2, 4)
    assert era.meter.stored.value == 3
    era.elapse(3.1)  # era 1 is copied; block 1 was written again
    assert era.covers(1, 2)
    assert era.covers(3, 4)
    assert not era.covers(2, 3)
    era.elapse(10.0)
    assert era.meter.stored.value == 0
    era.elapse(20.0)
    era.run(4, 5)
    era.elapse(100.0)
    assert era.meter.stored.value == 0


def test_a_batch_shares_one_commit() -> None:
    trace = units(BLOCK, [(0.0, 1), (0.0, 2), (0.0, 1), (9.0, 1)])
    era = at_once(era_of(trace, replace(PERFECT, queue_depth=4)), 3)
    assert era.meter.waited_updates == 1
    assert len(era.meter.waits) == 3


# -- paging -------------------------------------------------------------------------------
BOOK = (1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5)


def test_the_bounds_are_those_of_the_textbook() -> None:
    trace = sequence(MIB, *BOOK)
    three = replace(PERFECT, record_limit_bytes=3 * MIB)
    lru, belady = ran(Lru(trace, three), trace), ran(Belady(trace, three), trace)
    assert (lru.faults, belady.faults) == (10, 7)
    assert (lru.meter.waited_updates, belady.meter.waited_updates) == (10, 7)
    assert lru.covers(3, 6)
    assert not lru.covers(2, 4)
    assert belady.covers(5, 6)
    assert not belady.covers(0, 1)
    assert ran(Lru(trace, PERFECT, 5), trace).faults == 5


def test_missing_extents_of_a_batch_cost_one_update() -> None:
    trace = make_trace(
        "t",
        [
            Request(0.0, True, MIB - 4096, 8192),
            Request(0.0, True, 3 * MIB, 4096),
            Request(0.0, True, 3 * MIB, 4096),
            Request(5.0, True, 0, 4096),
        ],
    )
    lru = ran(Lru(trace, replace(PERFECT, queue_depth=4)), trace)
    assert lru.faults == 3
    assert lru.meter.waited_updates == 1
    assert len(lru.meter.waits) == 2


# -- what they share ----------------------------------------------------------------------
class Batches(BatchModel):
    """Remembers what is in flight together."""

    def __init__(self, trace: Trace, params: Params) -> None:
        super().__init__(trace, params, MIB)
        self.seen: list[tuple[float, int, int]] = []

    def submit(self, now_s: float, first: int, stop: int) -> None:
        self.seen.append((now_s, first, stop))

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return True


def test_writes_are_together_within_the_time_of_an_update() -> None:
    trace = units(MIB, [(0.0, 1), (0.0005, 1), (0.001, 1), (0.0011, 1), (0.0012, 1), (3.0, 1)])
    assert ran(Batches(trace, replace(PERFECT, queue_depth=32)), trace).seen == [
        (0.0, 0, 3),
        (0.0011, 3, 5),
        (3.0, 5, 6),
    ]
    assert [b[1:] for b in ran(Batches(trace, replace(PERFECT, queue_depth=2)), trace).seen] == [
        (0, 2),
        (2, 4),
        (4, 5),
        (5, 6),
    ]
    assert len(ran(Batches(trace, PERFECT), trace).seen) == 6


def test_a_model_has_to_say_what_it_does() -> None:
    trace = units(MIB, [(0.0, 1)])
    with pytest.raises(NotImplementedError):
        BatchModel(trace, PERFECT, MIB).submit(0.0, 0, 1)
    paging = Paging(trace, PERFECT)
    with pytest.raises(NotImplementedError):
        paging.touch(1)
    with pytest.raises(NotImplementedError):
        paging.count()
