"""copier/verify: what is explained, what is read again, what is unexpected, what is repaired."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

import pytest

from bitmapd.copier import verify as verify_module
from bitmapd.copier.comparing import BothRead, Side
from bitmapd.copier.verify import MAX_TRIES, PIECE_BYTES, RETRY_S, Verify, VerifyResult
from bitmapd.media.buffers import PAGE_BYTES, BufferPool, address_of
from tests.support.mirror import BLOCK, EXTENT, LoggedDisk, Mirror
from tests.support.sim import drain

MIB = 1 << 20


class Run:
    """One comparison of a mirror whose copier is not started."""

    def __init__(
        self, mirror: Mirror | None = None, *, repair: bool = False, pool_bytes: int = 16 << 20
    ) -> None:
        self.mirror = mirror or Mirror()
        self.ended: list[tuple[OSError | None, VerifyResult]] = []
        self.pool = BufferPool(self.mirror.loop, pool_bytes)
        self.verify = Verify(
            self.mirror.geometry,
            self.mirror.gate,
            BothRead(self.mirror.geometry, self.mirror.primary, self.mirror.secondary, self.pool),
            self.mirror.loop,
            repair=repair,
            done=lambda error, result: self.ended.append((error, result)),
        )

    def differ(self, *blocks: int, offset: int = 0) -> None:
        """Without anybody knowing."""
        for block in blocks:
            self.mirror.secondary.visible[block * BLOCK + offset] ^= 1

    def start(self) -> None:
        self.verify.start()
        self.mirror.turn()

    def whole(self) -> VerifyResult:
        self.start()
        self.mirror.run()
        return self.result

    @property
    def result(self) -> VerifyResult:
        ((error, result),) = self.ended
        assert error is None
        assert self.pool.out_bytes == 0
        return result


def test_equal_sides() -> None:
    run = Run()
    assert run.verify.progress == 0.0
    assert run.whole() == VerifyResult(compared_bytes=8 * EXTENT)
    assert run.verify.progress == 1.0


def test_nothing_is_done_inside_the_call() -> None:
    run = Run()
    run.verify.start()
    assert run.mirror.primary.calls == []


def test_an_unexpected_difference_is_found_and_nothing_is_written() -> None:
    run = Run()
    run.differ(5, offset=BLOCK - 1)
    result = run.whole()
    assert (result.unexpected_bytes, result.unexpected) == (BLOCK, [(5 * BLOCK, BLOCK)])
    assert (result.rechecked_blocks, result.repaired_bytes, result.undecided_blocks) == (1, 0, 0)
    mirror = run.mirror
    assert {kind for kind, _, _ in mirror.primary.calls + mirror.secondary.calls} == {"read"}
    assert not mirror.gate.current
    assert mirror.record.calls == []


def test_neighbours_are_listed_as_one_run() -> None:
    run = Run()
    run.differ(5, 6, 7, 9, 31)
    result = run.whole()
    assert result.unexpected == [
        (5 * BLOCK, 3 * BLOCK),
        (9 * BLOCK, BLOCK),
        (31 * BLOCK, BLOCK),
    ]
    assert result.unexpected_bytes == 5 * BLOCK


def test_the_list_has_an_end_and_the_count_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "MAX_LISTED", 2)
    run = Run()
    run.differ(1, 3, 5, 7)
    result = run.whole()
    assert result.unexpected == [(BLOCK, BLOCK), (3 * BLOCK, BLOCK)]
    assert result.unexpected_bytes == 4 * BLOCK


def test_the_last_block_may_be_short() -> None:
    run = Run(Mirror(size_bytes=EXTENT - 512))
    run.differ(3)
    result = run.whole()
    assert result.compared_bytes == EXTENT - 512
    assert result.unexpected == [(3 * BLOCK, BLOCK - 512)]


@pytest.mark.parametrize("state", ["current", "taken"])
def test_a_dirty_block_is_explained(state: str) -> None:
    run = Run()
    run.mirror.put(5)
    if state == "taken":
        run.mirror.gate.take_era(lambda: None)
    result = run.whole()
    assert result == VerifyResult(compared_bytes=8 * EXTENT)


def test_a_difference_is_looked_at_again_once_its_extent_is_settled() -> None:
    """A block that was copied between the two reads differs, and does so no more."""
    run = Run()
    mirror = run.mirror
    mirror.put(5)
    mirror.gate.take_era(lambda: None)
    mirror.gate.copied(5, 6)  # and not flushed: its extent may differ
    run.differ(6)
    run.start()
    mirror.run()
    assert run.ended == [], "nothing can be said before the settle"
    mirror.run(3 * RETRY_S)
    assert run.ended == []
    mirror.secondary.visible[:] = mirror.primary.visible
    mirror.gate.settle(mirror.gate.begin_settle())
    mirror.run(RETRY_S)
    result = run.result
    assert (result.rechecked_blocks, result.unexpected_bytes) == (2, 0)


def test_a_write_during_the_second_look_explains_the_difference() -> None:
    run = Run()
    run.differ(5)
    run.start()
    for _ in range(2):
        run.mirror.finish(run.mirror.primary)
        run.mirror.finish(run.mirror.secondary)
        if run.mirror.primary.asked("read")[-1] == (5, 1):
            break
    run.mirror.write(5)
    drain(run.mirror.loop, run.mirror.record)
    run.mirror.run()
    run.mirror.run(RETRY_S)
    result = run.result
    assert (result.rechecked_blocks, result.unexpected_bytes) == (1, 0)


def test_a_settle_during_the_second_look_makes_a_third() -> None:
    """A write may have come and gone meanwhile: the settle took its mark away."""
    run = Run()
    mirror = run.mirror
    run.differ(5)
    run.start()
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    assert mirror.primary.asked("read")[-1] == (5, 1)
    mirror.gate.settle(mirror.gate.begin_settle())
    mirror.run()
    result = run.result
    assert (result.rechecked_blocks, result.unexpected_bytes) == (2, BLOCK)


def test_a_block_that_is_never_quiet_is_given_up() -> None:
    run = Run()
    mirror = run.mirror
    mirror.put(4)
    mirror.gate.take_era(lambda: None)
    mirror.gate.copied(4, 5)
    run.differ(5)  # in an extent that is copied and never settled
    mirror.secondary.visible[4 * BLOCK : 5 * BLOCK] = b"\1" * BLOCK
    run.start()
    mirror.run()
    for tries in range(MAX_TRIES):
        assert run.ended == [], tries
        mirror.run(RETRY_S)
    result = run.result
    assert (result.undecided_blocks, result.unexpected_bytes) == (1, 0)
    assert result.rechecked_blocks == 0


def test_a_suspect_that_was_written_meanwhile_is_explained_later() -> None:
    run = Run()
    mirror = run.mirror
    mirror.put(4)
    mirror.gate.take_era(lambda: None)
    mirror.gate.copied(4, 5)
    run.differ(5)
    run.start()
    mirror.run()
    mirror.put(4)
    mirror.put(5)
    mirror.run(RETRY_S)
    assert run.result.unexpected_bytes == 0


# -- repair -----------------------------------------------------------------------------------


def test_a_repair_marks_the_block_and_the_copier_does_the_rest() -> None:
    run = Run(repair=True)
    mirror = run.mirror
    run.differ(5, 6, 20)
    result = run.whole()
    assert (result.unexpected_bytes, result.repaired_bytes) == (3 * BLOCK, 3 * BLOCK)
    assert mirror.stored() == {1, 5}, "recorded before anything else"
    assert list(mirror.gate.current.runs()) == [(5, 7), (20, 21)]
    mirror.copier.start()
    mirror.run(1.0)
    assert mirror.primary.visible == mirror.secondary.durable
    assert Run(mirror).whole().unexpected_bytes == 0


def test_a_repair_waits_for_the_record() -> None:
    run = Run(repair=True)
    run.differ(5)
    run.start()
    drain(run.mirror.loop, run.mirror.primary, run.mirror.secondary)
    assert run.mirror.pending(run.mirror.record) == ["write"]
    assert run.ended == []
    run.mirror.run()
    assert run.result.repaired_bytes == BLOCK


def test_a_repair_that_cannot_be_recorded_ends_the_run() -> None:
    run = Run(repair=True)
    run.differ(5)
    run.mirror.record.fail_next = {"write": [errno.EIO]}
    run.start()
    run.mirror.run()
    ((error, result),) = run.ended
    assert error is not None
    assert error.errno == errno.EIO
    assert (result.unexpected_bytes, result.repaired_bytes) == (BLOCK, 0)


# -- ends -------------------------------------------------------------------------------------


def spotted(primary: Iterable[int] = (), secondary: Iterable[int] = (), **more: int) -> Run:
    """Both sides have blocks that cannot be read."""
    run = Run(**more)
    run.mirror.primary.unreadable = {block * BLOCK for block in primary}
    run.mirror.secondary.unreadable = {block * BLOCK for block in secondary}
    return run


def test_what_cannot_be_read_is_listed_and_hides_nothing_behind_it() -> None:
    run = spotted(primary=(6, 7), secondary=(0, 7, 31))
    run.differ(5, 8, 30)
    result = run.whole()
    assert result.unreadable_primary == [(6 * BLOCK, 2 * BLOCK)]
    assert result.unreadable_secondary == [
        (0, BLOCK),
        (7 * BLOCK, BLOCK),
        (31 * BLOCK, BLOCK),
    ]
    assert result.unreadable_bytes == 4 * BLOCK
    assert result.compared_bytes == 8 * EXTENT - 4 * BLOCK
    assert sorted(result.unexpected) == [(block * BLOCK, BLOCK) for block in (5, 8, 30)]


def test_blocks_wait_for_a_buffer_as_pieces_do() -> None:
    run = spotted(secondary=(3,), pool_bytes=2 * PAGE_BYTES)
    assert run.whole().unreadable_secondary == [(3 * BLOCK, BLOCK)]


def test_an_error_that_goes_away_is_none() -> None:
    run = Run()
    run.start()
    run.mirror.fail(run.mirror.primary, errno.EIO)
    run.mirror.run()
    assert run.result == VerifyResult(compared_bytes=8 * EXTENT)


def test_a_block_that_fails_when_it_is_read_again_is_listed() -> None:
    run = Run(Mirror(1))
    run.differ(2)
    run.start()
    mirror = run.mirror
    for disk in (mirror.primary, mirror.secondary):
        mirror.finish(disk)
    mirror.turn()
    mirror.fail(mirror.secondary, errno.EIO)
    mirror.run()
    assert run.result.unreadable_secondary == [(2 * BLOCK, BLOCK)]
    assert run.result.unexpected == []


@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_a_dead_side_ends_the_run(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "MAX_UNREADABLE_BLOCKS", 4)
    run = spotted(**{side: range(32)})
    run.start()
    run.mirror.run()
    ((error, result),) = run.ended
    assert error is not None
    assert error.errno == errno.EIO
    assert run.verify.failed is Side(side)
    assert 4 * BLOCK < result.unreadable_bytes < 32 * BLOCK
    assert run.pool.out_bytes == 0


def test_a_secondary_that_went_away_ends_the_run_once_nothing_is_in_flight() -> None:
    run = Run(Mirror(3, extent_bytes=MIB, block_bytes=64 << 10))
    run.start()
    mirror = run.mirror
    assert len(mirror.primary.pending) == 3, "several pieces at a time"
    mirror.secondary.connected = False
    mirror.finish(mirror.secondary)
    mirror.finish(mirror.primary)
    assert run.ended == []
    mirror.run()
    ((error, result),) = run.ended
    assert error is not None
    assert error.errno == errno.ENOTCONN
    assert run.verify.failed is Side.SECONDARY
    assert (result.compared_bytes, result.unreadable_bytes) == (0, 0)
    assert run.pool.out_bytes == 0


def test_a_cancelled_run_ends_with_the_reason_given() -> None:
    run = Run()
    run.start()
    reason = OSError(errno.ECANCELED, "stopping")
    run.verify.cancel(reason)
    run.verify.cancel(OSError(errno.EIO, "too late"))
    run.mirror.turn()
    assert run.ended == [], "its reads are in flight"
    run.mirror.run()
    ((error, _),) = run.ended
    assert error is reason
    run.verify.cancel(reason)
    run.mirror.run(10.0)
    assert len(run.ended) == 1


def test_a_run_that_waits_for_quiet_can_be_cancelled() -> None:
    run = Run()
    mirror = run.mirror
    mirror.put(4)
    mirror.gate.take_era(lambda: None)
    mirror.gate.copied(4, 5)
    run.differ(5)
    run.start()
    mirror.run()
    run.verify.cancel(OSError(errno.ECANCELED, "stopping"))
    mirror.run()
    assert len(run.ended) == 1
    mirror.run(2 * RETRY_S)
    assert len(run.ended) == 1, "the timer that is left does nothing"


# -- memory -----------------------------------------------------------------------------------


def test_pieces_are_bounded_in_size_and_number() -> None:
    run = Run(Mirror(8, extent_bytes=MIB, block_bytes=64 << 10))
    run.start()
    assert [length for _, _, length in run.mirror.primary.calls] == [PIECE_BYTES] * 4
    run.mirror.run()
    assert run.result.compared_bytes == 8 * MIB


def test_a_small_pool_slows_down_and_stops_nothing() -> None:
    run = Run(Mirror(8, extent_bytes=MIB, block_bytes=64 << 10), pool_bytes=2 * MIB)
    run.start()
    assert len(run.mirror.primary.pending) == 1
    run.mirror.run()
    assert run.result.compared_bytes == 8 * MIB


def test_a_block_larger_than_the_pool_is_compared_all_the_same() -> None:
    run = Run(Mirror(2, extent_bytes=MIB, block_bytes=MIB), pool_bytes=MIB)
    run.mirror.secondary.visible[MIB + 5] = 1
    result = run.whole()
    assert result.compared_bytes == 2 * MIB
    assert result.unexpected == [(MIB, MIB)]


def test_a_pool_that_others_have_emptied_is_waited_for() -> None:
    run = Run(pool_bytes=64 << 10)
    others = [run.pool.take(32 << 10) for _ in range(2)]
    run.start()
    for other in others:
        run.mirror.run(2 * RETRY_S)
        assert run.mirror.primary.calls == []
        assert other is not None
        run.pool.give(other)
    run.mirror.run()
    assert run.result.compared_bytes == 8 * EXTENT


def test_buffers_are_aligned_for_direct_io() -> None:
    addresses: list[int] = []

    class Watched(LoggedDisk):
        def read(self, offset_bytes: int, buffer: memoryview, done: Any) -> None:
            addresses.append(address_of(buffer))
            super().read(offset_bytes, buffer, done)

    mirror = Mirror(size_bytes=EXTENT - 512)
    for name in ("primary", "secondary"):
        setattr(mirror, name, Watched(name, EXTENT - 512))
    mirror.disks = (mirror.record, mirror.primary, mirror.secondary)
    run = Run(mirror)
    run.differ(3)
    run.whole()
    assert len(addresses) == 4
    assert [address % PAGE_BYTES for address in addresses] == [0] * 4
