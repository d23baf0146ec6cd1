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
4. An extent that is given to another node leaves every stage, and its dirt goes along.  Nothing
   that ends or fails later brings any of it back: a copy counts for what is still in `taken`, a
   settle for what is still settling, and a hold for what is ours when it ends.
5. Where a copy from elsewhere may still land on the secondary, the extent is under *embargo*: it is
   not clean, and none of its blocks is in `taken`.  What is dirty there stays in the current era,
   whatever era it was written in, until `free`.

An extent that is given and comes back needs no more than that: its dirt comes into the current
era, and an era is taken only while no copy is in flight.  So a copy that began before it was given
has ended by the time that anything of it is copied again.

One settle at a time.  Nothing of this is stored, and a crash loses all of it: whoever makes blocks
dirty has recorded their extents first, and the next start takes every block of the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitmapd.gate.blockset import BlockSet
from bitmapd.record.geometry import Geometry

Run = tuple[int, int]  # blocks [first, stop)


class Era:
    """The blocks of one era, and since when there are some.

    A write that hits marks its blocks without a call to here, by adding to `marks`: the blocks
    themselves, or what brings them along (`changes`).
    """

    __slots__ = ("blocks", "marks", "since_s")

    def __init__(self) -> None:
        self.blocks = self.marks = BlockSet()
        self.since_s: float | None = None

    def mark(self, first: int, stop: int, now_s: float) -> None:
        """Blocks [first, stop) are to be copied."""
        if self.since_s is None:
            self.since_s = now_s
        self.blocks.add(first, stop)


class Unsettled:
    """See the module docstring.  Times are seconds of the loop's clock."""

    def __init__(self, geometry: Geometry, is_ours: Callable[[int], bool] | None = None) -> None:
        """`is_ours` tells of extents; without it none is ever given away."""
        self._geometry = geometry
        self._is_ours = is_ours
        self._per_extent = geometry.blocks_per_extent
        self.current_era = Era()
        self.taken = BlockSet()  # waits to be copied
        self._taken_since_s: float | None = None
        self._copied: set[int] = set()
        self._settling: set[int] = set()
        self._settling_since_s: float | None = None  # of both of them
        self._held: list[BlockSet] = []
        self._suspect: list[BlockSet] = []
        self._embargoed: set[int] = set()
        self._kept = -1  # extent that counts as unsettled for what it will have (`keep`)

    # -- from stage to stage ----------------------------------------------------------------
    def take_era(self) -> Era:
        """Move the era's blocks into `taken`.  Returns the era that begins."""
        ended, self.current_era = self.current_era, Era()
        if self.taken:
            self.taken.update(ended.blocks)
        else:
            self.taken = ended.blocks
        self._taken_since_s = _earliest(self._taken_since_s, ended.since_s)
        self._withhold(ended.since_s)
        return self.current_era

    def take(self, runs: Iterable[Run], since_s: float) -> None:
        """Have these copied, too; the oldest of them may have been written at `since_s`."""
        for first, stop in runs:
            self.taken.add(first, stop)
        if self.taken:
            self._taken_since_s = _earliest(self._taken_since_s, since_s)
        self._withhold(since_s)

    def join(self, runs: Iterable[Run], since_s: float) -> None:
        """As `take`, into the current era."""
        era = self.current_era
        for first, stop in runs:
            era.mark(first, stop, since_s)
            era.since_s = _earliest(era.since_s, since_s)

    def _withhold(self, since_s: float | None) -> None:
        """Put what is under embargo back into the current era."""
        for extent in self._embargoed:
            span = self._geometry.extent_blocks(extent, extent + 1)
            if self.taken.any(*span):
                for run in self.taken.runs(*span):
                    self.current_era.blocks.add(*run)
                self.current_era.since_s = _earliest(self.current_era.since_s, since_s)
                self.taken.discard(*span)
        self._forget_times()

    def copied(self, first: int, stop: int) -> None:
        """Blocks [first, stop) of `taken` are on the secondary, perhaps in its volatile cache."""
        per = self._per_extent
        for extent in self._extents(first, stop):
            if self.taken.any(max(first, extent * per), min(stop, (extent + 1) * per)):
                self._copied.add(extent)
        self.taken.discard(first, stop)
        self._forget_times()

    def _forget_times(self) -> None:
        """Stages that have become empty have no time, and leave it to the next."""
        if not self.current_era.blocks:
            self.current_era.since_s = None
        if not self.taken:
            self._settling_since_s = _earliest(self._settling_since_s, self._taken_since_s)
            self._taken_since_s = None
        if not self._copied and not self._settling:
            self._settling_since_s = None

    def begin_settle(self) -> set[int]:
        """Extents with blocks copied since the last call; both sides are to be flushed now.  What
        is given away until then leaves this set."""
        self._settling, self._copied = self._copied, set()
        return self._settling

    def settled(self) -> None:
        """Both sides have been flushed since `begin_settle`."""
        self._settling = set()
        self._forget_times()

    def unsettle(self, extents: Iterable[int]) -> None:
        """A flush failed, so anything copied to these extents may be lost: copy them again."""
        self._take_again(self._settling.intersection(extents))
        self._settling = set()

    def forget_copied(self) -> set[int]:
        """What was copied and not flushed may be gone: have it copied again.  Its extents."""
        extents, self._copied = self._copied, set()
        self._take_again(extents)
        return extents

    def _take_again(self, extents: Iterable[int]) -> None:
        for extent in extents:
            self.taken.add(*self._geometry.extent_blocks(extent, extent + 1))
        if self.taken and self._settling_since_s is not None:
            self._taken_since_s = _earliest(self._taken_since_s, self._settling_since_s)
            self._settling_since_s = None

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
        if self._is_ours is None:
            era.blocks.update(blocks)
        else:
            for run in blocks.runs():
                for extent in filter(self._is_ours, self._extents(*run)):
                    span = self._geometry.extent_blocks(extent, extent + 1)
                    era.blocks.add(max(run[0], span[0]), min(run[1], span[1]))
        if era.since_s is None and era.blocks:
            era.since_s = now_s

    def keep(self, extent: int) -> None:
        """It counts as unsettled until `grow`; only the last one of a volume is ever kept."""
        self._kept = extent

    @property
    def extents(self) -> int:
        """Of the volume."""
        return self._geometry.extents

    def grow(self, geometry: Geometry, now_s: float, *, mine: bool) -> None:
        """The volume is larger from now on; with `mine` its new part is to be copied."""
        self._kept = -1
        first = self._geometry.size_bytes // geometry.block_bytes
        self._geometry = geometry
        if mine:
            self.current_era.mark(first, geometry.blocks, now_s)

    # -- between nodes ----------------------------------------------------------------------
    def give(self, extents: Iterable[int]) -> BlockSet:
        """These are another node's from now on.  Returns their dirt: what waits to be copied, and
        all blocks of an extent that is copied, settling, held or suspect."""
        dirt = BlockSet()
        for extent in extents:
            span = self._geometry.extent_blocks(extent, extent + 1)
            unsure = any(blocks.any(*span) for blocks in (*self._held, *self._suspect))
            if unsure or extent in self._copied or extent in self._settling:
                dirt.add(*span)
            for blocks in (self.current_era.blocks, self.taken):
                for run in blocks.runs(*span):
                    dirt.add(*run)
                blocks.discard(*span)
            for stage in (self._copied, self._settling, self._embargoed):
                stage.discard(extent)
        self._forget_times()
        return dirt

    def take_over(self, dirt: Iterable[Run], embargoed: Iterable[int], now_s: float) -> None:
        """These blocks have come with extents that are ours from now on; some under embargo."""
        self._embargoed.update(embargoed)
        for first, stop in dirt:
            self.current_era.mark(first, stop, now_s)

    def free(self, extents: Iterable[int]) -> None:
        """Nothing from elsewhere can land there any more."""
        self._embargoed.difference_update(extents)

    @property
    def embargoed_extents(self) -> int:
        return len(self._embargoed)

    def free_all(self) -> None:
        self._embargoed.clear()

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
            or not self._embargoed.isdisjoint(extents)
            or self._kept in extents
        )

    def touches(self, extent: int) -> bool:
        """`any` for one extent, written out: a miss on a full record asks for dozens."""
        if extent in self._copied or extent in self._settling or extent == self._kept:
            return True
        if extent in self._embargoed:
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
            self.current_era.blocks
            or self.taken
            or self._copied
            or self._settling
            or self._held
            or self._embargoed
        )

    @property
    def wants_era(self) -> bool:
        """Whether `take_era` would bring something into `taken`."""
        blocks = self.current_era.blocks
        if self._embargoed:
            spans = (self._geometry.extent_blocks(e, e + 1) for e in self._embargoed)
            blocks = blocks.minus(BlockSet(spans))
        return bool(blocks)

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
        return _earliest(self._settling_since_s, self._taken_since_s, self.current_era.since_s)


def _earliest(*times_s: float | None) -> float | None:
    """The earliest of those that are times; None if none is."""
    return min((time_s for time_s in times_s if time_s is not None), default=None)
