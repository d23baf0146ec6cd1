"""gate/changes: which pieces of a block are sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.gate.blockset import REGION_BLOCKS, BlockSet
from bitmapd.gate.changes import PIECE_SHIFT, Changes, Pieces
from bitmapd.record.geometry import PIECE_BYTES, Geometry

BLOCK = 4 * PIECE_BYTES
GEOMETRY = Geometry(8 * BLOCK, 4 * BLOCK, BLOCK)


class Volume:
    """Eras as a gate has them."""

    def __init__(self) -> None:
        self.blocks = BlockSet()
        self.changes = Changes(GEOMETRY, self.blocks)

    def write(self, piece: int, count: int = 1) -> None:
        self.changes.written(piece * PIECE_BYTES, count * PIECE_BYTES)

    def begin_era(self) -> None:
        self.blocks = BlockSet()
        self.changes.begin_era(self.blocks)

    def cut(self) -> None:
        self.changes.cut()
        self.begin_era()

    def of(self, block: int, *, pending: bool = False) -> int | None:
        return self.changes.of(block, pending=pending)


@pytest.fixture
def volume() -> Volume:
    return Volume()


def test_a_write_marks_every_piece_that_it_touches_and_the_blocks_of_them(volume: Volume) -> None:
    volume.changes.written(PIECE_BYTES - 1, 2)
    volume.write(7)
    volume.write(7)
    assert [volume.of(block) for block in range(2)] == [0b0011, 0b1000]
    assert list(volume.blocks.runs()) == [(0, 2)]
    assert volume.changes.most_bytes == 3 * PIECE_BYTES


def test_what_changed_before_the_cut_and_since_are_told_apart(volume: Volume) -> None:
    volume.write(0)
    volume.cut()
    volume.write(1)
    assert (volume.of(0, pending=True), volume.of(0)) == (0b0001, 0b0011)


def test_what_changed_stays_until_its_point_is_committed_whatever_eras_and_cuts(
    volume: Volume,
) -> None:
    volume.write(0)
    volume.begin_era()
    volume.write(1)
    volume.cut()
    volume.write(2)
    volume.begin_era()
    volume.write(3)
    assert (volume.of(0, pending=True), volume.of(0)) == (0b0011, 0b1111)
    volume.cut()
    assert volume.of(0, pending=True) == 0b1111
    assert volume.changes.cut_bytes == 4 * PIECE_BYTES
    volume.write(4)
    volume.changes.committed()
    assert (volume.of(0), volume.of(1)) == (None, 0b0001)


def test_a_block_that_was_marked_unknown_is_sent_whole_though_pieces_of_it_were_written(
    volume: Volume,
) -> None:
    volume.write(0)
    volume.changes.unknown(0, 2)
    volume.write(5)
    assert (volume.of(0), volume.of(1)) == (None, None)
    volume.cut()
    assert (volume.of(1, pending=True), volume.of(1)) == (None, None)
    assert volume.changes.cut_bytes == 2 * BLOCK
    assert volume.changes.most_bytes == 2 * BLOCK + 2 * PIECE_BYTES
    volume.write(9, 2)
    assert volume.changes.bytes_in([(0, 1), (2, 3)]) == BLOCK + 2 * PIECE_BYTES
    volume.changes.unknown(0, 1)
    volume.changes.committed()
    volume.write(0)
    assert volume.of(0) is None, "marked after the cut"


def test_a_block_of_which_nothing_is_known_is_sent_whole(volume: Volume) -> None:
    assert volume.of(3) is None


@given(st.lists(st.tuples(st.integers(0, 2 * REGION_BLOCKS), st.integers(1, 40)), max_size=30))
def test_pieces_are_a_set_that_brings_its_blocks_along(runs: list[tuple[int, int]]) -> None:
    blocks = BlockSet()
    pieces = Pieces(blocks, 2)
    for first, count in runs:
        pieces.add(first, first + count)
    plain = BlockSet((first, first + count) for first, count in runs)
    assert list(pieces.runs()) == list(plain.runs())
    assert pieces.count() == plain.count()
    assert list(blocks.runs()) == list(
        BlockSet((first >> 2, (first + count - 1 >> 2) + 1) for first, count in runs).runs()
    )


def test_a_piece_is_what_the_wire_has() -> None:
    assert 1 << PIECE_SHIFT == PIECE_BYTES


def unknown(volume: Volume) -> list[tuple[int, int]]:
    """All blocks of which nobody knows what changed, and that are not in question."""
    runs, at = [], 0
    while (run := volume.changes.next_unknown(at, 2)) is not None:
        runs.append(run)
        at = run[1]
    return runs


def test_what_is_in_question_is_unknown_until_its_answer(volume: Volume) -> None:
    volume.changes.unknown(0, 1)
    volume.cut()
    volume.changes.unknown(3, 6)
    assert unknown(volume) == [(0, 1), (3, 5), (5, 6)]
    volume.changes.question(0, 5)
    assert unknown(volume) == [(5, 6)]
    assert [volume.of(block) for block in (0, 3, 5)] == [None] * 3
    assert volume.changes.most_bytes == 6 * BLOCK
    assert not volume.changes.answered(3, 0b1010)
    assert volume.of(3) == 0b1010
    assert volume.changes.answered(4, 0)
    volume.changes.unanswered()
    assert unknown(volume) == [(0, 2), (2, 3), (5, 6)]


def test_what_cannot_be_told_is_unknown_again(volume: Volume) -> None:
    volume.changes.unknown(2, 3)
    volume.changes.question(2, 3)
    assert not volume.changes.answered(2, None)
    assert unknown(volume) == [(2, 3)]


def test_an_answer_adds_to_what_is_written_meanwhile(volume: Volume) -> None:
    volume.changes.unknown(1, 2)
    volume.changes.question(1, 2)
    volume.write(4)
    assert volume.of(1) is None
    assert not volume.changes.answered(1, 0b1000)
    assert volume.of(1) == 0b1001


def test_what_becomes_unknown_while_it_is_in_question_stays_so(volume: Volume) -> None:
    volume.changes.unknown(1, 2)
    volume.changes.question(1, 2)
    volume.changes.unknown(1, 2)
    assert not volume.changes.answered(1, 0)
    assert unknown(volume) == [(1, 2)]
    assert volume.of(1) is None
