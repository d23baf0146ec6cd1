"""Proves on scratch devices in RAM that the kernel does what the attachment relies on (edge).

dm-era's rules for discards are nobody's promise, and counters can be compiled or switched off.  So,
before an era device is made for a volume, a small one is made, written, discarded and zeroed:

 1. dm-era's device cuts discards from above at its `discard_max_bytes`, and each piece
    marks its first block;
 2. zeroing marks every block, or is not offered;
 3. the counters of writes and discards of a mapped device count, once they are switched on;
 4. `take_metadata_snap` ends the era: what is written later is not in the snapshot;
 5. a new table comes in force while the device is in use, and the limit of discards stays.

On the way it is measured what a mark costs on this machine: eras last the longer for it.

What a test that was killed has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import statistics
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NoReturn

from bitarray import bitarray

from bitmapd.errors import WrongStateError
from bitmapd.media.blockstat import BlockStat
from dmctl.kernel import ram
from dmctl.kernel.barrier import Barrier, Collected, MetadataFile, counters
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.dm_wire import Target
from dmctl.kernel.execute import Dmsetup
from dmctl.kernel.observe import queue_number
from dmctl.model.names import device_path
from dmctl.model.targets import SECTOR_BYTES, Era, Line, Linear

BLOCK_BYTES: Final = 64 << 10
DATA_BYTES: Final = 32 * BLOCK_BYTES
MARKED: Final = range(8, 24)
METADATA_BYTES: Final = 1 << 20
_PAGE_BYTES: Final = 4096
_DEADLINE_S: Final = 5.0
_NAME: Final = re.compile(r"dmctl-selftest\.([0-9]+)\.(?:era|w)")
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F


@dataclass(frozen=True, slots=True)
class _Scratch:
    mapper: DeviceMapper
    actor: Dmsetup
    era: str
    write: str
    barrier: Barrier
    stat: BlockStat

    def queue(self, name: str, attribute: str) -> int:
        device = self.mapper.device(name)
        return queue_number(device.number, attribute) if device is not None else 0


def selftest(mapper: DeviceMapper, actor: Dmsetup) -> float:
    """For how long a host waits longer at its first write to a block in an era, in seconds.

    WrongStateError that names the kernel and the first fact that does not hold."""
    _remove_leftovers(mapper, actor)
    with _scratch(mapper, actor) as scratch:
        era = _writes(scratch)
        mark_s, era = _marks(scratch, era)
        era = _discards(scratch, era)
        _zeroes(scratch, era)
    return mark_s


def _writes(scratch: _Scratch) -> int:
    """The latest era that was collected."""
    before = counters(scratch.stat)
    _write(scratch, 3)
    after = counters(scratch.stat)
    if after.lapses != before.lapses:
        _fail("something has it stop counting again and again (queue/iostats)")
    if after.sectors_written == before.sectors_written:
        _fail("the counter of writes of a mapped device stands still")
    table = [Target(0, DATA_BYTES // SECTOR_BYTES, "linear", f"{device_path(scratch.era)} 0")]
    first = scratch.barrier(table, 1, _DEADLINE_S)
    if _blocks(first) != {3}:
        _fail(f"of a write to block 3 dm-era's snapshot says {sorted(_blocks(first))}")
    _write(scratch, 5)
    second = scratch.barrier(None, first.to_era + 1, _DEADLINE_S)
    if _blocks(second) != {5} or second.to_era <= first.to_era:
        _fail(f"after the end of an era, of a write to block 5, {sorted(_blocks(second))} is said")
    return second.to_era


def _marks(scratch: _Scratch, era: int) -> tuple[float, int]:
    """What a mark costs, and the latest era that was collected."""
    first, again = ([_write(scratch, block) for block in MARKED] for _ in range(2))
    landed = scratch.barrier(None, era + 1, _DEADLINE_S)
    missing = set(MARKED) - _blocks(landed)
    if missing:
        _fail(f"of writes to many blocks dm-era does not mark {sorted(missing)}")
    return max(0.0, statistics.median(first) - statistics.median(again)), landed.to_era


def _discards(scratch: _Scratch, era: int) -> int:
    limit = scratch.queue(scratch.era, "discard_max_bytes")
    if limit > BLOCK_BYTES:
        _fail(f"discards of up to {limit} bytes are let through, {BLOCK_BYTES} were allowed")
    if not scratch.queue(scratch.write, "discard_max_bytes"):
        return era
    scratch.actor.limit_discard(scratch.write, DATA_BYTES)  # so that nothing is cut above
    before = counters(scratch.stat)
    start, length = 8 * BLOCK_BYTES + BLOCK_BYTES // 2, 5 * BLOCK_BYTES
    _ask(scratch.write, _BLKDISCARD, start, length)
    if counters(scratch.stat).discards == before.discards:
        _fail("the counter of discards of a mapped device stands still")
    landed = scratch.barrier(None, era + 1, _DEADLINE_S)
    missing = set(range(8, 14)) - _blocks(landed)
    if missing:
        _fail(f"of a discard of blocks 8 to 13, dm-era does not mark {sorted(missing)}")
    return landed.to_era


def _zeroes(scratch: _Scratch, era: int) -> None:
    _ask(scratch.write, _BLKZEROOUT, 20 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    missing = set(range(20, 24)) - _blocks(scratch.barrier(None, era + 1, _DEADLINE_S))
    if missing:
        _fail(f"of a zeroing of blocks 20 to 23, dm-era does not mark {sorted(missing)}")


def _blocks(collected: Collected) -> set[int]:
    return set(collected.blocks.search(bitarray("1")))


def _fail(fact: str) -> NoReturn:
    raise WrongStateError(
        f"the kernel {os.uname().release} does not do what --attach dm relies on: {fact}",
        hint="use --attach nbd with this kernel, and report it",
    )


# -- devices ----------------------------------------------------------------------------------
@contextlib.contextmanager
def _scratch(mapper: DeviceMapper, actor: Dmsetup) -> Iterator[_Scratch]:
    pid = os.getpid()
    era, write = (f"dmctl-selftest.{pid}.{layer}" for layer in ("era", "w"))
    with contextlib.ExitStack() as stack:
        paths = []
        for what, size_bytes in (("data", DATA_BYTES), ("meta", METADATA_BYTES)):
            paths.append(ram.make(size_bytes, _stamp(pid, what)))
            stack.callback(ram.free, paths[-1])
        data, metadata = paths
        _create(stack, actor, era, Line(0, DATA_BYTES, Era(metadata, data, BLOCK_BYTES)))
        actor.limit_discard(era, BLOCK_BYTES)
        _create(stack, actor, write, Line(0, DATA_BYTES, Linear(device_path(era), 0)))
        device = mapper.device(era)
        stat = BlockStat(device.number if device is not None else "")
        stack.callback(stat.close)
        stat.switch_on()
        reader = MetadataFile(metadata)
        stack.callback(reader.close)
        barrier = Barrier(mapper, era, write, reader, lambda: counters(stat))
        yield _Scratch(mapper, actor, era, write, barrier, stat)


def _create(stack: contextlib.ExitStack, actor: Dmsetup, name: str, line: Line) -> None:
    actor.create(name, f"DMCTL-{name.removeprefix('dmctl-').replace('.', '-')}", (line,))
    stack.callback(actor.remove, name)


def _stamp(pid: int, what: str) -> str:
    return f"DMCTL-selftest-{pid}-{what}"


def _remove_leftovers(mapper: DeviceMapper, actor: Dmsetup) -> None:
    left: dict[int, list[str]] = {}
    for name, _ in mapper.names():
        match = _NAME.fullmatch(name)
        if match is not None and not os.path.exists(f"/proc/{match[1]}"):
            left.setdefault(int(match[1]), []).append(name)
    for pid, names in left.items():
        for name in sorted(names, reverse=True):  # w before era
            mapper.clear(name)
            mapper.resume(name)
            actor.remove(name)
        for what in ("data", "meta"):
            for device in ram.find(_stamp(pid, what)):
                ram.free(device.path)


# -- input and output -------------------------------------------------------------------------
def _write(scratch: _Scratch, block: int) -> float:
    """How long it took, in seconds."""
    fd = os.open(device_path(scratch.write), os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, _PAGE_BYTES) as page:
            begun_s = time.monotonic()
            os.pwrite(fd, page, block * BLOCK_BYTES)
            return time.monotonic() - begun_s
    finally:
        os.close(fd)


def _ask(name: str, request: int, start_bytes: int, length_bytes: int) -> None:
    fd = os.open(device_path(name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, struct.pack("=QQ", start_bytes, length_bytes))
    finally:
        os.close(fd)
