"""What a volume is made of in the kernel: tables, sizes, what was seen, what is wanted (pure).

    top      delay   reads -> primary | writes -> write | flushes -> primary
    write    linear  segments: direct -> era | gate -> NBD device of bitmapd
    era      era     over the primary, metadata on a RAM device

1. Every layer begins at byte 0 of the one below: a range of the volume has the same offset in every
   device, so flushes of old kernels and discards meet what they mean.
2. Segments cover the volume exactly once, in whole logical blocks.
3. `Observed` comes from the kernel alone.  The volume's devices are found by their UUIDs, its NBD
   device by the identifier that the kernel keeps for it, its RAM device by the era device's table
   or, before there is one, by the stamp on it.
4. Device numbers ("254:0") name devices in what was observed; paths do in what is to be made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Final

from bitmapd.errors import NoSpaceError, PermissionError_, UsageError, WrongStateError
from dmctl.model.names import UUID_PREFIX, Layer, layer_name, layer_uuid
from dmctl.model.targets import (
    SECTOR_BYTES,
    Delay,
    Era,
    Line,
    Linear,
    Other,
    Table,
    Target,
    Via,
    table_bytes,
)

# dm-era keeps 4 bytes a block and a bit a block for each era that is not digested; it fails writes
# when it runs out of room, so the room is three times of what it needs.
RAM_BYTES_PER_BLOCK: Final = 3 * 4
RAM_HEADROOM_BYTES: Final = 16 << 20
RAM_PAGE_BYTES: Final = 4096
# dm-era takes multiples of 8 sectors.
ERA_GRAIN_BYTES: Final = 8 * SECTOR_BYTES
# Loading and reading back a table costs by the segment.
MAX_SEGMENTS: Final = 10_000


class Route(StrEnum):
    DIRECT = "direct"
    GATE = "gate"


Segment = tuple[int, int, str]  # first byte, end byte, a Route


@dataclass(frozen=True, slots=True)
class Volume:
    """What must be known of a volume to build it; `uuid` is 32 hexadecimal digits."""

    name: str
    uuid: str
    primary: str
    size_bytes: int
    logical_block_bytes: int
    block_bytes: int

    def device(self, layer: Layer) -> str:
        return layer_name(self.name, layer)

    def device_uuid(self, layer: Layer) -> str:
        return layer_uuid(self.uuid, layer)

    @property
    def stamp(self) -> str:
        """What marks the volume's RAM device."""
        return f"{UUID_PREFIX}{self.uuid}-ram"

    @property
    def ram_bytes(self) -> int:
        """Size of the RAM device for the era device's metadata, the stamp included."""
        blocks = -(-self.size_bytes // self.block_bytes)
        need = blocks * RAM_BYTES_PER_BLOCK + RAM_HEADROOM_BYTES
        return need + -need % RAM_PAGE_BYTES


# -- what was seen ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Mapped:
    """A mapped device; `table` is None if none is in force, or if asking could have hung.

    `has_node`: whether its path in /dev/mapper leads to it.
    """

    name: str
    uuid: str
    number: str
    open_count: int = 0
    suspended: bool = False
    inactive: bool = False
    table: Table | None = None
    has_node: bool = True
    discard_max_bytes: int = 0
    discard_granularity_bytes: int = 0

    def uses(self, device: Mapped | None) -> bool:
        """Whether the table in force sends anything to that device."""
        return device is not None and any(device.number in _devices(line) for line in self.lines)

    @property
    def lines(self) -> Table:
        return self.table or ()


def _devices(line: Line) -> tuple[str, ...]:
    match line.target:
        case Linear(device, _):
            return (device,)
        case Era(metadata, origin, _):
            return metadata, origin
        case Delay(reads, writes, flushes):
            return reads.device, writes.device, flushes.device
        case _:
            return ()


@dataclass(frozen=True, slots=True)
class Ram:
    path: str
    number: str


@dataclass(frozen=True, slots=True)
class Nbd:
    """An NBD device that the kernel holds for the volume."""

    path: str
    number: str
    size_bytes: int
    logical_block_bytes: int


@dataclass(frozen=True, slots=True)
class Primary:
    """The block device under the volume.

    `holders`: numbers of the devices made of it; `use`: what else has it ("mounted on /srv").
    """

    path: str
    number: str
    size_bytes: int
    logical_block_bytes: int
    physical_block_bytes: int
    read_only: bool = False
    zoned: str = "none"
    discard_max_bytes: int = 0
    discard_granularity_bytes: int = 0
    holders: tuple[str, ...] = ()
    use: str | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """`devices`: all with a name or a UUID of the volume.  `rams`: all that are the volume's."""

    primary: Primary | None = None
    devices: tuple[Mapped, ...] = ()
    nbd: Nbd | None = None
    rams: tuple[Ram, ...] = ()

    def layer(self, volume: Volume, layer: Layer) -> Mapped | None:
        uuid = volume.device_uuid(layer)
        return next((device for device in self.devices if device.uuid == uuid), None)


# -- what is wanted ---------------------------------------------------------------------------
class Goal(Enum):
    AWAKE = "awake"  # nothing is suspended; whatever is there stays as it is
    TRACKED = "tracked"  # the era device is there; what is above it stays as it is
    ATTACHED = "attached"  # everything is there
    CLOSED = "closed"  # hosts have no device; what is below it stays as it is
    GONE = "gone"  # nothing is there
    SEVERED = "severed"  # likewise, but for a device that hosts have open: it answers with errors


@dataclass(frozen=True, slots=True)
class Wanted:
    """`segments` are for a table that has to be made; one that is in force keeps its own."""

    volume: Volume
    goal: Goal
    segments: tuple[Segment, ...] = ()


# -- tables -----------------------------------------------------------------------------------
def era_table(volume: Volume, *, ram: str, primary: str) -> Table:
    return (Line(0, volume.size_bytes, Era(ram, primary, volume.block_bytes)),)


def top_table(volume: Volume, *, primary: str, write: str) -> Table:
    ways = Delay(reads=Via(primary), writes=Via(write), flushes=Via(primary))
    return (Line(0, volume.size_bytes, ways),)


def error_table(device: Mapped) -> Table:
    """Every request of it fails."""
    return (Line(0, table_bytes(device.lines), Other("error", "")),)


def write_table(
    volume: Volume,
    segments: Iterable[Segment],
    *,
    era: str,
    nbd: str,
    max_segments: int = MAX_SEGMENTS,
) -> Table:
    """Neighbours with the same route become one line."""
    devices = {Route.DIRECT.value: era, Route.GATE.value: nbd}
    runs: list[list[int]] = []
    routes: list[str] = []
    end = 0
    for first, stop, route in segments:
        if first != end or stop <= first:
            raise UsageError(
                f"segment {first}..{stop} of '{volume.name}' does not follow on byte {end}"
            )
        if route not in devices:
            raise UsageError(f"segment {first}..{stop} has the unknown route '{route}'")
        if stop % volume.logical_block_bytes:
            raise UsageError(
                f"segment {first}..{stop} does not end with a logical block of"
                f" {volume.logical_block_bytes} bytes"
            )
        if routes and routes[-1] == route:
            runs[-1][1] = stop
        else:
            runs.append([first, stop])
            routes.append(route)
        end = stop
    if end != volume.size_bytes:
        raise UsageError(
            f"segments end at byte {end} of '{volume.name}', which has {volume.size_bytes}"
        )
    if len(runs) > max_segments:
        raise UsageError(f"{len(runs)} segments are more than {max_segments}")
    return tuple(
        Line(first, stop - first, Linear(devices[route], first))
        for (first, stop), route in zip(runs, routes, strict=True)
    )


def with_devices(table: Sequence[Line], names: Mapping[str, str]) -> Table:
    """The table with other words for the devices it names."""

    def word(device: str) -> str:
        return names.get(device, device)

    def target(old: Target) -> Target:
        match old:
            case Linear(device, offset_bytes):
                return Linear(word(device), offset_bytes)
            case Era(metadata, origin, block_bytes):
                return Era(word(metadata), word(origin), block_bytes)
            case Delay(reads, writes, flushes):
                return Delay(
                    *(replace(way, device=word(way.device)) for way in (reads, writes, flushes))
                )
            case _:
                return old

    return tuple(replace(line, target=target(line.target)) for line in table)


def segments_of(table: Sequence[Line], *, era: str, nbd: str) -> list[Segment] | None:
    """What a table in force says, by device numbers; None if it is not of our making."""
    routes = {nbd: Route.GATE.value, era: Route.DIRECT.value}
    segments: list[Segment] = []
    end = 0
    for line in table:
        match line.target:
            case Linear(device, offset_bytes) if (
                device in routes and offset_bytes == line.first_byte == end
            ):
                end = line.end_byte
                segments.append((line.first_byte, end, routes[device]))
            case _:
                return None
    return segments


# -- checks -----------------------------------------------------------------------------------
def check_primary(volume: Volume, primary: Primary) -> None:
    """Raise what speaks against building the volume on that device."""
    what = f"primary {volume.primary}"
    if any(char.isspace() or char in "\\$" for char in volume.primary):
        raise UsageError(
            f"{what} has a name that cannot stand in a table",
            hint="use another name of it, such as one in /dev/disk/by-id",
        )
    if primary.zoned not in {"none", ""}:
        raise UsageError(
            f"{what} is a zoned device ({primary.zoned}), whose zones cannot be written through dm",
            hint="use --attach nbd, or another device",
        )
    if primary.read_only:
        raise PermissionError_(f"{what} cannot be written")
    if primary.size_bytes < volume.size_bytes:
        raise NoSpaceError(
            f"{what} has {primary.size_bytes} bytes, volume '{volume.name}' has"
            f" {volume.size_bytes}",
            hint="is it the right device?",
        )
    logical = primary.logical_block_bytes
    if logical != volume.logical_block_bytes:
        raise WrongStateError(
            f"{what} has logical blocks of {logical} bytes, volume '{volume.name}' was made for"
            f" {volume.logical_block_bytes}",
            hint="is it the right device?",
        )
    if volume.size_bytes % logical:
        raise UsageError(
            f"volume '{volume.name}' has {volume.size_bytes} bytes, no multiple of the primary's"
            f" logical blocks of {logical} bytes"
        )
    for label, grain in (
        ("the grain of dm-era,", ERA_GRAIN_BYTES),
        ("the primary's physical blocks of", primary.physical_block_bytes),
    ):
        if volume.block_bytes % grain:
            raise UsageError(
                f"the block size {volume.block_bytes} is no multiple of {label} {grain} bytes",
                hint="choose a larger --block-size",
            )


def check_nbd(volume: Volume, nbd: Nbd) -> None:
    """Raise what speaks against the NBD device as the way to the gate."""
    if nbd.size_bytes < volume.size_bytes:
        raise WrongStateError(
            f"{nbd.path} has {nbd.size_bytes} bytes, volume '{volume.name}' has"
            f" {volume.size_bytes}",
            hint="connect it anew with the volume's size",
        )
    if nbd.logical_block_bytes != volume.logical_block_bytes:
        raise WrongStateError(
            f"{nbd.path} has logical blocks of {nbd.logical_block_bytes} bytes, volume"
            f" '{volume.name}' of {volume.logical_block_bytes}",
            hint="connect it anew with the volume's logical block size",
        )
