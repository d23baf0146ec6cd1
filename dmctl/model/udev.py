"""The udev rules that say which devices are media of volumes and receivers (pure).

`render` makes the whole file that dmctl keeps in /etc/udev/rules.d: for each medium the property
DMCTL_VOLUME, DMCTL_ROLE and, if it is to be started at boot, DMCTL_ASSEMBLE.  What follows
from them (hiding, units) stands in the rules that are installed with the program.

1. A device is known by the path in the configuration: a name of the kernel, or a link of udev's.
   Nothing is looked up, so that the rules hold for devices that are not there yet.
2. Only names of plain characters are written.  In a match udev takes `*?[|` for patterns, and
   nothing else of what is left has a meaning; names of volumes are checked by the configuration.
3. A link that udev makes from a file system cannot name a medium: hiding the file system takes the
   link away, and the volume has the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bitmapd.errors import UsageError

FILE_NAME = "63-volumes-dmctl.rules"
# Partitions of this type may hold a record; see udev/69-dmctl.rules.
RECORD_PARTITION_TYPE = "22a97922-7e0b-42b7-9e79-a9e765cb67f9"

_DEV = "/dev/"
_PLAIN = re.compile(r"[A-Za-z0-9#+.:=@_/\\-]+", re.ASCII)
_BY_CONTENT = ("disk/by-uuid/", "disk/by-label/")
_HEAD = """\
# Media of dmctl's volumes, written by dmctl from /etc/dmctl/volumes: changes here are lost.
# 'dmctl udev-rules' writes the file anew.
ACTION!="add|change", GOTO="dmctl_volumes_end"
SUBSYSTEM!="block", GOTO="dmctl_volumes_end"
"""
_TAIL = """\
LABEL="dmctl_volumes_end"
"""


@dataclass(frozen=True, slots=True)
class Medium:
    """A local medium of a volume or receiver, by the path in its configuration."""

    volume: str
    role: str  # "primary", "secondary", "record", "image" or "journal"
    path: str
    start_at_boot: bool


def device_name(path: str) -> str | None:
    """The name below /dev, such as `sdb1` or `disk/by-id/ata-X`; None for anything else."""
    if not path.startswith(_DEV):
        return None
    name = path.removeprefix(_DEV)
    return name if name.strip("/") else None


def objection(medium: Medium) -> UsageError | None:
    """Why no rule can tell udev of this medium; None also for one that is no device."""
    name = device_name(medium.path)
    if name is None:
        return None
    what = f"{medium.role} {medium.path} of volume '{medium.volume}' cannot be hidden or waited for"
    if name.startswith(_BY_CONTENT):
        return UsageError(
            f"{what}: the volume has the same file system, and so the same link",
            hint="name it by /dev/disk/by-id or /dev/disk/by-partuuid",
        )
    if _PLAIN.fullmatch(name) is None or any(part in ("", ".", "..") for part in name.split("/")):
        return UsageError(
            f"{what}: udev's rules cannot hold that name",
            hint="name it by a link in /dev/disk/by-id",
        )
    return None


def render(media: Iterable[Medium], kept: Iterable[str] = ()) -> str:
    """The rules file; media that are no devices, or to which there is an objection, are left out.

    `kept` are lines of an older file that stay.
    """
    lines = [_HEAD, *(f"{line}\n" for line in kept)]
    for medium in media:
        name = device_name(medium.path)
        if name is None or objection(medium) is not None:
            continue
        says = f'{_volume(medium.volume)}, ENV{{DMCTL_ROLE}}="{medium.role}"'
        if medium.start_at_boot:
            says += ', ENV{DMCTL_ASSEMBLE}="1"'
        kernel = name.replace("/", "!")  # as the kernel itself writes names with a slash
        lines.append(f'KERNEL=="{kernel}", {says}\nSYMLINK=="{name}", {says}\n')
    return "".join([*lines, _TAIL])


def _volume(name: str) -> str:
    return f'ENV{{DMCTL_VOLUME}}="{name}"'


def lines_of(text: str, volume: str) -> list[str]:
    """The lines of a rules file that are about one volume."""
    return [line for line in text.splitlines() if f" {_volume(volume)}," in line]
