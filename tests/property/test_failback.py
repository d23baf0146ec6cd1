"""An old primary becomes the receiver of what took its place, on disks that forget and tear.

Both have been written since the promotion, each knows where by its own record and by no other.

F1 Until the first point every extent in which they differ is named by one of the two records.
F2 From then on all that holds of a receiver holds (`simpoints`); in the end both are equal.
F3 What neither record names is not sent, and of what they name only pieces that differ are.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from bitmapd.gate.changes import Changes
from bitmapd.points import differences
from bitmapd.points.differences import Differences
from bitmapd.points.messages import NIL, Feature
from bitmapd.receiver import receiver
from bitmapd.receiver.summing import Summing
from bitmapd.receiver.superblock import Line
from tests.support.machines import sim_seeds
from tests.support.pointmistakes import read_before_landed
from tests.support.records import blank_image, load_image
from tests.support.sim import SECTOR, SimDisk
from tests.support.simpoints import EXTENT, SIZE, PrimaryDisk, World, Wrong
from tests.support.simreceiver import (
    BLOCK,
    GENERATION,
    GEOMETRY,
    IMAGE_BYTES,
    JOURNAL_BYTES,
    VOLUME,
    Machine,
    formatted,
    superblock,
)
from tests.support.simreceiver import small as _small

RUNS = int(os.environ.get("FAILBACK_RUNS", "12"))
STEPS = int(os.environ.get("FAILBACK_STEPS", "200"))
NEW = UUID("20000000-0000-4000-8000-00000000000b")
OLD_EXTENT, NEW_EXTENT = 2, 0  # written there, written here; the one between is as it was


class OldPrimary(Machine):
    differs = ((OLD_EXTENT, OLD_EXTENT + 1),)


class Failback(World):
    generations = (NEW.bytes, GENERATION.bytes, NIL, NIL)
    promoted = True

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = random.Random(seed)
        point = bytearray(rng.randbytes(SIZE))
        here, there = bytearray(point), bytearray(point)
        here[BLOCK : 2 * BLOCK] = rng.randbytes(BLOCK)
        at = OLD_EXTENT * EXTENT + BLOCK
        there[at : at + BLOCK] = rng.randbytes(BLOCK)
        line = Line(VOLUME, GEOMETRY, (GENERATION,), 0)
        journal = bytes(formatted(superblock(line=line)))
        self.machine = OldPrimary(
            SimDisk("image", IMAGE_BYTES, bytes(there) + bytes(IMAGE_BYTES - SIZE)),
            SimDisk("journal", JOURNAL_BYTES, journal),
        )
        record = blank_image(GEOMETRY, bytes([1 << NEW_EXTENT]))
        self.boot(bytes(here), record, bytes(SECTOR))

    def check(self) -> None:
        machine = self.machine.crash(self.rng)
        machine.settle()
        if machine.receiver.journal.page.committed:
            super().check()
            return
        image = bytes(machine.image.visible)
        primary = self.site.primary.crash(self.rng)
        bits = load_image(self.site.record.crash(self.rng)).bits
        for extent in range(GEOMETRY.extents):
            at = slice(extent * EXTENT, min((extent + 1) * EXTENT, SIZE))
            named = bits[extent] or extent == OLD_EXTENT or not self.machine.differs
            if primary[at] != image[at] and not named:
                raise Wrong(f"F1 extent {extent} differs, and neither record names it")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is smaller than what is otherwise worth a message."""
    _small(monkeypatch)
    monkeypatch.setattr(receiver, "CREDIT_BYTES", BLOCK)


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_an_old_primary_becomes_equal_whatever_happens(seed: int) -> None:
    world = Failback(seed)
    world.run(STEPS)
    line = world.machine.receiver.journal.superblock.line
    assert line is not None
    assert line.generations == (NEW, GENERATION)


def test_a_receiver_that_knows_no_pieces_is_sent_all_that_the_records_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receiver, "FEATURES", Feature.ZSTD)
    world = Failback(1)
    world.run(0)
    assert world.site.sender.uplink.sent_bytes == SIZE - EXTENT
    assert bytes(world.machine.image.visible[:SIZE]) == bytes(world.site.primary.visible)


def test_a_receiver_of_nobody_is_sent_everything() -> None:
    """After a promotion the record names what was written since, which is not all."""
    world = Failback(2)
    world.machine = Machine(
        SimDisk("image", IMAGE_BYTES),
        SimDisk("journal", JOURNAL_BYTES, bytes(formatted(superblock()))),
    )
    world.run(0)
    assert bytes(world.machine.image.visible[:SIZE]) == bytes(world.site.primary.visible)


# -- pieces -----------------------------------------------------------------------------------

PIECE = 4096
PIECES = SIZE // PIECE  # whole ones


class OldPieces(OldPrimary):
    differs = ((0, 1), (OLD_EXTENT, OLD_EXTENT + 1))


class Scattered(Failback):
    """Here and there some pieces were written that the records name.  Caches of both disks have
    writes that a power cut takes back: to what is on the other side, or away from it."""

    forgotten = 0.5

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = random.Random(seed)
        point = bytearray(rng.randbytes(SIZE))
        here, there = PrimaryDisk("primary", SIZE, point), SimDisk("image", IMAGE_BYTES)
        there.carry_out(0, bytes(point), fua=True)
        self.differing = 0
        written = rng.choice((0.05, 0.3))  # of the pieces that a record names, at either site
        for piece in range(PIECES):
            at = piece * PIECE
            extent = at // EXTENT
            for disk, is_named in ((here, extent == NEW_EXTENT), (there, extent != 1)):
                if is_named and rng.random() < written:
                    disk.carry_out(at, rng.randbytes(PIECE), fua=True)
                    if rng.random() < self.forgotten:  # and as it was before, if power stays
                        disk.carry_out(at, bytes(point[at : at + PIECE]), fua=False)
            self.differing += here.visible[at : at + PIECE] != there.visible[at : at + PIECE]
        journal = SimDisk("journal", JOURNAL_BYTES, bytes(self.machine.journal.visible))
        self.machine = OldPieces(there, journal)
        self.boot(
            bytes(here.visible), blank_image(GEOMETRY, bytes([1 << NEW_EXTENT])), bytes(SECTOR)
        )
        disk = self.site.primary
        disk.durable[:], disk.volatile = here.durable, here.volatile
        disk._serial = here._serial


class Forgotten(Scattered):
    """Both sides are equal as long as power stays."""

    forgotten = 1.0


@pytest.fixture
def bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several questions have to be asked, of several reads each."""
    monkeypatch.setattr(differences, "MOST_BYTES", 2 * BLOCK)
    monkeypatch.setattr(differences, "READ_BYTES", BLOCK)
    monkeypatch.setattr(differences, "DEPTH", 2)


@pytest.mark.usefixtures("bit_by_bit")
@pytest.mark.parametrize("world", [Scattered, Forgotten])
@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_pieces_that_differ_are_found_whatever_happens(seed: int, world: type[Scattered]) -> None:
    world(seed).run(STEPS)


@pytest.mark.parametrize("seed", range(4))
def test_only_pieces_that_differ_are_sent(seed: int) -> None:
    world = Scattered(seed)
    world.run(0)
    assert world.site.sender.uplink.sent_bytes == world.differing * PIECE
    compared = world.site.sender.differences
    assert compared.compared_bytes == SIZE - EXTENT
    assert 0 < compared.equal_bytes <= compared.compared_bytes


def sums_of_what_is_not_durable(patch: pytest.MonkeyPatch) -> None:
    """The receiver sums what its disk may yet forget."""

    def read(self: Summing, question: Any) -> Any:
        flush, self._image.flush = self._image.flush, lambda done: done(None)  # type: ignore[method-assign]
        steps = right(self, question)
        step = next(steps)
        self._image.flush = flush  # type: ignore[method-assign]
        yield step
        return (yield from steps)

    right = Summing._read
    patch.setattr(Summing, "_read", read)


def equal_is_settled(patch: pytest.MonkeyPatch) -> None:
    """What is equal leaves the record at once."""

    def answered(self: Differences, *arguments: Any) -> None:
        right(self, *arguments)
        self._gate.settle(self._gate.begin_settle())
        self._gate.drop_all_clean()
        self._gate._store.flush_clears()

    right = Differences._answered
    patch.setattr(Differences, "_answered", answered)


def unanswered_is_known(patch: pytest.MonkeyPatch) -> None:
    """A block whose question was lost is sent with what was written since."""

    def unanswered(self: Changes) -> None:
        self._questioned = type(self._questioned)()

    patch.setattr(Changes, "unanswered", unanswered)


FAILBACK_MISTAKES: dict[Callable[[pytest.MonkeyPatch], None], type[Scattered]] = {
    sums_of_what_is_not_durable: Forgotten,
    read_before_landed: Scattered,
    unanswered_is_known: Scattered,
}


@pytest.mark.walk
@pytest.mark.usefixtures("bit_by_bit")
@pytest.mark.parametrize("mistake", FAILBACK_MISTAKES)
def test_a_mistake_of_the_comparison_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    world = FAILBACK_MISTAKES[mistake]

    def search() -> None:
        for seed in range(200):
            world(seed).run(STEPS)

    with pytest.raises(Wrong):
        search()


@pytest.mark.usefixtures("bit_by_bit")
def test_what_is_equal_must_not_leave_the_record_before_the_first_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    equal_is_settled(monkeypatch)

    def search() -> None:
        for seed in range(20):
            world = Forgotten(seed)
            for _ in range(100):
                world.step(faults=False)
                world.check()

    with pytest.raises(Wrong, match="F1"):
        search()
