"""Points that stay when newer ones come: their copies, their labels, and what changed since.

A copy of the image is made by a `Keeper`, whatever that is: a clone of a file, a snapshot of a
volume.  It is made of the image when this is just the point, so the next one is not applied before
it has ended.  Receiving goes on meanwhile, and nobody who writes waits.

| a point is | because | then |
| --- | --- | --- |
| WANTED | it has a label, rules want it, or `catchup` | its copy is made once it is in the image |
| KEPT | that has succeeded, and an empty map is durable | what is applied joins the newest map |
| GOING | its copy failed, or it is no longer needed | the copy is taken away |
| not named | that has succeeded | |

Invariants:
1. A label is in the directory, durably, before the point is committed.
2. While the point that the image has is WANTED, nothing newer is applied.
3. What a point changes is in the map of the newest kept point, durably, before the commit page says
   that it is applied.  So the maps from a kept point on name at least what differs between it and
   the image.
4. The map of a point that goes joins that of the one before it first.
5. A copy that fails costs its point, and nothing else.
6. While the open point goes into the image (`catchup`) no copy of that is made, and a copy of the
   last point stays.

A crash leaves a directory that says what was under way: what is WANTED is made again, what is GOING
is taken away again, and bits are added to a map a second time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from typing import Final, Protocol

from bitarray import bitarray

from bitmapd.errors import NotFoundError, WrongStateError
from bitmapd.media.base import Done
from bitmapd.media.buffers import aligned
from bitmapd.receiver.commit import Queued
from bitmapd.receiver.directory import NO_SLOT, Directory, Keep, KeptPoint
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.maps import PAGE_EXTENTS, decode_map, encode_map_page
from bitmapd.receiver.places import PAGE_BYTES
from bitmapd.receiver.retention import Rules, needed
from bitmapd.receiver.scan import AT_ONCE, pages_at
from bitmapd.receiver.steps import Steps, Turn, together
from bitmapd.record.extents import zeros

Change = Callable[[tuple[KeptPoint, ...]], Iterable[KeptPoint]]


class Keeper(Protocol):
    """Makes copies of the image, each durable when it ends, whatever an attempt before has left."""

    @property
    def obstacle(self) -> str | None:
        """Why it can keep nothing."""

    def keep(self, kept: KeptPoint, done: Done) -> None:
        """The image is this point until it has ended."""

    def drop(self, kept: KeptPoint, done: Done) -> None:
        """Also one that was never made, or only in part."""

    def restore(self, kept: KeptPoint, done: Done) -> None:
        """The image is this point again, durably; the copy stays."""


class Keeping:
    """See the module docstring.  `told` hears of events."""

    def __init__(
        self,
        journal: Journal,
        keeper: Keeper,
        rules: Rules | None,
        told: Callable[..., None],
    ) -> None:
        """`rules`: None leaves what is kept as it is."""
        self._journal = journal
        self._keeper = keeper
        self._rules = rules
        self._emit = told
        self._work = Turn()  # on copies and maps
        self._naming = Turn()  # of directories
        self._open: bitarray | None = None  # map of the newest kept point, once it is known
        self._looked = False  # at what an earlier process has left

    # -- figures --------------------------------------------------------------------------------
    @property
    def points(self) -> tuple[KeptPoint, ...]:
        """In order; also those that are not kept yet, or no longer."""
        return self._journal.directory.points

    # -- what may come to it --------------------------------------------------------------------
    def name(self, queued: Queued, label: str) -> Steps[None]:
        """Before a point is committed: whether it has to be kept."""
        point = queued.point
        wanted: list[KeptPoint] = []
        if label and (reason := self._obstacle(point)):
            self._emit("point-not-kept", point=point, reason=reason)
        elif label:
            wanted.append(self._wanted(point, queued.wall_ns, label, queued.size_bytes))
        yield from self._named(
            lambda points: [*(kept for kept in points if kept.point != point), *wanted]
        )

    def add(self, extents: Iterable[int]) -> Steps[None]:
        """Points that are being applied change these."""
        yield from self._work.alone(self._added(extents))

    def settle(self, point: int, wall_ns: int | None) -> Steps[None]:
        """The image is this point, and nothing else is applied: keep it, if it is wanted or due.
        `wall_ns`: when it was cut; None if it can no longer be due."""
        yield from self._work.alone(self._settled(point, wall_ns))

    def leave(self, wall_ns: int, then: Steps[None], *, copied: bool) -> Steps[None]:
        """The image, which is the last point, is one no longer when `then` has ended; with `copied`
        a copy of it is kept before, and nothing is done if none can be."""
        yield from self._work.alone(self._left(wall_ns, then, copied=copied))

    def is_kept(self, point: int) -> bool:
        """Whether there is a copy of it."""
        return any(kept.point == point for kept in self._journal.directory.kept)

    def drop(self, point: int) -> Steps[None]:
        """NotFoundError if it is not kept, WrongStateError if nothing else has the last point."""
        yield from self._work.alone(self._dropped(point))

    def choose(self, point: int | None) -> Steps[None]:
        """A promotion takes this one; None: the newest, which is no kept one."""

        def chosen(points: tuple[KeptPoint, ...]) -> Iterable[KeptPoint]:
            for kept in points:
                state = Keep.CHOSEN if kept.point == point else Keep.KEPT
                yield dataclasses.replace(kept, state=state) if kept.has_map else kept

        yield from self._named(chosen)

    @property
    def chosen(self) -> KeptPoint | None:
        """What a promotion that goes on has chosen."""
        return next((kept for kept in self.points if kept.state is Keep.CHOSEN), None)

    def restore(self) -> Steps[None]:
        """The image becomes the chosen point, if there is one."""
        if self.chosen is not None:
            yield partial(self._keeper.restore, self.chosen)

    def changed_since(self, point: int) -> Steps[bitarray]:
        """The extents in which a kept point and the image's one may differ."""
        changed = zeros(self._journal.line.geometry.extents)
        for kept in self._journal.directory.kept:
            if kept.point >= point:
                changed |= yield from self._map_of(kept)
        return changed

    # -- a larger size --------------------------------------------------------------------------
    def grow(self, growth: Steps[None], most: int) -> Steps[None]:
        """The journal takes up a larger size by `growth`, and has room for so many maps then: those
        in use, which may be elsewhere then, say what they have said.  Until one is written there it
        names everything (`maps`)."""
        yield from self._work.alone(self._grown(growth, most))

    def _grown(self, growth: Steps[None], most: int) -> Steps[None]:
        said = {}
        for kept in self._journal.directory.kept:
            said[kept.point] = yield from self._map_of(kept)
        yield from growth
        if any(kept.slot >= most for kept in self._journal.directory.kept):
            yield from self._named(_closed_up)
        added = zeros(self._journal.line.geometry.extents)
        for kept in self._journal.directory.kept:
            bits = said[kept.point]
            bits.extend(added[len(bits) :])
            yield from self._write_map(kept, bits, range(self._pages))
            self._open = bits  # the newest is the last one

    # -- keeping --------------------------------------------------------------------------------
    def _left(self, wall_ns: int, then: Steps[None], *, copied: bool) -> Steps[None]:
        page = self._journal.page
        point = page.applied
        yield from self._settled(point, None)  # what has to be kept of it for another reason
        if copied and not self.is_kept(point):
            if reason := self._obstacle(point):
                self._emit("point-not-kept", point=point, reason=reason)
                return
            wanted = self._wanted(point, wall_ns, "", page.size_bytes)
            yield from self._named(lambda points: [*points, wanted])
            yield from self._make(wanted)
            if not self.is_kept(point):
                return
        yield from then

    def _settled(self, point: int, wall_ns: int | None) -> Steps[None]:
        in_place = self._journal.page.in_place
        for kept in self.points:
            missed = kept.state is Keep.WANTED and kept.point < point
            if missed:
                reason = "a newer point was applied together with it"
                self._emit("point-not-kept", point=kept.point, reason=reason)
            if missed or (kept.state is Keep.GOING and not self._looked):
                yield from self._let_go(kept)
        self._looked = True
        here = self._journal.directory.find(point)
        if here is None and wall_ns is not None and self._is_due(point, wall_ns):
            here = self._wanted(point, wall_ns, "", self._journal.page.size_bytes)
            wanted = here
            yield from self._named(lambda points: [*points, wanted])
        if here is not None and here.state is Keep.WANTED:
            yield from self._make(here)
        if self._rules is None:
            return
        stay = needed(self.points, self._rules)
        for kept in self._journal.directory.kept:
            if kept.point not in stay and not (in_place and kept.point == point):
                yield from self._let_go(kept)

    def _is_due(self, point: int, wall_ns: int) -> bool:
        if self._rules is None or self._journal.page.in_place or self._obstacle(point):
            return False
        here = self._wanted(point, wall_ns, "", 0)
        return point in needed([*self.points, here], self._rules)

    def _obstacle(self, point: int) -> str | None:
        """Why a point cannot be kept."""
        if self._keeper.obstacle:
            return self._keeper.obstacle
        others = [kept for kept in self.points if kept.point != point]
        if len(others) >= self._journal.places.maps:
            return f"{len(others)} are kept, and the journal has no room for another change map"
        return None

    def _wanted(self, point: int, wall_ns: int, label: str, size_bytes: int) -> KeptPoint:
        line = self._journal.line
        size_bytes = size_bytes or line.geometry.size_bytes
        generation = line.generations[0].bytes
        return KeptPoint(point, wall_ns, generation, size_bytes, Keep.WANTED, NO_SLOT, label)

    def _make(self, wanted: KeptPoint) -> Steps[None]:
        try:
            yield partial(self._keeper.keep, wanted)
        except OSError as error:
            self._emit("point-not-kept", point=wanted.point, reason=str(error))
            yield from self._let_go(wanted)
            return
        used = {kept.slot for kept in self._journal.directory.kept}
        slot = next(slot for slot in range(self._journal.places.maps) if slot not in used)
        made = dataclasses.replace(wanted, state=Keep.KEPT, slot=slot)
        empty = zeros(self._journal.line.geometry.extents)
        yield from self._write_map(made, empty, range(self._pages))
        yield from self._replaced(made)
        self._open = empty
        self._emit("point-kept", point=made.point, label=made.label)

    # -- letting go -----------------------------------------------------------------------------
    def _dropped(self, point: int) -> Steps[None]:
        kept = self._journal.directory.find(point)
        if kept is None or not kept.has_map:
            raise NotFoundError(f"point {point} is not kept")
        page = self._journal.page
        if page.in_place and point == page.committed:
            raise WrongStateError(
                f"nothing but the copy of point {point} has the last point",
                hint=f"point {page.inconsistent_until} ends that, when it is committed",
            )
        yield from self._let_go(kept)

    def _let_go(self, kept: KeptPoint) -> Steps[None]:
        if kept.has_map:
            yield from self._passed_on(kept)
        going = dataclasses.replace(kept, state=Keep.GOING, slot=NO_SLOT)
        yield from self._replaced(going)
        try:
            yield partial(self._keeper.drop, going)
        except OSError as error:
            self._emit("point-not-dropped", point=going.point, reason=str(error))
            return
        yield from self._named(
            lambda points: (other for other in points if other.point != going.point)
        )
        if kept.has_map:
            self._emit("point-dropped", point=going.point)

    def _passed_on(self, kept: KeptPoint) -> Steps[None]:
        """What its map has joins that of the one before."""
        is_open = kept == self._journal.directory.newest
        before = self._journal.directory.before(kept.point)
        together_bits: bitarray | None = None
        if before is not None:
            together_bits = yield from self._map_of(before)
            together_bits |= yield from self._map_of(kept)
            yield from self._write_map(before, together_bits, range(self._pages))
        if is_open:
            self._open = together_bits

    # -- maps -----------------------------------------------------------------------------------
    @property
    def _pages(self) -> int:
        return self._journal.places.map_bytes // PAGE_BYTES

    def _added(self, extents: Iterable[int]) -> Steps[None]:
        newest = self._journal.directory.newest
        if newest is None:
            return
        if self._open is None:
            self._open = yield from self._map_of(newest)
        pages = set()
        for extent in extents:
            if not self._open[extent]:
                self._open[extent] = True
                pages.add(extent // PAGE_EXTENTS)
        yield from self._write_map(newest, self._open, pages)

    def _map_of(self, kept: KeptPoint) -> Steps[bitarray]:
        places = self._journal.places
        start = places.map_offset(kept.slot)
        offsets = range(start, start + places.map_bytes, PAGE_BYTES)
        pages: list[memoryview | None] = []
        for at in range(0, len(offsets), AT_ONCE):
            pages += yield from pages_at(self._journal.device, offsets[at : at + AT_ONCE])
        journal = self._journal.superblock.journal.bytes
        return decode_map(pages, journal, kept.point, places.geometry.extents)

    def _write_map(self, kept: KeptPoint, bits: bitarray, pages: Iterable[int]) -> Steps[None]:
        """Durable when it goes on."""
        start = self._journal.places.map_offset(kept.slot)
        journal = self._journal.superblock.journal.bytes
        writes = []
        for page in pages:
            buffer = aligned(PAGE_BYTES)
            buffer[:] = encode_map_page(bits, journal, kept.point, page)
            writes.append(partial(self._journal.put, start + page * PAGE_BYTES, buffer))
        if writes:
            yield together(writes)

    # -- the directory --------------------------------------------------------------------------
    def _replaced(self, kept: KeptPoint) -> Steps[None]:
        yield from self._named(
            lambda points: (kept if other.point == kept.point else other for other in points)
        )

    def _named(self, change: Change) -> Steps[None]:
        """Durable when it goes on; nothing is written if nothing changes."""
        yield from self._naming.alone(self._written(change))

    def _written(self, change: Change) -> Steps[None]:
        before = self._journal.directory
        points = tuple(sorted(change(before.points), key=lambda kept: kept.point))
        if points != before.points:
            yield from self._journal.name_kept(Directory(before.sequence + 1, points))


def _closed_up(points: tuple[KeptPoint, ...]) -> Iterable[KeptPoint]:
    """Their maps in the first slots."""
    slots = count()
    for kept in points:
        yield dataclasses.replace(kept, slot=next(slots)) if kept.has_map else kept


class NoKeeper:
    """Of an image of which no copies can be made."""

    def __init__(self, obstacle: str) -> None:
        self.obstacle: str | None = obstacle

    def keep(self, kept: KeptPoint, done: Done) -> None:
        self.drop(kept, done)

    def drop(self, kept: KeptPoint, done: Done) -> None:
        done(OSError(self.obstacle))

    restore = drop


NO_KEEPER: Final = NoKeeper("this receiver has neither a file system that clones nor a point_hook")
