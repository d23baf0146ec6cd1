"""A sparse set of blocks or extents: what is dirty in an era, what is being copied (pure).

The set is cut into regions of 16,384 blocks (1 GiB at 64 KiB), each a bitarray of 2 KiB that
exists only while it has bits.  So an empty set costs nothing whatever the volume's size, taking
over a whole era's blocks is a swap of one dictionary, and the worst case is a plain bitmap: 2 MiB
per TiB.  A write marks its blocks in about 150 ns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bitarray import bitarray

REGION_SHIFT = 14
REGION_BLOCKS = 1 << REGION_SHIFT
_MASK = REGION_BLOCKS - 1


class BlockSet:
    """Blocks are non-negative integers; ranges are [first, stop)."""

    __slots__ = ("_regions",)

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self._regions: dict[int, bitarray] = {}
        for first, stop in runs:
            self.add(first, stop)

    def _pieces(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(region, first within it, stop within it) of a range."""
        while first < stop:
            region = first >> REGION_SHIFT
            end = min(stop, (region + 1) << REGION_SHIFT)
            yield region, first & _MASK, end - (region << REGION_SHIFT)
            first = end

    def add(self, first: int, stop: int) -> None:
        if stop - first == 1:
            region = first >> REGION_SHIFT
            bits = self._regions.get(region)
            if bits is None:
                bits = self._regions[region] = bitarray(REGION_BLOCKS)
                bits.setall(False)
            bits[first & _MASK] = True
            return
        for region, low, high in self._pieces(first, stop):
            bits = self._regions.get(region)
            if bits is None:
                bits = self._regions[region] = bitarray(REGION_BLOCKS)
                bits.setall(False)
            bits[low:high] = True

    def discard(self, first: int, stop: int) -> None:
        for region, low, high in self._pieces(first, stop):
            bits = self._regions.get(region)
            if bits is not None:
                bits[low:high] = False
                if not bits.any():
                    del self._regions[region]

    def any(self, first: int, stop: int) -> bool:
        """Whether some block of the range is in the set."""
        region = first >> REGION_SHIFT
        if region == (stop - 1) >> REGION_SHIFT:  # nearly always; evictions ask for many
            bits = self._regions.get(region)
            return bits is not None and bits.find(True, first & _MASK, (stop - 1 & _MASK) + 1) >= 0
        for region, low, high in self._pieces(first, stop):
            bits = self._regions.get(region)
            if bits is not None and bits.find(True, low, high) >= 0:
                return True
        return False

    def count(self) -> int:
        return sum(bits.count() for bits in self._regions.values())

    def count_in(self, first: int, stop: int) -> int:
        """How many blocks of the range are in the set."""
        return sum(
            self._regions[region].count(True, low, high)
            for region, low, high in self._pieces(first, stop)
            if region in self._regions
        )

    def update(self, other: BlockSet) -> None:
        """Add every block of the other set."""
        for region, bits in other._regions.items():
            mine = self._regions.get(region)
            if mine is None:
                self._regions[region] = bits.copy()
            else:
                mine |= bits

    def minus(self, other: BlockSet) -> BlockSet:
        """Those that the other set has not, as a set of its own."""
        left = BlockSet()
        for region, bits in self._regions.items():
            theirs = other._regions.get(region)
            rest = bits.copy() if theirs is None else bits & ~theirs
            if theirs is None or rest.any():
                left._regions[region] = rest
        return left

    def meets(self, other: BlockSet) -> bool:
        """Whether a block is in both."""
        return any(
            (bits & other._regions[region]).any()
            for region, bits in self._regions.items()
            if region in other._regions
        )

    def intersect(self, other: BlockSet) -> None:
        """Keep only blocks that are in the other set, too."""
        for region in list(self._regions):
            theirs = other._regions.get(region)
            if theirs is not None:
                self._regions[region] &= theirs
            if theirs is None or not self._regions[region].any():
                del self._regions[region]

    def next_run(self, start: int, limit: int | None = None) -> tuple[int, int] | None:
        """The first run of blocks at or after `start`, cut off after `limit` blocks."""
        first = self._next(start)
        if first is None:
            return None
        stop = first
        while limit is None or stop - first < limit:
            bits = self._regions.get(stop >> REGION_SHIFT)
            if bits is None:
                break
            low = stop & _MASK
            gap = bits.find(False, low)
            if gap >= 0:
                stop += gap - low
                break
            stop += REGION_BLOCKS - low
        if limit is not None:
            stop = min(stop, first + limit)
        return first, stop

    def _next(self, start: int) -> int | None:
        region = start >> REGION_SHIFT
        bits = self._regions.get(region)
        if bits is not None:
            found = bits.find(True, start & _MASK)
            if found >= 0:
                return (region << REGION_SHIFT) + found
        later = min((other for other in self._regions if other > region), default=None)
        if later is None:
            return None
        return (later << REGION_SHIFT) + self._regions[later].find(True)

    def runs(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """The maximal runs within [first, stop) in order; the set must not change meanwhile."""
        run = self.next_run(first, None if stop is None else stop - first)
        while run is not None and (stop is None or run[0] < stop):
            yield run if stop is None else (run[0], min(run[1], stop))
            run = self.next_run(run[1], None if stop is None else stop - first)

    def __bool__(self) -> bool:
        # `add` never leaves an empty region and `discard` removes one that became empty.
        return bool(self._regions)
