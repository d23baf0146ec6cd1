"""A volume with points whose hosts write past the gate, and its receiver, in one guest."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.vm.guest.disks import MIB, Disk, disks
from tests.vm.guest.dmvolume import DmVolume

NAME = "far0"
PIECE = 4096
STEP = 7919  # a prime: the pieces go all over the slots
SLOTS = 2000


class FarSite(DmVolume):
    """A receiver; what it has is called as the volume, and has no layers of its own."""

    def __init__(
        self, folder: Path, image: Disk, journal: Disk, uri: str, name: str = NAME
    ) -> None:
        super().__init__(name, folder, [image, image, journal])
        self.uri = uri

    def create(self, *options: str) -> None:
        self.dmctl(
            *("receive", self.name, "--image", self.primary.path, "--journal", self.record.path),
            *("--listen", self.uri, *options),
        )


class NearSite(DmVolume):
    """The volume."""

    def __init__(
        self, folder: Path, primary: Disk, record: Disk, uri: str, name: str = "near0"
    ) -> None:
        super().__init__(name, folder, [primary, primary, record])
        self.uri = uri

    def create(self, *options: str) -> None:
        self.dmctl(
            *("create", self.name, "--attach", "dm", "--primary", self.primary.path),
            *("--secondary", self.uri, "--record", self.record.path, *options),
        )

    def points(self) -> dict[str, Any]:
        return dict(self.status()["points"])

    def point(self, newer_than: int) -> None:
        words = ("wait", self.name, "--for", "point", "--newer-than", str(newer_than))
        self.dmctl(*words, "--timeout", "120s")


@contextlib.contextmanager
def dm_sites(
    *options: str, size_bytes: int = 64 * MIB, interval: str = "1s"
) -> Iterator[tuple[NearSite, FarSite]]:
    with (
        tempfile.TemporaryDirectory(prefix="dms-") as name,
        disks(
            ("site-p", size_bytes),
            ("site-i", size_bytes),
            ("site-j", 80 * MIB),
            ("site-r", 4 * MIB),
        ) as (primary, image, journal, record),
    ):
        uri = f"receiver+unix:///{NAME}?socket={name}/link"
        near = NearSite(Path(name) / "near", primary, record, uri)
        far = FarSite(Path(name) / "far", image, journal, uri)
        try:
            far.create()
            near.create("--point-interval", interval, *options)
            far.start()
            near.start()
            near.point(0)
            yield near, far
        finally:
            near.destroy()
            far.destroy()


@contextlib.contextmanager
def dm_group(*options: str, size_bytes: int = 16 * MIB) -> Iterator[list[tuple[NearSite, FarSite]]]:
    """Two volumes of a group, each with its receiver."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dmg-")))
        pairs = []
        for number in (0, 1):
            media = (
                (f"group-p{number}", size_bytes),
                (f"group-i{number}", size_bytes),
                (f"group-j{number}", 80 * MIB),
                (f"group-r{number}", 4 * MIB),
            )
            primary, image, journal, record = stack.enter_context(disks(*media))
            uri = f"receiver+unix:///far{number}?socket={folder}/link{number}"
            near = NearSite(folder / "near", primary, record, uri, f"near{number}")
            far = FarSite(folder / "far", image, journal, uri, f"far{number}")
            pairs.append((near, far))
            for site in (near, far):
                stack.callback(site.destroy)
            far.create("--group", "g")
            near.create("--group", "g", "--point-interval", "1s", *options)
        for near, far in pairs:
            far.start()
            near.start()
        for near, _ in pairs:
            near.point(0)
        yield pairs


class DeviceWriter:
    """A host that writes numbered pieces past the page cache, one after the other: each of them to
    all devices, in their order, before the next."""

    def __init__(self, *devices: str, first: int = 1) -> None:
        self.answered = first - 1
        self._stop = threading.Event()
        self._reached = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(devices,), daemon=True)
        self._thread.start()

    def _run(self, devices: tuple[str, ...]) -> None:
        memory = mmap.mmap(-1, PIECE)
        fds = [os.open(device, os.O_WRONLY | os.O_DIRECT) for device in devices]
        try:
            while not self._stop.is_set():
                number = self.answered + 1
                memory[:] = content(number)
                for fd in fds:
                    os.pwrite(fd, memory, number * STEP % SLOTS * PIECE)
                with self._reached:
                    self.answered = number
                    self._reached.notify_all()
        finally:
            for fd in fds:
                os.close(fd)

    def until(self, number: int) -> None:
        with self._reached:
            assert self._reached.wait_for(lambda: self.answered >= number, timeout=120)

    def more(self, count: int) -> None:
        self.until(self.answered + count)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join(60)
        return self.answered


def content(number: int) -> bytes:
    return struct.pack(">Q", number) * (PIECE // 8)


def newest(image: str, first: int = 1) -> int:
    """The number up to which an image has all writes since `first`, and none of later."""
    fd = os.open(image, os.O_RDONLY)
    try:
        found = [struct.unpack(">Q", os.pread(fd, 8, slot * PIECE))[0] for slot in range(SLOTS)]
        last = max(found)
        for number in range(max(first, last - SLOTS + 1), last + 1):
            place = number * STEP % SLOTS
            assert os.pread(fd, PIECE, place * PIECE) == content(number), (number, found[place])
    finally:
        os.close(fd)
    return last
