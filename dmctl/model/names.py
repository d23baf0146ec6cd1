"""Names and UUIDs of a volume's mapped devices (pure).

    layer   name             UUID             what it is
    top     NAME             DMCTL-U-top      what hosts use
    write   dmctl-NAME-w     DMCTL-U-write    routes of writes
    era     dmctl-NAME-era   DMCTL-U-era      tracker over the primary

U is the volume's UUID as 32 hexadecimal digits.  Hyphens of NAME are doubled in inner names, as LVM
does it, so that an inner name is read in one way only.

1. A device is ours if and only if its UUID says so.  A name proves nothing: anybody can choose it.
2. A volume whose name begins like an inner one is refused, because its top device could take the
   name of another volume's layer; and one called like device-mapper's own node.
3. The kernel has room for 127 bytes.  A name of 64 fits, unless it is full of hyphens.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

from bitmapd.errors import UsageError

INNER_PREFIX: Final = "dmctl-"
UUID_PREFIX: Final = "DMCTL-"
MAPPER_DIR: Final = "/dev/mapper/"
CONTROL_NODE: Final = "control"
MAX_NAME_BYTES: Final = 127

_ODD_HYPHENS: Final = re.compile(r"(?<!-)-(?:--)*(?!-)")
_UUID: Final = re.compile(r"DMCTL-([0-9a-f]{32})-([a-z]+)")


class Layer(StrEnum):
    """From the primary upwards; the value is the end of the device's UUID."""

    ERA = "era"
    WRITE = "write"
    TOP = "top"


_SUFFIXES: Final = {Layer.ERA: "era", Layer.WRITE: "w"}
_LAYERS: Final = {suffix: layer for layer, suffix in _SUFFIXES.items()}


def layer_name(volume: str, layer: Layer) -> str:
    """The name of a volume's mapped device."""
    if volume.startswith(INNER_PREFIX):
        raise UsageError(
            f"volume name '{volume}' begins like the inner devices of other volumes",
            hint=f"choose a name that does not begin with '{INNER_PREFIX}'",
        )
    if volume == CONTROL_NODE:
        raise UsageError(
            f"/dev/mapper/{volume} is device-mapper's own node", hint="choose another name"
        )
    if layer is Layer.TOP:
        return volume
    name = f"{INNER_PREFIX}{volume.replace('-', '--')}-{_SUFFIXES[layer]}"
    if len(name) > MAX_NAME_BYTES:
        raise UsageError(
            f"the device '{name}' would have a name of {len(name)} bytes; the kernel allows"
            f" {MAX_NAME_BYTES}",
            hint="choose a shorter name for the volume; a hyphen counts twice",
        )
    return name


def parse_layer_name(name: str) -> tuple[str, Layer] | None:
    """Volume and layer that an inner name stands for; None if it is not one."""
    if not name.startswith(INNER_PREFIX):
        return None
    volume, _, suffix = name[len(INNER_PREFIX) :].rpartition("-")
    if suffix not in _LAYERS or not volume or _ODD_HYPHENS.search(volume):
        return None
    return volume.replace("--", "-"), _LAYERS[suffix]


def layer_uuid(volume_uuid: str, layer: Layer) -> str:
    """The UUID of a volume's mapped device; `volume_uuid` is 32 hexadecimal digits."""
    return f"{UUID_PREFIX}{volume_uuid}-{layer.value}"


def parse_layer_uuid(uuid: str) -> tuple[str, Layer] | None:
    """UUID of the volume, and layer, if the device is one of ours."""
    match = _UUID.fullmatch(uuid)
    if match is None or match[2] not in {layer.value for layer in Layer}:
        return None
    return match[1], Layer(match[2])


def device_path(name: str) -> str:
    """Where a mapped device of that name is found."""
    return MAPPER_DIR + name
