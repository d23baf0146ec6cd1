"""What a file is known by, over renames and reboots, and from which file system it came (edge).

The text is `file:INODE@BIRTH`, and behind it what else the file system keeps of a file for good:

- `+gen=` the generation of its inode (FS_IOC_GETVERSION), which tells a new file in a used inode
  from the old one.  ext4 and XFS draw it at random, so it tells two file systems apart as well,
  also where inodes hold no time of birth.
- `+fs=` the file system.  Of ext2 to 4 and btrfs statfs has a number made of its UUID, for btrfs
  with the subvolume in it: a file in a snapshot has inode, birth and generation of the original.
  Of XFS that number is the device's, which changes, so it is asked for its UUID (Linux 6.9).

1. What the file system does not offer is left out.  A part that only one of two texts has is not
   compared: a record keeps its text when the kernel learns more.
2. A copy of a whole file system keeps all of the above until it is given a UUID of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
from contextlib import suppress
from typing import Final

_PARTS: Final = re.compile(r"\+(gen|fs)=([0-9a-f]+)")

_AT_FDCWD: Final = -100
_STATX_BTIME: Final = 0x800
_FS_IOC_GETVERSION: Final = 0x80087601  # _IOR('v', 1, long)
_FS_IOC_GETFSUUID: Final = 0x80111500  # _IOR(0x15, 0, struct fsuuid2: a length, 16 bytes)
_EXT: Final = 0xEF53
_BTRFS: Final = 0x9123683E
_XFS: Final = 0x58465342


def file_text(path: str, found: os.stat_result) -> str:
    born_ns = _birth_ns(path)
    birth = f"@{born_ns}" if born_ns is not None else ""
    parts = ""
    with suppress(OSError):  # not readable by this user: known by less
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            parts = "".join(
                f"+{label}={value}"
                for label, value in (("gen", _generation(fd)), ("fs", _file_system(fd)))
                if value is not None
            )
        finally:
            os.close(fd)
    return f"file:{found.st_ino}{birth}{parts}"


def same_identity(one: str, other: str) -> bool:
    """Whether two texts of `identify` name the same medium, as far as both say."""
    if not one.startswith(("file:", "loop:")):
        return one == other
    if _PARTS.sub("", one) != _PARTS.sub("", other):
        return False
    mine, theirs = (dict(_PARTS.findall(text)) for text in (one, other))
    return all(mine[label] == theirs[label] for label in mine.keys() & theirs.keys())


def _birth_ns(path: str) -> int | None:
    """When the file was made, through statx(2), which the os module does not offer."""
    statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if statx is None:
        return None
    mask_at, btime_at = 0, 80
    buffer = ctypes.create_string_buffer(256)
    if statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, buffer) != 0:
        return None
    if not int.from_bytes(buffer.raw[mask_at : mask_at + 4], "little") & _STATX_BTIME:
        return None
    seconds = int.from_bytes(buffer.raw[btime_at : btime_at + 8], "little", signed=True)
    nanoseconds = int.from_bytes(buffer.raw[btime_at + 8 : btime_at + 12], "little")
    return seconds * 1_000_000_000 + nanoseconds


def _generation(fd: int) -> str | None:
    # The number says long; every file system writes an int.
    answer = _ioctl(fd, _FS_IOC_GETVERSION, 8)
    return None if answer is None else f"{struct.unpack_from('=I', answer)[0]:x}"


def _file_system(fd: int) -> str | None:
    kind = _file_system_type(fd)
    if kind in (_EXT, _BTRFS):
        return f"{os.fstatvfs(fd).f_fsid:x}"
    if kind == _XFS:
        answer = _ioctl(fd, _FS_IOC_GETFSUUID, 17)
        return None if answer is None else answer[1 : 1 + answer[0]].hex()
    return None


def _file_system_type(fd: int) -> int:
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer) != 0:
        return 0
    return ctypes.c_long.from_buffer(buffer).value


def _ioctl(fd: int, number: int, length: int) -> bytes | None:
    try:
        return fcntl.ioctl(fd, number, bytes(length))
    except OSError:
        return None
