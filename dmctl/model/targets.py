"""Targets of device-mapper tables: rendered, parsed, and the status of dm-era (pure).

Offsets and lengths are bytes; sectors of 512 bytes appear in rendered text only, whatever the
logical block size of the device is.  A device is a string: a path when a table is to be made,
`major:minor` when the kernel shows one.

1. `parse(render(lines)) == lines` for the targets known here.  A target of another kind, or one of
   a known kind in a form that is not used here, is `Other`: it is kept word for word and equals
   nothing that this program makes.
2. A number that is no whole sector cannot be rendered: ValueError, nothing is rounded.
3. Status text that has another shape than this kernel interface's raises ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SECTOR_BYTES: Final = 512
_NUMBER: Final = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class Linear:
    """The same range of another device."""

    device: str
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class Era:
    """Writes go to the origin; which blocks of it, and when, is kept on the metadata device."""

    metadata: str
    origin: str
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Via:
    """One of the ways that dm-delay knows."""

    device: str
    offset_bytes: int = 0
    delay_ms: int = 0


@dataclass(frozen=True, slots=True)
class Delay:
    """Sends reads, writes and flushes three ways."""

    reads: Via
    writes: Via
    flushes: Via


@dataclass(frozen=True, slots=True)
class Zero:
    """Reads zeros and forgets writes."""


@dataclass(frozen=True, slots=True)
class Other:
    kind: str
    parameters: str


Target = Linear | Era | Delay | Zero | Other


@dataclass(frozen=True, slots=True)
class Line:
    """One target at its place in a table."""

    first_byte: int
    length_bytes: int
    target: Target

    @property
    def end_byte(self) -> int:
        return self.first_byte + self.length_bytes


Table = tuple[Line, ...]


def table_bytes(table: Sequence[Line]) -> int:
    """The size of a device with this table."""
    return table[-1].end_byte if table else 0


# -- rendering --------------------------------------------------------------------------------
def sectors(value_bytes: int) -> int:
    count, rest = divmod(value_bytes, SECTOR_BYTES)
    if rest:
        raise ValueError(f"{value_bytes} bytes are no whole sectors of {SECTOR_BYTES}")
    return count


def kind_and_parameters(target: Target) -> tuple[str, str]:
    """The two texts that the kernel takes for a target."""
    match target:
        case Linear(device, offset_bytes):
            return "linear", f"{device} {sectors(offset_bytes)}"
        case Era(metadata, origin, block_bytes):
            return "era", f"{metadata} {origin} {sectors(block_bytes)}"
        case Delay(reads, writes, flushes):
            return "delay", " ".join(map(_render_via, (reads, writes, flushes)))
        case Zero():
            return "zero", ""
        case _:
            return target.kind, target.parameters


def _render_via(via: Via) -> str:
    return f"{via.device} {sectors(via.offset_bytes)} {via.delay_ms}"


def render_line(line: Line) -> str:
    kind, parameters = kind_and_parameters(line.target)
    text = f"{sectors(line.first_byte)} {sectors(line.length_bytes)} {kind} {parameters}"
    return text.rstrip(" ")


def render(table: Sequence[Line]) -> str:
    """A table as dmsetup takes it, one line a target."""
    return "\n".join(render_line(line) for line in table)


# -- parsing ----------------------------------------------------------------------------------
def parse_target(kind: str, parameters: str) -> Target:
    """What the kernel's words for a target mean."""
    words = parameters.split()
    match kind:
        case "linear" if len(words) == 2 and _numbers(words[1:]):
            return Linear(words[0], int(words[1]) * SECTOR_BYTES)
        case "era" if len(words) == 3 and _numbers(words[2:]):
            return Era(words[0], words[1], int(words[2]) * SECTOR_BYTES)
        case "delay" if len(words) == 9 and _numbers(words[1:3] + words[4:6] + words[7:9]):
            return Delay(*(_parse_via(words[at : at + 3]) for at in (0, 3, 6)))
        case "zero" if not words:
            return Zero()
    return Other(kind, parameters)


def _numbers(words: Sequence[str]) -> bool:
    return all(_NUMBER.fullmatch(word) for word in words)


def _parse_via(words: Sequence[str]) -> Via:
    return Via(words[0], int(words[1]) * SECTOR_BYTES, int(words[2]))


def parse_line(text: str) -> Line:
    """A line as dmsetup prints it."""
    words = text.split(maxsplit=3)
    if len(words) < 3 or not _numbers(words[:2]):
        raise ValueError(f"{text!r} is no line of a table")
    first, length = (int(word) * SECTOR_BYTES for word in words[:2])
    return Line(first, length, parse_target(words[2], words[3].rstrip() if words[3:] else ""))


def parse(text: str) -> Table:
    """A table as dmsetup prints it for one device."""
    return tuple(parse_line(line) for line in text.splitlines() if line.strip())


# -- status -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class EraStatus:
    """What dm-era says of itself; blocks are those of its metadata."""

    metadata_block_bytes: int
    used_blocks: int
    total_blocks: int
    current_era: int
    held_root: int | None  # of the metadata snapshot that is held, if one is


_ERA_STATUS: Final = re.compile(r"(\d+) (\d+)/(\d+) (\d+) (\d+|-)", re.ASCII)


def parse_era_status(text: str) -> EraStatus:
    """The parameters of an era target's status line."""
    match = _ERA_STATUS.fullmatch(text.strip())
    if match is None:  # "Error" when the metadata cannot be asked
        raise ValueError(f"{text!r} is no status of dm-era")
    block_sectors, used, total, era = (int(match[group]) for group in range(1, 5))
    held = None if match[5] == "-" else int(match[5])
    return EraStatus(block_sectors * SECTOR_BYTES, used, total, era, held)
