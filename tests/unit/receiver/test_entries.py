"""Entries of a point: the largest stamp of a block counts, whatever the order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitmapd.points.messages import Encoding
from bitmapd.points.pieces import digest
from bitmapd.receiver.entries import Entries, Kept

u64 = st.integers(0, (1 << 64) - 1)
kept = st.builds(
    Kept,
    block=st.integers(0, 100) | st.integers(0, 1 << 40),
    stamp=st.integers(1, 1 << 40),
    mask=u64,
    sum64=u64,
    place_bytes=u64,
    length_bytes=st.integers(0, 262144),
    encoding=st.sampled_from(Encoding),
)


@given(st.lists(kept, max_size=60))
def test_the_largest_stamp_of_a_block_counts(found: list[Kept]) -> None:
    entries = Entries()
    wanted: dict[int, Kept] = {}
    for one in found:
        entries.add(one)
        if one.block not in wanted or wanted[one.block].stamp < one.stamp:
            wanted[one.block] = one
    ordered = [wanted[block] for block in sorted(wanted)]
    assert list(entries) == ordered
    assert entries.count == len(ordered)
    assert entries.payload_bytes == sum(one.length_bytes for one in ordered)
    assert list(entries.stamps()) == [(one.block, one.stamp) for one in ordered]
    lines = [(one.block, one.stamp, one.mask, one.sum64) for one in ordered]
    assert entries.digest() == digest(lines)
