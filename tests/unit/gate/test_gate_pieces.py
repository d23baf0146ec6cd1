"""gate: where another node writes, reads ask, and no write holds an extent while it waits."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

import pytest

from bitmapd.gate import gate
from bitmapd.gate.inturns import InTurns
from bitmapd.media.base import Done
from bitmapd.media.buffers import aligned
from tests.support.mirror import BLOCK, EXTENT, PER_EXTENT, Answers, Mirror, number


class Other:
    """An `Asks`: extents that the other node has, and who waits for its answer."""

    def __init__(self) -> None:
        self.theirs: set[int] = set()
        self.asked: list[tuple[int, int, Done]] = []

    def may_read(self, first: int, stop: int) -> bool:
        return self.theirs.isdisjoint(range(first, stop))

    def ask(self, first: int, stop: int, go: Done) -> None:
        self.asked.append((first, stop, go))


@pytest.fixture
def other() -> Other:
    return Other()


@pytest.fixture
def mirror(other: Other) -> Mirror:
    return Mirror(asks=other, piecewise=True)


# -- reads ------------------------------------------------------------------------------------


def test_a_read_of_what_nobody_else_has_asks_nobody(mirror: Mirror, other: Other) -> None:
    other.theirs = {2}
    answers: Answers = []
    mirror.gate.read(0, aligned(2 * EXTENT), answers.append)
    mirror.gate.allocation(EXTENT, EXTENT, lambda error, found: answers.append(error))
    assert mirror.pending(mirror.primary) == ["read", "allocation"]
    mirror.run()
    assert answers == [None, None]
    assert other.asked == []


def test_a_read_waits_until_the_other_node_has_answered(mirror: Mirror, other: Other) -> None:
    other.theirs = {2}
    answers: Answers = []
    mirror.gate.read(EXTENT, aligned(2 * EXTENT), answers.append)
    mirror.gate.allocation(2 * EXTENT, EXTENT, lambda error, found: answers.append(error))
    mirror.run()
    assert mirror.primary.calls == []
    assert [asked[:2] for asked in other.asked] == [(1, 3), (2, 3)]
    for *_, go in other.asked:
        go(None)
    assert mirror.pending(mirror.primary) == ["read", "allocation"], "in the same event"
    mirror.run()
    assert answers == [None, None]


def test_a_read_that_is_refused_does_not_touch_the_primary(mirror: Mirror, other: Other) -> None:
    other.theirs = {0}
    answers: Answers = []
    found: list[tuple[OSError | None, list[tuple[int, int]]]] = []
    mirror.gate.read(0, aligned(BLOCK), answers.append)
    mirror.gate.allocation(0, BLOCK, lambda *answer: found.append(answer))
    error = OSError(errno.EIO, "cut")
    for *_, go in other.asked:
        go(error)
    assert answers == [error]
    assert found == [(error, [])]
    assert mirror.primary.calls == []
    assert mirror.gate.primary_errors == 0, "it is no fault of the primary"


# -- writes -----------------------------------------------------------------------------------


def changed(mirror: Mirror, kind: str, offset: int, length: int) -> Answers:
    answers: Answers = []
    if kind == "write":
        buffer = aligned(length)
        blocks = range(offset // BLOCK, (offset + length) // BLOCK)
        buffer[:] = b"".join(bytes([block]) * BLOCK for block in blocks)
        mirror.gate.write(offset, buffer, answers.append)
    else:
        getattr(mirror.gate, kind)(offset, length, answers.append)
    return answers


@pytest.mark.parametrize("kind", ["write", "zero", "trim"])
def test_a_miss_over_several_extents_goes_in_pieces(mirror: Mirror, kind: str) -> None:
    answers = changed(mirror, kind, EXTENT - BLOCK, EXTENT + 3 * BLOCK)
    mirror.turn()
    assert mirror.pending(mirror.record) == ["write"], "they share a page, and its write"
    mirror.finish(mirror.record)
    assert mirror.primary.calls == [
        (kind, EXTENT - BLOCK, BLOCK),
        (kind, EXTENT, EXTENT),
        (kind, 2 * EXTENT, 2 * BLOCK),
    ]
    mirror.run()
    assert answers == [None]
    assert (mirror.gate.writes, mirror.gate.hits, mirror.gate.misses) == (1, 0, 1)
    if kind == "write":
        assert mirror.gate.written_bytes == EXTENT + 3 * BLOCK
        assert mirror.primary.visible[EXTENT - BLOCK : 2 * EXTENT + 2 * BLOCK] == b"".join(
            bytes([block]) * BLOCK for block in range(3, 10)
        )


@pytest.mark.interpreted  # it looks into what is compiled
@pytest.mark.parametrize("requests", [1, 3])
def test_of_many_pieces_some_begin_in_a_turn(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    """However many requests they are of; small ones need not wait for them."""
    mirror.gate._large = InTurns(mirror.loop, 3)
    monkeypatch.setattr(gate, "MOST_PIECES", 3)
    added: list[int] = []
    add = mirror.store.add

    def noted(wanted: Sequence[tuple[int, int]], *more: Any) -> bool:
        added.append(wanted[0][0])
        return add(wanted, *more)

    monkeypatch.setattr(mirror.store, "add", noted)
    answers: Answers = []
    for _ in range(requests):
        mirror.gate.trim(BLOCK, 7 * EXTENT, answers.append)
    assert added == [0, 1, 2]
    mirror.gate.write(7 * EXTENT + BLOCK, aligned(BLOCK), answers.append)
    assert added == [0, 1, 2, 7]
    turns = 0
    while len(added) < 1 + 8 * requests and turns < 100:
        before = len(added)
        mirror.loop.run_soon_once()
        assert len(added) <= before + 3
        turns += 1
    assert answers == []
    mirror.run()
    assert answers == [None] * (requests + 1)


def test_a_piece_that_is_covered_does_not_wait_for_the_others(mirror: Mirror) -> None:
    mirror.put(PER_EXTENT)
    mirror.primary.calls.clear()
    answers = mirror.write(PER_EXTENT - 1, 2)
    assert mirror.primary.calls == [("write", EXTENT, BLOCK)]
    assert not mirror.gate.is_dirty(0, PER_EXTENT), "a piece holds nothing while it waits"
    heard: list[str] = []
    mirror.gate.when_landed(lambda: heard.append("landed"))
    mirror.turn()
    assert heard == [], "a piece on its way is in flight"
    mirror.finish(mirror.primary)
    assert heard == ["landed"]
    assert answers == [], "not before the last piece"
    mirror.run()
    assert answers == [None]
    assert ("wrote", 1, 2, True) in mirror.policy.told
    assert ("wrote", 0, 1, False) in mirror.policy.told


def test_a_write_that_is_covered_whole_goes_whole(mirror: Mirror) -> None:
    mirror.put(0)
    mirror.put(PER_EXTENT)
    mirror.primary.calls.clear()
    for kind in ("write", "zero", "trim"):
        changed(mirror, kind, EXTENT - BLOCK, 2 * BLOCK)
    assert mirror.primary.calls == [
        (kind, EXTENT - BLOCK, 2 * BLOCK) for kind in ("write", "zero", "trim")
    ]


def test_a_host_hears_the_first_error_after_the_last_piece(mirror: Mirror) -> None:
    answers = mirror.write(PER_EXTENT - 1, PER_EXTENT + 2)
    mirror.turn()
    mirror.finish(mirror.record)
    mirror.finish(mirror.primary, 2)
    mirror.fail(mirror.primary, errno.ENOSPC, 1)
    assert answers == []
    mirror.fail(mirror.primary, errno.EIO, 0)
    assert number(answers) == errno.ENOSPC
    assert mirror.gate.primary_errors == 2
    answers = mirror.write(5 * PER_EXTENT - 1, 2)
    mirror.turn()
    mirror.fail(mirror.record, errno.EIO)
    assert number(answers) == errno.EIO
    assert not mirror.gate.is_dirty(5 * PER_EXTENT - 1, 5 * PER_EXTENT + 1)


def test_an_extent_that_was_given_away_while_a_piece_waited_is_asked_for_again(
    mirror: Mirror,
) -> None:
    answers = mirror.write(PER_EXTENT - 1, 2)
    mirror.turn()
    assert mirror.gate.give([0]) == []
    mirror.store.drop([0])
    mirror.finish(mirror.record)
    assert mirror.recorded() == {0, 1}
    assert mirror.stored() == {0, 1}
    mirror.run()
    assert answers == [None]
    assert list(mirror.gate.current.runs()) == [(3, 5)]


def test_what_another_node_may_have_written_may_differ(mirror: Mirror, other: Other) -> None:
    other.theirs = {2}
    per = PER_EXTENT
    assert mirror.gate.may_differ(2 * per, 2 * per + 1)
    assert mirror.gate.may_differ(2 * per - 1, 2 * per + 1), "half of it is theirs"
    assert not mirror.gate.may_differ(0, 2 * per)
