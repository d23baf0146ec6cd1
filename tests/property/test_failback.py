"""An old primary becomes the receiver of what took its place, on disks that forget and tear.

Both have been written since the promotion, each knows where by its own record and by no other.

F1 Until the first point every extent in which they differ is named by one of the two records.
F2 From then on all that holds of a receiver holds (`simpoints`); in the end both are equal.
F3 What neither record names is not sent.
"""

from __future__ import annotations

import os
import random
from uuid import UUID

import pytest

from bitmapd.points.messages import NIL
from bitmapd.receiver import receiver
from bitmapd.receiver.superblock import Line
from tests.support.records import blank_image, load_image
from tests.support.sim import SECTOR, SimDisk
from tests.support.simpoints import EXTENT, SIZE, World, Wrong
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


@pytest.mark.parametrize("seed", range(RUNS))
def test_an_old_primary_becomes_equal_whatever_happens(seed: int) -> None:
    world = Failback(seed)
    world.run(STEPS)
    line = world.machine.receiver.journal.superblock.line
    assert line is not None
    assert line.generations == (NEW, GENERATION)


def test_only_what_one_of_the_records_names_is_sent() -> None:
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
