"""Records made in memory for tests of the store, the gate and what is above them."""

from __future__ import annotations

import os
from uuid import UUID

from bitmapd.record import layout
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import Loaded, Superblock

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


def blank_image(geometry: Geometry) -> bytes:
    """A freshly formatted record without a set bit."""
    image = bytearray(layout.record_size_bytes(geometry.extents))
    block = superblock(geometry)
    raw = layout.encode_superblock(block)
    for offset in layout.SUPERBLOCK_OFFSETS:
        image[offset : offset + len(raw)] = raw
    uuid = VOLUME.bytes
    for index in range(layout.page_count(geometry.extents)):
        for slot, sequence, previous in ((1, 1, 0), (0, 2, 1)):
            at = layout.page_offset(index, slot)
            page = layout.encode_page(uuid, index, sequence, previous, b"")
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


def alter(path: str, offset: int, raw: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
