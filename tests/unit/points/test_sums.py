"""points/sums: questions and answers, and what is compared with what."""

from __future__ import annotations

import errno

import pytest
import xxhash

from bitmapd.copier.comparing import Side
from bitmapd.copier.verify import Verify as Comparing
from bitmapd.copier.verify import VerifyResult
from bitmapd.gate.cycle import Void
from bitmapd.media.buffers import BufferPool
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.points.messages import Sums, Verify
from bitmapd.points.sums import BySums, ImageSums, piece_sums, sums_of
from bitmapd.record.geometry import Geometry
from tests.support.mirror import BLOCK, EXTENT
from tests.unit.points.homes import EXTENTS, Home, begun

BLOCKS = EXTENTS * EXTENT // BLOCK
EMPTY = xxhash.xxh3_64_intdigest(bytes(BLOCK))


class Run:
    """One comparison of a volume of zeros, and a receiver that answers as the test says."""

    def __init__(self, home: Home | None = None, *, pool_bytes: int = 1 << 20) -> None:
        self.home = home or begun()
        self.home.told()
        self.ended: list[tuple[OSError | None, VerifyResult]] = []
        self.pool = BufferPool(self.home.loop, pool_bytes)
        self.verify = Comparing(
            self.home.geometry,
            self.home.gate,
            BySums(
                self.home.geometry,
                self.home.primary.read,
                self.home.sender,
                self.home.loop,
                self.pool,
            ),
            self.home.loop,
            repair=True,
            done=lambda error, result: self.ended.append((error, result)),
        )
        self.verify.start()
        self.home.run()

    def asked(self) -> list[tuple[int, int]]:
        return [run for told in self.home.told() if isinstance(told, Verify) for run in told.runs]

    def answer(self, first: int, count: int, **other: int) -> None:
        """Zeros everywhere but at `block`."""
        at = other.get("block")
        self.home.say(
            Sums(first, tuple(7 if b == at else EMPTY for b in range(first, first + count)))
        )
        self.home.run()


def test_sums_are_of_whole_blocks_and_the_last_may_be_short() -> None:
    geometry = Geometry(2 * BLOCK - 512, EXTENT, BLOCK)
    raw = memoryview(bytes(range(256)) * ((2 * BLOCK - 512) // 256))
    assert sums_of(geometry, 0, raw) == (
        xxhash.xxh3_64_intdigest(raw[:BLOCK]),
        xxhash.xxh3_64_intdigest(raw[BLOCK:]),
    )


def test_sums_of_pieces_belong_to_their_block_and_the_last_may_be_short() -> None:
    geometry = Geometry(32768 - 512, 1 << 20, 16384)
    raw = memoryview(bytes(32768 - 512))
    sums = piece_sums(geometry, 1, 0, raw)
    assert len(sums) == 8
    assert sums[:4] == piece_sums(geometry, 1, 0, raw[:16384])
    assert sums[4:] == piece_sums(geometry, 1, 1, raw[16384:])
    assert [len({*part}) for part in (sums[:4], sums[4:7], sums[7:], sums)] == [1, 1, 1, 3]
    assert not {*sums} & {*piece_sums(geometry, 2, 0, raw)}


def test_equal_sums_are_no_difference() -> None:
    run = Run()
    assert run.asked() == [(0, BLOCKS)]
    run.answer(0, BLOCKS)
    assert run.ended == [(None, VerifyResult(compared_bytes=BLOCKS * BLOCK))]
    assert run.pool.out_bytes == 0


def test_a_block_that_differs_is_asked_for_again_and_marked() -> None:
    run = Run()
    run.asked()
    run.answer(0, BLOCKS, block=5)
    assert run.asked() == [(5, 6)]
    run.answer(5, 1, block=5)
    ((error, result),) = run.ended
    assert (error, result.unexpected) == (None, [(5 * BLOCK, BLOCK)])
    assert run.home.gate.is_dirty(5, 6)
    assert run.home.recorded() == {5 // (EXTENT // BLOCK)}


def test_what_waits_for_a_point_has_it_cut_at_once() -> None:
    """The block was sent, and is not committed: only then it is known what the image has of it."""
    home = begun()
    home.put(0, fill=0)
    home.run(1.0)
    home.commit(1)
    home.put(5)
    home.sender.cut()
    home.turn()
    home.gate.give_up_cut(Void.ASKED)  # what was read of it goes on all the same
    home.run()
    assert home.gate.may_differ(5, 6)
    assert not home.gate.is_dirty(5, 6)
    run = Run(home)
    run.asked()
    run.answer(0, BLOCKS, block=5)
    assert not run.ended
    home.run(1.0)
    home.commit(2)  # long before the interval is over
    home.run(1.0)
    assert run.asked() == [(5, 6)]


@pytest.mark.parametrize("sums", [Sums(1, (EMPTY,)), Sums(0, (EMPTY,))])
def test_an_answer_to_another_question_ends_the_connection(sums: Sums) -> None:
    run = Run()
    run.home.say(sums)
    assert run.home.wire.error is not None
    assert run.home.wire.error.code is ErrorCode.ANSWER


@pytest.mark.parametrize("asked", [None, (4, 5)])
def test_an_answer_that_nobody_asked_for_is_none(asked: tuple[int, int] | None) -> None:
    sums = ImageSums(lambda message: None)
    if asked is not None:
        sums.ask(*asked, lambda error, found: None)
    with pytest.raises(PeerError):
        sums.take(Sums(3, (1,)))


def test_a_receiver_that_goes_away_ends_it() -> None:
    run = Run()
    run.home.lose()
    run.home.run()
    ((error, _),) = run.ended
    assert error is not None
    assert error.errno == errno.ENOTCONN
    assert run.verify.failed is Side.SECONDARY
    assert run.pool.out_bytes == 0
    again = Run(run.home)
    ((error, _),) = again.ended
    assert error is not None
    assert error.errno == errno.ENOTCONN
    assert not run.home.sender.sums.is_due


def test_blocks_that_the_receiver_cannot_read_are_told_and_hide_nothing() -> None:
    run = Run()
    run.asked()
    run.home.say(Sums(0, ()))
    run.home.run()
    while asked := run.asked():
        for first, stop in asked:
            assert stop == first + 1
            if first == 3:
                run.home.say(Sums(3, ()))
            else:
                run.answer(first, 1)
        run.home.run()
    ((error, result),) = run.ended
    assert error is None
    assert result.unreadable_secondary == [(3 * BLOCK, BLOCK)]
    assert result.compared_bytes == (BLOCKS - 1) * BLOCK


def test_a_primary_that_cannot_be_read_is_told() -> None:
    home = begun()
    home.primary.fail_next["read"] = [errno.EIO]
    run = Run(home)
    run.asked()
    run.answer(0, BLOCKS)
    while asked := run.asked():
        for first, _ in asked:
            run.answer(first, 1)
    ((error, result),) = run.ended
    assert (error, result.compared_bytes) == (None, BLOCKS * BLOCK)


def test_who_gives_up_does_not_wait_and_the_answer_is_still_due() -> None:
    run = Run()
    error = OSError(errno.ECANCELED, "withdrawn")
    run.verify.cancel(error)
    run.home.sender.sums.give_up(error)
    run.home.run()
    assert [ended for ended, _ in run.ended] == [error]
    sums = run.home.sender.sums
    assert sums.is_due
    sums.give_up(error)
    run.answer(0, BLOCKS)
    assert not sums.is_due
    assert run.home.wire.is_open
    again = Run(run.home)
    sums.give_up(error)
    run.home.lose()
    assert not sums.is_due
    assert len(again.ended) == 1


def test_without_memory_it_waits_for_some() -> None:
    home = begun()
    pool = BufferPool(home.loop, BLOCKS * BLOCK)
    held = pool.take(BLOCK)
    assert held is not None
    comparison = BySums(home.geometry, home.primary.read, home.sender, home.loop, pool)
    called: list[int] = []
    assert not comparison.compare(0, BLOCKS, lambda failures, differing: None)
    comparison.when_room(lambda: called.append(1))
    pool.give(held)
    home.run()
    assert called == [1]
    assert home.told() == []
