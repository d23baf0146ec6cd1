"""Records made in memory for tests of the store, the gate and what is above them."""

from __future__ import annotations

import os
from collections.abc import Callable
from uuid import UUID

from bitmapd.errors import BitmapdError
from bitmapd.record import layout
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import Loaded, Superblock
from bitmapd.record.medium import RecordMedium
from tests.support.sim import SECTOR, SimDisk

VOLUME = UUID("6f0d2a54-9b7c-4f43-8b50-0d2f6a4f6c01")
GENERATION = UUID("0b3c4e9a-1f0e-4f7c-9a52-5d1b0c7a9e02")


def superblock(geometry: Geometry) -> Superblock:
    return Superblock(
        volume_uuid=VOLUME,
        name="vol0",
        geometry=geometry,
        generations=(GENERATION,),
        primary="file:1",
        primary_size_bytes=geometry.size_bytes,
        secondary="file:2",
        secondary_size_bytes=geometry.size_bytes,
        created_s=1,
        updated_s=1,
    )


def blank_image(geometry: Geometry, bits: bytes = b"") -> bytes:
    """A freshly formatted record without a set bit, or with those of its one page."""
    image = bytearray(layout.record_size_bytes(geometry.extents))
    block = superblock(geometry)
    raw = layout.encode_superblock(block)
    for offset in layout.SUPERBLOCK_OFFSETS:
        image[offset : offset + len(raw)] = raw
    uuid = VOLUME.bytes
    for index in range(layout.page_count(geometry.extents)):
        for slot, sequence, previous in ((1, 1, 0), (0, 2, 1)):
            at = layout.page_offset(index, slot)
            page = layout.encode_page(uuid, index, sequence, previous, bits)
            image[at : at + layout.PAGE_BYTES] = page
    return bytes(image)


def load_image(image: bytes) -> Loaded:
    """What a start would find; the image must be intact but for torn page writes."""

    def page(offset: int) -> bytes:
        return image[offset : offset + layout.PAGE_BYTES]

    choice = layout.choose_superblock(*(page(at) for at in layout.SUPERBLOCK_OFFSETS))
    if choice is None:
        raise AssertionError("the image holds no record")
    pages = layout.page_count(choice.superblock.geometry.extents)
    return layout.assemble(
        choice,
        (
            (page(layout.page_offset(index, 0)), page(layout.page_offset(index, 1)))
            for index in range(pages)
        ),
    )


class SimMedium(RecordMedium):
    """A simulated disk as synchronous code sees it; `judge` is called after every effect.

    Of each write with a fate that part lands, by sectors from its beginning, and then it fails.
    """

    def __init__(self, disk: SimDisk, judge: Callable[[], object]) -> None:
        super().__init__(disk.name, -1)
        self._disk = disk
        self._judge = judge
        self.fates: list[float | None] = []

    def write(self, offset_bytes: int, view: memoryview, flags: int = 0) -> None:
        fate = self.fates.pop(0) if self.fates else None
        landing = len(view) if fate is None else int(len(view) * fate) // SECTOR * SECTOR
        # Sector by sector: a power cut may come in between.
        for at in range(0, landing, SECTOR):
            piece = bytes(view[at : at + SECTOR])
            self._disk.carry_out(offset_bytes + at, piece, fua=bool(flags & os.RWF_DSYNC))
            self._judge()
        if fate is not None:
            raise BitmapdError("cannot write: Input/output error")

    def sync(self) -> None:
        self._disk.sync()
        self._judge()


def alter(path: str, offset: int, raw: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
