"""copier/engine: rounds, pieces, settling, the link that comes and goes."""

from __future__ import annotations

import dataclasses
import errno
import itertools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from bitmapd.copier.engine import LATE_WRITES_S, SETTLE_INTERVAL_S, Copier, CopyState
from bitmapd.copier.load import YIELD_BYTES_PER_S, YIELD_PIECE_BYTES, YIELD_SHARE, HostLoad
from bitmapd.copier.throttle import Backoff, Throttle
from bitmapd.media.buffers import aligned
from tests.support.mirror import BLOCK, EXTENT, PER_EXTENT, Mirror
from tests.support.sim import SimOp, drain

MIB = 1 << 20


@pytest.fixture
def mirror() -> Mirror:
    """Started, with nothing to do."""
    mirror = Mirror()
    mirror.copier.start()
    return mirror


def begun(**options: Any) -> Mirror:
    mirror = Mirror(**options)
    mirror.copier.start()
    return mirror


def until_reads(mirror: Mirror) -> None:
    """The era is over, the barrier passed, and the copies have begun."""
    mirror.loop.advance(1.0)


def equal(mirror: Mirror) -> bool:
    return mirror.primary.visible == mirror.secondary.visible == mirror.secondary.durable


# -- one round --------------------------------------------------------------------------------


def test_a_write_is_copied_flushed_and_leaves_the_record(mirror: Mirror) -> None:
    mirror.put(5, 2)
    assert mirror.secondary.calls == [], "nothing is copied before the era is over"
    mirror.run(1.0)
    assert equal(mirror)
    assert mirror.secondary.calls == [("write", 5 * BLOCK, 2 * BLOCK), ("flush", 0, 0)]
    assert mirror.primary.calls[-2:] == [("read", 5 * BLOCK, 2 * BLOCK), ("flush", 0, 0)]
    assert mirror.gate.in_sync
    assert mirror.recorded() == set()
    assert (mirror.copier.copied_bytes, mirror.copier.sent_bytes) == (2 * BLOCK, 2 * BLOCK)


def test_copying_waits_for_the_barrier(mirror: Mirror) -> None:
    mirror.put(0)
    mirror.loop.advance(0.5)
    late = mirror.write(0, fill=2)  # in flight across the end of the era
    mirror.loop.advance(0.5)
    assert mirror.gate.era == 2
    assert mirror.primary.asked("read") == []
    assert not mirror.copier.idle
    mirror.loop.advance(3.0)
    assert mirror.primary.asked("read") == [], "however long that takes"
    mirror.finish(mirror.primary)
    assert late == [None]
    assert mirror.primary.asked("read") == [(0, 1)]
    mirror.run()
    assert equal(mirror)


def test_no_era_is_taken_while_copies_are_in_flight(mirror: Mirror) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.write(9)
    drain(mirror.loop, mirror.record)
    mirror.finish(mirror.primary, 1)
    mirror.loop.advance(2.0)
    assert mirror.gate.current
    assert mirror.gate.era == 2
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    assert mirror.gate.era == 3
    mirror.run(1.0)
    assert equal(mirror)


def test_adjacent_blocks_are_one_read_and_one_write(mirror: Mirror) -> None:
    for block in (2, 3, 4, 8):
        mirror.put(block)
    mirror.run(1.0)
    assert mirror.primary.asked("read") == [(2, 3), (8, 1)]
    assert mirror.secondary.asked("write") == [(2, 3), (8, 1)]


def test_long_runs_are_cut_into_pieces_that_are_in_flight_together(mirror: Mirror) -> None:
    mirror.put(0, 11)
    until_reads(mirror)
    assert mirror.pending(mirror.primary) == ["read"] * 3
    assert mirror.primary.asked("read") == [(0, 4), (4, 4), (8, 3)]
    mirror.finish(mirror.primary, 2)
    mirror.finish(mirror.primary, 0)
    assert mirror.secondary.asked("write") == [(8, 3), (0, 4)], "each goes on as it comes"
    mirror.run()
    assert equal(mirror)


def test_zero_blocks_become_zeroing(mirror: Mirror) -> None:
    mirror.secondary.visible[:] = mirror.secondary.durable[:] = b"\xff" * 8 * EXTENT
    mirror.put(0, fill=1)
    mirror.put(1, 2, fill=0)
    mirror.put(3, fill=4)
    mirror.run(1.0)
    assert mirror.secondary.calls[:3] == [
        ("write", 0, BLOCK),
        ("zero", BLOCK, 2 * BLOCK),
        ("write", 3 * BLOCK, BLOCK),
    ]
    assert mirror.copier.zero_bytes == 2 * BLOCK
    assert mirror.copier.sent_bytes == 4 * BLOCK
    assert mirror.secondary.durable[:EXTENT] == mirror.primary.visible[:EXTENT]


@pytest.mark.parametrize("fill", [0, 3])
def test_the_last_block_may_be_short(fill: int) -> None:
    mirror = begun(size_bytes=EXTENT - 1024)
    mirror.secondary.visible[:] = mirror.secondary.durable[:] = b"\xff" * (EXTENT - 1024)
    mirror.store.add([(0, 1)], (), lambda error: None)
    drain(mirror.loop, mirror.record)
    mirror.primary.visible[:] = bytes([fill]) * (EXTENT - 1024)
    mirror.gate.take_recorded()
    mirror.copier.wake()
    mirror.run(1.0)
    assert mirror.primary.calls[0] == ("read", 0, EXTENT - 1024)
    assert [call[0] for call in mirror.secondary.calls[:-1]] == ["write" if fill else "zero"]
    assert equal(mirror)
    assert mirror.copier.copied_bytes == EXTENT - 1024


def test_a_block_written_while_it_is_copied_is_copied_again(mirror: Mirror) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)  # read
    answers = mirror.write(0, fill=2)
    mirror.run()
    assert answers == [None]
    assert mirror.recorded() == {0}
    mirror.run(1.0)
    assert equal(mirror)
    assert mirror.recorded() == set()


def test_hot_blocks_are_passed_over_but_not_for_ever() -> None:
    mirror = begun()
    mirror.put(0)
    mirror.put(9)
    copied_in = []
    mirror.loop.advance(0.999)
    for fill in range(2, 8):
        # The barrier comes, and the host writes block 0 again before its copy can begin.
        mirror.write(0, fill=fill)
        mirror.loop.advance(0.001)
        mirror.write(0, fill=fill)
        before = len(mirror.secondary.asked("write"))
        drain(mirror.loop, *mirror.disks)
        if (0, 1) in mirror.secondary.asked("write")[before:]:
            copied_in.append(fill)
        mirror.loop.advance(0.999)
    assert (9, 1) in mirror.secondary.asked("write")
    assert copied_in, "a block that is always hot is copied all the same"
    assert len(copied_in) < 6, "and not in every round"


def test_an_idle_copier_asks_for_nothing(mirror: Mirror) -> None:
    mirror.run(20.0)
    assert mirror.primary.calls == mirror.secondary.calls == mirror.record.calls == []
    assert mirror.gate.era == 1
    assert mirror.copier.idle


def test_waking_ends_the_era_early(mirror: Mirror) -> None:
    mirror.run(0.5)
    mirror.put(0)
    mirror.copier.wake()
    mirror.run()
    assert equal(mirror)
    assert mirror.gate.in_sync


# -- settling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["primary", "secondary"])
def test_nothing_is_cleared_before_both_sides_are_flushed(mirror: Mirror, last: str) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    assert mirror.pending(mirror.primary) == mirror.pending(mirror.secondary) == ["flush"]
    first = mirror.primary if last == "secondary" else mirror.secondary
    mirror.finish(first)
    assert mirror.recorded() == {0}
    mirror.finish(getattr(mirror, last))
    assert mirror.recorded() == set()
    assert equal(mirror)


@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_a_failed_flush_of_either_side_copies_again(mirror: Mirror, side: str) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    mirror.fail(getattr(mirror, side), errno.EIO)
    mirror.finish(mirror.secondary if side == "primary" else mirror.primary)
    assert mirror.recorded() == {0}
    assert list(mirror.gate.taken.runs()) == [(0, 4)]
    mirror.run(10.0)
    assert mirror.secondary.asked("write")[1:] == [(0, 1)]
    assert mirror.secondary.asked("zero") == [(1, 3)], "the whole extent"
    assert mirror.gate.in_sync
    assert mirror.recorded() == set()
    error = mirror.copier.last_error
    assert error is not None
    assert error.errno == errno.EIO


def test_a_primary_that_cannot_be_flushed_is_told_and_not_hurried(mirror: Mirror) -> None:
    mirror.primary.fail_next = {"flush": [errno.EIO] * 3}
    mirror.put(0)
    for _ in range(4):
        mirror.run(1.0)
    (event,) = mirror.told("copy-error")
    assert event["device"] == "primary"
    assert event["message"] == "cannot flush the primary: simulated EIO"
    assert mirror.copier.state is CopyState.RUNNING, "it is not the link"
    mirror.run(3 * SETTLE_INTERVAL_S)
    mirror.run(SETTLE_INTERVAL_S)
    assert len(mirror.told("copy-error")) <= 3
    for _ in range(20):
        mirror.run(1.0)
    assert mirror.recorded() == set()


def test_a_primary_flush_that_failed_takes_back_what_was_copied_since(mirror: Mirror) -> None:
    """The cache that was lost may have held what the copies under way have read."""
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)  # now both flushes are on their way
    mirror.write(9, fill=2)
    mirror.write(17, fill=2)
    drain(mirror.loop, mirror.record)
    while "write" in mirror.pending(mirror.primary):
        mirror.finish(mirror.primary, mirror.pending(mirror.primary).index("write"))
    mirror.loop.advance(1.0)
    reads = [i for i, kind in enumerate(mirror.pending(mirror.primary)) if kind == "read"]
    mirror.finish(mirror.primary, reads[0])
    mirror.finish(mirror.secondary, 1)  # block 9 is copied while the flushes run
    assert mirror.gate.has_copied
    mirror.fail(mirror.primary, errno.EIO, mirror.pending(mirror.primary).index("flush"))
    assert not mirror.gate.has_copied
    mirror.finish(mirror.primary)  # block 17 was read before, and is written after, the failure
    writes = mirror.secondary.asked("write")
    assert writes[-1] == (17, 1)
    mirror.finish(mirror.secondary, 1)
    assert not mirror.gate.has_copied
    assert mirror.gate.is_dirty(17, 18)
    mirror.run(SETTLE_INTERVAL_S + 1.0)
    mirror.run(1.0)
    assert mirror.gate.in_sync
    assert (17, 1) in mirror.secondary.asked("write")[len(writes) :]


def test_an_error_of_the_secondary_spoils_a_settle_under_way(mirror: Mirror) -> None:
    """The flush succeeds, but after a write that failed: the cache may have been lost between."""
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)  # now both flushes are on their way
    mirror.write(9)
    drain(mirror.loop, mirror.record)
    mirror.finish(mirror.primary, 1)
    mirror.loop.advance(1.0)
    mirror.finish(mirror.primary, 1)
    assert mirror.pending(mirror.secondary) == ["flush", "write"]
    mirror.fail(mirror.secondary, errno.EIO, 1)
    mirror.finish(mirror.secondary)
    mirror.finish(mirror.primary)
    assert mirror.recorded() == {0, 2}
    assert mirror.gate.is_dirty(0, 1)


def test_a_long_pass_settles_now_and_then() -> None:
    mirror = begun(extents=64, rate_bytes_per_s=4 * BLOCK)
    mirror.put(0, 64)
    for _ in range(9):
        mirror.run(1.0)
    assert mirror.secondary.calls.count(("flush", 0, 0)) in (1, 2)
    assert mirror.gate.taken, "the pass goes on"
    assert 0 not in mirror.recorded()
    assert 15 in mirror.recorded()


# -- compare mode -----------------------------------------------------------------------------


def compared(content: bytes, pool_bytes: int = 4 << 20) -> Mirror:
    """Two extents full of ones on the primary, everything recorded, compared with `content`."""
    mirror = begun(extents=2, secondary=content, pool_bytes=pool_bytes)
    mirror.primary.visible[:] = mirror.primary.durable[:] = b"\1" * 2 * EXTENT
    mirror.store.add([(0, 2)], (), lambda error: None)
    drain(mirror.loop, mirror.record)
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=True)
    return mirror


def test_comparing_sends_only_what_differs() -> None:
    content = bytearray(b"\1" * 2 * EXTENT)
    content[5 * BLOCK] = 0
    content[7 * BLOCK - 1] = 0
    mirror = compared(bytes(content))
    done: list[int] = []
    mirror.copier.on_pass_done = lambda: done.append(mirror.copier.pass_copied_bytes)
    mirror.run()
    assert mirror.secondary.asked("read") == [(0, 4), (4, 4)]
    assert mirror.secondary.asked("write") == [(5, 2)]
    assert mirror.copier.sent_bytes == 2 * BLOCK
    assert mirror.copier.copied_bytes == 2 * EXTENT
    assert equal(mirror)
    assert done == [2 * EXTENT]
    assert not mirror.copier.compare, "the next era is sent without asking"
    assert mirror.pool.out_bytes == 0


def test_comparing_without_a_buffer_to_spare_sends() -> None:
    mirror = compared(b"\1" * 2 * EXTENT, pool_bytes=EXTENT)
    mirror.run()
    assert mirror.secondary.asked("read") == []
    assert mirror.secondary.asked("write") == [(0, 4), (4, 4)]
    assert mirror.gate.in_sync


def test_a_secondary_that_cannot_be_read_is_a_lost_link() -> None:
    mirror = compared(bytes(2 * EXTENT))
    mirror.turn()
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.EIO)
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.run(1.0)
    mirror.run(1.0)
    assert equal(mirror)
    assert mirror.pool.out_bytes == 0


# -- a pass -----------------------------------------------------------------------------------


def test_a_pass_is_followed_to_its_end(mirror: Mirror) -> None:
    copier = mirror.copier
    assert copier.pass_remaining_bytes == 0
    mirror.policy.kept = set(range(8))
    mirror.put(0, 6)
    mirror.run(1.0)
    mirror.gate.take_recorded()
    copier.begin_pass(compare=False)
    assert copier.pass_total_bytes == copier.pass_remaining_bytes == 2 * EXTENT
    mirror.turn()
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    mirror.write(20)  # not part of the pass
    assert copier.pass_remaining_bytes == 2 * EXTENT - 2 * BLOCK
    settles: list[int] = []
    copier.on_pass_done = lambda: settles.append(mirror.gate.settles)
    mirror.run()
    assert settles == [2], "after the settle, not before"
    assert copier.pass_blocks is None
    assert copier.pass_copied_bytes == 2 * EXTENT


def test_a_pass_without_listeners_ends_as_well(mirror: Mirror) -> None:
    mirror.put(0)
    mirror.gate.take_era(lambda: None)
    mirror.copier.begin_pass(compare=False)
    mirror.run(1.0)
    assert mirror.copier.pass_blocks is None


def test_the_remainder_is_never_more_than_the_volume() -> None:
    mirror = begun(size_bytes=EXTENT - 512)
    mirror.gate.grow(mirror.geometry)
    mirror.store.add([(0, 1)], (), lambda error: None)
    drain(mirror.loop, mirror.record)
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=False)
    assert mirror.copier.pass_remaining_bytes == EXTENT - 512


# -- errors of the primary --------------------------------------------------------------------


def test_a_bad_block_holds_back_itself_alone(mirror: Mirror) -> None:
    mirror.put(0, 4)
    until_reads(mirror)
    mirror.fail(mirror.primary, errno.EIO)  # all four in one read
    event = mirror.told("copy-error")[0]
    assert (event["offset_bytes"], event["length_bytes"]) == (0, 4 * BLOCK)
    assert event["message"] == "cannot read the primary: simulated EIO"
    assert mirror.pending(mirror.primary) == ["read"] * 4, "one by one"
    mirror.fail(mirror.primary, errno.EIO, 1)
    mirror.run()
    assert mirror.secondary.asked("write") == [(0, 1), (2, 1), (3, 1)]
    assert list(mirror.gate.taken.runs()) == [(1, 2)]
    assert mirror.recorded() == {0}, "the block stays dirty, its extent in the record"
    assert mirror.copier.read_errors == 2
    assert mirror.copier.state is CopyState.RUNNING
    mirror.run(2.0)
    mirror.run(2.0)
    assert equal(mirror)
    assert mirror.recorded() == set()


# -- the link ---------------------------------------------------------------------------------


def test_a_lost_link_stops_nothing_but_copying(mirror: Mirror) -> None:
    changes: list[CopyState] = []
    mirror.copier.on_change = lambda: changes.append(mirror.copier.state)
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.ENOTCONN)
    assert mirror.copier.state is CopyState.LINK_DOWN
    (event,) = mirror.told("link-down")
    assert event["secondary"] == "secondary"
    assert event["message"] == "the secondary failed: simulated ENOTCONN"
    mirror.put(9)  # hosts notice nothing
    assert mirror.recorded() == {0, 2}
    assert mirror.secondary.asked("open") == []
    mirror.loop.advance(0.5)
    assert mirror.secondary.calls[-2:] == [("close", 0, 0), ("open", 0, 0)]
    mirror.run()
    assert mirror.told("link-up") == [{"event": "link-up", "secondary": "secondary"}]
    mirror.run(1.0)
    assert equal(mirror)
    assert changes[:2] == [CopyState.LINK_DOWN, CopyState.RUNNING]


def test_copies_that_were_not_flushed_when_the_link_went_are_made_again(mirror: Mirror) -> None:
    mirror.put(0, 12)
    until_reads(mirror)
    for _ in range(3):
        mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    assert not mirror.gate.is_dirty(0, 4)
    mirror.secondary.connected = False
    mirror.finish(mirror.secondary)
    mirror.secondary.connected = True
    mirror.finish(mirror.secondary)  # one that began before the failure, and succeeds after it
    mirror.secondary.connected = False
    assert mirror.gate.is_dirty(0, 4)
    assert mirror.gate.is_dirty(8, 12)
    before = len(mirror.secondary.asked("write"))
    mirror.run(0.5)
    mirror.run(1.0)
    assert sorted(mirror.secondary.asked("write")[before:]) == [(0, 4), (4, 4), (8, 4)]
    assert equal(mirror)


def test_every_write_of_a_copy_has_to_succeed(mirror: Mirror) -> None:
    mirror.put(0)
    mirror.put(1, fill=0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    assert len(mirror.secondary.pending) == 2
    mirror.fail(mirror.secondary, errno.EIO)
    assert mirror.copier.state is CopyState.RUNNING, "the other piece is still in flight"
    mirror.finish(mirror.secondary)
    assert mirror.copier.state is CopyState.LINK_DOWN
    assert mirror.gate.is_dirty(0, 2)


def test_waits_between_attempts_grow_and_a_success_resets_them(mirror: Mirror) -> None:
    mirror.secondary.fail_next = {"open": [errno.ECONNREFUSED] * 3}
    mirror.secondary.connected = False
    mirror.put(0)
    at: list[float] = []
    for _ in range(200):
        mirror.loop.advance(0.25)
        if "open" in mirror.pending(mirror.secondary):
            at.append(mirror.loop.now_s)
        drain(mirror.loop, *mirror.disks)
    assert [round(b - a, 2) for a, b in pairwise(at)] == [1.0, 2.0, 4.0]
    assert mirror.gate.in_sync
    mirror.secondary.connected = False
    mirror.put(0)
    mirror.run(1.0)
    lost_at = mirror.loop.now_s
    while "open" not in mirror.pending(mirror.secondary):
        mirror.loop.advance(0.25)
    assert mirror.loop.now_s - lost_at == 0.5


def test_reopening_waits_for_requests_of_the_old_connection(mirror: Mirror) -> None:
    mirror.put(0, 8)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.ENOTCONN)
    mirror.loop.advance(3.0)
    assert mirror.secondary.asked("open") == []
    mirror.finish(mirror.secondary)
    mirror.loop.advance(0.5)
    assert mirror.secondary.asked("open") == [(0, 0)]


def test_a_volume_may_start_without_its_secondary() -> None:
    mirror = Mirror()
    mirror.secondary.connected = False
    mirror.copier.start()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.put(0)
    mirror.run(0.5)
    mirror.run(1.0)
    assert mirror.copier.state is CopyState.RUNNING
    assert equal(mirror)


def test_a_wrong_secondary_is_never_written(mirror: Mirror) -> None:
    mirror.refusal = OSError(errno.ENODEV, "another medium")
    mirror.secondary.connected = False
    mirror.put(0)
    mirror.run(1.0)
    mirror.secondary.calls.clear()
    for _ in range(8):
        mirror.run(1.0)
    assert mirror.copier.state is CopyState.LINK_DOWN
    assert mirror.copier.last_error is mirror.refusal
    assert len(mirror.secondary.asked("open")) > 2, "it is looked for again and again"
    assert not mirror.secondary.connected, "and let go of each time"
    for _ in range(4):  # a pause does not make it the right one
        mirror.copier.pause()
        mirror.run(1.0)
        mirror.copier.resume()
        mirror.run(1.0)
    assert mirror.secondary.asked("write") == []
    mirror.refusal = None
    mirror.run(30.0)
    mirror.run(2.0)
    assert equal(mirror)


def test_a_wrong_secondary_that_appears_during_a_pause(mirror: Mirror) -> None:
    mirror.secondary.connected = False
    mirror.put(0)
    mirror.run(1.0)
    mirror.loop.advance(0.5)
    assert mirror.pending(mirror.secondary) == ["open"]
    mirror.secondary.calls.clear()
    mirror.copier.pause()
    mirror.refusal = OSError(errno.ENODEV, "another medium")
    mirror.run()
    assert mirror.copier.state is CopyState.PAUSED
    mirror.copier.resume()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.run(2.0)
    assert mirror.secondary.asked("write") == []


def test_a_connection_can_be_made_anew(mirror: Mirror) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.copier.reconnect()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.copier.reconnect()
    mirror.run(0.5)
    mirror.run(0.5)
    mirror.run(1.0)
    assert mirror.secondary.asked("open") == [(0, 0)]
    assert mirror.told("link-down") == [], "nothing failed"
    assert equal(mirror)
    assert mirror.recorded() == set()


# -- pause, resume, stop ----------------------------------------------------------------------


def test_a_pause_lets_what_is_in_flight_finish_and_starts_nothing(mirror: Mirror) -> None:
    mirror.put(0, 2)
    until_reads(mirror)
    mirror.copier.pause()
    mirror.write(9)
    mirror.run(3.0)
    assert mirror.secondary.asked("write") == [(0, 2)]
    assert mirror.copier.state is CopyState.PAUSED
    assert mirror.recorded() == {0, 2}, "writes go on, the record grows"
    mirror.copier.resume()
    mirror.run(1.0)
    assert equal(mirror)
    assert mirror.recorded() == set()


def test_resuming_what_is_not_paused_does_nothing(mirror: Mirror) -> None:
    mirror.copier.resume()
    assert mirror.copier.state is CopyState.RUNNING


def test_resuming_without_a_secondary_looks_for_it(mirror: Mirror) -> None:
    mirror.copier.pause()
    mirror.secondary.connected = False
    mirror.copier.resume()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.run(0.5)
    assert mirror.copier.state is CopyState.RUNNING


def test_a_pause_ends_the_search_and_a_resume_begins_it_again(mirror: Mirror) -> None:
    mirror.secondary.connected = False
    mirror.put(0)
    mirror.run(1.0)
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.copier.pause()
    mirror.run(30.0)
    assert mirror.secondary.asked("open") == []
    mirror.copier.resume()
    mirror.run(2.0)
    mirror.run(1.0)
    assert equal(mirror)


def test_an_error_during_a_pause_takes_back_the_copies_beside_it(mirror: Mirror) -> None:
    mirror.put(0, 8)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.primary)
    mirror.copier.pause()
    mirror.fail(mirror.secondary, errno.EIO)
    mirror.finish(mirror.secondary)
    assert mirror.copier.state is CopyState.PAUSED
    assert mirror.told("link-down") == []
    assert mirror.gate.is_dirty(0, 4)
    assert mirror.gate.is_dirty(4, 8)
    mirror.copier.resume()
    mirror.run(1.0)
    assert equal(mirror)


def test_stopping_waits_for_copies_and_for_the_settle(mirror: Mirror) -> None:
    stopped: list[bool] = []
    mirror.put(0)
    until_reads(mirror)
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.turn()
    assert stopped == []
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    assert stopped == [True]
    assert mirror.pending(mirror.secondary) == [], "nothing is begun any more"
    assert mirror.recorded() == {0}, "copied and not flushed"
    mirror.copier.pause()
    assert mirror.copier.state is CopyState.STOPPED
    mirror.run(10.0)
    assert mirror.secondary.asked("write") == [(0, 1)]


def test_stopping_during_the_settle(mirror: Mirror) -> None:
    stopped: list[bool] = []
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.finish(mirror.secondary)
    assert stopped == []
    mirror.finish(mirror.primary)
    assert stopped == [True]
    assert mirror.recorded() == set()


def test_stopping_during_the_barrier(mirror: Mirror) -> None:
    stopped: list[bool] = []
    mirror.put(0)
    mirror.write(0)
    mirror.loop.advance(1.0)
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.turn()
    assert stopped == []
    mirror.finish(mirror.primary)
    assert stopped == [True]
    assert mirror.primary.asked("read") == []


def test_stopping_what_was_not_started_and_while_the_secondary_is_sought() -> None:
    mirror = Mirror()
    stopped: list[int] = []
    mirror.copier.stop(lambda: stopped.append(1))
    assert stopped == [], "not inside the call"
    mirror.turn()
    other = Mirror()
    other.secondary.connected = False
    other.copier.start()
    other.loop.advance(0.5)
    other.copier.stop(lambda: stopped.append(2))
    other.run()
    assert stopped == [1, 2]
    assert other.copier.state is CopyState.STOPPED
    other.run(60.0)
    assert other.secondary.asked("open") == [(0, 0)], "it is looked for no more"


def test_stopping_cancels_a_wait_for_the_throttle() -> None:
    mirror = begun(rate_bytes_per_s=BLOCK)
    mirror.put(0, 12)
    mirror.run(1.0)
    assert len(mirror.secondary.asked("write")) == 1
    stopped: list[bool] = []
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.run(60.0)
    assert stopped == [True]
    assert len(mirror.secondary.asked("write")) == 1


# -- how fast ---------------------------------------------------------------------------------


def test_the_rate_limit_holds() -> None:
    mirror = begun(rate_bytes_per_s=4 * BLOCK)
    mirror.put(0, 32)
    mirror.run(1.0)
    for elapsed in range(1, 6):
        mirror.run(1.0)
        # One burst at the beginning, then one piece a second.
        assert mirror.copier.copied_bytes <= (1 + elapsed) * 4 * BLOCK
    assert mirror.copier.copied_bytes >= 5 * 4 * BLOCK
    mirror.copier.throttle.set_rate(None)
    mirror.run(2.0)
    mirror.run(2.0)
    assert equal(mirror)


def test_one_wait_for_the_throttle_at_a_time() -> None:
    mirror = begun(rate_bytes_per_s=BLOCK)
    mirror.put(0, 12)
    mirror.run(1.0)
    for _ in range(100):
        mirror.copier.wake()
        mirror.run(0.01)
    waiting = [timer for timer in mirror.loop._timers if not timer.cancelled]
    assert len(waiting) == 2, "the end of the era and the throttle"


def test_copies_wait_for_memory() -> None:
    mirror = begun(pool_bytes=4 * BLOCK)
    mirror.put(0, 12)
    other = mirror.pool.take(4 * BLOCK)
    assert other is not None
    mirror.run(1.0)
    mirror.copier.wake()
    mirror.run(1.0)
    assert mirror.primary.asked("read") == []
    mirror.pool.give(other)
    mirror.run()
    assert equal(mirror)
    assert mirror.pool.out_bytes == 0


def test_the_window_bounds_what_is_in_flight() -> None:
    mirror = begun(
        extents=24,
        extent_bytes=MIB,
        block_bytes=64 << 10,
        piece_bytes=3 * MIB,
        pool_bytes=1 << 30,
    )
    mirror.store.add([(0, 24)], (), lambda error: None)
    drain(mirror.loop, mirror.record)
    mirror.gate.take_recorded()
    mirror.copier.wake()
    mirror.turn()
    # 8 MiB at a time: two pieces of 3 MiB fit, a third does not.
    assert [n // MIB for _, _, n in mirror.primary.calls] == [3, 3]
    mirror.finish(mirror.primary)
    assert len(mirror.primary.calls) == 2
    mirror.finish(mirror.secondary)
    assert len(mirror.primary.calls) == 3
    mirror.run()
    assert mirror.gate.in_sync


def test_small_copies_are_many_at_a_time() -> None:
    mirror = begun(extents=40)
    for block in range(0, 160, 2):
        mirror.write(block)
    drain(mirror.loop, mirror.record, mirror.primary)
    mirror.loop.advance(1.0)
    assert mirror.pending(mirror.primary) == ["read"] * 64
    mirror.run()
    assert equal(mirror)


class Hosts:
    """A mirror of 64 KiB blocks, 4 MiB of which are to be copied, while a host reads."""

    def __init__(self, limit_extents: int = 100) -> None:
        self.mirror = begun(
            extents=4,
            extent_bytes=MIB,
            block_bytes=64 << 10,
            piece_bytes=MIB,
            pool_bytes=1 << 30,
            limit_extents=limit_extents,
        )
        mirror = self.mirror
        mirror.store.add([(0, 4)], (), lambda error: None)
        drain(mirror.loop, mirror.record)
        mirror.gate.take_recorded()
        mirror.loop.advance(0.5)

    def read(self) -> None:
        self.mirror.gate.reads += 1

    def lengths(self) -> list[int]:
        return [n for kind, _, n in self.mirror.primary.calls if kind == "read"]


def test_copying_yields_to_hosts_at_work() -> None:
    hosts = Hosts()
    hosts.read()
    hosts.mirror.copier.wake()
    hosts.mirror.turn()
    lengths = hosts.lengths()
    assert set(lengths) == {YIELD_PIECE_BYTES}
    assert sum(lengths) == MIB, "no more than one burst at once"
    hosts.mirror.run(0.005)
    assert sum(hosts.lengths()) <= MIB + 0.006 * (YIELD_BYTES_PER_S + MIB) + YIELD_PIECE_BYTES
    hosts.mirror.run(0.5)
    hosts.mirror.run(0.5)
    assert hosts.mirror.gate.in_sync, "quiet hosts hold nothing back"


def test_copying_does_not_yield_to_quiet_hosts() -> None:
    hosts = Hosts()
    hosts.mirror.copier.wake()
    hosts.mirror.turn()
    assert hosts.lengths() == [MIB] * 4


def test_copying_does_not_yield_when_the_record_has_outgrown_its_limit() -> None:
    hosts = Hosts(limit_extents=3)
    hosts.read()
    hosts.mirror.copier.wake()
    hosts.mirror.turn()
    assert hosts.lengths() == [MIB] * 4


def test_host_load_allows_what_hosts_write_and_a_share() -> None:
    load = HostLoad()
    assert not load.active(0.0, 0, 0)
    assert load.active(1.0, 1, 50 << 20)
    assert load.throttle.rate_bytes_per_s == YIELD_BYTES_PER_S + (50 << 20) * YIELD_SHARE
    assert load.active(1.009, 1, 50 << 20)
    assert not load.active(1.02, 1, 50 << 20)
    sampled = load.throttle.rate_bytes_per_s
    assert sampled == YIELD_BYTES_PER_S + (50 << 20) * YIELD_SHARE, "sampled seldom"
    assert load.active(1.2, 2, 50 << 20)
    assert load.throttle.rate_bytes_per_s == YIELD_BYTES_PER_S


# -- the volume's size ------------------------------------------------------------------------


def test_a_larger_volume_is_copied_to_its_end() -> None:
    mirror = Mirror(extents=4)
    small = dataclasses.replace(mirror.geometry, size_bytes=2 * EXTENT)
    mirror.copier = Copier(
        small,
        mirror.gate,
        mirror.primary,
        mirror.secondary,
        mirror.loop,
        mirror.pool,
        Throttle(None),
        Backoff(),
        lambda event, **fields: None,
        check_secondary=lambda: None,
        era_interval_s=1.0,
        piece_bytes=BLOCK // 2,
    )
    mirror.copier.grow(mirror.geometry)
    mirror.copier.start()
    mirror.put(4 * PER_EXTENT - 1)
    mirror.run(1.0)
    assert equal(mirror)
    assert mirror.primary.asked("read") == [(15, 1)], "a piece has at least one block"


# -- a server that carries out late what it had received --------------------------------------


@pytest.fixture
def late() -> Mirror:
    """A connection was lost with the write of block 0 in flight, and has been made anew."""
    mirror = begun()
    mirror.secondary.writes_late = True
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.secondary.connected = False
    mirror.finish(mirror.secondary)
    mirror.run(0.5)
    mirror.run()
    return mirror


def overtake(mirror: Mirror) -> None:
    """The old write is carried out at last."""
    buffer = aligned(BLOCK)
    buffer[:] = b"\1" * BLOCK
    mirror.secondary.write(0, buffer, lambda error: None)
    mirror.secondary.finish(-1)


def test_what_a_server_may_write_late_is_copied_once_more(late: Mirror) -> None:
    late.put(0, fill=2)
    late.run(1.0)
    assert equal(late)
    overtake(late)
    late.run(LATE_WRITES_S / 2)
    assert late.recorded() == {0}, "nobody may take it for clean"
    assert late.gate.may_differ(0, 1)
    assert not late.gate.in_sync
    late.run(LATE_WRITES_S)
    late.run(1.0)
    assert equal(late)
    assert late.gate.in_sync
    assert late.recorded() == set()


def test_a_copy_in_flight_when_the_time_is_over_does_not_count(late: Mirror) -> None:
    late.loop.advance(LATE_WRITES_S - 1.5)
    late.put(0, fill=2)
    until_reads(late)
    late.finish(late.primary)
    assert late.pending(late.secondary) == ["write"]
    late.loop.advance(1.0)
    late.finish(late.secondary)
    overtake(late)  # before the time was over; what the copy had written is gone with it
    late.run(2.0)
    late.run(1.0)
    assert equal(late)


def test_a_device_that_ends_its_writes_is_not_waited_for(mirror: Mirror) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.EIO)
    mirror.run(0.5)
    mirror.run(1.0)  # a place that was refused waits before it is tried again
    assert mirror.gate.in_sync


def test_a_pause_does_not_forget_what_may_come_late(late: Mirror) -> None:
    late.copier.pause()
    late.run(LATE_WRITES_S + 1.0)
    overtake(late)
    assert late.gate.is_dirty(0, 1)
    assert late.recorded() == {0}
    late.copier.resume()
    late.run(2.0)
    assert equal(late)


def test_a_connection_lost_while_there_was_nothing_to_do_is_noticed(mirror: Mirror) -> None:
    mirror.secondary.connected = False
    mirror.loop.advance(1.0)
    assert mirror.copier.state is CopyState.LINK_DOWN
    assert "the connection was lost" in mirror.told("link-down")[0]["message"]
    mirror.run(0.5)
    assert mirror.copier.state is CopyState.RUNNING


def refuse_writes(mirror: Mirror, refused: Callable[[SimOp], bool]) -> None:
    """The secondary answers these writes with EIO, and stays connected."""
    disk = mirror.secondary

    def finish(index: int = 0) -> None:
        op = disk.pending[index]
        disk.fail_next = {"write": [errno.EIO]} if op.kind == "write" and refused(op) else {}
        type(disk).finish(disk, index)

    disk.finish = finish  # type: ignore[method-assign]


def test_a_place_that_can_never_be_written_holds_back_itself_only(mirror: Mirror) -> None:
    bad = 5 * BLOCK
    refuse_writes(mirror, lambda op: op.offset_bytes <= bad < op.offset_bytes + len(op.data))
    mirror.put(0, 12)
    for _ in range(60):
        mirror.run(1.0)
    assert list(mirror.gate.taken.runs()) == [(5, 6)]
    assert mirror.recorded() == {5 // PER_EXTENT}
    assert mirror.copier.stuck
    assert len(mirror.told("link-down")) < 12, "it is tried less and less often"
    refuse_writes(mirror, lambda op: False)
    for _ in range(70):
        mirror.run(1.0)
    assert not mirror.copier.stuck
    assert mirror.gate.in_sync
    assert equal(mirror)


def test_errors_now_and_then_delay_copying_and_do_not_stop_it(mirror: Mirror) -> None:
    """Every eighth write fails: there are never as many in a row as there is to copy."""
    count = itertools.count(1)
    refuse_writes(mirror, lambda op: next(count) % 8 == 0)
    for extent in range(8):
        mirror.put(extent * PER_EXTENT, 1)
        mirror.put(extent * PER_EXTENT + 2, 1)
    for _ in range(60):
        mirror.run(1.0)
    assert mirror.told("link-down")
    assert mirror.gate.in_sync
    assert equal(mirror)
