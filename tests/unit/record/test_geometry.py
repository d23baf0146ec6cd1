"""record/geometry: extents and blocks of a volume."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import UsageError
from bitmapd.record.geometry import KIB, MAX_EXTENTS, MIB, TIB, Geometry

powers = st.integers(12, 26).map(lambda exponent: 1 << exponent)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    extent = draw(powers)
    block = draw(powers.filter(lambda size: size <= extent))
    return Geometry(draw(st.integers(1, 2000 * extent)), extent, block)


def test_the_defaults() -> None:
    geometry = Geometry(64 * TIB)
    assert (geometry.extent_bytes, geometry.block_bytes) == (MIB, 64 * KIB)
    assert geometry.extents == MAX_EXTENTS, "64 TiB with extents of 1 MiB is the largest"


@pytest.mark.parametrize(
    ("size", "extent", "block", "said"),
    [
        (MIB, 3 * KIB, 4 * KIB, "extent size 3072 is not a power of two"),
        (MIB, 0, 4 * KIB, "extent size 0 is not a power of two"),
        (MIB, -4096, 4 * KIB, "extent size -4096 is not a power of two"),
        (MIB, MIB, 12 * KIB, "block size 12288 is not a power of two"),
        (MIB, MIB, 2 * KIB, "block size 2048 is below 4096"),
        (MIB, 128 * MIB, 4 * KIB, "extent size 134217728 is above 67108864"),
        (MIB, 64 * KIB, MIB, "block size 1048576 is larger than extent size 65536"),
        (0, MIB, 64 * KIB, "volume size 0 is not positive"),
        (-1, MIB, 64 * KIB, "volume size -1 is not positive"),
        (64 * TIB + 1, MIB, 64 * KIB, "more than 67108864 extents of 1048576 bytes"),
    ],
)
def test_what_is_refused(size: int, extent: int, block: int, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Geometry(size, extent, block)
    assert said in caught.value.message


def test_a_volume_with_too_many_extents_is_told_what_to_do() -> None:
    with pytest.raises(UsageError) as caught:
        Geometry(65 * TIB)
    assert caught.value.hint == "choose a larger --extent-size"
    assert Geometry(65 * TIB, 2 * MIB).extents <= MAX_EXTENTS


@given(geometry=geometries(), data=st.data())
def test_spans_hold_every_byte_and_no_more(geometry: Geometry, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, geometry.size_bytes - 1))
    length = data.draw(st.integers(1, geometry.size_bytes - offset))
    for unit, count, (first, stop) in (
        (geometry.extent_bytes, geometry.extents, geometry.extent_span(offset, length)),
        (geometry.block_bytes, geometry.blocks, geometry.block_span(offset, length)),
    ):
        assert 0 <= first < stop <= count
        assert first * unit <= offset < (first + 1) * unit
        assert (stop - 1) * unit < offset + length <= stop * unit


@given(geometry=geometries(), data=st.data())
def test_blocks_and_extents_tile_the_volume(geometry: Geometry, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, geometry.extents - 1))
    stop = data.draw(st.integers(first + 1, geometry.extents))
    blocks = geometry.extent_blocks(first, stop)
    offset, length = geometry.block_bytes_range(*blocks)
    assert offset == first * geometry.extent_bytes
    assert length == geometry.extents_bytes(first, stop)
    assert offset + length == min(stop * geometry.extent_bytes, geometry.size_bytes)
    assert geometry.block_span(offset, length) == blocks
    assert geometry.extents_bytes(0, geometry.extents) == geometry.size_bytes
    assert geometry.extent_blocks(0, geometry.extents) == (0, geometry.blocks)
    assert geometry.blocks_per_extent * geometry.block_bytes == geometry.extent_bytes
