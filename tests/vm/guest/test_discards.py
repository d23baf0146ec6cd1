"""Discards through dm-era: no discarded block is ever missing from what a barrier brings."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmctl.kernel.dm_wire import Target
from tests.vm.guest.disks import MIB, SECTOR, sh
from tests.vm.guest.erastack import (
    BLOCK,
    WRITE,
    Stack,
    blocks,
    device,
    queue,
    remove,
    set_queue,
    stack_over,
)

SIZE = 32 * MIB
SOON_S = 20.0
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F


def ask(path: str, what: int, offset: int, length: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        fcntl.ioctl(fd, what, struct.pack("QQ", offset, length))
    finally:
        os.close(fd)


@contextlib.contextmanager
def loop(path: Path, size: int) -> Iterator[str]:
    """Discards punch holes, at any sector."""
    with path.open("wb") as stream:
        stream.truncate(size)
    made = sh("losetup", "-f", "--show", str(path)).strip()
    try:
        yield made
    finally:
        sh("losetup", "-d", made)


@pytest.fixture
def made() -> Iterator[Stack]:
    sh("modprobe", "-a", "dm-era", "dm-delay", "loop")
    folder = Path("/dev/shm/discards")
    folder.mkdir(exist_ok=True)
    with (
        loop(folder / "lower", SIZE) as lower,
        loop(folder / "meta", 8 * MIB) as metadata,
        stack_over(lower, metadata, SIZE) as stack,
    ):
        yield stack


def limit(made: Stack, value: int) -> None:
    """As the attach does it, before the write device gets its table."""
    set_queue(made.era, "discard_max_bytes", value)
    made.mapper.load(WRITE, made.linear())
    made.mapper.resume(WRITE)


def discarded(made: Stack, chance: random.Random, path: str) -> set[int]:
    """Discard a random range; its blocks."""
    sectors = SIZE // SECTOR
    per = BLOCK // SECTOR
    length = chance.choice(
        (1, per - 1, per, per + 1, 2 * per, chance.randrange(1, per), chance.randrange(1, 40 * per))
    )
    first = chance.randrange(sectors - length)
    if chance.random() < 0.5:
        first = first // per * per + chance.choice((0, 0, per - 1))
    first = min(first, sectors - length)
    ask(path, BLKDISCARD, first * SECTOR, length * SECTOR)
    return set(range(first // per, (first + length - 1) // per + 1))


def missing(made: Stack, rounds: int, path: str, chance: random.Random) -> int:
    lost, era = 0, 0
    for _ in range(rounds):
        expected: set[int] = set()
        for _ in range(chance.randrange(1, 6)):
            expected |= discarded(made, chance, path)
        landed = made.barrier(None, era + 1, SOON_S)
        era = landed.to_era
        assert landed.widened
        lost += len(expected - blocks(landed.blocks))
    return lost


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_no_discarded_block_is_missing(made: Stack, shift: int) -> None:
    limit(made, BLOCK >> shift)
    assert queue(made.write, "discard_max_bytes") > 0
    assert missing(made, 30, made.write, random.Random(shift)) == 0


def test_without_the_limit_blocks_are_missing(made: Stack) -> None:
    """What the limit is for; the kernel marks the first block of a discard only."""
    granularity = queue(made.era, "discard_granularity")
    limit(made, queue(made.era, "discard_max_hw_bytes") // granularity * granularity)
    assert missing(made, 10, made.write, random.Random(1)) > 0


def test_without_the_longer_runs_blocks_are_missing(made: Stack) -> None:
    limit(made, BLOCK)
    ask(made.write, BLKDISCARD, BLOCK // 2, BLOCK)
    barrier = made.barrier  # as if there had been no discard
    barrier._last = barrier._earlier = barrier._read_counters()
    landed = made.barrier(made.linear(), 1, SOON_S)
    assert blocks(landed.blocks) == {0}


def test_writes_alone_are_not_widened(made: Stack) -> None:
    limit(made, BLOCK)
    ask(made.write, BLKDISCARD, 0, BLOCK)
    first = made.barrier(None, 1, SOON_S)
    assert first.widened
    # A discard that the kernel had counted, but not yet marked, could come with the next one.
    second = made.barrier(None, first.to_era + 1, SOON_S)
    assert second.widened
    ask(made.write, BLKZEROOUT, 8 * BLOCK, 2 * BLOCK)
    third = made.barrier(None, second.to_era + 1, SOON_S)
    assert not third.widened
    assert blocks(third.blocks) == {8, 9}


def test_a_discard_between_a_failed_barrier_and_the_next_is_widened(made: Stack) -> None:
    limit(made, BLOCK)
    made.barrier(made.linear(), 1, SOON_S)
    ask(made.write, BLKDISCARD, BLOCK // 2, BLOCK)
    beyond = [Target(0, made.sectors, "linear", f"{made.era} 8")]
    with pytest.raises(OSError, match="cannot hold"):
        made.barrier(beyond, 2, SOON_S)
    landed = made.barrier(None, 2, SOON_S)
    assert landed.widened
    assert blocks(landed.blocks) == {0, 1}


def test_zeroing_marks_every_block(made: Stack) -> None:
    assert queue(made.era, "write_zeroes_max_bytes") == 0
    ask(made.write, BLKZEROOUT, 3 * BLOCK + 4096, 10 * BLOCK)
    assert blocks(made.barrier(None, 1, SOON_S).blocks) == set(range(3, 14))


def test_the_limit_stays_through_new_tables(made: Stack) -> None:
    limit(made, BLOCK)
    era = 0
    for _ in range(3):
        era = made.barrier(made.linear(), era + 1, SOON_S).to_era
        assert queue(made.era, "discard_max_bytes") == BLOCK
        assert queue(made.write, "discard_max_bytes") == BLOCK


def test_a_limit_of_zero_takes_discards_away(made: Stack) -> None:
    """For devices whose granularity is above a block: the kernel would not split there."""
    limit(made, 0)
    for path in (made.write, made.era):
        with pytest.raises(OSError, match="not supported"):
            ask(path, BLKDISCARD, 0, MIB)


def test_the_top_device_offers_them_as_well(made: Stack) -> None:
    limit(made, BLOCK)
    ways = f"{made.lower} 0 0 {made.write} 0 0 {made.lower} 0 0"
    top = device(made.mapper, "dmtest-top", [Target(0, made.sectors, "delay", ways)])
    try:
        assert queue(top, "discard_max_bytes") > 0
        assert missing(made, 20, top, random.Random(9)) == 0
    finally:
        remove(made.mapper, "dmtest-top")
