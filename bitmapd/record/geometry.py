"""How a volume is cut into extents and blocks (pure).

A *block* is the unit of dirty tracking and copying, an *extent* the unit of the record.  Both
are powers of two, a block divides an extent, and the last one of either may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitmapd.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
TIB = 1 << 40

PIECE_BYTES = 4 * KIB  # what is known of within a block, and sent by itself

MIN_BLOCK_BYTES = 4 * KIB
MAX_EXTENT_BYTES = 64 * MIB
MAX_EXTENTS = 1 << 26


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes; `extent_bytes` and `block_bytes` are powers of two."""

    size_bytes: int
    extent_bytes: int = MIB
    block_bytes: int = 64 * KIB

    def __post_init__(self) -> None:
        for label, value in (("extent size", self.extent_bytes), ("block size", self.block_bytes)):
            if value <= 0 or value & (value - 1):
                raise UsageError(f"{label} {value} is not a power of two")
        if self.block_bytes < MIN_BLOCK_BYTES:
            raise UsageError(f"block size {self.block_bytes} is below {MIN_BLOCK_BYTES}")
        if self.extent_bytes > MAX_EXTENT_BYTES:
            raise UsageError(f"extent size {self.extent_bytes} is above {MAX_EXTENT_BYTES}")
        if self.block_bytes > self.extent_bytes:
            raise UsageError(
                f"block size {self.block_bytes} is larger than extent size {self.extent_bytes}"
            )
        if self.size_bytes <= 0:
            raise UsageError(f"volume size {self.size_bytes} is not positive")
        if self.extents > MAX_EXTENTS:
            raise UsageError(
                f"a volume of {self.size_bytes} bytes has more than {MAX_EXTENTS} extents of"
                f" {self.extent_bytes} bytes",
                hint="choose a larger --extent-size",
            )

    @property
    def extents(self) -> int:
        return -(-self.size_bytes // self.extent_bytes)

    @property
    def blocks(self) -> int:
        return -(-self.size_bytes // self.block_bytes)

    @property
    def short_extent(self) -> int | None:
        """The extent in which the volume ends, unless it ends with that."""
        return None if self.size_bytes % self.extent_bytes == 0 else self.extents - 1

    @property
    def blocks_per_extent(self) -> int:
        return self.extent_bytes // self.block_bytes

    def extent_span(self, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        """First extent touched and the one after the last; `length_bytes` is positive."""
        return (
            offset_bytes // self.extent_bytes,
            (offset_bytes + length_bytes - 1) // self.extent_bytes + 1,
        )

    def block_span(self, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        """First block touched and the one after the last; `length_bytes` is positive."""
        return (
            offset_bytes // self.block_bytes,
            (offset_bytes + length_bytes - 1) // self.block_bytes + 1,
        )

    def extent_blocks(self, first: int, stop: int) -> tuple[int, int]:
        """The blocks of extents [first, stop)."""
        per = self.blocks_per_extent
        return first * per, min(stop * per, self.blocks)

    def block_bytes_range(self, first: int, stop: int) -> tuple[int, int]:
        """Byte offset and length of blocks [first, stop); the last block may be short."""
        start = first * self.block_bytes
        return start, min(stop * self.block_bytes, self.size_bytes) - start

    def extents_bytes(self, first: int, stop: int) -> int:
        """Bytes that extents [first, stop) cover; the last one may be short."""
        return min(stop * self.extent_bytes, self.size_bytes) - first * self.extent_bytes
