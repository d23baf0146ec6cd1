"""What payloads are made of: lists of runs, and texts (pure).

    runs         u32 count, then (u32 first, u32 length) of extents
    block runs   u32 count, then (u64 first, u32 length) of blocks
    text         u16 length, UTF-8, at most 1,024 bytes, printable

Runs ascend, do not touch, are not empty, and lie inside the volume; so a list has one form only,
and its length is bounded by the volume.  A run of blocks that is longer than a u32 says is cut, and
only such pieces touch.  Runs that were read are (first, stop).
"""

from __future__ import annotations

import struct
from typing import Final

from bitmapd.peer.frames import MAX_TEXT_BYTES, ErrorCode, PeerError

Run = tuple[int, int]  # [first, stop)
Runs = tuple[Run, ...]

COUNT: Final = struct.Struct("<I")
EXTENT_RUN: Final = struct.Struct("<II")
BLOCK_RUN: Final = struct.Struct("<QI")

_TEXT: Final = struct.Struct("<H")
_U32: Final = (1 << 32) - 1


def wrong(text: str) -> PeerError:
    """A payload that contradicts itself or the volume."""
    return PeerError(ErrorCode.RUNS, text)


def pack_runs(runs: Runs, layout: struct.Struct = EXTENT_RUN) -> bytes:
    """Runs that `fitting` has looked at."""
    pack = layout.pack
    return COUNT.pack(len(runs)) + b"".join([pack(first, stop - first) for first, stop in runs])


def fitting(runs: Runs, layout: struct.Struct) -> Runs:
    """The same places in runs that this layout can say."""
    if layout is EXTENT_RUN or all(stop - first <= _U32 for first, stop in runs):
        return runs
    return tuple(
        (at, min(at + _U32, stop)) for first, stop in runs for at in range(first, stop, _U32)
    )


def read_runs(payload: bytes, at: int, layout: struct.Struct, bound: int, found: list[Run]) -> int:
    """Adds the runs at this place of the payload to those that were `found` in parts before, and
    returns where they end.  `bound` is the number of extents or blocks."""
    start = at + COUNT.size
    if len(payload) < start:
        raise wrong("a list of runs is cut short")
    count: int = COUNT.unpack_from(payload, at)[0]
    end = start + count * layout.size
    if len(payload) < end:
        raise wrong(f"a list says {count} runs and is shorter")
    floor = found[-1][1] if found else -1
    add = found.append
    for first, length in layout.iter_unpack(memoryview(payload)[start:end]):
        if first > floor and length:
            floor = first + length
            add((first, floor))
        elif first == floor and length and not (floor - found[-1][0]) % _U32:
            floor += length
            found[-1] = (found[-1][0], floor)
        else:
            raise wrong(f"a run of {length} at {first} does not follow one that ends at {floor}")
    if floor > bound:
        raise wrong(f"a run ends at {floor}, outside the volume, which ends at {bound}")
    return end


def read_text(payload: bytes, at: int) -> tuple[str, int]:
    """The text at this place of the payload, and where it ends."""
    start = at + _TEXT.size
    if len(payload) < start:
        raise wrong("a text is cut short")
    (length,) = _TEXT.unpack_from(payload, at)
    end = start + length
    if length > MAX_TEXT_BYTES or len(payload) < end:
        raise wrong(f"a text says {length} bytes and is shorter, or too long")
    try:
        text = payload[start:end].decode()
    except UnicodeDecodeError:
        raise wrong("a text is not UTF-8") from None
    if not text.isprintable():
        raise wrong("a text is not printable")
    return text, end
