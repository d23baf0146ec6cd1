"""dm-era and the write device over it, as a volume has them, without the rest of the volume."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from bitarray import bitarray

from bitmapd.media.blockstat import BlockStat
from dmctl.kernel.barrier import Barrier, MetadataFile, counters
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.dm_wire import Target
from tests.vm.guest.disks import MIB, SECTOR, disks

BLOCK = 64 << 10
ERA, WRITE = "dmtest-era", "dmtest-w"


def device(mapper: DeviceMapper, name: str, table: list[Target]) -> str:
    """Make it; the path of its node, which needs no udev."""
    mapper.create(name, f"DMTEST-{name}")
    try:
        mapper.load(name, table)
        mapper.resume(name)
    except OSError:
        mapper.remove(name)
        raise
    made = mapper.device(name)
    assert made is not None
    return f"/dev/dm-{made.minor}"


def remove(mapper: DeviceMapper, *names: str) -> None:
    """Whatever state they are in."""
    for name in names:
        found = mapper.device(name)
        if found is None:
            continue
        if found.suspended:
            mapper.clear(name)
            mapper.resume(name)
        mapper.remove(name)


def number(path: str) -> str:
    found = os.stat(path).st_rdev
    return f"{os.major(found)}:{os.minor(found)}"


def queue(path: str, attribute: str) -> int:
    with open(f"/sys/dev/block/{number(path)}/queue/{attribute}") as stream:
        return int(stream.read())


def set_queue(path: str, attribute: str, value: int) -> None:
    with open(f"/sys/dev/block/{number(path)}/queue/{attribute}", "w") as stream:
        stream.write(str(value))


@dataclass
class Stack:
    mapper: DeviceMapper
    lower: str  # under everything
    metadata: str
    era: str
    write: str
    sectors: int
    barrier: Barrier = field(init=False)
    _files: list[MetadataFile | BlockStat] = field(init=False, default_factory=list)

    def linear(self, device: str | None = None) -> list[Target]:
        """A table for the write device."""
        return [Target(0, self.sectors, "linear", f"{device or self.era} 0")]

    def renew_barrier(self, metadata: str | None = None) -> None:
        """As a helper does that takes over a live era device."""
        self.close()
        self._files = [MetadataFile(metadata or self.metadata), BlockStat(number(self.era))]
        reader, stat = self._files
        assert isinstance(reader, MetadataFile)
        assert isinstance(stat, BlockStat)
        stat.switch_on()
        self.barrier = Barrier(self.mapper, ERA, WRITE, reader, lambda: counters(stat))

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


@contextlib.contextmanager
def stack_over(lower: str, metadata: str, size_bytes: int, delay_ms: int = 0) -> Iterator[Stack]:
    """`delay_ms`: how long each write takes that has been marked."""
    mapper = DeviceMapper()
    sectors = size_bytes // SECTOR
    try:
        over = lower
        if delay_ms:
            table = f"{lower} 0 0 {lower} 0 {delay_ms}"
            over = device(mapper, "dmtest-slow", [Target(0, sectors, "delay", table)])
        line = f"{metadata} {over} {BLOCK // SECTOR}"
        era = device(mapper, ERA, [Target(0, sectors, "era", line)])
        write = device(mapper, WRITE, [Target(0, sectors, "linear", f"{era} 0")])
        made = Stack(mapper, lower, metadata, era, write, sectors)
        made.renew_barrier()
        try:
            yield made
        finally:
            made.close()
    finally:
        remove(mapper, WRITE, ERA, "dmtest-slow")
        mapper.close()


@contextlib.contextmanager
def stack(size_bytes: int = 64 * MIB, delay_ms: int = 0) -> Iterator[Stack]:
    with disks(("lower", size_bytes), ("meta", 16 * MIB)) as (lower, metadata):
        clear_head(metadata.path)
        with stack_over(lower.path, metadata.path, size_bytes, delay_ms) as made:
            yield made


def clear_head(path: str) -> None:
    """dm-era formats metadata whose first block is zero."""
    with direct(path) as put:
        put(0, bytes(4096))


@contextlib.contextmanager
def direct(path: str) -> Iterator[object]:
    """A function (offset in bytes, data) that writes past the page cache."""
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, MIB)

    def put(offset: int, data: bytes) -> None:
        memory[: len(data)] = data
        with memoryview(memory) as view, view[: len(data)] as piece:
            assert os.pwritev(fd, [piece], offset) == len(data)

    try:
        yield put
    finally:
        os.close(fd)


def blocks(bits: bitarray) -> set[int]:
    return set(bits.search(bitarray("1")))
