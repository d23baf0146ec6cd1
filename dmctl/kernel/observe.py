"""What the kernel has of a volume, asked anew each time (edge).

Everything is read from device-mapper and sysfs; no file of ours is looked at.  Tables are read of
the volume's own devices only, and never of a suspended one: what dm-era answers then could wait
for ever.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from bitmapd.media.identity import in_use
from dmctl.kernel import dm_wire, ram
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.nbd_netlink import find_device
from dmctl.model.names import Layer, device_path, parse_layer_uuid
from dmctl.model.stack import Mapped, Nbd, Observed, Primary, Ram, Volume
from dmctl.model.targets import SECTOR_BYTES, Era, Line, Table, parse_target

SYS_DEV_BLOCK: Final = Path("/sys/dev/block")
_SYS_BLOCK: Final = Path("/sys/block")


def observe(volume: Volume, mapper: DeviceMapper | None) -> Observed:
    """`mapper` is None where the kernel has no device-mapper: then there are no mapped devices."""
    devices = tuple(_devices(volume, mapper)) if mapper is not None else ()
    return Observed(
        primary=primary_facts(volume.primary),
        devices=devices,
        nbd=_nbd(volume),
        rams=tuple(_rams(volume, devices)),
    )


def _devices(volume: Volume, mapper: DeviceMapper) -> list[Mapped]:
    names = {volume.device(layer) for layer in Layer}
    found = []
    for name, _ in mapper.names():
        device = mapper.device(name)
        if device is None:  # removed in this moment
            continue
        parsed = parse_layer_uuid(device.uuid)
        ours = parsed is not None and parsed[0] == volume.uuid
        if not ours and name not in names:
            continue
        table = None
        if ours and device.has_table and not device.suspended:
            table = read_table(mapper, name)
        found.append(
            Mapped(
                name=name,
                uuid=device.uuid,
                number=device.number,
                open_count=device.open_count,
                suspended=device.suspended,
                inactive=device.has_inactive_table,
                table=table,
                has_node=node_number(name) == device.number,
                discard_max_bytes=queue_number(device.number, "discard_max_bytes"),
                discard_granularity_bytes=queue_number(device.number, "discard_granularity"),
            )
        )
    return found


def node_number(name: str) -> str | None:
    """Number of the block device that the path of a mapped device leads to."""
    try:
        found = os.stat(device_path(name))
    except OSError:
        return None
    if not stat.S_ISBLK(found.st_mode):
        return None
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def read_table(mapper: DeviceMapper, name: str) -> Table:
    """The table in force; devices in it are numbers."""
    return tuple(line_of(target) for target in mapper.table(name))


def line_of(target: dm_wire.Target) -> Line:
    return Line(
        target.first_sector * SECTOR_BYTES,
        target.sectors * SECTOR_BYTES,
        parse_target(target.kind, target.parameters),
    )


def primary_facts(path: str) -> Primary | None:
    """None if there is no block device of that name."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISBLK(found.st_mode):
        return None
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    entry = SYS_DEV_BLOCK / number
    holders = tuple(
        (holder / "dev").read_text().strip() for holder in sorted((entry / "holders").iterdir())
    )
    return Primary(
        path=path,
        number=number,
        size_bytes=int((entry / "size").read_text()) * SECTOR_BYTES,
        logical_block_bytes=queue_number(number, "logical_block_size"),
        physical_block_bytes=queue_number(number, "physical_block_size"),
        read_only=(entry / "ro").read_text().strip() != "0",
        zoned=_queue(number, "zoned"),
        discard_max_bytes=queue_number(number, "discard_max_bytes"),
        discard_granularity_bytes=queue_number(number, "discard_granularity"),
        holders=holders,
        use=None if holders else in_use(path),
    )


def queue_number(number: str, attribute: str) -> int:
    return int(_queue(number, attribute) or 0)


def _queue(number: str, attribute: str) -> str:
    """Of a device, or of the disk that it is a partition of; "" where there is no such thing."""
    entry = (SYS_DEV_BLOCK / number).resolve()
    folder = entry.parent if (entry / "partition").exists() else entry
    try:
        return (folder / "queue" / attribute).read_text().strip()
    except FileNotFoundError:
        return ""


def _nbd(volume: Volume) -> Nbd | None:
    index = find_device(volume.uuid)
    if index is None:
        return None
    entry = _SYS_BLOCK / f"nbd{index}"
    number = (entry / "dev").read_text().strip()
    return Nbd(
        path=f"/dev/nbd{index}",
        number=number,
        size_bytes=int((entry / "size").read_text()) * SECTOR_BYTES,
        logical_block_bytes=queue_number(number, "logical_block_size"),
    )


def _rams(volume: Volume, devices: tuple[Mapped, ...]) -> list[Ram]:
    found = ram.find(volume.stamp)
    for device in devices:
        for line in device.lines:
            if isinstance(line.target, Era):
                used = ram.by_number(line.target.metadata)
                if used is not None and used not in found:
                    found.append(used)
    return found
