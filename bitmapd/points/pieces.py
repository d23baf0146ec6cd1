"""Blocks in pieces of 4 KiB: masks, sums, and what is done to them on the wire (pure).

Hosts write 4 KiB where blocks have 64, so an entry names the pieces that it brings: bit n of its
mask is piece n of the block.  A mask has 64 bits, and a block that points are made of at most 256
KiB.  The last block of a volume may be short, and its last piece, too.

1. The sum of an entry covers where its content belongs, not only what it is: the same bytes of
   another block, of an older sending or under another mask have another sum.
2. What is unpacked has exactly the bytes that the mask says.  A zstd frame says its size in its
   header, and one that says anything else is refused before a byte is allocated for it; the
   output is bounded by that size besides.
3. The digest of a point does not depend on the order in which its entries came.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

import zstandard
from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.points.messages import Encoding, Entry
from bitmapd.record.geometry import PIECE_BYTES, Geometry

MAX_BLOCK_BYTES: Final = 64 * PIECE_BYTES
LEVEL: Final = 1
# An entry that zstd makes less than a twentieth shorter is sent as it is; after so many in a row
# as many more are not tried.
POOR_RUN: Final = 8
POOR_PAUSE: Final = 64

_PLACE: Final = struct.Struct("<16sQQQ")
_LINE: Final = struct.Struct("<QQQQ")
_HEAD_BYTES: Final = 16

Content = bytes | bytearray | memoryview


def whole_mask(geometry: Geometry, block: int) -> int:
    """The mask of all pieces of a block."""
    _, length = geometry.block_bytes_range(block, block + 1)
    return (1 << -(-length // PIECE_BYTES)) - 1


def raw_bytes(geometry: Geometry, block: int, mask: int) -> int:
    """What the pieces of this mask, which fits the block, have together."""
    _, length = geometry.block_bytes_range(block, block + 1)
    bytes_ = mask.bit_count() * PIECE_BYTES
    rest = length % PIECE_BYTES
    if rest and mask >> (length // PIECE_BYTES):
        bytes_ -= PIECE_BYTES - rest
    return bytes_


def spans(geometry: Geometry, block: int, mask: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of this mask are in the block: (offset, length) in bytes, pieces that touch
    as one, in ascending order.  Their contents stand in an entry in this order."""
    _, end = geometry.block_bytes_range(block, block + 1)
    piece = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        count = (~mask & (mask + 1)).bit_length() - 1
        mask >>= count
        start = (piece + skip) * PIECE_BYTES
        yield start, min(start + count * PIECE_BYTES, end) - start
        piece += skip + count


def gather(geometry: Geometry, block: int, mask: int, content: memoryview) -> memoryview:
    """The pieces of this mask of a whole block, one behind the other."""
    if mask == whole_mask(geometry, block):
        return content
    parts = (content[at : at + length] for at, length in spans(geometry, block, mask))
    return memoryview(b"".join(parts))


def piece_sum(volume: bytes, block: int, stamp: int, mask: int, raw: Content) -> int:
    """xxh3-64 of the raw pieces, seeded with that of where they belong."""
    seed = xxh3_64_intdigest(_PLACE.pack(volume, block, stamp, mask))
    return xxh3_64_intdigest(raw, seed)


class Digest:
    """Of the entries that a point is made of, one for each block: the sum of the xxh3-128 of
    (block, stamp, mask, sum), modulo 2**128.  It is known at any time, so that the end of a point
    that has millions of blocks takes no longer than that of others."""

    __slots__ = ("_sum",)

    def __init__(self) -> None:
        self._sum = 0

    def add(self, block: int, stamp: int, mask: int, sum64: int) -> None:
        self._sum += xxh3_128_intdigest(_LINE.pack(block, stamp, mask, sum64))

    def remove(self, block: int, stamp: int, mask: int, sum64: int) -> None:
        """One that was added."""
        self._sum -= xxh3_128_intdigest(_LINE.pack(block, stamp, mask, sum64))

    def value(self) -> bytes:
        return (self._sum % (1 << 128)).to_bytes(16, "little")


def digest(entries: Iterable[tuple[int, int, int, int]]) -> bytes:
    """Of these (block, stamp, mask, sum), as `Digest` has it."""
    found = Digest()
    for entry in entries:
        found.add(*entry)
    return found.value()


def is_zeros(raw: Content) -> bool:
    """Whether all of these are zeros."""
    # A bytearray compares with any buffer by memcmp, 2 us for 64 KiB; bytes leave it to a
    # memoryview, which goes through its elements, 270 us.  Most data begin with something else.
    return not any(raw[:_HEAD_BYTES]) and bytearray(len(raw)) == raw


class Packer:
    """Makes entries as short as it pays."""

    def __init__(self, geometry: Geometry, volume: bytes, *, compress: bool) -> None:
        self.geometry = geometry
        self._volume = volume
        self._compressor = zstandard.ZstdCompressor(level=LEVEL) if compress else None
        self._poor = 0
        self._pause = 0

    def pack(self, block: int, stamp: int, mask: int, raw: Content) -> Entry:
        """`raw` has the pieces of the mask; unless it is bytes, it is not used any more when this
        returns."""
        sum64 = piece_sum(self._volume, block, stamp, mask, raw)
        if is_zeros(raw):
            return Entry(block, stamp, mask, Encoding.ZEROS, sum64, b"")
        packed = self._compressed(raw)
        if packed is None:
            return Entry(block, stamp, mask, Encoding.RAW, sum64, bytes(raw))
        return Entry(block, stamp, mask, Encoding.ZSTD, sum64, packed)

    def _compressed(self, raw: Content) -> bytes | None:
        if self._compressor is None:
            return None
        if self._pause:
            self._pause -= 1
            return None
        packed: bytes = self._compressor.compress(raw)
        if len(packed) * 20 <= len(raw) * 19:
            self._poor = 0
            return packed
        self._poor += 1
        if self._poor == POOR_RUN:
            self._poor, self._pause = 0, POOR_PAUSE
        return None


class Unpacker:
    """Of entries that the codec has let through, or that it once has and a medium kept."""

    def __init__(self, geometry: Geometry, volume: bytes) -> None:
        self.geometry = geometry
        self._volume = volume
        self._decompressor = zstandard.ZstdDecompressor()

    def unpack(self, entry: Entry) -> Content:
        """The raw pieces.  PeerError BROKEN if they are not those that the sender had."""
        length = raw_bytes(self.geometry, entry.block, entry.mask)
        raw: Content
        if entry.encoding is Encoding.ZEROS:
            raw = bytes(length)
        elif entry.encoding is Encoding.RAW:
            raw = entry.payload
        else:
            raw = self._decompressed(entry, length)
        found = piece_sum(self._volume, entry.block, entry.stamp, entry.mask, raw)
        if len(raw) != length or found != entry.sum64:
            raise PeerError(ErrorCode.BROKEN, f"the sum of block {entry.block} is wrong")
        return raw

    def _decompressed(self, entry: Entry, length: int) -> bytes:
        try:
            said = zstandard.frame_content_size(entry.payload)
            if said != length:
                raise PeerError(
                    ErrorCode.TOO_LONG,
                    f"block {entry.block} would unpack to {said} bytes instead of {length}",
                )
            raw: bytes = self._decompressor.decompress(
                entry.payload, max_output_size=length, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise PeerError(
                ErrorCode.BROKEN, f"block {entry.block} cannot be unpacked: {error}"
            ) from None
        return raw
