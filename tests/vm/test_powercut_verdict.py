"""The verdict of the power-cut tests, over the lossy disk itself and without a guest."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import powercut
from tests.vm.lossy import LossyStore, Mode

PAGES = powercut.CHUNK_PAGES * powercut.WRITERS * 9
SIZE = PAGES * powercut.PAGE_BYTES
EXTENT = 128 << 10


class Disk:
    """A lossy disk that the writers of one round after the other write to, in some order."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.store = LossyStore(folder, SIZE, self.chance)
        self.flushes = True

    def go(self, round_: int, count: int) -> powercut.Ledger:
        ledger = powercut.Ledger(round_, PAGES, flushing=True)
        todo = [
            powercut.operations(round_, writer, PAGES, flushing=True)
            for writer in range(powercut.WRITERS)
        ]
        for _ in range(count):
            writer = self.chance.randrange(powercut.WRITERS)
            self._one(ledger, round_, writer, next(todo[writer]))
        return ledger

    def _one(
        self, ledger: powercut.Ledger, round_: int, writer: int, operation: powercut.Operation
    ) -> None:
        offset, length = (n * powercut.PAGE_BYTES for n in (operation.page, operation.pages))
        match operation.kind:
            case powercut.Kind.FLUSH:
                if self.flushes:
                    self.store.flush()
                ledger.note(f"all {writer} {operation.number}")
            case powercut.Kind.DISCARD:
                self.store.zero(offset, length)
            case powercut.Kind.WRITE:
                data = powercut.content(round_, writer, operation)
                self.store.write(offset, data, operation.durable and self.flushes)
                if operation.durable:
                    ledger.note(f"one {writer} {operation.number}")

    def cut(self, mode: Mode | None = None) -> bytes:
        self.store.cut(mode)
        return self.store.medium_path.read_bytes()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path, 1)
    yield made
    made.store.close()


def test_a_disk_that_keeps_its_promises_is_believed(disk: Disk) -> None:
    before = bytes(SIZE)
    for round_ in range(12):
        ledger = disk.go(round_, 150)
        assert ledger.told
        after = disk.cut()
        assert powercut.lost(before, after, ledger) == []
        before = after


def test_one_that_does_not_flush_is_found_out(disk: Disk) -> None:
    before = disk.cut()
    disk.flushes = False
    ledger = disk.go(0, 150)
    problems = powercut.lost(before, disk.cut(Mode.NOTHING), ledger)
    assert all("is to be there, and zeros is" in problem for problem in problems[:-1])
    assert problems[-1].endswith("more")


@pytest.mark.parametrize("seed", range(20))
def test_a_sector_of_another_time_or_place_is_found_out(disk: Disk, seed: int) -> None:
    chance = random.Random(seed)
    disk.go(0, 150)
    before = disk.cut(Mode.EVERYTHING)
    ledger = disk.go(1, 150)
    after = disk.cut(Mode.EVERYTHING)
    assert powercut.lost(before, after, ledger) == []
    page = chance.choice(sorted(ledger.floors()))
    at = page * powercut.PAGE_BYTES + chance.randrange(8) * powercut.SECTOR_BYTES
    there = slice(at, at + powercut.SECTOR_BYTES)
    elsewhere = (at + chance.randrange(1, 100) * powercut.SECTOR_BYTES) % SIZE
    for wrong in (
        before[there],
        bytes(powercut.SECTOR_BYTES),
        after[elsewhere : elsewhere + powercut.SECTOR_BYTES],
        after[at : at + 511] + b"?",
    ):
        if wrong == after[there]:
            continue
        (problem,) = powercut.lost(before, after[:at] + wrong + after[there.stop :], ledger)
        assert problem.startswith(f"page {page}, sector")


def test_what_differs_has_to_be_recorded() -> None:
    one = bytes(EXTENT * 10)
    other = bytearray(one)
    for extent in (2, 3, 9):
        other[extent * EXTENT + 77] = 1
    differ = powercut.differing(one, bytes(other), EXTENT)
    assert differ == {2, 3, 9}
    assert powercut.unrecorded(differ, [(1, 4), (9, 1)]) == []
    assert powercut.unrecorded(differ, [(3, 6)]) == [
        "extent 2 is not in the record",
        "extent 9 is not in the record",
    ]
    assert powercut.differing(one, one + b"x", EXTENT) == {10}
