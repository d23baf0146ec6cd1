"""What the two sides of a volume have in some blocks, compared (pure).

`Comparison` is one way to find out; here is that of a secondary which can be read: both sides are
read into one buffer.  A receiver says sums instead (`points.sums`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial
from typing import Protocol

import xxhash

from bitmapd.media.base import Device, Target
from bitmapd.media.buffers import PAGE_BYTES, BufferPool
from bitmapd.record.geometry import Geometry


class Side(enum.Enum):
    PRIMARY = "primary"
    SECONDARY = "secondary"


# With the sides that could not be read, or with the blocks that differ if there is no such side.
Compared = Callable[[list[tuple[Side, OSError]], list[int]], None]


class Comparison(Protocol):
    """Of one volume."""

    @property
    def connected(self) -> bool:
        """Whether the secondary can be asked."""

    def compare(self, first: int, stop: int, compared: Compared) -> bool:
        """Compare blocks [first, stop) as they are from now on; `compared` is never called from
        inside.  False if there is no memory for it now: `when_room` says when there is."""

    def when_room(self, call: Callable[[], None]) -> None: ...

    def hurry(self) -> None:
        """What is under way keeps blocks from being compared: end it soon."""


def when_both(
    then: Callable[[list[tuple[Side, OSError]]], None],
) -> Callable[[Side, OSError | None], None]:
    """What each side ends with; `then` hears when both have, and which of them failed."""
    waiting = len(Side)
    failures: list[tuple[Side, OSError]] = []

    def ended(side: Side, error: OSError | None) -> None:
        nonlocal waiting
        waiting -= 1
        if error is not None:
            failures.append((side, error))
        if not waiting:
            then(failures)

    return ended


class BothRead:
    """`Comparison` with a secondary that can be read."""

    def __init__(
        self, geometry: Geometry, primary: Device, secondary: Target, pool: BufferPool
    ) -> None:
        self._geometry = geometry
        self._primary = primary
        self._secondary = secondary
        self._pool = pool

    @property
    def connected(self) -> bool:
        return self._secondary.connected

    def compare(self, first: int, stop: int, compared: Compared) -> bool:
        offset, length = self._geometry.block_bytes_range(first, stop)
        # One buffer for both, so that the pool's promise (something is always handed out when
        # nothing is out) holds for the pair, however large a block is.
        half = -(-length // PAGE_BYTES) * PAGE_BYTES
        both = self._pool.take(2 * half)
        if both is None:
            return False
        mine, theirs = both[:length], both[half : half + length]

        def read(failures: list[tuple[Side, OSError]]) -> None:
            differing = [] if failures else self._differing(first, stop, mine, theirs)
            self._pool.give(both)
            compared(failures, differing)

        was_read = when_both(read)
        self._primary.read(offset, mine, partial(was_read, Side.PRIMARY))
        self._secondary.read(offset, theirs, partial(was_read, Side.SECONDARY))
        return True

    def _differing(self, first: int, stop: int, mine: memoryview, theirs: memoryview) -> list[int]:
        if xxhash.xxh3_64_intdigest(mine) == xxhash.xxh3_64_intdigest(theirs):
            return []
        size = self._geometry.block_bytes
        places = [(block, slice((block - first) * size, (block - first + 1) * size))
                  for block in range(first, stop)]  # fmt: skip
        return [block for block, at in places if bytearray(mine[at]) != theirs[at]]

    def when_room(self, call: Callable[[], None]) -> None:
        self._pool.when_free(call)

    def hurry(self) -> None:
        """Copies settle by themselves."""
