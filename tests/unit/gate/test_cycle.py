"""gate/cycle: cuts, and what hosts wait for while one is open."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from bitmapd.gate.cycle import PATIENCE_S, CutGate, Void
from bitmapd.media.buffers import aligned
from bitmapd.record.geometry import PIECE_BYTES, Geometry
from bitmapd.record.store import RecordStore
from tests.support.mirror import BLOCK, EXTENT, PER_EXTENT, Answers, LoggedDisk, ScriptedPolicy
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop, drain

EXTENTS = 8
Runs = list[tuple[int, int]]


class Cuts:
    """A gate with a reader that notes what it is asked for."""

    def __init__(self, block_bytes: int = BLOCK) -> None:
        self.geometry = Geometry(EXTENTS * EXTENT, EXTENT, block_bytes)
        image = blank_image(self.geometry)
        self.loop = SimLoop()
        self.record = LoggedDisk("record", len(image), image)
        self.primary = LoggedDisk("primary", EXTENTS * EXTENT)
        self.store = RecordStore(
            self.geometry, load_image(image), self.record, self.loop, lambda event, **fields: None
        )
        self.policy = ScriptedPolicy()
        self.gate = CutGate(
            self.geometry, self.primary, self.store, self.policy, self.loop, limit_extents=100
        )
        self.gate.reader = self
        self.has_room = True
        self.wanted: Runs = []
        self.reasons: list[Void] = []
        self.ready = 0

    # -- as a reader
    def read_first(self, runs: Iterable[tuple[int, int]]) -> bool:
        if self.has_room:
            self.wanted += runs
        return self.has_room

    def gave_up(self, reason: Void) -> None:
        assert not self.gate.is_cutting, "the reader hears of it when it is over"
        self.reasons.append(reason)

    # -- hosts
    def write(self, block: int, count: int = 1, fill: int = 1) -> Answers:
        answers: Answers = []
        buffer = aligned(count * BLOCK)
        buffer[:] = bytes([fill]) * len(buffer)
        self.gate.write(block * BLOCK, buffer, answers.append)
        return answers

    def trim(self, offset_bytes: int, length_bytes: int) -> Answers:
        answers: Answers = []
        self.gate.trim(offset_bytes, length_bytes, answers.append)
        return answers

    def put(self, block: int, count: int = 1) -> None:
        answers = self.write(block, count)
        self.drain()
        assert answers == [None]

    def drain(self) -> None:
        drain(self.loop, self.record, self.primary)

    def finish(self, disk: SimDisk, index: int = 0) -> None:
        disk.finish(index)
        self.loop.run_soon()

    # -- cuts
    def cut(self) -> None:
        def ready() -> None:
            self.ready += 1

        self.gate.begin_cut(ready)
        self.loop.run_soon()
        self.primary.calls.clear()

    def settle(self) -> None:
        """What was read is in a committed point."""
        self.gate.end_cut()
        self.gate.settle(self.gate.begin_settle())


@pytest.fixture
def cuts() -> Cuts:
    return Cuts()


def test_what_is_dirty_at_the_cut_is_pending(cuts: Cuts) -> None:
    cuts.put(1, 2)
    cuts.cut()
    assert cuts.ready == 1
    assert [block for block in range(8) if cuts.gate.is_pending(block)] == [1, 2]
    assert cuts.gate.is_cutting
    cuts.put(5)
    assert not cuts.gate.is_pending(5)
    cuts.gate.copied(1, 3)
    assert not cuts.gate.is_pending(1)


def test_pending_blocks_may_be_read_when_writes_of_before_have_landed(cuts: Cuts) -> None:
    cuts.put(0)
    answers = cuts.write(1)  # a hit, in flight
    cuts.cut()
    assert cuts.ready == 0
    cuts.finish(cuts.primary)
    assert (cuts.ready, answers) == (1, [None])


def test_a_write_to_a_pending_block_waits_until_it_was_read(cuts: Cuts) -> None:
    cuts.put(1)
    cuts.cut()
    first, second, beside = cuts.write(1, fill=2), cuts.write(1, fill=3), cuts.write(2)
    assert cuts.wanted == [(1, 2), (1, 2)]
    assert cuts.primary.asked("write") == [(2, 1)]
    cuts.loop.advance(0.01)
    cuts.gate.copied(1, 2)
    assert cuts.primary.asked("write") == [(2, 1), (1, 1), (1, 1)]
    cuts.drain()
    assert (first, second, beside) == ([None], [None], [None])
    assert cuts.gate.is_hot(1, 2) is False, "while a cut is open nothing is passed over"
    cuts.gate.end_cut()
    assert cuts.gate.is_hot(1, 2)
    assert cuts.gate.waits == 2
    assert cuts.gate.wait_s == pytest.approx(0.02)
    assert cuts.gate.longest_wait_s == pytest.approx(0.01)
    assert cuts.gate.writes == 4, "one that waited counts once"


def test_a_write_waits_for_all_its_pending_blocks_and_no_others(cuts: Cuts) -> None:
    cuts.put(1, 3)
    cuts.put(6)
    cuts.cut()
    cuts.write(2, 3)
    assert cuts.wanted == [(2, 4)]
    cuts.gate.copied(6, 7)
    cuts.gate.copied(2, 3)
    assert cuts.primary.asked("write") == []
    cuts.gate.copied(3, 4)
    assert cuts.primary.asked("write") == [(2, 3)]


def test_a_host_waits_for_its_patience_and_no_longer(cuts: Cuts) -> None:
    cuts.put(1, 2)
    cuts.cut()
    first = cuts.write(1)
    cuts.loop.advance(PATIENCE_S * 0.8)
    second = cuts.write(2)
    cuts.loop.advance(PATIENCE_S * 0.1)
    assert cuts.reasons == []
    cuts.loop.advance(PATIENCE_S * 0.2)
    assert cuts.reasons == [Void.SLOW]
    cuts.drain()
    assert (first, second) == ([None], [None])
    assert not cuts.gate.is_cutting
    assert cuts.gate.taken.any(1, 2)
    assert cuts.gate.current.any(1, 2)


def test_patience_is_that_of_the_oldest_who_still_waits(cuts: Cuts) -> None:
    cuts.put(1, 2)
    cuts.cut()
    cuts.write(1)
    cuts.loop.advance(PATIENCE_S / 2)
    cuts.write(2)
    cuts.gate.copied(1, 2)
    cuts.loop.advance(PATIENCE_S * 0.75)
    assert cuts.reasons == []
    cuts.loop.advance(PATIENCE_S / 2)
    assert cuts.reasons == [Void.SLOW]


def test_when_nobody_waits_any_more_there_is_no_patience_to_lose(cuts: Cuts) -> None:
    cuts.put(1, 2)
    cuts.cut()
    cuts.write(1)
    cuts.gate.copied(1, 2)
    cuts.loop.advance(2 * PATIENCE_S)
    assert cuts.reasons == []
    assert cuts.gate.is_cutting


def test_no_room_for_what_has_to_be_read_gives_the_cut_up(cuts: Cuts) -> None:
    cuts.put(1, 2)
    cuts.cut()
    waiting = cuts.write(1)
    cuts.has_room = False
    answers = cuts.write(2)
    assert cuts.reasons == [Void.SPOOL]
    assert cuts.primary.asked("write") == [(1, 1), (2, 1)]
    cuts.drain()
    assert (waiting, answers) == ([None], [None])


def test_a_cut_is_given_up_once(cuts: Cuts) -> None:
    cuts.put(1)
    cuts.cut()
    cuts.gate.give_up_cut(Void.READ_ERROR)
    cuts.gate.give_up_cut(Void.READ_ERROR)
    assert cuts.reasons == [Void.READ_ERROR]
    cuts.put(1)


@pytest.mark.parametrize("verb", ["write", "zero"])
def test_what_a_write_waited_for_may_have_cost_it_its_place_in_the_record(
    cuts: Cuts, verb: str
) -> None:
    """Over two extents: one is pending, the other is clean, recorded, and evicted meanwhile."""
    cuts.policy.kept = {1}
    cuts.put(PER_EXTENT)  # extent 1 gets into the record, and stays when it is clean
    cuts.cut()
    cuts.gate.copied(PER_EXTENT, PER_EXTENT + 1)
    cuts.settle()
    cuts.put(PER_EXTENT - 1)
    cuts.cut()
    answers: Answers = []
    if verb == "zero":
        cuts.gate.zero((PER_EXTENT - 1) * BLOCK, 2 * BLOCK, answers.append)
    else:
        answers = cuts.write(PER_EXTENT - 1, 2)
    assert cuts.wanted == [(PER_EXTENT - 1, PER_EXTENT)]
    cuts.gate.drop_clean([1])
    cuts.store.flush_clears()
    cuts.drain()
    assert not cuts.store.covers(1, 2)
    cuts.gate.copied(PER_EXTENT - 1, PER_EXTENT)
    assert cuts.primary.asked(verb) == [], "extent 1 is in no record"
    cuts.loop.run_soon()
    cuts.finish(cuts.record)
    assert cuts.primary.asked(verb) == [(PER_EXTENT - 1, 2)]
    cuts.drain()
    assert answers == [None]


def test_a_cut_that_comes_while_a_write_waits_for_the_record_is_seen(cuts: Cuts) -> None:
    cuts.put(PER_EXTENT - 1)
    answers = cuts.write(PER_EXTENT - 1, 2)  # a miss in extent 1
    cuts.cut()
    cuts.finish(cuts.record)
    assert cuts.primary.asked("write") == []
    assert cuts.wanted == [(PER_EXTENT - 1, PER_EXTENT)]
    cuts.gate.copied(PER_EXTENT - 1, PER_EXTENT)
    assert cuts.primary.asked("write") == [(PER_EXTENT - 1, 2)]
    cuts.drain()
    assert answers == [None]


def test_a_miss_beside_pending_blocks_goes_on(cuts: Cuts) -> None:
    cuts.put(1)
    cuts.cut()
    cuts.put(PER_EXTENT)
    assert cuts.wanted == []


def test_a_zeroing_is_a_write(cuts: Cuts) -> None:
    cuts.put(1, 2)
    cuts.cut()
    answers: Answers = []
    cuts.gate.zero(0, 4 * BLOCK, answers.append)
    assert cuts.wanted == [(1, 3)]
    assert cuts.primary.asked("zero") == []
    cuts.gate.copied(1, 3)
    assert cuts.primary.asked("zero") == [(0, 4)]
    cuts.drain()
    assert answers == [None]


def test_a_trim_leaves_pending_blocks_out(cuts: Cuts) -> None:
    cuts.put(1)
    cuts.put(3)
    cuts.cut()
    answers = cuts.trim(512, 4 * BLOCK - 1024)
    assert [call[1:] for call in cuts.primary.calls if call[0] == "trim"] == [
        (512, BLOCK - 512),
        (2 * BLOCK, BLOCK),
    ]
    cuts.drain()
    assert (answers, cuts.wanted) == ([None], [])
    assert not cuts.gate.current.any(1, 2)
    assert not cuts.gate.current.any(3, 4)


def test_a_trim_of_nothing_but_pending_blocks_is_done(cuts: Cuts) -> None:
    cuts.put(1)
    cuts.cut()
    answers = cuts.trim(BLOCK, BLOCK)
    assert answers == [], "not from inside"
    cuts.loop.run_soon()
    assert answers == [None]
    assert cuts.primary.calls == []


def test_what_did_not_arrive_is_dirty_and_not_pending(cuts: Cuts) -> None:
    cuts.put(1)
    cuts.cut()
    cuts.gate.copied(1, 2)
    cuts.gate.send_again(1, 2)
    assert not cuts.gate.is_pending(1)
    assert cuts.gate.current.any(1, 2)


@pytest.mark.parametrize("way", ["recorded", "everything", "growth", "forgotten", "unsettled"])
def test_nothing_becomes_pending_after_the_cut(cuts: Cuts, way: str) -> None:
    cuts.put(1, 2)
    cuts.cut()
    cuts.gate.copied(1, 2)
    if way == "recorded":
        cuts.gate.take_recorded()
    elif way == "everything":
        cuts.gate.take_everything(lambda error: None)
    elif way == "growth":
        cuts.gate.grow(Geometry(2 * EXTENTS * EXTENT, EXTENT, BLOCK))
    elif way == "forgotten":
        assert cuts.gate.forget_copied() == {0}
    else:
        cuts.gate.unsettle(cuts.gate.begin_settle())
    assert len(cuts.reasons) == 1
    assert not cuts.gate.is_cutting


def test_outside_of_cuts_nobody_waits(cuts: Cuts) -> None:
    cuts.put(1)
    cuts.gate.take_era(lambda: None)
    cuts.loop.run_soon()
    cuts.put(1)
    assert cuts.trim(BLOCK, BLOCK) == []
    assert cuts.primary.asked("trim") == [(1, 1)]
    assert (cuts.gate.waits, cuts.wanted) == (0, [])


# -- pieces: blocks of an extent, and requests of a piece each --------------------------------


@pytest.fixture
def pieces() -> Cuts:
    cuts = Cuts(EXTENT)
    assert BLOCK == PIECE_BYTES
    return cuts


def masks(cuts: Cuts, *blocks: int, pending: bool = False) -> list[int | None]:
    return [cuts.gate.changes.of(block, pending=pending) for block in blocks]


def test_every_change_of_a_host_is_known_by_its_pieces(pieces: Cuts) -> None:
    pieces.put(1)  # a miss
    pieces.put(2, 3)  # a hit, and a miss over two blocks
    pieces.gate.zero(9 * BLOCK, BLOCK, lambda error: None)
    pieces.trim(15 * BLOCK, BLOCK)
    pieces.drain()
    assert masks(pieces, 0, 1, 2, 3) == [0b1110, 0b0001, 0b0010, 0b1000]
    assert list(pieces.gate.current.runs()) == [(0, 4)]


def test_what_is_written_after_the_cut_is_not_of_the_point(pieces: Cuts) -> None:
    pieces.put(1)
    pieces.cut()
    pieces.write(2)
    pieces.gate.copied(0, 1)
    pieces.drain()
    pieces.gate.zero(3 * BLOCK, BLOCK, lambda error: None)
    pieces.trim(0, BLOCK)
    pieces.drain()
    assert (masks(pieces, 0, pending=True), masks(pieces, 0)) == ([0b0010], [0b1111])
    pieces.settle()
    assert masks(pieces, 0) == [0b1101]


def test_a_write_that_waits_while_its_point_is_committed_is_of_the_next_one(pieces: Cuts) -> None:
    pieces.write(1)  # a miss
    pieces.cut()
    pieces.settle()
    pieces.drain()
    assert list(pieces.gate.current.runs()) == [(0, 1)]
    assert masks(pieces, 0) == [0b0010]


@pytest.mark.parametrize("way", ["mark", "recorded", "everything", "forgotten", "unsettled"])
def test_what_no_host_wrote_is_sent_whole(pieces: Cuts, way: str) -> None:
    gate = pieces.gate
    pieces.put(0)
    pieces.cut()
    gate.copied(0, 1)
    gate.end_cut()
    errors: Answers = []
    if way == "mark":
        gate.mark(0, 1, errors.append)
    elif way == "recorded":
        gate.take_recorded()
    elif way == "everything":
        gate.take_everything(errors.append)
    elif way == "forgotten":
        gate.forget_copied()
    else:
        gate.unsettle(gate.begin_settle())
    pieces.drain()
    gate.settle(gate.begin_settle())  # of the cut before it
    pieces.put(1)
    assert masks(pieces, 0) == [None]
    pieces.cut()
    assert masks(pieces, 0, pending=True) == [None]


def test_a_mark_that_the_record_does_not_take_marks_nothing(pieces: Cuts) -> None:
    errors: Answers = []
    pieces.record.fail_next = {"write": [5]}
    pieces.gate.mark(0, 1, errors.append)
    pieces.drain()
    assert isinstance(errors[0], OSError)
    pieces.put(1)
    assert masks(pieces, 0) == [0b0010]


def test_the_new_part_of_a_volume_is_sent_whole(pieces: Cuts) -> None:
    pieces.gate.grow(Geometry(2 * EXTENTS * EXTENT, EXTENT, EXTENT))
    pieces.gate.changes.written(EXTENTS * EXTENT, BLOCK)
    pieces.put(0)
    assert masks(pieces, EXTENTS, 0) == [None, 0b0001]


def test_what_did_not_arrive_is_sent_with_the_same_pieces(pieces: Cuts) -> None:
    pieces.put(1)
    pieces.cut()
    pieces.gate.copied(0, 1)
    pieces.gate.end_cut()
    pieces.gate.send_again(0, 1)
    pieces.put(2)
    assert masks(pieces, 0) == [0b0110]


def test_no_write_of_after_the_cut_is_answered_while_answers_are_withheld(cuts: Cuts) -> None:
    """Whichever way it takes: a hit, a miss, one that waited for the record, a zeroing."""
    cuts.put(0)
    early = cuts.write(3 * PER_EXTENT)  # a miss: it is submitted behind the cut
    cuts.gate.withhold_answers()
    cuts.cut()
    hit, miss = cuts.write(1), cuts.write(2 * PER_EXTENT)
    zero: Answers = []
    cuts.gate.zero(2 * BLOCK, BLOCK, zero.append)
    cuts.drain()
    cuts.gate.copied(0, 1)
    cuts.gate.end_cut()  # all was read; not all of the group have been cut
    later = cuts.write(1)
    cuts.drain()
    assert (early, hit, miss, zero, later) == ([], [], [], [], [])
    cuts.gate.release_answers()
    assert (early, hit, miss, zero, later) == ([None], [None], [None], [None], [None])
    cuts.put(1)


def test_answers_that_are_given_in_a_cut_leave_it_open(cuts: Cuts) -> None:
    cuts.put(0)
    cuts.gate.withhold_answers()
    cuts.cut()
    cuts.gate.release_answers()
    answers = cuts.write(0)
    assert cuts.wanted == [(0, 1)]
    cuts.gate.give_up_cut(Void.GROUP)
    cuts.drain()
    assert answers == [None]
