"""The journal's space: what is used again, and when; and what its caller must not do."""

from __future__ import annotations

import random

import pytest

from bitmapd.errors import NoSpaceError, WrongStateError
from bitmapd.points.codec import cost_bytes
from bitmapd.points.messages import Data, Encoding, Entry
from bitmapd.receiver.commit import Queued
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.steps import run
from tests.support.sim import SimDisk
from tests.support.simreceiver import (
    SEGMENT,
    SEGMENTS,
    Machine,
    Script,
    fresh,
    point,
    small,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)


@pytest.fixture
def machine() -> Machine:
    """Its first point is in the image."""
    machine = fresh()
    point(Script(random.Random(1)), machine)
    return machine


def entry(block: int, stamp: int, length: int = 4096) -> Entry:
    return Entry(block, stamp, 15, Encoding.RAW, 0, bytes([stamp % 251 + 1]) * length)


def append(machine: Machine, *entries: Entry) -> None:
    ends: list[OSError | None] = []
    machine.receiver.journal.append(entries, ends.append)
    machine.settle()
    assert ends == [None]


def commit(journal: Journal, number: int) -> None:
    queued = Queued(number, bytes(16), journal.open.count, journal.open.digest(), 0)
    run(journal.commit(queued), lambda error, _: None)


def test_a_journal_without_a_volume_takes_nothing() -> None:
    journal = fresh().receiver.journal
    with pytest.raises(WrongStateError):
        journal.append([entry(0, 1)], lambda error: None)
    with pytest.raises(WrongStateError):
        journal.commit_in_image(Queued(1, bytes(16), 0, bytes(16), 0)).send(None)


def test_a_batch_is_cut_at_the_end_of_its_segment(machine: Machine) -> None:
    entries = [entry(block, block + 1, 16384) for block in range(8)]
    append(machine, *entries)
    journal = machine.receiver.journal
    assert journal.used_bytes == 3 * SEGMENT
    assert journal.open.count == 8
    for kept in journal.open:
        start = kept.place_bytes
        assert (start - (1 << 20)) // SEGMENT == (start + 16383 - (1 << 20)) // SEGMENT
        raw = machine.journal.visible[start : start + 16384]
        assert raw == bytes([kept.stamp % 251 + 1]) * 16384


def test_a_batch_may_fill_its_segment_to_the_last_byte(machine: Machine) -> None:
    lengths = [16384, 16384, 12288, 0]  # and four pages that describe
    for stamp, length in enumerate(lengths, 1):
        append(machine, entry(stamp, stamp, length))
    journal = machine.receiver.journal
    assert journal.used_bytes == SEGMENT
    append(machine, entry(7, 7, 0))
    assert journal.used_bytes == 2 * SEGMENT


def test_what_was_promised_is_there_whatever_the_sizes() -> None:
    """`room_bytes`, in the unit of `cost_bytes`."""
    for seed in range(30):
        rng = random.Random(seed)
        machine = fresh()
        point(Script(rng), machine)
        journal = machine.receiver.journal
        room, stamp = journal.room_bytes, 0
        while True:
            entries = []
            for block in range(rng.choice((1, 2, 11))):
                stamp += 1
                entries.append(entry(block, stamp, rng.choice((0, 21, 4096, 4097, 16384))))
            cost = cost_bytes(Data(tuple(entries)))
            if cost > room:
                break
            room -= cost
            append(machine, *entries)


def test_a_journal_that_is_full_says_so(machine: Machine) -> None:
    for stamp in range(1, 3 * SEGMENTS + 1):
        append(machine, entry(0, stamp, 16384))
    with pytest.raises(NoSpaceError):
        append(machine, entry(0, 100, 16384))
    assert machine.receiver.journal.used_bytes == SEGMENTS * SEGMENT


def test_space_is_free_when_the_page_that_says_applied_is_durable(machine: Machine) -> None:
    journal = machine.receiver.journal
    for block in range(5):
        append(machine, entry(block, block + 1, 16384))
    commit(journal, 2)
    machine.settle()
    used = journal.used_bytes
    assert used == 2 * SEGMENT
    ends: list[OSError | None] = []
    run(journal.applied(2), lambda error, _: ends.append(error))
    assert journal.used_bytes == used
    machine.settle()
    assert ends == [None]
    assert journal.used_bytes == 0
    assert journal.page.scan_from > max(segment.sequence for segment in journal._segments)


def test_a_segment_of_two_points_is_free_when_both_are_applied(machine: Machine) -> None:
    journal = machine.receiver.journal
    append(machine, entry(0, 1))
    commit(journal, 2)
    machine.settle()
    append(machine, entry(0, 2))
    for number in (2, 3):
        run(journal.applied(number), lambda error, _: None)
        if number == 2:
            machine.settle()
            assert journal.used_bytes == SEGMENT
            commit(journal, 3)
            machine.settle()
    machine.settle()
    assert journal.used_bytes == 0


def test_changes_of_the_page_follow_one_another(machine: Machine) -> None:
    journal = machine.receiver.journal
    before = journal.page.sequence
    ends: list[int] = []

    def again(error: OSError | None, _: None) -> None:
        ends.append(journal.page.sequence)
        if len(ends) < 4:
            run(journal.inconsistent(9), again)

    run(journal.inconsistent(7), again)
    run(journal.inconsistent(8), again)
    disk: SimDisk = machine.journal
    while disk.pending:
        assert len([op for op in disk.pending if op.kind == "write"]) == 1
        disk.finish()
    assert ends == [before + 1, before + 2, before + 3, before + 4, before + 5]
    assert journal.page.inconsistent_until == 9
