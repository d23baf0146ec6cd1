"""A record as a whole: loading whatever is on the medium, and the report on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import BitmapdError, FormatTooNewError, RecordDamagedError
from bitmapd.record import layout
from bitmapd.record.copies import Choice
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import (
    EXTENTS_PER_PAGE,
    ONES_PAGE,
    PAGE_BYTES,
    PAGES_OFFSET,
    SUPERBLOCK_OFFSETS,
    InitialSync,
    Loaded,
    RecordFlag,
    Superblock,
    assemble,
    choose_superblock,
    encode_page,
    encode_superblock,
    healed,
    page_bits,
    page_offset,
    with_superblock,
)
from bitmapd.record.pages import HEAL_JUMP, MAX_SEQUENCE
from bitmapd.record.report import Severity, dump, examine, unusable

VOLUME = UUID("11111111-2222-3333-4444-555555555555")
EXTENTS = 2 * EXTENTS_PER_PAGE + 100
LAST = EXTENTS - 1


def superblock(**changes: Any) -> Superblock:
    plain = Superblock(
        volume_uuid=VOLUME,
        name="vol0",
        geometry=Geometry((EXTENTS << 20) - 4096),
        generations=(UUID(int=7),),
        primary="file:1@2",
        primary_size_bytes=EXTENTS << 20,
        secondary="nbd:host:10809/",
        secondary_size_bytes=EXTENTS << 20,
        created_s=1_700_000_000,
        updated_s=1_700_000_060,
    )
    return dataclasses.replace(plain, **changes)


def bits_of(*extents: int) -> bitarray:
    bits = bitarray(EXTENTS, endian="little")
    for extent in extents:
        bits[extent] = True
    return bits


def image_of(bits: bitarray, block: Superblock | None = None, sequence: int = 1) -> bytearray:
    block = block or superblock()
    image = bytearray(layout.record_size_bytes(EXTENTS))
    for offset in SUPERBLOCK_OFFSETS:
        image[offset : offset + 4096] = encode_superblock(block)
    for index in range(block.page_count):
        for slot, back in ((0, 0), (1, 1)):
            at = page_offset(index, slot)
            image[at : at + PAGE_BYTES] = encode_page(
                VOLUME.bytes, index, sequence + 1 - back, sequence - back, page_bits(bits, index)
            )
    return image


def slots_of(image: bytes, count: int) -> Iterator[tuple[bytes | None, bytes | None]]:
    for index in range(count):
        at = PAGES_OFFSET + 2 * index * PAGE_BYTES
        yield (
            bytes(image[at : at + PAGE_BYTES]) or None,
            bytes(image[at + PAGE_BYTES : at + 2 * PAGE_BYTES]) or None,
        )


def load(image: bytes) -> Loaded | None:
    choice = choose_superblock(*(bytes(image[at : at + 4096]) or None for at in SUPERBLOCK_OFFSETS))
    if choice is None:
        return None
    return assemble(choice, slots_of(image, choice.superblock.page_count))


def loaded_from(image: bytes) -> Loaded:
    loaded = load(image)
    assert loaded is not None
    return loaded


# -- loading ------------------------------------------------------------------------------------


def test_what_was_written_is_loaded() -> None:
    bits = bits_of(0, 7, EXTENTS_PER_PAGE - 1, EXTENTS_PER_PAGE, LAST)
    loaded = loaded_from(image_of(bits))
    assert loaded.bits == bits
    assert loaded.bits.endian == "little"
    assert [page.newest_slot for page in loaded.pages] == [0, 0, 0]
    assert loaded.damaged == loaded.torn == loaded.messages == ()


def test_a_damaged_page_is_ones_and_its_neighbours_are_not() -> None:
    image = image_of(bits_of(5))
    image[page_offset(1, 1) + 700] ^= 1
    loaded = loaded_from(image)
    assert loaded.damaged == (1,)
    assert loaded.bits[:EXTENTS_PER_PAGE].count() == 1
    assert loaded.bits[EXTENTS_PER_PAGE : 2 * EXTENTS_PER_PAGE].all()
    assert not loaded.bits[2 * EXTENTS_PER_PAGE :].any()
    assert loaded.messages == (loaded.pages[1].message,)


def test_ones_of_the_last_page_end_with_the_volume() -> None:
    image = image_of(bits_of())
    image[page_offset(2, 0) :] = bytes(2 * PAGE_BYTES)
    loaded = loaded_from(image)
    assert len(loaded.bits) == EXTENTS
    assert loaded.bits.count() == 100


def test_bits_beyond_the_last_extent_do_not_exist() -> None:
    image = image_of(bits_of())
    for slot, sequence in ((0, 2), (1, 1)):
        at = page_offset(2, slot)
        image[at : at + PAGE_BYTES] = encode_page(
            VOLUME.bytes, 2, sequence, sequence - 1, ONES_PAGE
        )
    loaded = loaded_from(image)
    assert (len(loaded.bits), loaded.bits.count()) == (EXTENTS, 100)
    assert loaded.damaged == ()


def test_a_missing_page_is_a_mistake_of_the_caller() -> None:
    image = image_of(bits_of())
    choice = Choice(superblock(), ())
    with pytest.raises(BitmapdError, match="2 pages of 3 were given"):
        assemble(choice, slots_of(image, 2))


def test_a_torn_page_is_told_apart() -> None:
    image = image_of(bits_of(1))
    at = page_offset(0, 1)
    image[at : at + 512] = encode_page(VOLUME.bytes, 0, 3, 2, ONES_PAGE)[:512]
    loaded = loaded_from(image)
    assert (loaded.torn, loaded.damaged) == ((0,), ())
    assert loaded.bits == bits_of(1)


def test_a_superblock_can_be_replaced() -> None:
    loaded = loaded_from(image_of(bits_of(1)))
    later = loaded.superblock.updated(5)
    assert with_superblock(loaded, later).superblock == later
    assert with_superblock(loaded, later).bits == loaded.bits


# -- healing ------------------------------------------------------------------------------------


def test_healing_makes_ones_durable_in_a_new_epoch() -> None:
    image = image_of(bits_of(3), sequence=50)
    for offset in (page_offset(0, 0), page_offset(2, 1)):
        image[offset + 9] ^= 1
    found = loaded_from(image)
    sequence = found.heal_sequence
    assert sequence == 51 + HEAL_JUMP
    for index in found.damaged:
        content = page_bits(found.bits, index)
        for slot, previous in ((0, 0), (1, sequence)):
            at = page_offset(index, slot)
            image[at : at + PAGE_BYTES] = encode_page(
                VOLUME.bytes, index, sequence + slot, previous, content
            )
    assert healed(found, sequence).pages == loaded_from(image).pages
    assert loaded_from(image).bits == found.bits
    assert healed(found, sequence).damaged == ()


def test_sequences_that_are_used_up_are_refused() -> None:
    loaded = loaded_from(image_of(bits_of(), sequence=MAX_SEQUENCE - 1))
    assert loaded.damaged == ()
    with pytest.raises(RecordDamagedError, match="used up"):
        _ = loaded.heal_sequence


# -- anything at all ----------------------------------------------------------------------------

CONTENT = bits_of(0, 63, EXTENTS_PER_PAGE + 9, LAST)
IMAGE = bytes(image_of(CONTENT))
edits = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 4096), st.integers(65536, 69632), st.integers(PAGES_OFFSET, len(IMAGE))
        ),
        st.binary(min_size=1, max_size=600),
    ),
    max_size=6,
)
places = st.integers(0, len(IMAGE) // 4096 - 1)


def loads_a_superset_or_refuses(image: bytes) -> None:
    try:
        loaded = load(image)
    except (RecordDamagedError, FormatTooNewError):
        return
    if loaded is not None:
        assert (loaded.bits & CONTENT) == CONTENT
        json.dumps(dump(loaded))
        examine(loaded)


@given(edits)
def test_damage_anywhere_loses_nothing(changes: list[tuple[int, bytes]]) -> None:
    image = bytearray(IMAGE)
    for at, values in changes:
        image[at : at + len(values)] = values
    loads_a_superset_or_refuses(image[: len(IMAGE)])


@given(st.integers(0, len(IMAGE)))
def test_a_cut_image_loses_nothing(length: int) -> None:
    loads_a_superset_or_refuses(IMAGE[:length])


@given(st.lists(st.tuples(places, places), max_size=5))
def test_units_in_the_wrong_places_lose_nothing(moves: list[tuple[int, int]]) -> None:
    image = bytearray(IMAGE)
    for source, target in moves:
        image[target * 4096 : (target + 1) * 4096] = IMAGE[source * 4096 : (source + 1) * 4096]
    loads_a_superset_or_refuses(image)


@pytest.mark.parametrize("fill", [b"\0", b"\xff"])
def test_a_wiped_image_holds_no_record(fill: bytes) -> None:
    assert load(fill * len(IMAGE)) is None


@pytest.mark.parametrize("fill", [b"\0", b"\xff"])
def test_wiped_pages_are_ones(fill: bytes) -> None:
    loaded = loaded_from(IMAGE[:PAGES_OFFSET] + fill * (len(IMAGE) - PAGES_OFFSET))
    assert loaded.bits.all()


def test_pages_of_another_volume_are_ones() -> None:
    other = superblock(volume_uuid=UUID(int=99))
    raw = encode_superblock(other)
    image = bytearray(IMAGE)
    for offset in SUPERBLOCK_OFFSETS:
        image[offset : offset + 4096] = raw
    loaded = loaded_from(image)
    assert loaded.bits.all()
    assert f"holds page 0 of volume {VOLUME}" in loaded.messages[0]


# -- the report ---------------------------------------------------------------------------------


def test_a_dump_leaves_nothing_out() -> None:
    block = superblock(
        flags=RecordFlag.SYNC_SKIPPED, initial_sync=InitialSync.CHECKSUM, compatible=2
    )
    image = image_of(bits_of(0, 1, 2, LAST), block)
    image[page_offset(1, 0)] ^= 1
    image[1] ^= 1
    dumped = json.loads(json.dumps(dump(loaded_from(image))))
    assert dumped["superblock"]["volume_uuid"] == str(VOLUME)
    assert dumped["superblock"]["created"] == "2023-11-14T22:13:20Z"
    assert dumped["superblock"]["initial_sync"] == "checksum"
    assert dumped["superblock"]["features"] == {
        "incompatible": 0,
        "compatible_read_only": 0,
        "compatible": 2,
    }
    assert dumped["superblock"]["pair"] is None
    assert dumped["superblock"]["sync_skipped"]
    assert not dumped["superblock"]["clean"]
    assert dumped["extents"] == {
        "total": EXTENTS,
        "recorded": 4 + EXTENTS_PER_PAGE,
        # The last extent of the volume is short by 4096 bytes.
        "recorded_bytes": ((4 + EXTENTS_PER_PAGE) << 20) - 4096,
        "runs": [[0, 3], [EXTENTS_PER_PAGE, EXTENTS_PER_PAGE], [LAST, 1]],
    }
    verdicts = [page["verdict"] for page in dumped["pages"]]
    assert verdicts == ["whole", "damaged", "whole"]
    assert dumped["pages"][0]["sequence"] == 2
    assert dumped["pages"][1]["sequence"] is None
    assert dumped["warnings"] == ["superblock copy A: there is no superblock"]
    assert dumped["notes"] == []


def test_a_time_beyond_the_calendar_is_left_out() -> None:
    loaded = loaded_from(image_of(bits_of(), superblock(created_s=(1 << 63) - 1)))
    assert dump(loaded)["superblock"]["created"] is None


def severities(image: bytes, volume_uuid: UUID | None = None) -> tuple[list[str], int]:
    report = examine(loaded_from(image), volume_uuid)
    assert report.to_json()["exit_status"] == report.exit_status
    assert len(report.to_json()["findings"]) == len(report.findings)
    return [finding.severity.value for finding in report.findings], report.exit_status


def test_a_sound_record_has_no_findings() -> None:
    assert severities(IMAGE, VOLUME) == ([], 0)
    report = examine(loaded_from(IMAGE)).to_json()
    assert (report["volume"], report["volume_uuid"]) == ("vol0", str(VOLUME))


def test_what_a_crash_leaves_behind_is_only_noted() -> None:
    image = bytearray(IMAGE)
    image[:4096] = encode_superblock(superblock(sequence=2))
    at = page_offset(0, 1)
    image[at : at + 512] = encode_page(VOLUME.bytes, 0, 3, 2, ONES_PAGE)[:512]
    assert severities(image) == (["note", "note"], 0)


def test_damage_has_status_20() -> None:
    image = bytearray(IMAGE)
    image[page_offset(2, 1)] ^= 1
    assert severities(image) == (["damage"], 20)
    image[65536] ^= 1
    assert severities(image) == (["damage", "damage"], 20)


def test_a_clean_record_that_is_not_empty_is_noted() -> None:
    clean = superblock(flags=RecordFlag.CLEAN)
    assert severities(image_of(bits_of(4), clean)) == (["note"], 0)
    assert severities(image_of(bits_of(), clean)) == ([], 0)


def test_another_volume_has_status_22() -> None:
    assert severities(IMAGE, UUID(int=1)) == (["fatal"], 22)


@pytest.mark.parametrize(
    ("error", "status"), [(RecordDamagedError("bad"), 20), (FormatTooNewError("new"), 21)]
)
def test_what_cannot_be_loaded_is_reported(error: Any, status: int) -> None:
    report = unusable(error)
    assert report.exit_status == status
    assert report.findings[0].severity is Severity.FATAL
    assert report.to_json()["volume"] is None
