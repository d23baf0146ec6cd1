"""copier/engine: rounds, pieces, settling, comparing, a pass, the volume's size."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from bitmapd.copier import settling
from bitmapd.copier.engine import Copier, CopyState
from bitmapd.copier.late import QUIET_S
from bitmapd.copier.settling import SETTLE_INTERVAL_S
from bitmapd.copier.throttle import Backoff, Throttle
from bitmapd.media.base import Done
from tests.support.mirror import BLOCK, EXTENT, PER_EXTENT, Mirror, begun, equal, until_reads
from tests.support.sim import drain


@pytest.fixture
def mirror() -> Mirror:
    return begun()


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
    assert (mirror.copier.copied_bytes, mirror.copier.transfers.sent_bytes) == (
        2 * BLOCK,
        2 * BLOCK,
    )


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
    assert mirror.copier.transfers.zero_bytes == 2 * BLOCK
    assert mirror.copier.transfers.sent_bytes == 4 * BLOCK
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


def test_much_that_was_copied_is_flushed_while_copying_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settling, "SETTLE_BYTES", 2 * PER_EXTENT * BLOCK)
    mirror = begun(pool_bytes=PER_EXTENT * BLOCK, piece_bytes=PER_EXTENT * BLOCK)
    for extent in range(8):
        mirror.put(extent * PER_EXTENT, PER_EXTENT)
    mirror.run(1.0)
    assert equal(mirror)
    assert mirror.recorded() == set()
    kinds = [call[0] for call in mirror.secondary.calls]
    assert "write" in kinds[kinds.index("flush") :]


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
    mirror.copier.passes.on_done = lambda: done.append(mirror.copier.passes.copied_bytes)
    mirror.run()
    assert mirror.secondary.asked("read") == [(0, 4), (4, 4)]
    assert mirror.secondary.asked("write") == [(5, 2)]
    assert mirror.copier.transfers.sent_bytes == 2 * BLOCK
    assert mirror.copier.copied_bytes == 2 * EXTENT
    assert equal(mirror)
    assert done == [2 * EXTENT]
    assert not mirror.copier.transfers.compare, "the next era is sent without asking"
    assert mirror.pool.out_bytes == 0


def test_comparing_without_a_buffer_to_spare_sends() -> None:
    mirror = compared(b"\1" * 2 * EXTENT, pool_bytes=EXTENT)
    mirror.run()
    assert mirror.secondary.asked("read") == []
    assert mirror.secondary.asked("write") == [(0, 4), (4, 4)]
    assert mirror.gate.in_sync


def test_a_place_of_the_secondary_that_cannot_be_read_is_sent() -> None:
    mirror = compared(bytes(2 * EXTENT))
    mirror.turn()
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.EIO)
    assert mirror.copier.state is CopyState.RUNNING
    mirror.run()
    assert equal(mirror)
    assert mirror.pool.out_bytes == 0


def test_a_link_that_is_lost_while_comparing_is_made_anew() -> None:
    mirror = compared(bytes(2 * EXTENT))
    mirror.turn()
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.ENODEV)
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.run(1.0)
    mirror.run(1.0)
    assert equal(mirror)
    assert mirror.pool.out_bytes == 0


# -- a pass -----------------------------------------------------------------------------------


def test_a_pass_is_followed_to_its_end(mirror: Mirror) -> None:
    copier = mirror.copier
    assert copier.passes.remaining_bytes == 0
    mirror.policy.kept = set(range(8))
    mirror.put(0, 6)
    mirror.run(1.0)
    mirror.gate.take_recorded()
    copier.begin_pass(compare=False)
    assert copier.passes.total_bytes == copier.passes.remaining_bytes == 2 * EXTENT
    mirror.turn()
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    mirror.write(20)  # not part of the pass
    assert copier.passes.remaining_bytes == 2 * EXTENT - 2 * BLOCK
    settles: list[int] = []
    copier.passes.on_done = lambda: settles.append(mirror.gate.settles)
    mirror.run()
    assert settles == [2], "after the settle, not before"
    assert not copier.passes.under_way
    assert copier.passes.copied_bytes == 2 * EXTENT


def test_a_settle_does_not_end_a_pass_that_began_meanwhile(mirror: Mirror) -> None:
    mirror.policy.kept = set(range(8))
    mirror.put(0, 4)
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=False)
    while not mirror.copier.passes.nothing_left:
        drain(mirror.loop, mirror.primary)
        if mirror.pending(mirror.secondary) == ["flush"]:
            break
        mirror.loop.advance(0.5)
        if "write" in mirror.pending(mirror.secondary):
            mirror.finish(mirror.secondary)
    assert mirror.pending(mirror.secondary) == ["flush"]
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=True)
    mirror.finish(mirror.secondary)
    drain(mirror.loop, mirror.primary)
    assert mirror.copier.passes.under_way
    assert mirror.copier.transfers.compare
    mirror.run(5.0)
    assert not mirror.copier.passes.under_way


def test_a_settle_on_the_way_does_not_end_a_pass() -> None:
    mirror = begun(rate_bytes_per_s=BLOCK)
    mirror.policy.kept = set(range(8))
    mirror.put(0, 16)
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=False)
    while not mirror.gate.settles:
        mirror.run(1.0)
    assert mirror.copier.passes.remaining_bytes > 0
    assert mirror.copier.passes.under_way


@pytest.mark.parametrize("late", [False, True])
def test_what_a_process_that_died_had_sent_is_waited_for(mirror: Mirror, late: bool) -> None:
    mirror.secondary.writes_late = late
    mirror.put(0)
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=False, predecessor=True)
    mirror.run(QUIET_S - 0.5)
    assert (mirror.copier.passes.under_way) is late
    assert bool(mirror.copier.copied_bytes) is not late
    mirror.run(1.0)
    assert not mirror.copier.passes.under_way
    assert mirror.copier.copied_bytes == EXTENT


def test_a_pass_without_listeners_ends_as_well(mirror: Mirror) -> None:
    mirror.put(0)
    mirror.gate.take_era(lambda: None)
    mirror.copier.begin_pass(compare=False)
    mirror.run(1.0)
    assert not mirror.copier.passes.under_way


def test_the_remainder_is_never_more_than_the_volume() -> None:
    mirror = begun(size_bytes=EXTENT - 512)
    mirror.gate.grow(mirror.geometry)
    mirror.store.add([(0, 1)], (), lambda error: None)
    drain(mirror.loop, mirror.record)
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=False)
    assert mirror.copier.passes.remaining_bytes == EXTENT - 512


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


def test_the_primary_may_be_read_in_another_way() -> None:
    mirror = Mirror(extents=2)
    asked: list[tuple[int, int]] = []

    def read_aside(offset_bytes: int, buffer: memoryview, done: Done) -> None:
        asked.append((offset_bytes, len(buffer)))
        mirror.primary.read(offset_bytes, buffer, done)

    mirror.copier = Copier(
        mirror.geometry,
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
        read_primary=read_aside,
    )
    mirror.copier.start()
    mirror.put(3)
    mirror.run(1.0)
    assert equal(mirror)
    assert asked == [(3 * BLOCK, BLOCK)]
