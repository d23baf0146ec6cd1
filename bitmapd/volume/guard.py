"""A secondary that was written while both sides were at rest: it is not overwritten unasked.

A clean stop leaves both sides equal.  If they differ at the next start somebody has written the
secondary: it was mounted, or used in the primary's place, or is a disk that was put back to a
snapshot.  What it holds may be all that is left of that, and copying would destroy it.  So the
volume starts paused, and says so; somebody decides.

1. Between a clean stop and the first comparison of the next session nothing is copied
   (`Copier.start`, guarded).
2. Once a difference is known everything is recorded, to be compared when the pause ends; so
   `resume` makes the sides equal, wherever they differ.
3. First the record names everything, then the superblock keeps the pause.  A crash in between
   starts a volume that copies; a crash behind it starts one that is paused.

What is compared is not everything.  A difference elsewhere goes unnoticed (`dmctl verify`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bitmapd.copier.engine import Copier, Places
from bitmapd.gate.gate import Gate
from bitmapd.volume.pausing import Pausing

MOST_LISTED = 4

Emit = Callable[..., None]


class Guard:
    """See the module docstring."""

    def __init__(
        self,
        name: str,
        secondary: str,
        gate: Gate,
        copier: Copier,
        pausing: Pausing,
        loop: asyncio.AbstractEventLoop,
        emit: Emit,
    ) -> None:
        self._name = name
        self._secondary = secondary
        self._gate = gate
        self._copier = copier
        self._pausing = pausing
        self._loop = loop
        self._emit = emit
        self._keeping: asyncio.Task[None] | None = None
        copier.on_changed_secondary = self.found

    def found(self, places: Places) -> None:
        """The sides differ, at these places at least, or nobody knows where."""
        where = "among its first and last MiB and 64 places in between"
        if places:
            where = ", ".join(f"{length} at {offset}" for offset, length in places[:MOST_LISTED])
            more = len(places) - MOST_LISTED
            where = f"bytes {where}" + (f" and {more} more places" if more > 0 else "")
        self._emit(
            "secondary-changed",
            secondary=self._secondary,
            places=[list(place) for place in places],
            message="the stop left both sides equal, and they differ now: somebody has written the"
            f" secondary, or it has forgotten ({where}). Nothing is copied over it. 'dmctl resume"
            f" {self._name}' compares everything and overwrites what differs; if the secondary was"
            " used in the primary's place, save what it holds first",
        )
        self._pausing.hold()
        recorded: asyncio.Future[OSError | None] = self._loop.create_future()
        self._gate.take_everything(recorded.set_result)
        self._copier.begin_pass(compare=True)
        self._keeping = self._loop.create_task(self._keep(recorded))

    async def _keep(self, recorded: asyncio.Future[OSError | None]) -> None:
        await recorded  # an error of the record is told by the store, and changes nothing here
        await self._pausing.keep()

    async def end(self) -> None:
        """Return when nothing is under way; the copier has been stopped."""
        if self._keeping is not None:
            await self._keeping
