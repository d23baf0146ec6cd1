"""Block devices for tests in the guest: RAM disks behind dm-linear, whose table can be exchanged.

A `Disk` has a name that begins with `dmtest-`, which is what clean-up goes by.  Swapping an error
table under it makes every later request fail, as with a disk that is pulled out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

SECTOR = 512
MIB = 1 << 20
RAM_DISK_KIB = 512 << 10
RAM_DISKS = 8
_BLKGETSIZE64 = 0x80081272
_BLKFLSBUF = 0x1261


def sh(*words: str, timeout_s: float = 120, check: bool = True) -> str:
    """Standard output of a command; both streams in the error."""
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def load_modules() -> None:
    sh("modprobe", "-a", "dm-mod", "dm-era", "dm-delay", "dm-flakey", "nbd", "zram", "loop")
    if not Path("/dev/ram0").exists():
        sh("modprobe", "brd", f"rd_nr={RAM_DISKS}", f"rd_size={RAM_DISK_KIB}")


def size_of(path: str) -> int:
    with open(path, "rb") as stream:
        answer = fcntl.ioctl(stream, _BLKGETSIZE64, bytes(8))
    return int(struct.unpack("Q", answer)[0])


def drop_cache(path: str) -> None:
    """Forget what the page cache has of a device that others write directly."""
    with open(path, "rb") as stream:
        fcntl.ioctl(stream, _BLKFLSBUF, 0)


class Disk:
    """A dm-linear device over a RAM disk (or over a loop device with larger sectors on it).

    RAM disks know no discard before 6.4, so one with `discards` is a loop device on a
    file in memory.
    """

    def __init__(
        self, name: str, size_bytes: int, sector_bytes: int = SECTOR, discards: bool = False
    ) -> None:
        self.name = f"dmtest-{name}"
        self.path = f"/dev/mapper/{self.name}"
        self.size_bytes = size_bytes
        self._sectors = size_bytes // SECTOR
        self._ram = "" if discards else _free_ram_disk()
        self._file = Path(f"/dev/shm/{self.name}")
        self._loop = ""
        lower = self._ram
        if discards:
            with self._file.open("wb") as file:
                file.truncate(RAM_DISK_KIB << 10)
            lower = self._loop = sh(
                "losetup", "-f", "--show", "-b", str(sector_bytes), str(self._file)
            ).strip()
        elif sector_bytes != SECTOR:
            self._loop = sh(
                "losetup", "-f", "--show", "-b", str(sector_bytes), "--direct-io=on", self._ram
            ).strip()
            lower = self._loop
        self.lower = lower
        # RAM disks keep what they have.
        sh("blkdiscard", "-f", "-z", "-l", str(size_bytes), lower)
        sh("dmsetup", "create", self.name, "--noudevsync", "--table", self._linear)
        _make_node(self.name)

    @property
    def _linear(self) -> str:
        return f"0 {self._sectors} linear {self.lower} 0"

    def load(self, table: str) -> None:
        """Exchange the table while the device is in use."""
        sh("dmsetup", "load", self.name, "--table", table)
        sh("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)
        sh("dmsetup", "resume", "--noudevsync", self.name)

    def break_it(self) -> None:
        self.load(f"0 {self._sectors} error")

    def grow(self, size_bytes: int) -> None:
        self.size_bytes, self._sectors = size_bytes, size_bytes // SECTOR
        self.load(self._linear)

    def mend(self) -> None:
        self.load(self._linear)

    def read(self) -> bytes:
        drop_cache(self.lower)
        with open(self.lower, "rb") as stream:
            return stream.read(self.size_bytes)

    def close(self) -> None:
        sh("dmsetup", "remove", "--noudevsync", "--retry", self.name, check=False)
        if self._loop:
            sh("losetup", "-d", self._loop, check=False)
        self._file.unlink(missing_ok=True)
        _USED.discard(self._ram)


_USED: set[str] = set()


def _free_ram_disk() -> str:
    for number in range(RAM_DISKS):
        path = f"/dev/ram{number}"
        if path not in _USED:
            _USED.add(path)
            return path
    raise AssertionError("all RAM disks are in use")


def _make_node(name: str) -> None:
    """Without udev nobody makes the node under /dev/mapper."""
    sh("dmsetup", "mknodes", name)


@contextlib.contextmanager
def disks(
    *sizes: tuple[str, int], sector_bytes: int = SECTOR, discards: bool = False
) -> Iterator[list[Disk]]:
    """Fresh disks, by name and size in bytes."""
    load_modules()
    made: list[Disk] = []
    try:
        for name, size_bytes in sizes:
            made.append(Disk(name, size_bytes, sector_bytes, discards))
        yield made
    finally:
        for disk in reversed(made):
            disk.close()


def same(one: Disk, other: Disk, size_bytes: int) -> bool:
    """Whether two disks hold the same bytes; compared in pieces."""
    for disk in (one, other):
        drop_cache(disk.lower)
    with open(one.lower, "rb") as a, open(other.lower, "rb") as b:
        left = size_bytes
        while left:
            length = min(left, 8 * MIB)
            if a.read(length) != b.read(length):
                return False
            left -= length
    return True


def in_guest() -> bool:
    return os.environ.get("DMCTL_GUEST") == "1"
