"""Points that are committed become the image, one after the other.

For each: all of its entries are verified, it is written to the image, the image is flushed, what it
changes joins the map of the newest kept point, the commit page says that it is applied, its space
is free; and a copy of the image is made, if the point is to stay (`keeping`).

Invariants:
1. Nothing of a point is written before all of it was verified.
2. A point is in the image as a whole or not at all, but for a crash while it is being written: then
   it is still queued, and is written again.
3. A point with an entry that is wrong waits.  `missing` are the blocks of such entries, less those
   that a later point of the queue has as a whole; when none is left, all points up to that one are
   written in one go.  A point whose count or digest is wrong lacks entries that nobody knows: it
   misses every block.
4. Only if a part of a point that waits may be in the image the commit page says that the image is
   inconsistent until the next point.  After a start nobody knows, so then it may.
5. An error of the image ends nothing: what was written is written again after `RETRY_S`.
6. Points of a group wait until all members have them, or until there is no place for another
   (`held`).
7. While a copy of the image is made nothing is written to it.

A crash leaves a queue, which is applied again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Protocol

from bitarray.util import zeros

from bitmapd.media.base import Device, Done, Scheduler
from bitmapd.peer.payloads import Runs
from bitmapd.points.pieces import whole_mask
from bitmapd.receiver.commit import Queued
from bitmapd.receiver.held import may_be_applied, named
from bitmapd.receiver.image import Guard, Redo
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import Keeping
from bitmapd.receiver.steps import Steps, run
from bitmapd.receiver.superblock import Line
from bitmapd.record.extents import runs_of
from bitmapd.record.geometry import Geometry

RETRY_S: Final = 10.0  # after an error of the image


class Owner(Protocol):
    """Who hears of it."""

    def applied(self, point: int) -> None:
        """All points up to this one, durably."""

    def damaged(self, missing: Runs) -> None:
        """These blocks have to come once more, with the next point."""

    def image_failed(self, error: OSError) -> None: ...


class Applier:
    """See the module docstring."""

    def __init__(
        self,
        journal: Journal,
        image: Device,
        line: Line,
        scheduler: Scheduler,
        owner: Owner,
        keeping: Keeping,
    ) -> None:
        self.missing: Runs = ()
        self.is_at_work = False
        self._journal = journal
        self._image = image
        self._redo = Redo(line.geometry, line.volume.bytes, journal.device, image)
        self._scheduler = scheduler
        self._owner = owner
        self.keeping = keeping
        page = journal.page
        self._cut_ns = page.committed_ns if page.applied == page.committed else None
        self._partly = bool(journal.page.queue)  # some of it may be in the image
        self._when_applied: list[Done] = []
        self.up_to = 0  # the newest point that a group may have in the image

    def name(self, group: int) -> None:
        """All members of the group have the point with that number."""
        self.up_to = named(self._journal.page, group, self.up_to)
        self.go_on()

    def make_place(self) -> int | None:
        """Another point is complete, and no more can be queued: the number of one that is applied
        although others of its group may lack it, if that has to be."""
        if self.due or not self._journal.page.queue:
            return None
        self.up_to = self._journal.page.queue[0].point
        self.go_on()
        return self.up_to

    @property
    def due(self) -> tuple[Queued, ...]:
        """What is to be applied."""
        return may_be_applied(self._journal.page.queue, self.up_to)

    def go_on(self) -> None:
        """There may be something in the queue, or a point to be kept."""
        if self._journal.page.applied and not self.is_at_work and self._journal.failure is None:
            self.is_at_work = True
            run(self.apply(), lambda error, _: self._ended(error))

    @property
    def is_whole(self) -> bool:
        """Whether the image is a point, and not between two."""
        return not (self._partly or self._journal.page.inconsistent_until)

    def guard(self, guard: Guard | None) -> None:
        """Who is asked before the image is overwritten; to be set while it is whole."""
        self._redo.guard = guard

    @property
    def guarded_by(self) -> Guard | None:
        return self._redo.guard

    def when_applied(self, done: Done) -> None:
        """Call it when the queue has become shorter."""
        self._when_applied.append(done)

    def _ended(self, error: OSError | None) -> None:
        self.is_at_work = False
        if error is not None and self._journal.failure is None:
            self._owner.image_failed(error)
            self._scheduler.call_later(RETRY_S, self.go_on)

    def apply(self) -> Steps[None]:
        """Until nothing is queued, or what is first in the queue has to wait for a later point."""
        journal = self._journal
        yield from self._settle()
        while queue := self.due:
            wrong, missing = yield from self._examine(queue)
            if missing is None:
                yield from self._write(wrong)
            elif queue == self.due:
                if self._partly and not journal.page.inconsistent_until:
                    yield from journal.inconsistent(journal.open_point)
                self.missing = missing
                self._owner.damaged(missing)
                return

    def _examine(
        self, queue: tuple[Queued, ...]
    ) -> Steps[tuple[dict[int, Collection[int]], Runs | None]]:
        """The first points of the queue that can be applied together: the wrong blocks of each; and
        those that no point of the whole queue makes good, if there are such."""
        blocks = self._geometry(queue[-1]).blocks  # a volume only grows
        wrong: dict[int, Collection[int]] = {}
        missing = zeros(blocks, "little")
        for queued in queue:
            entries = self._journal.points[queued.point]
            if (queued.entries, queued.digest) != (entries.count, entries.digest()):
                wrong[queued.point] = range(blocks)  # nobody knows what is lost
                missing.setall(True)
                continue
            geometry = self._geometry(queued)
            self._redo.resize(geometry)
            bad = yield from self._redo.verify(entries)
            if missing.any():
                for kept in entries:
                    if kept.mask == whole_mask(geometry, kept.block):
                        missing[kept.block] = False
            for block in bad:
                missing[block] = True
            wrong[queued.point] = frozenset(bad)
            if not missing.any():
                return wrong, None
        return wrong, runs_of(missing)

    def _write(self, wrong: dict[int, Collection[int]]) -> Steps[None]:
        journal = self._journal
        self._partly = True
        for queued in journal.page.queue:
            if queued.point not in wrong:
                continue
            self._redo.resize(self._geometry(queued))
            entries, bad = journal.points[queued.point], wrong[queued.point]
            if (yield from self._redo.apply(entries, bad)):
                return  # it rots under our hands: examine it again
        yield self._image.flush
        per = journal.line.geometry.blocks_per_extent
        yield from self.keeping.add(
            block // per for point in wrong for block, _ in journal.points[point].stamps()
        )
        last = max(wrong)
        cut_ns = next(queued.wall_ns for queued in journal.page.queue if queued.point == last)
        yield from journal.applied(last)
        self._partly, self._cut_ns = False, cut_ns
        self.missing = ()
        self._owner.applied(journal.page.applied)
        waiting, self._when_applied = self._when_applied, []
        for call in waiting:
            call(None)
        yield from self._settle()

    def _geometry(self, queued: Queued) -> Geometry:
        return self._journal.geometry_at(queued.size_bytes)

    def _settle(self) -> Steps[None]:
        """Keep the point that the image is.  A part of the next one may be in it if that is queued
        at the start, but not if the point is wanted: then nothing followed it."""
        page = self._journal.page
        if page.applied == page.committed:
            self._cut_ns = page.committed_ns
        yield from self.keeping.settle(page.applied, self._cut_ns if self.is_whole else None)
