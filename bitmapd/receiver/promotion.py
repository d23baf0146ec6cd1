"""A receiver becomes the volume: what happens to journal and image (pure but for the `Device`s).

| step | is durable | a crash behind it |
| --- | --- | --- |
| 1 | commit page: a promotion is under way | undone by the next start: a receiver as before |
| 2 | what is queued is in the image | the same, further on |
| 3 | a new record, made by the owner | the same: the record is made anew |
| 4 | superblock: a new generation, the term is one larger | the promotion goes on with 3 |
| 5 | commit page: promoted | it goes on behind this |

Nobody else works on journal and image meanwhile.

1. The image holds a point as a whole when the generation changes; or the administrator was told
   that it does not, and forced it.
2. What the newest committed point has and the image has not is in `Ready.since`: the old primary
   has it and its record need not name it, so the new record has to.
3. From 4 on a sender of the old generation is refused, whichever of its points it knows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Final
from uuid import UUID

from bitmapd.peer.payloads import Runs
from bitmapd.points.lineage import descend
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.commit import NO_FLAGS, PageFlag
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.steps import Steps
from bitmapd.receiver.superblock import Line
from bitmapd.record.extents import joined

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
    since: Runs
    obstacle: Obstacle | None


def has_new_generation(journal: Journal) -> bool:
    """Whether step 4 was done: it can only go on."""
    page, line = journal.page, journal.superblock.line
    if line is None or page.flags & PageFlag.PROMOTED:
        return line is not None
    return bool(page.flags & _HALF) and page.term < line.term


def prepare(journal: Journal, applier: Applier, line: Line, *, force: bool) -> Steps[Ready]:
    """Steps 1 and 2.  With an obstacle that is not forced everything is as before."""
    if not has_new_generation(journal):
        yield from journal.flagged(_HALF, line)
        yield from applier.apply()
    page = journal.page
    obstacle = None
    if not page.committed:
        obstacle = Obstacle.NEVER
    elif page.queue:
        obstacle = Obstacle.DAMAGED
    elif page.inconsistent_until:
        obstacle = Obstacle.INCONSISTENT
    per = line.geometry.blocks_per_extent
    extents = {kept.block // per for entries in journal.points.values() for kept in entries}
    if obstacle is not None and not force and not has_new_generation(journal):
        yield from undo(journal, line)
    return Ready(page.applied, joined(extents), obstacle)


def undo(journal: Journal, line: Line) -> Steps[None]:
    """A receiver as before; up to step 3."""
    yield from journal.flagged(NO_FLAGS, line)


def successor(line: Line, generation: UUID) -> Line:
    """What follows it."""
    generations = descend(line.generations, generation)
    return dataclasses.replace(line, generations=generations, term=line.term + 1)


def finish(journal: Journal, line: Line, now_s: int) -> Steps[None]:
    """Steps 4 and 5, with the successor."""
    if journal.superblock.line != line:
        yield from journal.follow(line, now_s)
    if not journal.page.flags & PageFlag.PROMOTED:
        yield from journal.flagged(PageFlag.PROMOTED, line)
