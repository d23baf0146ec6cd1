"""Directory of kept points, change maps and retention: their bytes, and what they survive."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.receiver.directory import (
    NO_SLOT,
    Directory,
    Keep,
    KeptPoint,
    choose_directory,
    decode_directory,
    directory_offset,
    encode_directory,
)
from bitmapd.receiver.maps import PAGE_EXTENTS, decode_map, encode_map_page
from bitmapd.receiver.places import DIRECTORY_BYTES, DIRECTORY_OFFSETS, MAP_SECTOR_EXTENTS
from bitmapd.receiver.retention import needed
from bitmapd.record.extents import zeros

JOURNAL = bytes(range(16))
HOUR_NS = 3600 * 10**9
KEPT = KeptPoint(7, 5 * HOUR_NS, bytes([1] * 16), 1 << 30, Keep.KEPT, 3, "före uppgradering")
WANTED = KeptPoint(9, 6 * HOUR_NS, bytes([1] * 16), 1 << 30, Keep.WANTED, NO_SLOT, "x" * 255)


# -- directory --------------------------------------------------------------------------------


def test_a_directory_is_read_as_it_was_written() -> None:
    for sequence in (1, 2):
        directory = Directory(sequence, (KEPT, WANTED))
        raw = encode_directory(directory, JOURNAL)
        assert len(raw) == DIRECTORY_BYTES
        assert decode_directory(raw, JOURNAL, sequence % 2) == directory
        assert directory_offset(sequence) == DIRECTORY_OFFSETS[sequence % 2]
    assert directory.newest == KEPT
    assert directory.find(9) == WANTED
    assert directory.find(8) is None
    assert Directory().newest is None


def test_the_bytes_of_a_directory_stay() -> None:
    """Golden: docs/format.md has the table."""
    raw = encode_directory(Directory(5, (KEPT,)), JOURNAL)
    assert raw[:64] == b"BMPkept1" + (5).to_bytes(8, "little") + JOURNAL + b"\1" + bytes(31)
    entry = raw[64 : 64 + 304]
    assert entry[:40] == b"".join(
        (
            (7).to_bytes(8, "little"),
            (5 * HOUR_NS).to_bytes(8, "little"),
            bytes([1] * 16),
            (1 << 30).to_bytes(8, "little"),
        )
    )
    label = "före uppgradering".encode()
    assert entry[40:48] == bytes([2, len(label), 3, 0, 0, 0, 0, 0])
    assert entry[48:] == label.ljust(256, b"\0")
    assert not any(raw[64 + 304 : -4])
    assert raw[-4:].hex() == "d88da23f"


@pytest.mark.parametrize(
    "points",
    [
        (WANTED, KEPT),
        (KEPT, KEPT),
        (KEPT, replace(KEPT, point=8)),
        (replace(KEPT, slot=64),),
    ],
    ids=["order", "twice", "slot-twice", "slot"],
)
def test_a_directory_that_contradicts_itself_is_none(points: tuple[KeptPoint, ...]) -> None:
    directory = Directory(1, points)
    assert directory.fault is not None
    assert decode_directory(encode_directory(directory, JOURNAL), JOURNAL, 1) is None


def sealed(raw: bytearray) -> bytes:
    """With a right checksum, whatever is in it."""
    start = crc32c(b"bitmapd kept points" + JOURNAL)
    raw[-4:] = crc32c(bytes(raw[:-4]), start).to_bytes(4, "little")
    return bytes(raw)


def test_what_is_no_directory_is_none() -> None:
    good = encode_directory(Directory(1, (KEPT,)), JOURNAL)
    assert decode_directory(None, JOURNAL, 1) is None
    assert decode_directory(good[:-1], JOURNAL, 1) is None
    assert decode_directory(good, bytes(16), 1) is None
    assert decode_directory(good, JOURNAL, 0) is None
    assert sealed(bytearray(good)) == good
    for at, value in ((0, 0), (8, 0), (32, 65), (64 + 40, 9), (64 + 48, 0xFF)):
        raw = bytearray(good)
        raw[at] = value
        assert decode_directory(bytes(raw), JOURNAL, 1) is None
        assert decode_directory(sealed(raw), JOURNAL, 1) is None


def test_the_newest_directory_counts_unless_a_newer_one_is_known() -> None:
    old, new = Directory(4, (KEPT,)), Directory(5, (KEPT, WANTED))
    slots = [encode_directory(old, JOURNAL), encode_directory(new, JOURNAL)]
    assert choose_directory(slots, JOURNAL, 5) == (new, ())
    assert choose_directory([None, None], JOURNAL, 0) == (Directory(), ())
    torn = [slots[0], bytes(DIRECTORY_BYTES)]
    assert choose_directory(torn, JOURNAL, 4) == (old, ())
    lost, (note,) = choose_directory(torn, JOURNAL, 5)
    assert lost == Directory(5)
    assert "cannot be read" in note


@given(st.binary(max_size=200), st.integers(0, DIRECTORY_BYTES - 200))
def test_no_bytes_stop_a_directory_from_being_read(noise: bytes, at: int) -> None:
    raw = bytearray(encode_directory(Directory(1, (KEPT, WANTED)), JOURNAL))
    raw[at : at + len(noise)] = noise
    for candidate in (bytes(raw), sealed(raw)):
        found = decode_directory(candidate, JOURNAL, 1)
        assert found is None or found.fault is None


# -- maps -------------------------------------------------------------------------------------


def test_a_map_is_read_as_it_was_written() -> None:
    extents = PAGE_EXTENTS + 5
    bits = zeros(extents)
    for extent in (0, 9, MAP_SECTOR_EXTENTS, PAGE_EXTENTS - 1, PAGE_EXTENTS, extents - 1):
        bits[extent] = True
    pages = [encode_map_page(bits, JOURNAL, 7, page) for page in range(2)]
    assert decode_map(pages, JOURNAL, 7, extents) == bits


def test_the_bytes_of_a_map_stay() -> None:
    """Golden: docs/format.md has the table."""
    bits = zeros(20)
    bits[0] = bits[9] = bits[19] = True
    page = encode_map_page(bits, JOURNAL, 7, 0)
    assert page[:508] == bytes([1, 2, 8]) + bytes(505)
    assert page[508:512].hex() == "a3387560"
    assert (
        hashlib.sha256(page).hexdigest()
        == "ce7fd4c0d16128aa903475f1bffaed3c0205466b136cd6c861ecf9a30890572a"
    )


def test_what_is_not_whole_in_a_map_counts_as_ones() -> None:
    extents = PAGE_EXTENTS * 2
    pages = [encode_map_page(zeros(extents), JOURNAL, 7, page) for page in range(2)]
    rotten = bytearray(pages[0])
    rotten[512 + 3] ^= 1
    found = decode_map([bytes(rotten), pages[1]], JOURNAL, 7, extents)
    assert found.count() == MAP_SECTOR_EXTENTS
    assert found[MAP_SECTOR_EXTENTS : 2 * MAP_SECTOR_EXTENTS].all()
    assert decode_map([pages[0], None], JOURNAL, 7, extents).count() == PAGE_EXTENTS
    for other in (
        decode_map(pages, JOURNAL, 8, extents),
        decode_map(pages, bytes(16), 7, extents),
        decode_map(pages[::-1], JOURNAL, 7, extents),
    ):
        assert other.all()


@given(st.integers(0, 2**32))
def test_any_mixture_of_two_writings_names_what_the_first_one_did(seed: int) -> None:
    rng = random.Random(seed)
    before = zeros(PAGE_EXTENTS)
    for _ in range(5):
        before[rng.randrange(PAGE_EXTENTS)] = True
    after = before.copy()
    for _ in range(5):
        after[rng.randrange(PAGE_EXTENTS)] = True
    pages = [encode_map_page(bits, JOURNAL, 7, 0) for bits in (before, after)]
    mixed = b"".join(rng.choice(pages)[at : at + 512] for at in range(0, 4096, 512))
    found = decode_map([mixed], JOURNAL, 7, PAGE_EXTENTS)
    assert not (before & ~found).any()
    assert not (found & ~after).any()


# -- retention --------------------------------------------------------------------------------


def at(point: int, hour: float, label: str = "", state: Keep = Keep.KEPT) -> KeptPoint:
    return KeptPoint(point, int(hour * HOUR_NS), bytes(16), 0, state, NO_SLOT, label)


def test_of_each_interval_the_first_point_stays() -> None:
    points = [at(1, 0.2), at(2, 0.9), at(3, 1.5), at(4, 3.0), at(5, 3.9), at(6, 4.1)]
    assert needed(points, ((3, 3600.0),)) == {3, 4, 6}
    assert needed(points, ((9, 3600.0),)) == {1, 3, 4, 6}
    assert needed(points, ((1, 3600.0), (1, 86400.0))) == {1, 6}
    assert needed(points, ()) == frozenset()


def test_labels_stay_and_what_goes_is_gone() -> None:
    points = [at(1, 0, "mine"), at(2, 0.5), at(3, 1, "", Keep.GOING), at(4, 1.5)]
    assert needed(points, ()) == {1}
    assert needed(points, ((2, 3600.0),)) == {1, 4}


def test_a_clock_that_jumps_does_no_harm_to_the_order_of_points() -> None:
    points = [at(1, 100), at(2, 101), at(3, 50), at(4, 51)]
    assert needed(points, ((2, 3600.0),)) == {3, 4}


@given(
    st.lists(st.integers(0, 200), max_size=40),
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from((3600.0, 7200.0, 86400.0))), max_size=3),
)
def test_rules_keep_no_more_than_they_say_and_go_on_keeping_it(
    hours: list[int], rules: list[tuple[int, float]]
) -> None:
    points = [at(number, hour) for number, hour in enumerate(hours, 1)]
    assert len(needed(points, tuple(rules))) <= sum(most for most, _ in rules)
    points = [at(number, hour) for number, hour in enumerate(sorted(hours), 1)]
    stay = needed(points, tuple(rules))
    left = [kept for kept in points if kept.point in stay]
    assert needed(left, tuple(rules)) == stay
