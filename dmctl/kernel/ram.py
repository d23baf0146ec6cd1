"""RAM devices for the metadata of era devices: zram (edge).

A zram device is made for one volume with the size it needs, takes what its content compresses to,
and gives its memory back when it goes.  brd is as quick, but has one size for all its devices,
fixed when its module is loaded, and keeps every page that was ever written; a loop device over
ramfs makes the first write to a block in an era three times as slow.

1. A device is stamped in its last page as soon as it exists, so that one whose maker died before it
   was put to use is found and freed.  dm-era takes its blocks from the start and overwrites the
   stamp only when it is about to be full; by then the era device's table names the device.
2. Nobody else's device is taken: setting the size fails if somebody was quicker.
3. A death between making a device and stamping it leaves an empty one, which holds no memory but
   16 bytes a page for its own table.

Where there is no memory left for a page, zram fails the write, dm-era fails the writes of hosts
from then on, and its status says so: no mark is lost silently.  Access is direct: a buffered page
could be older than what dm-era wrote.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import time
from pathlib import Path
from typing import Final

from dmctl.kernel.modules import modprobe
from dmctl.model.stack import RAM_PAGE_BYTES, Ram
from dmctl.model.steps import ZRAM

CONTROL: Final = Path("/sys/class/zram-control")
_SYS_BLOCK: Final = Path("/sys/block")
_SECTOR_BYTES: Final = 512
_ATTEMPTS: Final = 8
# udev opens what has just been made, or has just been let go, for a moment; nothing tells when it
# is done.
_BUSY_S: Final = 5.0
_POLL_S: Final = 0.05


def make(size_bytes: int, stamp: str) -> str:
    """A new device, all zeros but for the stamp; its path.  `size_bytes`: whole pages."""
    _load()
    for _ in range(_ATTEMPTS):
        index = int((CONTROL / "hot_add").read_text())
        path = f"{ZRAM}{index}"
        try:
            (_SYS_BLOCK / f"zram{index}" / "disksize").write_text(str(size_bytes))
        except OSError as error:
            if error.errno == errno.EBUSY:
                continue
            free(path)
            raise OSError(
                error.errno, f"cannot make {path} of {size_bytes} bytes: {error.strerror}"
            ) from error
        try:
            _write_stamp(path, size_bytes, stamp)
        except BaseException:
            free(path)
            raise
        return path
    raise OSError(
        errno.EBUSY, f"somebody else took {_ATTEMPTS} new zram devices, one after another"
    )


def free(path: str) -> None:
    """Give the device and its memory back; it may be gone already.  EBUSY if it is in use."""
    until_s = time.monotonic() + _BUSY_S
    while True:
        try:
            (CONTROL / "hot_remove").write_text(path.removeprefix(ZRAM))
        except OSError as error:
            if error.errno in {errno.ENODEV, errno.ENOENT}:
                return
            if error.errno != errno.EBUSY or time.monotonic() >= until_s:
                raise OSError(error.errno, f"cannot free {path}: {error.strerror}") from error
            time.sleep(_POLL_S)
        else:
            return


def find(stamp: str) -> list[Ram]:
    """All devices with that stamp."""
    return [
        Ram(f"/dev/{entry.name}", (entry / "dev").read_text().strip())
        for entry in sorted(_SYS_BLOCK.glob("zram*"))
        if _read_stamp(entry) == stamp
    ]


def by_number(number: str) -> Ram | None:
    """The zram device with that number ("252:0")."""
    link = Path("/sys/dev/block", number)
    name = link.resolve().name if link.exists() else ""
    return Ram(f"/dev/{name}", number) if name.startswith("zram") else None


def _load() -> None:
    if CONTROL.exists():
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        modprobe("zram", "num_devices=0")
    if not CONTROL.exists():
        raise OSError(
            errno.ENODEV,
            "the kernel has no zram: 'modprobe zram' did not bring it;"
            " use --attach nbd, or a kernel that has the module",
        )


def _write_stamp(path: str, size_bytes: int, stamp: str) -> None:
    with mmap.mmap(-1, RAM_PAGE_BYTES) as page:
        page[:] = stamp.encode().ljust(RAM_PAGE_BYTES)
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.pwrite(fd, page, size_bytes - RAM_PAGE_BYTES)
        finally:
            os.close(fd)


def _read_stamp(entry: Path) -> str | None:
    """None if there is none, or no device any more."""
    with contextlib.suppress(OSError), mmap.mmap(-1, RAM_PAGE_BYTES) as page:
        size_bytes = int((entry / "size").read_text()) * _SECTOR_BYTES
        if size_bytes < RAM_PAGE_BYTES:
            return None
        fd = os.open(f"/dev/{entry.name}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.preadv(fd, [page], size_bytes - RAM_PAGE_BYTES)
        finally:
            os.close(fd)
        return page[:].rstrip(b" ").decode(errors="replace")
    return None
