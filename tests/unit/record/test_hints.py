"""record/hints: what outlives a restart, and what is not believed."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from bitarray import bitarray
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.record.hints import HINTS_BYTES, TRAIL_EXTENTS, Hints, decode_hints, encode_hints


def hints(extents: int = 100) -> Hints:
    ever = bitarray(extents)
    ever[3] = True
    return Hints(extents, (0.5, 0.25), (7, 3, 9), ever)


def sealed(body: bytes) -> bytes:
    return (body + struct.pack("<I", crc32c(body))).ljust(HINTS_BYTES, b"\0")


@given(
    st.integers(1, 300).flatmap(
        lambda extents: st.builds(
            Hints,
            st.just(extents),
            st.lists(st.floats(0, 1, width=32), max_size=5).map(tuple),
            st.lists(st.integers(0, extents - 1), max_size=20).map(tuple),
            st.lists(st.booleans(), min_size=extents, max_size=extents).map(bitarray),
        )
    )
)
def test_what_is_written_is_read(written: Hints) -> None:
    data = encode_hints(written)
    assert len(data) == HINTS_BYTES
    read = decode_hints(data, written.extents)
    assert read == written


@given(st.binary(max_size=200))
def test_garbage_is_ignored(data: bytes) -> None:
    assert decode_hints(data, 100) is None
    assert decode_hints(data.ljust(HINTS_BYTES, b"\0"), 100) is None


@given(st.data())
def test_any_damage_is_noticed(data: st.DataObject) -> None:
    whole = encode_hints(hints())
    used = len(whole.rstrip(b"\0"))
    at = data.draw(st.integers(0, used - 1))
    flipped = bytearray(whole)
    flipped[at] ^= data.draw(st.integers(1, 255))
    assert decode_hints(bytes(flipped), 100) is None
    assert decode_hints(whole[:at], 100) is None
    torn = whole[:at].ljust(HINTS_BYTES, b"\0")
    assert torn == whole or decode_hints(torn, 100) is None


def test_hints_of_another_volume_are_ignored() -> None:
    data = encode_hints(hints())
    assert decode_hints(data, 100) is not None
    assert decode_hints(data, 99) is None


def test_hints_of_a_volume_that_has_grown_are_of_its_old_size() -> None:
    assert decode_hints(encode_hints(hints()), 1000) == hints()


def test_the_latest_of_a_long_trail_are_kept() -> None:
    trail = tuple(range(TRAIL_EXTENTS + 5))
    data = encode_hints(Hints(len(trail), (), trail, bitarray(len(trail))))
    read = decode_hints(data, len(trail))
    assert read is not None
    assert read.trail == trail[5:]


HEAD = struct.Struct("<8sQIII")


@pytest.mark.parametrize(
    "body",
    [
        HEAD.pack(b"dmhints0", 100, 0, 0, 0),
        HEAD.pack(b"dmhints1", 100, 0, 1, 0),  # shorter than it says
        HEAD.pack(b"dmhints1", 100, 0, 0, 0) + b"more",
        HEAD.pack(b"dmhints1", 100, 0, 0, HINTS_BYTES),
        HEAD.pack(b"dmhints1", 100, 0, 2**32 - 1, 0),
        HEAD.pack(b"dmhints1", 100, 2**32 - 1, 0, 0),
        HEAD.pack(b"dmhints1", 100, 0, 1, 0) + struct.pack("<I", 100),  # outside the volume
        HEAD.pack(b"dmhints1", 100, 0, 0, 4) + b"junk",
        HEAD.pack(b"dmhints1", 100, 0, 0, len(zlib.compress(bytes(99)))) + zlib.compress(bytes(99)),
        HEAD.pack(b"dmhints1", 100, 0, 0, len(zlib.compress(bytes(3)))) + zlib.compress(bytes(3)),
    ],
)
def test_what_makes_no_sense_is_ignored(body: bytes) -> None:
    assert decode_hints(sealed(body), 100) is None


@pytest.mark.parametrize("chance", [-0.1, 1.1, float("nan"), float("inf")])
def test_what_are_no_odds_is_ignored(chance: float) -> None:
    body = HEAD.pack(b"dmhints1", 100, 1, 0, 0) + struct.pack("<f", chance)
    assert decode_hints(sealed(body), 100) is None


def test_a_map_that_would_be_too_long_is_left_out() -> None:
    extents = 16 * HINTS_BYTES
    ever = bitarray()
    ever.frombytes(random.Random(1).randbytes(extents // 8))
    trail = tuple(range(TRAIL_EXTENTS))
    data = encode_hints(Hints(extents, (0.5,), trail, ever))
    assert len(data) == HINTS_BYTES
    read = decode_hints(data, extents)
    assert read is not None
    assert read.trail == trail
    assert not read.ever.any()
