"""Change maps: in which extents a kept point and the next one differ (pure).

A map is a bit for each extent, in sectors of 512 bytes that have a checksum each, since a medium
may write any sector of a page and not another.

1. A sector that is not whole, or of another point, counts as ones: a map names too much rather than
   too little.
2. Bits are only added while a map is in use.  So any mixture of an older and a newer writing of it
   names at least what the older one does.
3. The checksum is salted with journal, point and place: what an earlier map has left in the same
   slot is not taken for this one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from bitarray import bitarray

from bitmapd.crc import crc32c
from bitmapd.receiver.places import MAP_SECTOR_BYTES, MAP_SECTOR_EXTENTS, PAGE_BYTES
from bitmapd.record.extents import zeros
from bitmapd.record.pages import Raw

PAGE_EXTENTS: Final = PAGE_BYTES // MAP_SECTOR_BYTES * MAP_SECTOR_EXTENTS

_BITS_BYTES: Final = MAP_SECTOR_EXTENTS // 8
_CRC: Final = struct.Struct("<I")
_SALT: Final = b"bitmapd change map"
_KEY: Final = struct.Struct("<QI")


def encode_map_page(bits: bitarray, journal: bytes, point: int, page: int) -> bytes:
    """Page number `page` of the map of this point."""
    raw = bytearray()
    sectors = PAGE_BYTES // MAP_SECTOR_BYTES
    for sector in range(page * sectors, (page + 1) * sectors):
        first = sector * MAP_SECTOR_EXTENTS
        piece = bits[first : first + MAP_SECTOR_EXTENTS].tobytes().ljust(_BITS_BYTES, b"\0")
        raw += piece + _CRC.pack(_checksum(piece, journal, point, sector))
    return bytes(raw)


def decode_map(pages: Sequence[Raw], journal: bytes, point: int, extents: int) -> bitarray:
    """The extents that it names, of the pages in order; None for one that cannot be read."""
    found = zeros(0)
    sectors = PAGE_BYTES // MAP_SECTOR_BYTES
    for number, raw in enumerate(pages):
        for at in range(sectors):
            whole = None if raw is None else bytes(raw[at * MAP_SECTOR_BYTES :][:MAP_SECTOR_BYTES])
            found.frombytes(_bits(whole, journal, point, number * sectors + at))
    return found[:extents]


def _bits(raw: bytes | None, journal: bytes, point: int, sector: int) -> bytes:
    if raw is not None:
        piece = raw[:_BITS_BYTES]
        if _CRC.unpack_from(raw, _BITS_BYTES) == (_checksum(piece, journal, point, sector),):
            return piece
    return b"\xff" * _BITS_BYTES


def _checksum(piece: bytes, journal: bytes, point: int, sector: int) -> int:
    return int(crc32c(piece, crc32c(_SALT + journal + _KEY.pack(point, sector))))
