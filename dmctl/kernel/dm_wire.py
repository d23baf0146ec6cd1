"""The messages of device-mapper's ioctl interface, packed and unpacked (pure).

Layout: <linux/dm-ioctl.h> of interface version 4.  Every request and answer begins with one
header; what follows depends on the command:

    TABLE_LOAD     targets, each a spec and its parameters; `next` counts from the spec itself
    TABLE_STATUS   the same, but `next` counts from the end of the header
    LIST_DEVICES   names, each with the distance to the next one
    TABLE_DEPS     a count and device numbers
    TARGET_MSG     a sector and a text

1. Numbers are in the machine's byte order; all fields are naturally aligned, so there is no padding
   but what is named here.
2. An answer that does not fit its own lengths raises `WireError`; nothing is guessed.
3. Request numbers follow asm-generic's encoding (x86, arm, riscv, s390).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final

INTERFACE_VERSION: Final = (4, 0, 0)
NAME_BYTES: Final = 128  # with the terminating zero
UUID_BYTES: Final = 129

# version, size, data start | targets, open count, flags, event number, padding | device, name, uuid
HEADER: Final = struct.Struct("=3III IiIII Q128s129s7x")
SPEC: Final = struct.Struct("=QQiI16s")  # first sector, sectors, status, next, target type
NAME: Final = struct.Struct("=QI")  # device, next
DEPS: Final = struct.Struct("=II")  # count, padding
NUMBER: Final = struct.Struct("=Q")

_ALIGN: Final = 8
_READ_WRITE: Final = 3 << 30
_TYPE: Final = 0xFD


class WireError(ValueError):
    """An answer of the kernel does not have the shape it should have."""


class Command(IntEnum):
    VERSION = 0
    LIST_DEVICES = 2
    DEV_CREATE = 3
    DEV_REMOVE = 4
    DEV_SUSPEND = 6
    DEV_STATUS = 7
    TABLE_LOAD = 9
    TABLE_CLEAR = 10
    TABLE_DEPS = 11
    TABLE_STATUS = 12
    TARGET_MSG = 14

    @property
    def request(self) -> int:
        """The number that ioctl(2) takes."""
        return _READ_WRITE | HEADER.size << 16 | _TYPE << 8 | self.value


class Flag(IntFlag):
    READ_ONLY = 1 << 0
    SUSPEND = 1 << 1
    STATUS_TABLE = 1 << 4
    ACTIVE_PRESENT = 1 << 5
    INACTIVE_PRESENT = 1 << 6
    BUFFER_FULL = 1 << 8
    SKIP_LOCKFS = 1 << 10
    NOFLUSH = 1 << 11
    UEVENT_GENERATED = 1 << 13


NO_FLAGS: Final = Flag(0)


@dataclass(frozen=True, slots=True)
class Device:
    """What the kernel says of one mapped device."""

    name: str
    uuid: str
    major: int
    minor: int
    targets: int
    open_count: int
    event_nr: int
    flags: Flag

    @property
    def number(self) -> str:
        return f"{self.major}:{self.minor}"

    @property
    def suspended(self) -> bool:
        return Flag.SUSPEND in self.flags

    @property
    def has_table(self) -> bool:
        return Flag.ACTIVE_PRESENT in self.flags

    @property
    def has_inactive_table(self) -> bool:
        return Flag.INACTIVE_PRESENT in self.flags


@dataclass(frozen=True, slots=True)
class Target:
    """One line of a table, or of its status; sectors of 512 bytes."""

    first_sector: int
    sectors: int
    kind: str
    parameters: str


def request(
    *,
    name: str = "",
    uuid: str = "",
    flags: Flag = NO_FLAGS,
    event_nr: int = 0,
    targets: int = 0,
    data: bytes = b"",
    room_bytes: int = 0,
) -> bytearray:
    """A header, `data`, and room for an answer of `room_bytes` in place of the data."""
    size = HEADER.size + max(len(data), room_bytes)
    message = bytearray(size)
    HEADER.pack_into(
        message,
        0,
        *INTERFACE_VERSION,
        size,
        HEADER.size,
        targets,
        0,
        flags,
        event_nr,
        0,
        0,
        _text(name, NAME_BYTES),
        _text(uuid, UUID_BYTES),
    )
    message[HEADER.size : HEADER.size + len(data)] = data
    return message


def targets_data(targets: Sequence[Target]) -> bytes:
    """The data of TABLE_LOAD."""
    data = bytearray()
    for target in targets:
        parameters = target.parameters.encode() + b"\0"
        parameters += bytes(-len(parameters) % _ALIGN)
        kind = _text(target.kind, 16)
        data += SPEC.pack(target.first_sector, target.sectors, 0, SPEC.size + len(parameters), kind)
        data += parameters
    return bytes(data)


def message_data(sector: int, text: str) -> bytes:
    """The data of TARGET_MSG."""
    return NUMBER.pack(sector) + text.encode() + b"\0"


def version(answer: bytes | bytearray) -> tuple[int, int, int]:
    """The kernel's interface version, from any answer."""
    major, minor, patch = HEADER.unpack_from(answer)[:3]
    return major, minor, patch


def device(answer: bytes | bytearray) -> Device:
    """What every answer about one device begins with."""
    fields = HEADER.unpack_from(answer)
    _, _, lines, open_count, seen, event_nr, _, number, name, uuid = fields[3:]
    major, minor = _major_minor(number)
    return Device(_read(name), _read(uuid), major, minor, lines, open_count, event_nr, Flag(seen))


def flags(answer: bytes | bytearray) -> Flag:
    return Flag(HEADER.unpack_from(answer)[7])


def is_full(answer: bytes | bytearray) -> bool:
    """Whether the kernel had more to say than there was room for."""
    return Flag.BUFFER_FULL in flags(answer)


def targets(answer: bytes | bytearray) -> list[Target]:
    """The lines of a table, or of its status."""
    data = _data(answer)
    found = []
    at = 0
    for _ in range(HEADER.unpack_from(answer)[5]):
        first, sectors, _, following, kind = _unpack(SPEC, data, at)
        if not at + SPEC.size <= following < len(data) + _ALIGN:  # the last one is padded, too
            raise WireError(f"a target at {at} ends at {following} of {len(data)} bytes")
        parameters = _read(data[at + SPEC.size : following])
        found.append(Target(first, sectors, _read(kind), parameters))
        at = following
    return found


def names(answer: bytes | bytearray) -> list[tuple[str, str]]:
    """Name and device number ("major:minor") of all mapped devices."""
    data = _data(answer)
    return list(_names(data)) if data else []


def _names(data: bytes) -> Iterator[tuple[str, str]]:
    at = 0
    while True:
        number, distance = _unpack(NAME, data, at)
        if not number:  # another way of the kernel's to say that there is none
            return
        major, minor = _major_minor(number)
        end = data.find(b"\0", at + NAME.size)
        if end < 0:
            raise WireError(f"a name at {at} does not end")
        yield data[at + NAME.size : end].decode(), f"{major}:{minor}"
        if not distance:
            return
        at += distance


def deps(answer: bytes | bytearray) -> list[str]:
    """Numbers ("major:minor") of the devices that a table is made of."""
    data = _data(answer)
    count, _ = _unpack(DEPS, data, 0)
    found = []
    for at in range(DEPS.size, DEPS.size + count * NUMBER.size, NUMBER.size):
        major, minor = _major_minor(_unpack(NUMBER, data, at)[0])
        found.append(f"{major}:{minor}")
    return found


def _data(answer: bytes | bytearray) -> bytes:
    size, start = HEADER.unpack_from(answer)[3:5]
    if not start <= size <= len(answer):
        raise WireError(f"data from {start} to {size} in an answer of {len(answer)} bytes")
    return bytes(answer[start:size])


def _unpack(shape: struct.Struct, data: bytes, at: int) -> tuple[Any, ...]:
    if at + shape.size > len(data):
        raise WireError(f"{shape.size} bytes at {at} of {len(data)}")
    return shape.unpack_from(data, at)


def _text(text: str, room_bytes: int) -> bytes:
    data = text.encode()
    if len(data) >= room_bytes or b"\0" in data:
        raise ValueError(f"{text!r} does not fit a field of {room_bytes} bytes")
    return data


def _read(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="replace")


def _major_minor(number: int) -> tuple[int, int]:
    """The kernel's encoding: 12 bits major between 8 low and 12 high bits minor."""
    return number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00
