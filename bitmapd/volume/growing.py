"""How a volume of a pair takes up a larger size, as `partner/growth` has it do so (edge).

The steps are those of `resize`, but for the extent of the old end: at the node that grows first it
is in the record as in a volume of one node, and at the other it counts as recorded, so it is stored
there before the superblock says the new size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from bitmapd.media.base import Done
from bitmapd.partner.growth import Answer
from bitmapd.partner.pair import Pair
from bitmapd.record.geometry import Geometry
from bitmapd.volume.answers import Answers
from bitmapd.volume.assemble import Parts
from bitmapd.volume.resize import enlarge, present_geometry, record_short_end, take_up


class Grown(Protocol):
    """The volume."""

    @property
    def geometry(self) -> Geometry: ...

    def grown(self, geometry: Geometry) -> None:
        """The parts have taken up a larger size."""


class PairGrowth:
    """`partner.growth.Media`."""

    def __init__(
        self, parts: Parts, pair: Pair, volume: Grown, on_grown: Callable[[], None]
    ) -> None:
        """`on_grown` is called after every growth, when all know of it but hosts."""
        self._parts = parts
        self._pair = pair
        self._volume = volume
        self._on_grown = on_grown
        self._answers = Answers(parts.loop)

    def look(self, size_bytes: int, answer: Answer) -> None:
        self._answers.begin(self._look(size_bytes), answer)

    async def _look(self, size_bytes: int) -> str | None:
        parts = self._parts
        found = await present_geometry(
            parts.config,
            self._volume.geometry,
            parts.secondary,
            parts.loop,
        )
        if found is None or found.size_bytes < size_bytes:
            there = self._volume.geometry.size_bytes if found is None else found.size_bytes
            return f"primary {parts.config.primary} has {there} bytes here, not {size_bytes}"
        return None

    def record_end(self, done: Done) -> None:
        self._parts.gate.prepare_growth(done)

    def enlarge(self, size_bytes: int, answer: Answer) -> None:
        self._answers.begin(self._enlarge(self._larger(size_bytes)), answer)

    async def _enlarge(self, geometry: Geometry) -> None:
        parts, old = self._parts, self._volume.geometry
        await enlarge(parts, geometry, partial(record_short_end, parts.store, old, parts.loop))

    def _larger(self, size_bytes: int) -> Geometry:
        return replace(self._volume.geometry, size_bytes=size_bytes)

    def grow(self, size_bytes: int) -> None:
        geometry = self._larger(size_bytes)
        take_up(self._parts, self._volume.geometry, geometry, mine=False)
        self._pair.grow(geometry)
        self._volume.grown(geometry)
        self._on_grown()

    async def end(self) -> None:
        """Return when nothing is under way."""
        await self._answers.end()
