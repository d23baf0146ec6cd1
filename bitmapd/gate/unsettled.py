"""What may differ between the two sides: how far each block has come, and since when (pure).

A block that was written goes from stage to stage until it is durable on both sides:

    current era ──take_era──> taken ──copied──> copied ──begin_settle──> settling ──settled──> equal
                                ^                  │                        │
                                └──forget_copied───┴────────unsettle────────┘

Invariants:
1. A block that was marked, taken or released is in the current era, in `taken`, or its extent is
   copied or settling, until `settled` is called for a settle that began after it was copied.
   Blocks that are held count besides, until `release`, and suspect ones until `trust`; these do
   not keep the volume from being in sync.  Nor does the extent that is kept for what a larger
   volume will have in it.
2. From `copied` on only extents are known, and all of an extent goes back: a flush that failed may
   have lost any of its blocks.
3. Times belong to stages, not to blocks: the current era, `taken`, and copied and settling together
   have one each.  What is copied takes the time along when nothing is left in `taken`; until then
   the time of `taken` stands for both.

One settle at a time.  Nothing of this is stored, and a crash loses all of it: whoever makes blocks
dirty has recorded their extents first, and the next start takes every block of the record.
"""

from __future__ import annotations

from collections.abc import Iterable

from bitmapd.gate.blockset import BlockSet
from bitmapd.record.geometry import Geometry

Run = tuple[int, int]  # blocks [first, stop)


class Era:
    """The blocks of one era, and since when there are some.

    A write that hits marks its blocks without a call to here.
    """

    __slots__ = ("blocks", "since_s")

    def __init__(self) -> None:
        self.blocks = BlockSet()
        self.since_s: float | None = None

    def mark(self, first: int, stop: int, now_s: float) -> None:
        """Blocks [first, stop) are to be copied."""
        if self.since_s is None:
            self.since_s = now_s
        self.blocks.add(first, stop)


class Unsettled:
    """See the module docstring.  Times are seconds of the loop's clock."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._per_extent = geometry.blocks_per_extent
        self.current_era = Era()
        self.taken = BlockSet()  # waits to be copied
        self._taken_since_s: float | None = None
        self._copied: set[int] = set()
        self._settling: set[int] = set()
        self._settling_since_s: float | None = None  # of both of them
        self._held: list[BlockSet] = []
        self._suspect: list[BlockSet] = []
        self._kept = -1  # extent that counts as unsettled for what it will have (`keep`)

    # -- from stage to stage ----------------------------------------------------------------
    def take_era(self) -> Era:
        """Move the era's blocks into `taken`.  Returns the era that begins."""
        ended, self.current_era = self.current_era, Era()
        if self.taken:
            self.taken.update(ended.blocks)
        else:
            self.taken = ended.blocks
        if self._taken_since_s is None:
            self._taken_since_s = ended.since_s
        return self.current_era

    def take(self, runs: Iterable[Run], since_s: float) -> None:
        """Have these copied, too; the oldest of them may have been written at `since_s`."""
        for first, stop in runs:
            self.taken.add(first, stop)
        if self.taken and (self._taken_since_s is None or since_s < self._taken_since_s):
            self._taken_since_s = since_s

    def copied(self, first: int, stop: int) -> None:
        """Blocks [first, stop) of `taken` are on the secondary, perhaps in its volatile cache."""
        self.taken.discard(first, stop)
        self._copied.update(self._extents(first, stop))
        if not self.taken:
            if self._settling_since_s is None:
                self._settling_since_s = self._taken_since_s
            self._taken_since_s = None

    def begin_settle(self) -> set[int]:
        """Extents with blocks copied since the last call; both sides are to be flushed now."""
        self._settling, self._copied = self._copied, set()
        return self._settling

    def settled(self) -> None:
        """Both sides have been flushed since `begin_settle`."""
        self._settling = set()
        if not self._copied:
            self._settling_since_s = None

    def unsettle(self, extents: Iterable[int]) -> None:
        """A flush failed, so anything copied to these extents may be lost: copy them again."""
        self._take_again(extents)
        self._settling = set()

    def forget_copied(self) -> set[int]:
        """What was copied and not flushed may be gone: have it copied again.  Its extents."""
        extents, self._copied = self._copied, set()
        self._take_again(extents)
        return extents

    def _take_again(self, extents: Iterable[int]) -> None:
        for extent in extents:
            self.taken.add(*self._geometry.extent_blocks(extent, extent + 1))
        if self.taken and self._settling_since_s is not None:  # older than what was taken since
            self._taken_since_s, self._settling_since_s = self._settling_since_s, None

    def hold(self, blocks: BlockSet) -> None:
        """These may change on the secondary without our doing."""
        self._held.append(blocks)

    def release(self, blocks: BlockSet, now_s: float) -> None:
        """They no longer change; have them copied once more."""
        self._held = [held for held in self._held if held is not blocks]
        self._copy_once_more(blocks, now_s)

    def suspect(self, blocks: BlockSet) -> None:
        """These are not clean, but count as in sync as far as is known."""
        self._suspect.append(blocks)

    def trust(self, blocks: BlockSet, now_s: float) -> None:
        """They are suspect no longer; have them copied once more."""
        self._suspect = [suspect for suspect in self._suspect if suspect is not blocks]
        self._copy_once_more(blocks, now_s)

    def _copy_once_more(self, blocks: BlockSet, now_s: float) -> None:
        if not blocks:  # all of them were given away meanwhile
            return
        # Into the current era, not `taken`: a copy that is in flight now must not count for this.
        era = self.current_era
        era.blocks.update(blocks)
        if era.since_s is None:
            era.since_s = now_s

    def keep(self, extent: int) -> None:
        """It counts as unsettled until `grow`; only the last one of a volume is ever kept."""
        self._kept = extent

    def grow(self, geometry: Geometry, now_s: float) -> None:
        """The volume is larger from now on, and its new part is to be copied."""
        self._kept = -1
        first = self._geometry.size_bytes // geometry.block_bytes
        self._geometry = geometry
        self.current_era.mark(first, geometry.blocks, now_s)

    # -- what is where ----------------------------------------------------------------------
    def is_dirty(self, first: int, stop: int) -> bool:
        """Whether some of blocks [first, stop) wait to be copied."""
        return self.current_era.blocks.any(first, stop) or self.taken.any(first, stop)

    def any(self, first: int, stop: int) -> bool:
        """Whether some of blocks [first, stop) may differ, as far as is known here."""
        extents = self._extents(first, stop)
        return (
            self.is_dirty(first, stop)
            or any(blocks.any(first, stop) for blocks in (*self._held, *self._suspect))
            or not self._copied.isdisjoint(extents)
            or not self._settling.isdisjoint(extents)
            or self._kept in extents
        )

    def touches(self, extent: int) -> bool:
        """`any` for one extent, written out: a miss on a full record asks for dozens."""
        if extent in self._copied or extent in self._settling or extent == self._kept:
            return True
        first = extent * self._per_extent
        stop = first + self._per_extent
        if self.current_era.blocks.any(first, stop) or self.taken.any(first, stop):
            return True
        # Nearly always both are empty.
        return bool(self._held or self._suspect) and any(
            blocks.any(first, stop) for blocks in (*self._held, *self._suspect)
        )

    def _extents(self, first: int, stop: int) -> range:
        return range(first // self._per_extent, (stop - 1) // self._per_extent + 1)

    # -- figures ----------------------------------------------------------------------------
    def __bool__(self) -> bool:
        """Whether there is anything in any stage but what is only suspect."""
        return bool(
            self.current_era.blocks or self.taken or self._copied or self._settling or self._held
        )

    def count_dirty(self) -> int:
        """Blocks that wait to be copied; one that was written again meanwhile counts twice."""
        return self.current_era.blocks.count() + self.taken.count()

    @property
    def suspect_blocks(self) -> int:
        """Blocks that may yet change on the secondary without our doing; some may count twice."""
        return sum(blocks.count() for blocks in (*self._held, *self._suspect))

    @property
    def has_copied(self) -> bool:
        """Whether something was copied and waits for a settle."""
        return bool(self._copied)

    @property
    def oldest_s(self) -> float | None:
        """When the oldest of what is here was written, or earlier."""
        stages = (self._settling_since_s, self._taken_since_s, self.current_era.since_s)
        return next((since_s for since_s in stages if since_s is not None), None)
