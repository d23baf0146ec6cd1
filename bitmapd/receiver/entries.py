"""What a receiver has of one point: an entry for each block, the one with the largest stamp (pure).

A point of a whole volume has millions of entries, so they are kept as 40 bytes each, in groups of
16 blocks, of which there are as many as have an entry.

1. Of several entries of a block the one with the largest stamp counts, whatever the order in which
   they come.
2. `count` and `digest` are those that END has of the same entries.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bitmapd.points.messages import Encoding, Entry
from bitmapd.points.pieces import Digest

IN_IMAGE: Final = 0  # instead of a place in the journal

_LINE: Final = struct.Struct("<QQQQIB3x")
_GROUP: Final = 16


@dataclass(frozen=True, slots=True)
class Kept:
    """`place_bytes`: where the payload is in the journal, or IN_IMAGE."""

    block: int
    stamp: int
    mask: int
    sum64: int
    place_bytes: int
    length_bytes: int
    encoding: Encoding


def kept(entry: Entry, place_bytes: int, length_bytes: int) -> Kept:
    """What is remembered of an entry whose payload is there."""
    sum64, encoding = entry.sum64, entry.encoding
    return Kept(entry.block, entry.stamp, entry.mask, sum64, place_bytes, length_bytes, encoding)


class Entries:
    """See the module docstring."""

    def __init__(self) -> None:
        self.count = 0
        self.payload_bytes = 0
        self._groups: dict[int, bytearray] = {}
        self._digest = Digest()

    def add(self, kept: Kept) -> None:
        group = self._groups.get(kept.block // _GROUP)
        if group is None:
            group = self._groups[kept.block // _GROUP] = bytearray(_GROUP * _LINE.size)
        at = kept.block % _GROUP * _LINE.size
        stamp, mask, sum64, _, length_bytes, _ = _LINE.unpack_from(group, at)
        if stamp >= kept.stamp:
            return
        if stamp:
            self._digest.remove(kept.block, stamp, mask, sum64)
        self._digest.add(kept.block, kept.stamp, kept.mask, kept.sum64)
        self.count += not stamp
        self.payload_bytes += kept.length_bytes - length_bytes
        _LINE.pack_into(
            group,
            at,
            kept.stamp,
            kept.mask,
            kept.sum64,
            kept.place_bytes,
            kept.length_bytes,
            kept.encoding,
        )

    def __iter__(self) -> Iterator[Kept]:
        """In order of place."""
        for number in sorted(self._groups):
            group = self._groups[number]
            for index, (stamp, mask, sum64, place, length, encoding) in enumerate(
                _LINE.iter_unpack(group)
            ):
                if stamp:
                    yield Kept(
                        number * _GROUP + index,
                        stamp,
                        mask,
                        sum64,
                        place,
                        length,
                        Encoding(encoding),
                    )

    def stamps(self) -> Iterator[tuple[int, int]]:
        """(block, stamp), ascending."""
        for number in sorted(self._groups):
            lines = _LINE.iter_unpack(self._groups[number])
            for block, (stamp, *_) in enumerate(lines, number * _GROUP):
                if stamp:
                    yield block, stamp

    def digest(self) -> bytes:
        return self._digest.value()
