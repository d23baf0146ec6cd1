"""The policy `lru`: demand only, least recently used goes first (pure).

For comparison, and for volumes on which prediction is unwanted.  Nothing rides along with a miss;
what was recorded stays while the volume is written, until the limit asks for it.  At rest the
record shrinks to nothing like that of any policy (`predict/stays.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bitmapd.predict.stays import BULK_EXTENTS, CAPACITY, StayTable
from bitmapd.record.geometry import Geometry
from bitmapd.record.hints import Hints


class LruPolicy:
    """See the module docstring; `bitmapd.predict.policy.Policy` is the contract."""

    name = "lru"

    def __init__(self, geometry: Geometry, capacity: int = CAPACITY) -> None:
        self._stays = StayTable(geometry.extents, (float("inf"),), capacity)

    def wrote(self, first: int, stop: int, now_s: float, hit: bool) -> None:
        stays = self._stays
        stays.last_write_s = now_s
        if stop - first > BULK_EXTENTS:
            return
        for extent in range(first, stop):
            if stays.recorded[extent]:
                stays.place(extent, 0, now_s)

    def predict(
        self, first: int, stop: int, now_s: float, limit: int, recorded: int
    ) -> Sequence[tuple[int, int]]:
        return ()

    def added(self, first: int, stop: int, now_s: float) -> None:
        self._stays.enter(first, stop)
        if stop - first <= BULK_EXTENTS:
            for extent in range(first, stop):
                self._stays.place(extent, 0, now_s)

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        for extent in extents:
            self._stays.leave(extent)

    def wants(self, extent: int, now_s: float) -> bool:
        return self._stays.wants(extent, now_s)

    def expired(self, now_s: float) -> Sequence[int]:
        named = self._stays.due(now_s)
        for extent in named:
            self._stays.forget(extent)
        return named + self._stays.take_loose()

    def hints(self) -> None:
        return None

    def recall(self, hints: Hints) -> bool:
        return False

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        return self._stays.coldest(count, is_clean)
