"""Which sending of each block an open point is made of (pure).

Of every block: stamp, mask and sum of its latest entry.  The receiver has a table like it, and both
have to be the same for the point to be committed.  A first copy has all blocks in it, so they
are kept in groups of 16: 24 bytes a block where they are dense, half a KiB where they are alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from bitmapd.points.pieces import Digest

_GROUP: Final = 16  # blocks
_EMPTY: Final = array("Q", bytes(8 * 3 * _GROUP))

Line = tuple[int, int, int, int]  # block, stamp, mask, sum


class Sent:
    """See the module docstring."""

    def __init__(self) -> None:
        self._groups: dict[int, array[int]] = {}
        self._count = 0
        self._digest = Digest()

    def __len__(self) -> int:
        return self._count

    def put(self, block: int, stamp: int, mask: int, sum64: int) -> None:
        """`stamp` is not 0."""
        group = self._groups.setdefault(block // _GROUP, _EMPTY)
        if group is _EMPTY:
            group = self._groups[block // _GROUP] = array("Q", _EMPTY)
        at = 3 * (block % _GROUP)
        if group[at]:
            self._digest.remove(block, *group[at : at + 3])
        self._count += not group[at]
        self._digest.add(block, stamp, mask, sum64)
        group[at], group[at + 1], group[at + 2] = stamp, mask, sum64

    def get(self, block: int) -> Line | None:
        group = self._groups.get(block // _GROUP)
        at = 3 * (block % _GROUP)
        if group is None or not group[at]:
            return None
        return block, group[at], group[at + 1], group[at + 2]

    def drop(self, block: int) -> None:
        """One that is there."""
        group, at = self._groups[block // _GROUP], 3 * (block % _GROUP)
        self._digest.remove(block, *group[at : at + 3])
        group[at] = 0
        self._count -= 1

    def digest(self) -> bytes:
        """`pieces.digest` of all lines."""
        return self._digest.value()

    def lines(self) -> Iterator[Line]:
        """All of them, blocks ascending."""
        for number in sorted(self._groups):
            group = self._groups[number]
            for at in range(_GROUP):
                if group[3 * at]:
                    block = number * _GROUP + at
                    yield block, group[3 * at], group[3 * at + 1], group[3 * at + 2]
