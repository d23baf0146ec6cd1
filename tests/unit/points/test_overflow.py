"""points/overflow: what memory has no room for goes to a file, and comes back as it was."""

from __future__ import annotations

import errno
from functools import partial

import pytest

from bitmapd.gate.blockset import BlockSet
from bitmapd.points.overflow import BATCH_BYTES, RETRY_S, Overflow
from bitmapd.points.spool import Spool
from tests.support.sim import SimDisk, SimLoop

LIMIT = 64 * 1024
BLOCK = 8 * 1024
PER_BATCH = 3  # blocks: what a test lets a batch have


class Filled:
    """A spool and its file, of two places, as a sender has them."""

    def __init__(self) -> None:
        self.loop = SimLoop()
        self.disk = SimDisk("spool", 2 * BATCH_BYTES + 4096)
        self.spool = Spool(LIMIT)
        self.file = Overflow(self.spool, self.disk, self.loop.time, self)
        self.spool.beyond = self.file
        self.errors: list[tuple[int | None, list[tuple[int, int]]]] = []

    def spool_failed(self, error: OSError, lost: BlockSet) -> None:
        self.errors.append((error.errno, list(lost.runs())))

    def proceed(self) -> None:
        """As a sender, which then has the file look again."""
        self.file.proceed()

    def put(self, *blocks: int, fill: int = 0) -> None:
        for block in blocks:
            self.spool.put(block, 0b11, bytes([fill or block]) * BLOCK)

    def sent(self) -> dict[int, int]:
        """All that can leave memory now, by what it is filled with."""
        found = {}
        for spooled in self.spool.first(1 << 30, 1000):
            assert spooled.mask == 0b11
            found[spooled.block] = spooled.raw[0]
            assert spooled.raw == spooled.raw[:1] * BLOCK
            self.spool.drop(spooled.block)
        return found

    def in_memory(self) -> list[int]:
        return sorted(spooled.block for spooled in self.spool.first(1 << 30, 1000))

    def finish(self, kind: str) -> None:
        (op,) = self.disk.pending
        assert op.kind == kind
        self.disk.finish(0)
        self.loop.run_soon()


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> Filled:
    filled = Filled()
    last = filled.spool.last
    monkeypatch.setattr(filled.spool, "last", lambda most: last(PER_BATCH * BLOCK))
    return filled


def out(filled: Filled, *blocks: int) -> None:
    """Put these, and have what came last written."""
    filled.put(*blocks)
    filled.file.proceed()
    filled.finish("write")


def test_what_came_last_goes_out_and_all_comes_back_as_it_was(filled: Filled) -> None:
    assert filled.file.limit_bytes == 2 * BATCH_BYTES
    filled.put(1, 2, 3)
    filled.file.proceed()
    assert filled.disk.pending == [], "memory has room"
    filled.put(4)
    filled.file.proceed()
    assert not filled.file.idle
    assert filled.in_memory() == [1, 2, 3, 4], "until the file has them"
    filled.finish("write")
    assert (filled.in_memory(), len(filled.file), len(filled.spool)) == ([1], 3, 4)
    assert (filled.spool.held_bytes, filled.spool.all_bytes) == (BLOCK, 4 * BLOCK)
    assert filled.disk.pending == [], "memory has something to be sent"
    assert filled.sent() == {1: 1}
    filled.file.proceed()
    assert filled.spool.first(1, 1) == []
    filled.finish("read")
    assert filled.sent() == {2: 2, 3: 3, 4: 4}
    assert (len(filled.spool), filled.file.held_bytes, filled.file.idle) == (0, 0, True)


def test_newer_content_takes_the_place_of_what_the_file_has(filled: Filled) -> None:
    out(filled, 1, 2, 3, 4)
    filled.put(3, fill=9)
    assert filled.file.held_bytes == 2 * BLOCK
    assert filled.sent() == {1: 1, 3: 9}
    filled.file.proceed()
    filled.put(4, fill=8)  # while it is read
    filled.finish("read")
    assert filled.sent() == {2: 2, 4: 8}
    assert len(filled.spool) == 0


def test_what_is_sent_or_replaced_while_it_is_written_is_not_in_the_file(filled: Filled) -> None:
    filled.put(1, 2, 3, 4)
    filled.file.proceed()
    filled.spool.drop(3)
    filled.put(4, fill=9)
    filled.finish("write")
    assert (filled.in_memory(), len(filled.file)) == ([1, 4], 1)
    assert filled.sent() == {1: 1, 4: 9}
    filled.file.proceed()
    filled.finish("read")
    assert filled.sent() == {2: 2}


def test_a_place_is_used_again_when_nothing_in_it_counts(filled: Filled) -> None:
    out(filled, 1, 2, 3, 4)
    out(filled, 5, 6, 7)
    filled.put(8, 9, 10)
    filled.file.proceed()
    assert filled.disk.pending == [], "both places are taken"
    filled.put(2, 3, 4, fill=9)
    filled.file.proceed()
    filled.finish("write")  # into the first
    while filled.disk.pending:
        filled.disk.finish(0)
    assert len(filled.spool) == 10


def test_a_place_is_not_used_again_while_it_is_read(filled: Filled) -> None:
    out(filled, 1, 2, 3, 4)
    filled.sent()
    filled.file.proceed()  # reads
    filled.put(2, 3, 4, fill=9)
    assert len(filled.file._free) == 1
    filled.put(5)
    filled.file.proceed()
    assert [op.kind for op in filled.disk.pending] == ["read", "write"]
    places = {op.offset_bytes for op in filled.disk.pending}
    assert len(places) == 2
    filled.disk.finish(0)
    assert len(filled.file._free) == 1


def test_a_write_that_fails_costs_nothing_and_is_not_tried_for_a_while(filled: Filled) -> None:
    filled.disk.fail_next = {"write": [errno.ENOSPC]}
    out(filled, 1, 2, 3, 4)
    assert filled.errors == [(errno.ENOSPC, [])]
    assert (filled.in_memory(), filled.file.works) == ([1, 2, 3, 4], False)
    filled.file.proceed()
    assert filled.disk.pending == []
    filled.loop.advance(RETRY_S)
    filled.file.proceed()
    filled.finish("write")
    assert len(filled.file) == 3


def test_what_cannot_be_read_is_lost_and_said(filled: Filled) -> None:
    out(filled, 1, 2, 3, 4)
    filled.sent()
    filled.disk.fail_next = {"read": [errno.EIO]}
    filled.file.proceed()
    filled.put(3, fill=9)
    filled.finish("read")
    assert filled.errors == [(errno.EIO, [(2, 3), (4, 5)])]
    assert (len(filled.spool), filled.file.held_bytes, filled.in_memory()) == (1, 0, [3])


def test_what_rots_in_the_file_is_lost_and_the_rest_comes_back(filled: Filled) -> None:
    out(filled, 1, 2, 3, 4)
    filled.sent()
    (batch,) = filled.file._batches.values()
    filled.disk.visible[batch.place_bytes + batch.parts[3].at] ^= 1
    filled.file.proceed()
    filled.finish("read")
    assert filled.errors == [(None, [(3, 4)])]
    assert filled.sent() == {2: 2, 4: 4}


def test_batches_come_back_oldest_first(filled: Filled) -> None:
    out(filled, 1, 2, 3, 4)
    out(filled, 5, 6, 7)
    filled.sent()
    filled.file.proceed()
    filled.finish("read")
    assert filled.sent() == {2: 2, 3: 3, 4: 4}


def test_last_and_first_are_the_ends_of_one_order() -> None:
    spool = Spool(100)
    for block in range(4):
        spool.put(block, 1, bytes(10))
    blocks = partial(map, lambda spooled: spooled.block)
    assert list(blocks(spool.last(25))) == [3, 2]
    assert list(blocks(spool.last(1))) == [3]


def test_what_would_have_to_come_back_at_once_stays_in_memory() -> None:
    filled = Filled()
    filled.spool.limit_bytes = 2 * BLOCK
    filled.put(1)
    filled.file.proceed()
    assert filled.disk.pending == []
    filled.spool.limit_bytes = LIMIT
    filled.put(2, 3, 4)
    filled.file.proceed()
    filled.finish("write")
    assert filled.in_memory() == [1, 2, 3], "an eighth of memory at a time"
