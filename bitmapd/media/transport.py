"""Whether a disk of this machine is behind a transport, so that it may write after we have gone on.

The kernel ends a request of a local disk before the process that made it is gone, and a bus that is
reset forgets it.  A server on the far side of a network keeps what it has received, and carries it
out in its own time: after the initiator gave the command up, after this machine was started anew.

`is_remote` follows a file to its file system, and a block device to all the disks that it stands on
(`slaves` of device-mapper and md, the file behind a loop device).  What a disk is stands in its
path below /sys/devices:

    iSCSI                …/hostN/sessionN/targetN…
    Fibre Channel        …/rport-N:N-N/…
    NVMe over fabrics    …/nvme-fabrics/…, or a controller whose `transport` is not `pcie`
    nbd, rbd, drbd, AoE  the name of the device
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

SYSFS = Path("/sys")

# Numbers of file systems whose server may write late (statfs(2), include/uapi/linux/magic.h).
_REMOTE_FILE_SYSTEMS = {
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x517B: "smb",
    0x00C36400: "ceph",
    0x01021997: "9p",
    0x5346414F: "afs",
    0x65735546: "fuse",
    0x0BD00BD0: "lustre",
}
_REMOTE_PATH = re.compile(r"/host\d+/session\d+/|/rport-|/nvme-fabrics/")
_REMOTE_NAME = re.compile(r"(nbd|rbd|drbd)\d+\Z|etherd!")
_DEPTH = 16  # of devices that stand on one another

_libc = ctypes.CDLL(None, use_errno=True)


def is_remote_disk(name: str, device_path: str, transports: frozenset[str]) -> bool:
    """Of a whole disk: its kernel name, its path below /sys/devices, and the transports of its NVMe
    controllers, if it has such (pure)."""
    return bool(
        _REMOTE_NAME.match(name) or _REMOTE_PATH.search(device_path) or transports - {"pcie"}
    )


def is_remote(fd: int) -> bool:
    """Whether some of the disks below an open file or block device is behind a transport; what
    cannot be known counts as remote."""
    try:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            return _is_remote_number(status.st_rdev, _DEPTH)
        return _is_remote_file(fd, _DEPTH)
    except OSError:
        return True


def is_remote_path(path: str) -> bool:
    """The same of a device or file by its name; not of one that is not there."""
    try:
        with _opened(path) as fd:
            return is_remote(fd)
    except OSError:
        return False


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """To ask what it is; a pipe that nobody writes holds nobody up."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_remote_file(fd: int, depth: int) -> bool:
    if file_system(fd) in _REMOTE_FILE_SYSTEMS:
        return True
    device = os.fstat(fd).st_dev
    # A file system of several disks, or of none, has a number of its own that no disk has.
    return os.major(device) != 0 and _is_remote_number(device, depth)


def file_system(fd: int) -> int:
    """The number of its type (statfs(2))."""
    words = (ctypes.c_long * 32)()
    if _libc.fstatfs(fd, words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(words[0]) & 0xFFFFFFFF


def _is_remote_number(device: int, depth: int) -> bool:
    folder = SYSFS / "dev/block" / f"{os.major(device)}:{os.minor(device)}"
    return _is_remote_folder(folder.resolve(strict=True), depth)


def _is_remote_folder(folder: Path, depth: int) -> bool:
    if depth == 0:
        return True
    if (folder / "partition").exists():
        folder = folder.parent
    below = sorted((folder / "slaves").glob("*"))
    if below:
        return any(_is_remote_folder(disk.resolve(strict=True), depth - 1) for disk in below)
    backing = folder / "loop/backing_file"
    if backing.exists():
        with _opened(backing.read_text().rstrip("\n")) as fd:
            return _is_remote_file(fd, depth - 1)
    return is_remote_disk(folder.name, str(folder), _transports(folder))


def _transports(disk: Path) -> frozenset[str]:
    """Those of the NVMe controllers that lead to a disk: its own, or the paths of its subsystem."""
    found = [*(disk / "device").glob("transport"), *(disk / "device").glob("nvme*/transport")]
    return frozenset(file.read_text().strip() for file in found)
