"""Which pieces of its blocks a volume has changed since its last committed point (pure).

Hosts write 4 KiB where blocks have 64, and a receiver takes pieces.  A receiver replaces what it
has of a block in an open point by what comes later, so what is sent of a block is always all that
changed since the point before, however many eras, cuts and sendings ago that was.  So three sets
are enough: the pieces of this era, to which writes add theirs; what was changed in earlier eras
since the newest cut; and what was changed before it, which a pending block is sent with.

1. What `of` says of a block has every piece that changed since the last committed point, up to the
   newest cut (`pending`) or up to now.
2. It only grows until the point is committed: the latest sending of a block in a point has every
   piece that an earlier one had.
3. A block that was marked and not by a host's write has changed nobody knows where: all of it.  So
   has a block of which nothing is here.
4. A piece of this era is of a block of this era.
5. Where nobody knows what changed it may be asked what differs instead.  From the question until
   its answer such a block is *in question*, and as unknown as before; what is not known of it
   anew meanwhile stays unknown.  The answer adds the pieces that differ to those that are known.

One bit a piece: a set has at most 32 MiB for a volume of 1 TiB, and 2 bytes a block of 64 KiB where
changes are dense.  A crash loses it: what the record names at the start is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bitarray.util import zeros

from bitmapd.gate.blockset import REGION_BLOCKS, REGION_SHIFT, BlockSet
from bitmapd.record.geometry import PIECE_BYTES, Geometry

PIECE_SHIFT: Final = PIECE_BYTES.bit_length() - 1
_MASK: Final = REGION_BLOCKS - 1


class Pieces(BlockSet):
    """Of an era, numbered from the start of the volume; a write that hits adds them here, and by
    that its blocks to those of the era."""

    __slots__ = ("_blocks", "_shift")

    def __init__(self, blocks: BlockSet, shift: int) -> None:
        super().__init__()
        self._blocks = blocks
        self._shift = shift

    def add(self, first: int, stop: int) -> None:
        if stop - first == 1:  # written out, as what it takes the place of
            bits = self._regions.get(first >> REGION_SHIFT)
            if bits is None:
                bits = self._put(first >> REGION_SHIFT, zeros(REGION_BLOCKS))
            low = first & _MASK
            if not bits[low]:
                bits[low] = True
                self._count += 1
                block = first >> self._shift
                self._blocks.add(block, block + 1)
            return
        super().add(first, stop)
        shift = self._shift
        self._blocks.add(first >> shift, (stop - 1 >> shift) + 1)


class _Changed:
    """Of ended eras."""

    __slots__ = ("pieces", "unknown")

    def __init__(self) -> None:
        self.pieces = BlockSet()
        self.unknown = BlockSet()  # blocks

    def add(self, pieces: BlockSet, unknown: BlockSet) -> None:
        """The sets may be kept, and are not to be used any more."""
        self.pieces = _united(self.pieces, pieces)
        self.unknown = _united(self.unknown, unknown)


class Changes:
    """See the module docstring."""

    def __init__(self, geometry: Geometry, blocks: BlockSet) -> None:
        """`blocks`: those of the era."""
        self._block_bytes = geometry.block_bytes
        self._shift = geometry.block_bytes.bit_length() - 1 - PIECE_SHIFT
        self._before = _Changed()
        self._since = _Changed()
        self.pieces = Pieces(blocks, self._shift)  # of this era
        self._questioned = BlockSet()

    def begin_era(self, blocks: BlockSet) -> None:
        """These are the blocks of the era that begins."""
        self._since.add(self.pieces, BlockSet())
        self.pieces = Pieces(blocks, self._shift)

    def cut(self) -> None:
        """What changes from the next era on belongs to the next point: it begins now."""
        self._before.add(_united(self._since.pieces, self.pieces), self._since.unknown)
        self._since = _Changed()
        self.pieces = Pieces(BlockSet(), self._shift)

    def committed(self) -> None:
        """The point of the newest cut is."""
        self._before = _Changed()

    def written(self, offset_bytes: int, length_bytes: int) -> None:
        """A change of the primary is submitted, other than a write that hits."""
        end = offset_bytes + length_bytes - 1
        self.pieces.add(offset_bytes >> PIECE_SHIFT, (end >> PIECE_SHIFT) + 1)

    def unknown(self, first: int, stop: int) -> None:
        """Blocks [first, stop) are to be sent, whatever of them changed."""
        self._since.unknown.add(first, stop)

    # -- in question ------------------------------------------------------------------------
    def next_unknown(self, start: int, limit: int) -> tuple[int, int] | None:
        """The first run of blocks from `start` on of which nobody knows what changed, and that are
        not in question; cut off after `limit` blocks, or before."""
        found = (changed.unknown.next_run(start, limit) for changed in (self._before, self._since))
        return min((run for run in found if run is not None), default=None)

    def question(self, first: int, stop: int) -> None:
        """It is asked what differs of these."""
        for changed in (self._before, self._since):
            changed.unknown.discard(first, stop)
        self._questioned.add(first, stop)

    def unanswered(self) -> None:
        """Nothing that is in question is answered any more."""
        self._since.unknown.update(self._questioned)
        self._questioned = BlockSet()

    def answered(self, block: int, mask: int | None) -> bool:
        """These pieces of it differ from the last point, and besides what is written since it was
        asked; None: that cannot be told.  Returns whether none differs, as it was asked."""
        self._questioned.discard(block, block + 1)
        if mask is None:
            self._since.unknown.add(block, block + 1)
            return False
        base, piece = block << self._shift, 0
        while mask >> piece:
            if mask >> piece & 1:
                self._since.pieces.add(base + piece, base + piece + 1)
            piece += 1
        known = not any(
            changed.unknown.any(block, block + 1) for changed in (self._before, self._since)
        )
        return known and not mask

    # -- what is asked ----------------------------------------------------------------------
    def of(self, block: int, *, pending: bool) -> int | None:
        """The mask of its pieces that changed; None: not known, so all of them."""
        sets = [self._before.pieces]
        if not pending:
            sets += self._since.pieces, self.pieces
        if self._before.unknown.any(block, block + 1):
            return None
        if self._questioned.any(block, block + 1):
            return None
        if not pending and self._since.unknown.any(block, block + 1):
            return None
        first, stop, mask = block << self._shift, block + 1 << self._shift, 0
        for pieces in sets:
            for begin, end in pieces.runs(first, stop):
                mask |= (1 << (end - first)) - (1 << (begin - first))
        return mask or None

    def bytes_in(self, runs: Iterable[tuple[int, int]]) -> int:
        """What has changed of these blocks since the last point."""
        count = 0
        for run in runs:
            for block in range(*run):
                mask = self.of(block, pending=False)
                count += 1 << self._shift if mask is None else mask.bit_count()
        return count * PIECE_BYTES

    @property
    def most_bytes(self) -> int:
        """What all of it has together, or more."""
        before, since = self._before, self._since
        pieces = before.pieces.count() + since.pieces.count() + self.pieces.count()
        blocks = before.unknown.count() + since.unknown.count() + self._questioned.count()
        return pieces * PIECE_BYTES + blocks * self._block_bytes

    @property
    def cut_bytes(self) -> int:
        """What the point of the newest cut changes; the last piece of a volume counts whole."""
        pieces, shift = self._before.pieces, self._shift
        count = pieces.count()
        for run in self._before.unknown.runs():
            first, stop = run[0] << shift, run[1] << shift
            count += stop - first - pieces.count_in(first, stop)
        return count * PIECE_BYTES


def _united(one: BlockSet, other: BlockSet) -> BlockSet:
    """All of both, in one of them."""
    if not one:  # nearly always
        return other
    one.update(other)
    return one
