"""The reader of era metadata on what a real dm-era wrote: against own bookkeeping and era_dump.

`era_dump` knows no metadata snapshots.  So it gets a copy of the metadata in which the snapshot's
superblock stands where the live one is.
"""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bitarray import bitarray
from crc32c import crc32c

from dmctl.kernel.barrier import DROP_SNAPSHOT, TAKE_SNAPSHOT, MetadataFile
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.dm_wire import Target
from dmctl.model.era import BLOCK_BYTES, Metadata, View
from dmctl.model.targets import EraStatus, parse_era_status
from tests.vm.guest.disks import MIB, SECTOR, disks, size_of
from tests.vm.guest.erastack import ERA, blocks, clear_head, device, direct, remove

SIZE = 160 * MIB + 20 * SECTOR  # the last block is a part of one
BLOCK = 4096
BLOCKS = -(-SIZE // BLOCK)  # more than one array block of a bitset, 41 of the era array
DIGESTED_S = 120.0


@dataclass
class Era:
    """A dm-era device, and what the test itself knows of it."""

    mapper: DeviceMapper
    path: str
    metadata_path: str
    reader: MetadataFile
    written: dict[int, set[int]] = field(default_factory=dict)

    def write(self, *runs: range) -> None:
        """One request each; the first write of an era to a block costs a commit."""
        era = self.status().current_era
        with direct(self.path) as put:
            for run in runs:
                end = min(run.stop * BLOCK, SIZE)
                put(run.start * BLOCK, bytes(end - run.start * BLOCK))
        self.written.setdefault(era, set()).update(*runs)

    def status(self) -> EraStatus:
        return parse_era_status(self.mapper.status(ERA)[0].parameters)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[View]:
        self.mapper.message(ERA, TAKE_SNAPSHOT)
        try:
            root = self.status().held_root
            metadata = Metadata(self.reader.read_block, self.reader.read_blocks)
            view = metadata.snapshot(root)
            assert metadata.snapshot().superblock == view.superblock
            yield view
        finally:
            self.mapper.message(ERA, DROP_SNAPSHOT)

    def until_digested(self) -> None:
        """What was written so far; every snapshot ends an era that is still to be digested."""
        written = self.status().current_era
        until = time.monotonic() + DIGESTED_S
        while True:
            with self.snapshot() as view:
                if all(era > written for era in view.writesets):
                    return
            assert time.monotonic() < until, "the kernel does not digest"
            time.sleep(0.2)  # nothing tells when the kernel's worker is done

    def since(self, era: int) -> set[int]:
        return {block for at, some in self.written.items() if at >= era for block in some}


@contextlib.contextmanager
def era_device() -> Iterator[Era]:
    with disks(("lower", SIZE), ("meta", 16 * MIB)) as (lower, metadata):
        clear_head(metadata.path)
        mapper = DeviceMapper()
        try:
            table = f"{metadata.path} {lower.path} {BLOCK // SECTOR}"
            path = device(mapper, ERA, [Target(0, SIZE // SECTOR, "era", table)])
            reader = MetadataFile(metadata.path)
            try:
                yield Era(mapper, path, metadata.path, reader)
            finally:
                reader.close()
        finally:
            remove(mapper, ERA)
            mapper.close()


def some(rng: random.Random) -> list[range]:
    runs = [range(at, at + 1) for at in rng.sample(range(BLOCKS), rng.choice((0, 1, 4)))]
    for _ in range(rng.randrange(3)):
        start = rng.randrange(BLOCKS)
        runs.append(range(start, min(BLOCKS, start + rng.randrange(2, 250))))
    return runs


def as_live(made: Era, view: View, copy: Path) -> None:
    """The metadata as if the snapshot were the live state."""
    whole = bytearray()
    for number in range(size_of(made.metadata_path) // BLOCK_BYTES):
        whole += made.reader.read_block(number)
    at = view.superblock.location * BLOCK_BYTES
    block = bytearray(whole[at : at + BLOCK_BYTES])
    block[8:16] = bytes(8)
    block[:4] = struct.pack("<I", crc32c(bytes(block[4:])) ^ 0xFFFFFFFF ^ 146538381)
    whole[:BLOCK_BYTES] = block
    copy.write_bytes(whole)


def dumped(copy: Path) -> ElementTree.Element:
    done = subprocess.run(["era_dump", str(copy)], capture_output=True, check=True, timeout=100)
    return ElementTree.fromstring(done.stdout)  # noqa: S314 (of our own device)


def agree(view: View, top: ElementTree.Element) -> None:
    assert int(top.attrib["nr_blocks"]) == BLOCKS == view.superblock.blocks
    assert int(top.attrib["current_era"]) == view.superblock.current_era
    found = {}
    for writeset in top.findall("writeset"):
        bits = bitarray(BLOCKS, endian="little")
        for bit in writeset:
            bits[int(bit.attrib["block"])] = bit.attrib["value"] == "true"
        found[int(writeset.attrib["era"])] = bits
    assert found == {era: view.writeset_bits(era) for era in view.writesets}
    array = top.find("era_array")
    assert array is not None
    eras = [int(entry.attrib["era"]) for entry in array]
    for since in sorted({1, *eras} - {0}):
        assert view.digested_bits(since) == bitarray((e >= since for e in eras), endian="little")


def test_several_eras_with_and_without_digestion(tmp_path: Path) -> None:
    rng = random.Random(7)
    with era_device() as made:
        for turn in range(8):  # metadata blocks are used again and again
            for _ in range(rng.randrange(1, 4)):
                made.write(*some(rng))
                if rng.random() < 0.5:
                    made.mapper.message(ERA, "checkpoint")
            if turn % 3 == 2:
                made.until_digested()
            with made.snapshot() as view:
                assert view.newest_era + 1 == view.superblock.current_era
                assert view.superblock.current_era == made.status().current_era
                digested_before = min(view.writesets, default=view.newest_era + 1)
                asked = {1, digested_before, *rng.sample(range(1, view.newest_era + 1), 1)}
                for since in asked:
                    assert blocks(view.bits_written(since)) == made.since(since), (turn, since)
                before = made.since(1)
                made.write(*some(rng))  # the snapshot does not change
                assert blocks(view.bits_written(1)) == before
                if turn in (4, 7):
                    copy = tmp_path / f"metadata-{turn}"
                    as_live(made, view, copy)
                    agree(view, dumped(copy))
        assert max(made.written) > 8


def test_everything_digested_is_read_from_the_array() -> None:
    with era_device() as made:
        made.write(range(3), range(40_000, 40_001), range(BLOCKS - 1, BLOCKS))
        first = made.status().current_era
        made.mapper.message(ERA, "checkpoint")
        made.write(range(1, 2), range(7, 8))
        made.until_digested()
        with made.snapshot() as view:
            assert first + 1 not in view.writesets
            assert blocks(view.bits_written(first)) == {0, 1, 2, 7, 40_000, BLOCKS - 1}
            assert blocks(view.bits_written(first + 1)) == {1, 7}
            assert blocks(view.bits_written(first + 2)) == set()


def test_a_device_that_was_taken_down_has_archived_its_last_era() -> None:
    with disks(("lower", SIZE), ("meta", 16 * MIB)) as (lower, metadata):
        clear_head(metadata.path)
        with contextlib.closing(DeviceMapper()) as mapper:
            table = f"{metadata.path} {lower.path} {BLOCK // SECTOR}"
            path = device(mapper, ERA, [Target(0, SIZE // SECTOR, "era", table)])
            with direct(path) as put:
                put(5 * BLOCK, bytes(SECTOR))
            remove(mapper, ERA)
        with contextlib.closing(MetadataFile(metadata.path)) as reader:
            view = Metadata(reader.read_block, reader.read_blocks).live()
            assert view.newest_era == view.superblock.current_era
            assert blocks(view.bits_written(1)) == {5}


@pytest.mark.parametrize("bit", [8, 4096 * 8 - 1])
def test_a_flipped_bit_in_a_copy_is_seen(bit: int) -> None:
    """Every block that the answer depends on; the reader must refuse or answer the same."""
    with era_device() as made:
        made.write(range(3, 5), range(39_999, 40_000))
        with made.snapshot() as view:
            right = view.bits_written(1)
            used: list[int] = []
            contents: dict[int, bytes] = {}

            def read(number: int) -> bytes:
                used.append(number)
                return contents.setdefault(number, bytes(made.reader.read_block(number)))

            root = view.superblock.location
            assert Metadata(read).snapshot(root).bits_written(1) == right
            for number in sorted(set(used)):
                flipped = bytearray(contents[number])
                flipped[bit // 8] ^= 1 << bit % 8
                damaged = {**contents, number: bytes(flipped)}
                with pytest.raises(Exception, match=f"{number} has a wrong checksum"):
                    Metadata(damaged.__getitem__).snapshot(root).bits_written(1)
