"""A receiver becomes the volume: what happens to journal and image (pure but for the `Device`s).

| step | is durable | a crash behind it |
| --- | --- | --- |
| 1 | commit page: a promotion is under way | undone by the next start: a receiver as before |
| 2 | what is queued is in the image; which older point is wanted | the same, further on |
| 3 | a new record, made by the owner | the same: the record is made anew |
| 4 | superblock: a new generation, the term is one larger | the promotion goes on with 3 |
| 5 | the image is the older point | it goes on with 3, and makes it that once more |
| 6 | commit page: promoted | it goes on behind this |

Nobody else works on journal and image meanwhile.

1. The image holds a point as a whole when the generation changes; or the administrator was told
   that it does not, and forced it.
2. What the newest committed point has and the image will not have is in `Ready.since`: the old
   primary has it and its record need not name it, so the new record has to.  That is what is queued
   and cannot be read; and with an older point the maps of all kept points from that one on.
3. From 4 on a sender of the old generation is refused, whichever of its points it knows.
4. The image becomes an older point behind 4 only: before, it may have to go on as a receiver's.
5. An image that gets the open point in place is no point; the copy that was made of the last one
   is taken, as if it had been asked for.
6. The volume has the size of its point, and the journal the largest one that it ever heard of: what
   the image has beyond is no part of the volume, and comes with a later `dmctl resize`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Final
from uuid import UUID

from bitarray import bitarray

from bitmapd.errors import WrongStateError
from bitmapd.peer.payloads import Runs
from bitmapd.points.lineage import descend
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.commit import NO_FLAGS, PageFlag
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import Keeping
from bitmapd.receiver.steps import Steps
from bitmapd.receiver.superblock import Line
from bitmapd.record.extents import runs_of, zeros

_HALF: Final = PageFlag.PROMOTING


class Obstacle(Enum):
    """Why an image is worth less than it should be."""

    NEVER = "it has never had a whole point"
    DAMAGED = "a point that it has committed cannot be read any more"
    INCONSISTENT = "it is between two points"


@dataclass(frozen=True, slots=True)
class Ready:
    """`point`: what the image holds.  `since`: extents of which newer points were committed."""

    point: int
    wall_ns: int  # of its cut
    since: Runs
    obstacle: Obstacle | None
    size_bytes: int  # of the volume


def has_new_generation(journal: Journal) -> bool:
    """Whether step 4 was done: it can only go on."""
    page, line = journal.page, journal.superblock.line
    if line is None or page.flags & PageFlag.PROMOTED:
        return line is not None
    return bool(page.flags & _HALF) and page.term < line.term


def prepare(
    journal: Journal,
    applier: Applier,
    line: Line,
    *,
    force: bool,
    point: int | None = None,
    up_to: int | None = None,
) -> Steps[Ready]:
    """Steps 1 and 2.  With an obstacle that is not forced everything is as before.  `point`: a kept
    one, instead of the newest; a promotion that goes on has the one that it began with.  `up_to`:
    the newest point that all of the group have; what is newer stays in the journal, and is named.
    """
    goes_on, keeping = has_new_generation(journal), applier.keeping
    if point is None and not goes_on and journal.page.in_place:
        last = journal.directory.newest
        if last is not None and last.point == journal.page.committed:
            point = last.point  # what the image was before a catch-up that goes into it
    if not goes_on:
        yield from journal.flagged(_HALF, line)
        applier.up_to = journal.page.committed if up_to is None else up_to
        yield from applier.apply()
        yield from keeping.choose(point)
    page, chosen = journal.page, keeping.chosen
    if point is not None and (chosen is None or chosen.point != point):
        if goes_on:
            begun = page.applied if chosen is None else chosen.point
            raise WrongStateError(
                f"a promotion was begun with point {begun}, and can only go on",
                hint="the same without a point does that",
            )
        yield from undo(journal, line)
        raise WrongStateError(f"of point {point} no copy could be made")
    since = _unread(journal, line)
    if chosen is not None:
        since |= yield from keeping.changed_since(chosen.point)
        size_bytes = chosen.size_bytes
        return Ready(
            chosen.point, chosen.wall_ns, _within(since, line, size_bytes), None, size_bytes
        )
    obstacle = None
    if not page.committed:
        obstacle = Obstacle.NEVER
    elif page.applied < (page.committed if up_to is None else up_to):
        obstacle = Obstacle.DAMAGED
    elif page.inconsistent_until:
        obstacle = Obstacle.INCONSISTENT
    if obstacle is not None and not force and not goes_on:
        yield from undo(journal, line)
    cut_ns = page.applied_ns if page.queue else page.committed_ns
    here_bytes = page.size_bytes if obstacle is None else page.committed_bytes
    size_bytes = here_bytes or line.geometry.size_bytes
    named = _within(since, line, size_bytes)
    return Ready(page.applied, cut_ns, named, obstacle, size_bytes)


def _within(extents: bitarray, line: Line, size_bytes: int) -> Runs:
    geometry = dataclasses.replace(line.geometry, size_bytes=size_bytes)
    return runs_of(extents[: geometry.extents])


def _unread(journal: Journal, line: Line) -> bitarray:
    """The extents of what is committed and not in the image."""
    per, extents = line.geometry.blocks_per_extent, zeros(line.geometry.extents)
    for queued in journal.page.queue:
        entries = journal.points[queued.point]
        if (queued.entries, queued.digest) != (entries.count, entries.digest()):
            extents.setall(True)  # nobody knows what is lost
        for block, _ in entries.stamps():
            extents[block // per] = True
    return extents


def undo(journal: Journal, line: Line) -> Steps[None]:
    """A receiver as before; up to step 3."""
    yield from journal.flagged(NO_FLAGS, line)


def successor(line: Line, generation: UUID) -> Line:
    """What follows it."""
    generations = descend(line.generations, generation)
    return dataclasses.replace(line, generations=generations, term=line.term + 1)


def finish(journal: Journal, keeping: Keeping, line: Line, now_s: int) -> Steps[None]:
    """Steps 4 to 6, with the successor."""
    if journal.superblock.line != line:
        yield from journal.follow(line, now_s)
    if not journal.page.flags & PageFlag.PROMOTED:
        yield from keeping.restore()
        yield from journal.flagged(PageFlag.PROMOTED, line)
