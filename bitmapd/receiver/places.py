"""Where things are in a journal (pure); docs/format.md has the tables.

The superblocks, the directories of kept points and the commit pages have fixed places.  The change
maps follow, sized by the volume's extents, and from the next whole MiB on there are segments to the
end of the journal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bitmapd.errors import NoSpaceError
from bitmapd.record.geometry import MIB, Geometry

PAGE_BYTES: Final = 4096
COMMIT_OFFSETS: Final = (131072, 135168)
DIRECTORY_OFFSETS: Final = (4096, 69632)
DIRECTORY_BYTES: Final = 20480
MAPS_OFFSET: Final = 143360
MOST_KEPT: Final = 64
MAP_SECTOR_BYTES: Final = 512
MAP_SECTOR_EXTENTS: Final = (MAP_SECTOR_BYTES - 4) * 8  # a checksum, and bits
SEGMENT_BYTES: Final = 4 * MIB
MIN_JOURNAL_BYTES: Final = 64 * MIB
MIN_SEGMENTS: Final = 8


def padded(length_bytes: int) -> int:
    """In whole pages."""
    return -(-length_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Places:
    """Of a journal of `journal_bytes` for a volume of this geometry."""

    geometry: Geometry
    journal_bytes: int

    def __post_init__(self) -> None:
        if self.journal_bytes < self.least_bytes:
            raise NoSpaceError(
                f"a journal of {self.journal_bytes} bytes is too small for a volume of"
                f" {self.geometry.size_bytes} bytes",
                hint=f"it needs {self.least_bytes} bytes at least; a tenth of the volume is a good"
                " size",
            )

    @property
    def least_bytes(self) -> int:
        """Of a journal for such a volume."""
        return max(MIN_JOURNAL_BYTES, self.segments_offset + MIN_SEGMENTS * self.segment_bytes)

    @property
    def map_bytes(self) -> int:
        """Of one change map."""
        sectors = -(-self.geometry.extents // MAP_SECTOR_EXTENTS)
        return padded(sectors * MAP_SECTOR_BYTES)

    def map_offset(self, slot: int) -> int:
        return MAPS_OFFSET + slot * self.map_bytes

    @property
    def maps(self) -> int:
        """How many change maps there is room for."""
        return min(MOST_KEPT, (self.segments_offset - MAPS_OFFSET) // self.map_bytes)

    @property
    def segments_offset(self) -> int:
        bits_bytes = padded(-(-self.geometry.extents // 8))
        return -(-(MAPS_OFFSET + MOST_KEPT * bits_bytes) // MIB) * MIB

    @property
    def segments(self) -> int:
        return (self.journal_bytes - self.segments_offset) // self.segment_bytes

    @property
    def segment_bytes(self) -> int:
        return SEGMENT_BYTES

    def segment_offset(self, index: int) -> int:
        return self.segments_offset + index * self.segment_bytes
