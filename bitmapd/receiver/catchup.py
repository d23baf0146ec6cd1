"""A point that the journal has no room for, and what becomes of the one before it (pure).

After days without a link more may have changed than fits into the journal, and an open point that
fills it can be neither committed nor applied.  The way out is the one of the first copy: what is
sent goes into the image at once.  From the first such write until that point is committed the image
is between two points, so this is done only where the administrator has chosen what becomes of the
last one.

| `catch_up` | the sender that asks | the last point meanwhile |
| --- | --- | --- |
| keep | is not followed in that: it waits | in the image |
| clone | is followed once a copy of the image is durable; not if none can be made | in the copy |
| in-place | is followed | given up |

Invariants:
1. The image is the last committed point, with nothing queued and nothing of the open point in the
   journal, until the commit page says durably from which point on it is one again.
2. With `clone` a copy of the last point is named as kept, durably, before that page; and it stays
   until the image is a point again.
3. Whoever has to know hears of it before that page is written.
4. What the page says holds for every sender and every process that comes until the point is
   committed, whatever the settings are then.

A crash before the page leaves a receiver as before, perhaps with a copy that nobody needs, which
goes when the next point is settled; one behind it a receiver that goes on in place.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import Keeping
from bitmapd.receiver.steps import Steps


class CatchUp(Enum):
    KEEP = "keep"
    CLONE = "clone"
    IN_PLACE = "in-place"


class CatchingUp:
    """See the module docstring.  `told` hears of events."""

    def __init__(
        self, mode: CatchUp, journal: Journal, keeping: Keeping, told: Callable[..., None]
    ) -> None:
        self._mode = mode
        self._journal = journal
        self._keeping = keeping
        self._emit = told

    def begin(self) -> Steps[None]:
        """A sender asks that the open point go into the image."""
        journal = self._journal
        page = journal.page
        if self._mode is CatchUp.KEEP or page.in_place or page.queue or journal.open.count:
            return
        copied = self._mode is CatchUp.CLONE
        yield from self._keeping.leave(page.committed_ns, self._begun(), copied=copied)

    def _begun(self) -> Steps[None]:
        journal = self._journal
        until, last = journal.open_point, journal.page.committed
        stays = self._keeping.is_kept(last)
        what = "stays in a copy" if stays else "is given up: until then there is nothing to promote"
        self._emit(
            "catch-up-begun",
            point=until,
            message=f"there is no room for it in the journal: it goes into the image, and point"
            f" {last} {what}",
        )
        yield from journal.inconsistent(until)
