"""Discards through dm-era: no discarded block is ever missing from what a barrier brings."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dmctl.kernel.dm_wire import Target
from dmctl.kernel.verbs import DISCARD_BYTES, counters_of
from tests.vm.guest.disks import MIB, SECTOR, sh
from tests.vm.guest.dmvolume import DmVolume, dm_volume
from tests.vm.guest.erastack import (
    BLOCK,
    WRITE,
    Stack,
    blocks,
    device,
    number,
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


def pass_on(*paths: str) -> None:
    """As the attach does it: nothing above the era device cuts."""
    for path in paths:
        set_queue(path, "discard_max_bytes", SIZE)


def discards(path: str) -> int:
    """How many have reached the device."""
    return counters_of(number(path))["discards"]


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


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_no_block_is_missing_if_only_dm_era_cuts(made: Stack, shift: int) -> None:
    limit(made, BLOCK >> shift)
    pass_on(made.write)
    before = discards(made.write), discards(made.era)
    ask(made.write, BLKDISCARD, 0, SIZE)
    assert discards(made.write) - before[0] == 1
    assert discards(made.era) - before[1] == SIZE // (BLOCK >> shift)
    landed = made.barrier(None, 1, SOON_S)
    assert blocks(landed.blocks) == set(range(SIZE // BLOCK))
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
        pass_on(made.write)
        assert queue(made.era, "discard_max_bytes") == BLOCK


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
        pass_on(made.write, top)
        assert queue(top, "discard_max_bytes") == SIZE
        assert missing(made, 20, top, random.Random(9)) == 0
    finally:
        remove(made.mapper, "dmtest-top")


# -- of a volume ----------------------------------------------------------------------------------
def limits(volume: DmVolume) -> list[int]:
    layers = [
        volume.device,
        *(f"/dev/mapper/dmctl-{volume.name}-{layer}" for layer in ("w", "era")),
    ]
    return [queue(path, "discard_max_bytes") for path in layers]


def has_changed(figure: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    return bool(now[figure] != before[figure])


def fill(volume: DmVolume, *first_mib: int) -> None:
    """Write a MiB at each of these, twice: then it is worth to be direct."""
    fd = os.open(volume.device, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, MIB) as data:
            for value in (1, 2):
                data[:] = bytes([value]) * MIB
                for at in first_mib:
                    os.pwrite(fd, data, at * MIB)
    finally:
        os.close(fd)


@pytest.mark.long
def test_long_discards_are_few_requests_for_the_gate_whatever_the_table() -> None:
    with dm_volume("trims", size_bytes=128 * MIB, discards=True) as volume:
        block_bytes = volume.status()["block_size_bytes"]
        for at in (32 * MIB, 96 * MIB):
            assert limits(volume) == [DISCARD_BYTES, DISCARD_BYTES, block_bytes]
            before = volume.status()
            ask(volume.device, BLKDISCARD, at, 32 * MIB)
            after = volume.status()
            # One for each stretch of the gate; in pieces of a block they would be 128.
            assert 0 < after["gate_writes_total"] - before["gate_writes_total"] <= 4
            fill(volume, *range(8))
            volume.until(partial(has_changed, "table_loads_total", after))
            volume.wait_in_sync()
        volume.stop()
        assert volume.is_equal()


@pytest.mark.long
def test_discards_across_direct_extents_and_a_crash_of_the_gate_leave_no_difference() -> None:
    """Long ones, some of them in flight when it dies; the record names what differs."""
    chance = random.Random(4)
    with dm_volume("trims", size_bytes=64 * MIB, discards=True) as volume:
        for _ in range(3):
            fill(volume, *range(0, 64, 2))
            volume.until(lambda status: status["direct_extents"] > 4)
            over = threading.Event()

            def discard(over: threading.Event = over) -> None:
                while not over.is_set():
                    first = chance.randrange(64 * MIB // SECTOR)
                    length = min(
                        chance.randrange(1, 16 * MIB // SECTOR), 64 * MIB // SECTOR - first
                    )
                    ask(volume.device, BLKDISCARD, first * SECTOR, length * SECTOR)

            thread = threading.Thread(target=discard)
            before = volume.status()
            thread.start()
            volume.until(partial(has_changed, "writes_total", before))
            volume.kill()
            over.set()
            volume.start()
            thread.join()
            volume.wait_in_sync()
        volume.stop()
        assert volume.is_equal()
