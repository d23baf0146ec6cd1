"""A pause: nothing more is copied to the secondary, until `resume`.

Somebody pauses a volume to keep the secondary as it is: to look at it, to take it away, or because
the primary is not to be trusted.  So a pause belongs to the record, not to the process.

1. A pause that was answered lasts over a stop, a crash and a reboot: both copies of the superblock
   say so durably before the answer.  A start that finds it begins paused (`Copier.start`).
2. After the answer nothing is under way to the secondary.
3. Copying stands still before a pause is written, and goes on only after its end was written.  If
   that cannot be written, copying does what was asked for all the same, and the error says what the
   next start will find.
4. One change at a time, so that the record and the copier never end up with different ones; none
   any more once the session is about to end (`close`).

A crash during either leaves the volume paused or not; nobody was told which.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from bitmapd.errors import BitmapdError, WrongStateError
from bitmapd.media.waiting import Aside
from bitmapd.record.layout import Incompatible, InitialSync
from bitmapd.volume.mirror import Mirror
from bitmapd.volume.session import RecordSession

Emit = Callable[..., None]


class Pausing:
    """See the module docstring."""

    def __init__(
        self,
        name: str,
        session: RecordSession,
        copier: Mirror,
        until: Callable[[Callable[[], bool]], Awaitable[None]],
        aside: Aside,
        emit: Emit,
    ) -> None:
        """`until` waits for a condition that depends on the copier's state."""
        self._name = name
        self._session = session
        self._copier = copier
        self._until = until
        self._aside = aside
        self._emit = emit
        self._one = asyncio.Lock()
        self._closed = False
        self.paused = self.stored  # what was asked for; a stop in a hurry pauses the copier as well
        if self.stored:
            self._emit("paused", message=f"since an earlier session; {self.hint} ends it")

    @property
    def stored(self) -> bool:
        """What the record says."""
        return self._session.superblock.paused

    @property
    def hint(self) -> str:
        return f"'dmctl resume {self._name}'"

    def refuse(self, what: str) -> None:
        """WrongStateError if the volume is paused, for `what` would have to copy."""
        if self.paused:
            raise WrongStateError(
                f"volume '{self._name}' is paused: {what}", hint=f"dmctl resume {self._name}"
            )

    async def pause(self) -> None:
        """Return when nothing is copied any more, and the record says that nothing is to be."""
        async with self._one:
            self._refuse_closed()
            self.paused = True
            self._copier.pause()
            if not self.stored:
                await self._write(paused=True)
                self._emit("paused")
        await self._until(lambda: self._copier.idle or not self.paused)

    async def resume(self) -> None:
        async with self._one:
            self._refuse_closed()
            try:
                if self.stored:
                    await self._write(paused=False)
                    self._emit("resumed")
            finally:
                self.paused = False
                self._copier.resume()

    def hold(self) -> None:
        """Copy nothing from now on; `keep` has it last."""
        self.paused = True
        self._copier.pause()

    async def keep(self) -> None:
        """Have a pause that nobody asked for last until `resume`, and then compare everything that
        is recorded.  What keeps it from lasting is told."""
        async with self._one:
            if not self.paused:  # somebody was faster
                return
            try:
                await self._write(paused=True, initial_sync=InitialSync.CHECKSUM)
            except BitmapdError as error:
                self._emit("record-error", message=error.message)

    async def close(self) -> None:
        """Return when no change is under way; there will be none any more."""
        async with self._one:
            self._closed = True

    def _refuse_closed(self) -> None:
        if self._closed:
            raise WrongStateError(f"volume '{self._name}' is being stopped")

    async def _write(self, *, paused: bool, **more: object) -> None:
        present = self._session.superblock.incompatible
        wanted = present | Incompatible.PAUSED if paused else present & ~Incompatible.PAUSED
        try:
            await self._aside(self._session.update, incompatible=int(wanted), **more)
        except BitmapdError as error:
            now, later = ("stands still", "goes on") if paused else ("goes on", "stands still")
            raise type(error)(
                f"copying {now}, but after a start of volume '{self._name}' it {later}, for the"
                f" record could not be written: {error.message}",
                hint="mend the record's device, then say it again",
            ) from error
