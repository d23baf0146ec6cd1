"""Make the golden images of the record: `python -m tests.data.make_golden`.

Each image stands for one way in which a record is found.  The images are the format: a program that
no longer reads them has changed it.  Beside NAME.img.gz stands NAME.json with what `dump` and
`check` say about it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
from pathlib import Path
from typing import Any
from uuid import UUID

from bitarray import bitarray
from crc32c import crc32c

from bitmapd.errors import FormatTooNewError, RecordDamagedError
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import (
    EXTENTS_PER_PAGE,
    PAGE_BYTES,
    SUPERBLOCK_OFFSETS,
    PairFlag,
    PairState,
    PartnerAck,
    RecordFlag,
    RecordOn,
    Superblock,
    assemble,
    choose_superblock,
    encode_page,
    encode_superblock,
    page_bits,
    page_offset,
    record_size_bytes,
)
from bitmapd.record.report import dump, examine, unusable

FOLDER = Path(__file__).parent
VOLUME = UUID("7a1c6f0e-3b52-4c8d-9d6e-1f2a3b4c5d6e")
FOREIGN = UUID("e0e1e2e3-0000-4000-8000-000000000001")
EXTENTS = 2 * EXTENTS_PER_PAGE + 17_024

DIRTY = [(0, 3), (1000, 1), (EXTENTS_PER_PAGE - 2, 5), (EXTENTS - 1, 1)]


def superblock(**changes: Any) -> Superblock:
    plain = Superblock(
        volume_uuid=VOLUME,
        name="vol0",
        geometry=Geometry((EXTENTS << 20) - 512),
        generations=(
            UUID("10000000-0000-4000-8000-00000000000a"),
            UUID("10000000-0000-4000-8000-000000000009"),
        ),
        primary="wwid:naa.5000c500a1b2c3d4-part1",
        primary_size_bytes=EXTENTS << 20,
        secondary="nbd:backup.example.net:10809/vol0",
        secondary_size_bytes=(EXTENTS << 20) - 512,
        created_s=1_767_225_600,
        updated_s=1_767_312_000,
        sequence=12,
        session=5,
    )
    return dataclasses.replace(plain, **changes)


def record(block: Superblock, runs: list[tuple[int, int]]) -> bytearray:
    """Whole pages, each at a sequence of its own, with an empty page in the older slot."""
    bits = bitarray(EXTENTS, endian="little")
    for first, count in runs:
        bits[first : first + count] = True
    image = bytearray(record_size_bytes(EXTENTS))
    for offset in SUPERBLOCK_OFFSETS:
        put(image, offset, encode_superblock(block))
    volume = block.volume_uuid.bytes
    for index in range(block.page_count):
        newest, sequence = index % 2, 100 * (index + 1)
        new = encode_page(volume, index, sequence, sequence - 1, page_bits(bits, index))
        old = encode_page(volume, index, sequence - 1, sequence - 2, b"")
        put(image, page_offset(index, newest), new)
        put(image, page_offset(index, 1 - newest), old)
    return image


def put(image: bytearray, offset: int, raw: bytes) -> None:
    image[offset : offset + len(raw)] = raw


def clean() -> bytearray:
    return record(superblock(flags=RecordFlag.CLEAN), [])


def dirty() -> bytearray:
    return record(superblock(), DIRTY)


def torn_page() -> bytearray:
    """A write of page 0, slot 1, cut short after three sectors."""
    image = dirty()
    after = encode_page(VOLUME.bytes, 0, 101, 100, b"\xff" * 3936)
    put(image, page_offset(0, 1), after[: 3 * 512])
    return image


def rotten_page() -> bytearray:
    """One bit of the older slot of page 2 has changed."""
    image = dirty()
    image[page_offset(2, 1) + 2000] ^= 0x04
    return image


def one_superblock() -> bytearray:
    """Copy A was overwritten by something else."""
    image = dirty()
    put(image, 0, b"\x55\xaa" * (PAGE_BYTES // 2))
    return image


def interrupted_update() -> bytearray:
    """Copy A is one update ahead of copy B."""
    image = dirty()
    put(image, 0, encode_superblock(superblock().updated(1_767_312_060, flags=RecordFlag.CLEAN)))
    return image


def no_superblock() -> bytearray:
    image = dirty()
    for offset in SUPERBLOCK_OFFSETS:
        image[offset + 300] ^= 0x80
    return image


def newer_format() -> bytearray:
    """Version 2, with a valid checksum."""
    image = dirty()
    for offset in SUPERBLOCK_OFFSETS:
        struct.pack_into("<I", image, offset + 16, 2)
        checksum = crc32c(image[offset : offset + 4092], crc32c(b"bitmapd superblock"))
        struct.pack_into("<I", image, offset + 4092, checksum)
    return image


def foreign() -> bytearray:
    return record(superblock(volume_uuid=FOREIGN, name="db"), DIRTY)


def foreign_page() -> bytearray:
    """Page 1 of another volume where ours should be."""
    image, other = dirty(), foreign()
    start, stop = page_offset(1, 0), page_offset(2, 0)
    put(image, start, bytes(other[start:stop]))
    return image


def pair_origin() -> bytearray:
    """Node 1 of a pair that has never been paired."""
    pair = PairState(node=1, volume=VOLUME, flags=PairFlag.NEVER_PAIRED)
    return record(superblock().with_pair(pair), DIRTY)


def pair_joining() -> bytearray:
    """Node 2, which does not know the pair's UUID yet; its own is another."""
    pair = PairState(node=2, volume=None, flags=PairFlag.NEVER_PAIRED)
    return record(superblock(volume_uuid=FOREIGN).with_pair(pair), [])


def pair_joined() -> bytearray:
    """Node 2 when it has joined node 1 above, with every field in use."""
    pair = PairState(
        node=2,
        volume=VOLUME,
        flags=PairFlag.VOLATILE | PairFlag.ALONE,
        record_on=RecordOn.PARTNER,
        partner_ack=PartnerAck.STORED,
        term=3,
        machine=UUID("0f1e2d3c-4b5a-4697-8879-6a5b4c3d2e1f").bytes,
        partner_session=41,
    )
    return record(superblock(volume_uuid=FOREIGN).with_pair(pair), DIRTY)


def images() -> dict[str, bytes]:
    makers = (
        clean,
        dirty,
        torn_page,
        rotten_page,
        one_superblock,
        interrupted_update,
        no_superblock,
        newer_format,
        foreign,
        foreign_page,
        pair_origin,
        pair_joining,
        pair_joined,
    )
    return {maker.__name__.replace("_", "-"): bytes(maker()) for maker in makers}


def described(image: bytes) -> dict[str, Any]:
    """What `dump` and `check` (for the volume of the other images) say."""

    def unit(offset: int) -> bytes:
        return image[offset : offset + PAGE_BYTES]

    try:
        choice = choose_superblock(*(unit(offset) for offset in SUPERBLOCK_OFFSETS))
    except (RecordDamagedError, FormatTooNewError) as error:
        return {"dump": {"error": error.to_json()}, "check": unusable(error).to_json()}
    if choice is None:
        return {"dump": None, "check": None}
    loaded = assemble(
        choice,
        [
            (unit(page_offset(index, 0)), unit(page_offset(index, 1)))
            for index in range(choice.superblock.page_count)
        ],
    )
    return {"dump": dump(loaded), "check": examine(loaded, VOLUME).to_json()}


def main() -> None:
    for name, image in images().items():
        (FOLDER / f"{name}.img.gz").write_bytes(gzip.compress(image, 9, mtime=0))
        text = json.dumps(described(image), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
