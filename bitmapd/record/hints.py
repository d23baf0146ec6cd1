"""What a policy remembers over a restart, as a value and as bytes (pure).

Hints make the first predictions of a session better and nothing else depends on them.  They have a
place of their own on the record device, between the second superblock and the pages.  They are
read with suspicion and written without ceremony: what is damaged, torn by a crash, of another
version or of another volume is ignored, and an old set does no harm.

    0   8  magic `dmhints1`, which is the version too
    8   8  extents of the volume, which may have grown since
    16  4  number of kinds
    20  4  number of extents on the trail
    24  4  length of the map, compressed, in bytes; 0 if it would have been too long
    28     odds, 4 bytes each (IEEE 754); trail, 4 bytes each, oldest first; the map: one bit for
           each extent that was ever written, deflated; crc32c of all before, 4 bytes; zeros

Numbers are little-endian; in the map the first extent of a byte is its highest bit.  All of it is
`HINTS_BYTES` long.  The trail takes 32 KiB at most; the map of a volume of some TiB fits beside it
unless it was written here and there.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from bitarray import bitarray

from bitmapd.crc import crc32c

MAGIC = b"dmhints1"
HINTS_BYTES = 60 << 10
TRAIL_EXTENTS = 8192

_HEAD = struct.Struct("<8sQIII")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Hints:
    """`ever` has one bit for each of the extents, the trail names none beyond them, and odds are
    from 0 to 1."""

    extents: int  # of the volume when this was learnt
    odds: tuple[float, ...]
    trail: tuple[int, ...]
    ever: bitarray


def encode_hints(hints: Hints) -> bytes:
    """Always `HINTS_BYTES`.  Deflating the map of 64 TiB takes some tens of milliseconds."""
    deflated = zlib.compress(hints.ever.tobytes(), 6)
    trail = hints.trail[-TRAIL_EXTENTS:]
    kinds, steps = len(hints.odds), len(trail)
    if _HEAD.size + 4 * kinds + 4 * steps + len(deflated) + _CRC.size > HINTS_BYTES:
        deflated = b""
    body = b"".join(
        (
            _HEAD.pack(MAGIC, hints.extents, kinds, steps, len(deflated)),
            struct.pack(f"<{kinds}f", *hints.odds),
            struct.pack(f"<{steps}I", *trail),
            deflated,
        )
    )
    return (body + _CRC.pack(crc32c(body))).ljust(HINTS_BYTES, b"\0")


def decode_hints(data: bytes, extents: int) -> Hints | None:
    """None for what are not whole hints for a volume that has so many extents, or had fewer."""
    if len(data) != HINTS_BYTES:
        return None
    magic, for_extents, odds_count, steps, map_bytes = _HEAD.unpack_from(data)
    if magic != MAGIC or for_extents > extents:
        return None
    odds_end = _HEAD.size + 4 * odds_count
    trail_end = odds_end + 4 * steps
    end = trail_end + map_bytes
    if end + _CRC.size > HINTS_BYTES or _CRC.unpack_from(data, end) != (crc32c(data[:end]),):
        return None
    odds = struct.unpack_from(f"<{odds_count}f", data, _HEAD.size)
    trail = struct.unpack_from(f"<{steps}I", data, odds_end)
    ever = _inflate(data[trail_end:end], for_extents) if map_bytes else bitarray(for_extents)
    # A comparison with not-a-number is false.
    if ever is None or not all(0 <= chance <= 1 for chance in odds):
        return None
    if any(extent >= for_extents for extent in trail):
        return None
    return Hints(for_extents, odds, trail, ever)


def _inflate(deflated: bytes, extents: int) -> bitarray | None:
    plain_bytes = -(-extents // 8)
    try:
        plain = zlib.decompressobj().decompress(deflated, plain_bytes + 1)
    except zlib.error:
        return None
    if len(plain) != plain_bytes:
        return None
    bits = bitarray()
    bits.frombytes(plain)
    del bits[extents:]
    return bits
