"""Sets of extents, or of blocks: as bits, as runs, one by one (pure).

Bits are in the byte order of the stored record.  Runs are half-open, in order and not touching.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bitarray import bitarray, util

Run = tuple[int, int]  # [first, stop)
Runs = tuple[Run, ...]


def zeros(size: int) -> bitarray:
    """A bitmap over `size` extents."""
    return util.zeros(size, "little")


def runs_of(bits: bitarray) -> Runs:
    """Maximal runs of ones."""
    return tuple(ones(bits, 0, len(bits)))


def ones(bits: bitarray, first: int, stop: int) -> Iterator[Run]:
    """Maximal runs of ones in [first, stop)."""
    return _runs(bits, True, first, stop)


def bits_of(runs: Runs, size: int) -> bitarray:
    """A bitmap of `size` bits with these runs of ones."""
    bits = zeros(size)
    for first, stop in runs:
        bits[first:stop] = True
    return bits


def each(runs: Iterable[Run]) -> Iterator[int]:
    """The extents of runs."""
    for first, stop in runs:
        yield from range(first, stop)


def joined(extents: Iterable[int]) -> Runs:
    """Maximal runs of a set of extents."""
    found: list[Run] = []
    for extent in sorted(set(extents)):
        if found and found[-1][1] == extent:
            found[-1] = (found[-1][0], extent + 1)
        else:
            found.append((extent, extent + 1))
    return tuple(found)


def unset(bits: bitarray, first: int, stop: int) -> Iterator[Run]:
    """Maximal runs of zeros in [first, stop)."""
    return _runs(bits, False, first, stop)


def _runs(bits: bitarray, value: bool, first: int, stop: int) -> Iterator[Run]:
    while (first := bits.find(value, first, stop)) >= 0:
        end = bits.find(not value, first, stop)
        end = stop if end < 0 else end
        yield first, end
        first = end
