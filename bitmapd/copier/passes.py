"""A pass: what was to be copied at one moment, followed until all of it is durable (pure).

Copying never ends by itself, for hosts go on writing.  A recovery and a resync do: they are over
when what they began with is on the secondary, whatever has been written since.  So a pass is a
snapshot of the set to copy, from which every block that is copied is taken.

Invariants:
1. A pass ends with a settle that began when nothing of it was left to copy, or with one after which
   nothing at all waits for a settle; never with a settle that began before the pass did.
2. What a failed device may have lost is copied again, so it is back in the pass.
3. What was given away is nobody's business here: the pass ends without it.

A crash forgets the pass; the record names what it had still to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitmapd.gate.blockset import BlockSet
from bitmapd.record.geometry import Geometry


class Passes:
    """One pass at a time; see the module docstring."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._left: BlockSet | None = None
        self._settling: BlockSet | None = None  # the pass that the present settle may end
        self.total_bytes = 0
        self.copied_bytes = 0
        self.on_done: Callable[[], None] | None = None

    @property
    def under_way(self) -> bool:
        return self._left is not None

    @property
    def nothing_left(self) -> bool:
        """Whether there is a pass of which everything was copied, if not yet settled."""
        return self._left is not None and not self._left

    @property
    def remaining_bytes(self) -> int:
        if self._left is None:
            return 0
        return min(self._left.count() * self._geometry.block_bytes, self._geometry.size_bytes)

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on; its new part belongs to no pass."""
        self._geometry = geometry

    # -- what becomes of it -----------------------------------------------------------------
    def begin(self, taken: BlockSet) -> None:
        """Follow what is to be copied now; it takes the place of a pass that is under way."""
        self._left = BlockSet()
        self._left.update(taken)
        self.total_bytes = self.remaining_bytes
        self.copied_bytes = 0

    def copied(self, first: int, stop: int) -> None:
        """Blocks [first, stop) are on the secondary, perhaps in its volatile cache."""
        if self._left is not None:
            self.copied_bytes += self._geometry.block_bytes * self._left.count_in(first, stop)
            self._left.discard(first, stop)

    def settle_failed(self, extents: Iterable[int]) -> None:
        """What was to be flushed is to be copied again."""
        self._settling = None
        self.again(extents)

    def again(self, extents: Iterable[int]) -> None:
        """These are copied again, so a pass that has counted them is not done with them."""
        if self._left is not None:
            for extent in extents:
                self._left.add(*self._geometry.extent_blocks(extent, extent + 1))

    def given(self, gone: BlockSet) -> None:
        """These are no longer ours to copy."""
        if self._left is not None:
            for first, stop in gone.runs():
                self._left.discard(first, stop)

    def settle_began(self) -> None:
        """Both sides are to be flushed now."""
        self._settling = self._left if self.nothing_left else None

    def ended(self, *, nothing_copied: bool) -> bool:
        """Whether the pass is over, now that no settle is under way (invariant 1).

        `nothing_copied`: nothing waits for the next one.
        """
        ending, self._settling = self._settling, None
        if not self.nothing_left or not (nothing_copied or ending is self._left):
            return False
        self._left = None
        return True
