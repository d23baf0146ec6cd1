"""Whether LVM would go past the gate (edge).

A physical volume that is on a volume shows on every layer below it as well, and on the primary.
LVM asks no udev when it scans; without the filter of docs/boot.md it takes one of them, and what it
then writes passes the record by.  No name or UUID of a layer prevents that: what looks like the
inside of a logical volume it leaves alone, but prefers what that is made of, the primary ("because
device is used by LV", LVM 2.03.16).  So LVM is asked what it takes.
"""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Collection
from typing import Final

PROGRAM: Final = "lvm"
TIMEOUT_S: Final = 20.0
# A label is in one of the first four sectors; 4 KiB can be read directly from any disk.
_HEAD_BYTES: Final = 4096
_LABEL: Final = b"LABELONE"
_LABEL_OFFSETS: Final = range(0, 2048, 512)


def taken_by_lvm(primary: str, below: Collection[str]) -> list[str]:
    """What LVM takes for a physical volume of the devices `below` the volume, by their numbers.

    Empty also if the primary holds none, or LVM is not installed or does not answer.
    """
    if not _has_label(primary):
        return []
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"
    try:
        done = subprocess.run(
            [PROGRAM, "pvs", "--noheadings", "-o", "pv_name"],
            env={"PATH": path, "LC_ALL": "C"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    names = [line.strip() for line in done.stdout.splitlines()]
    return [name for name in names if _number(name) in below]


def _has_label(device: str) -> bool:
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, _HEAD_BYTES) as head:
            os.preadv(fd, [head], 0)
            return any(head[at : at + len(_LABEL)] == _LABEL for at in _LABEL_OFFSETS)
    finally:
        os.close(fd)


def _number(name: str) -> str:
    """ "major:minor"; "" for a name that leads nowhere."""
    try:
        found = os.stat(name).st_rdev
    except OSError:
        return ""
    return f"{os.major(found)}:{os.minor(found)}"
