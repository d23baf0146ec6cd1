"""What a volume does first: copy what the record names, and say what became of it.

1. A pass is over when everything that was in the record when it began has been copied and settled.
   Its end is *kept* when the stored record no longer names what the pass took out of it and the
   superblock no longer asks for an initial sync, both durably.  Until then the volume is not in
   sync: a crash would have all of it copied again.
2. What cannot be written is tried again with the next tick; hosts and copying go on meanwhile.
3. What stays in the record for predicted writes is not waited for.

A crash in a pass leaves the record as it was, less what has been settled since, so it can be begun
again at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from bitmapd.errors import BitmapdError
from bitmapd.gate.gate import Gate
from bitmapd.media.waiting import Aside, completion
from bitmapd.record.holder import Record
from bitmapd.record.layout import InitialSync
from bitmapd.volume.mirror import Mirror
from bitmapd.volume.session import RecordSession
from bitmapd.volume.status import recorded_bytes

Emit = Callable[..., None]


class Recovery:
    """The pass over everything that was recorded at the start, and the end of any later one."""

    def __init__(
        self,
        session: RecordSession,
        store: Record,
        gate: Gate,
        copier: Mirror,
        loop: asyncio.AbstractEventLoop,
        aside: Aside,
        emit: Emit,
        on_kept: Callable[[], None],
    ) -> None:
        """`on_kept` is called when `kept` has become true."""
        self._session = session
        self._store = store
        self._gate = gate
        self._copier = copier
        self._loop = loop
        self._aside = aside
        self._emit = emit
        self._on_kept = on_kept
        self._keeping: asyncio.Task[None] | None = None
        self._reason = ""
        self._passes = 0
        self._inherited: tuple[int, int, float] | None = None  # extents, bytes copied, loop time
        self.kept = True  # the end of the last pass that is over (invariant 1)
        self.result: dict[str, Any] | None = None  # `last_recovery` of the status
        copier.passes.on_done = self._pass_done

    def begin(self) -> None:
        """Mark everything recorded as to be copied."""
        initial = self._session.superblock.initial_sync
        self._extents = self._store.recorded_extents
        self._bytes_total = recorded_bytes(self._store, self._session.superblock.geometry)
        self._started_s = self._loop.time()
        if initial is not InitialSync.NONE:
            self._reason = "initial"
        else:
            self._reason = "crash" if self._extents else "clean"
        self._gate.take_recorded()
        self._emit(
            "recovery-started",
            reason=self._reason,
            extents=self._extents,
            bytes_total=self._bytes_total,
        )
        if self._extents:
            self._copier.begin_pass(
                compare=initial is InitialSync.CHECKSUM,
                predecessor=self._session.superblock.session > 1,
            )
        else:
            self._pass_done()

    def inherited(self, extents: int) -> None:
        """So many extents of the partner's are ours, and are copied: a recovery of their own kind,
        over when everything is in sync."""
        self._inherited = (extents, self._copier.copied_bytes, self._loop.time())

    def look_at_inherited(self) -> None:
        """Whether that is over."""
        if self._inherited is None or not self._copier.in_sync:
            return
        (extents, copied_bytes, since_s), self._inherited = self._inherited, None
        geometry = self._session.superblock.geometry
        self.result = {
            "reason": "partner",
            "extents": extents,
            "bytes_total": min(extents * geometry.extent_bytes, geometry.size_bytes),
            "bytes_copied": self._copier.copied_bytes - copied_bytes,
            "seconds": round(self._loop.time() - since_s, 3),
        }
        self._emit("recovery-finished", **self.result)

    def give_way(self) -> None:
        """The pass that comes now is a resync and not a recovery."""
        self._reason = ""

    def _pass_done(self) -> None:
        if self._reason:
            self.result = {
                "reason": self._reason,
                "extents": self._extents,
                "bytes_total": self._bytes_total,
                "bytes_copied": self._copier.passes.copied_bytes,
                "seconds": round(self._loop.time() - self._started_s, 3),
            }
            self._reason = ""
            self._emit("recovery-finished", **self.result)
        self._passes += 1
        self.kept = self._store.settled and not self._initial
        self.tick()

    @property
    def _initial(self) -> bool:
        return self._session.superblock.initial_sync is not InitialSync.NONE

    def tick(self) -> None:
        """Have the end of the last pass kept, unless it is, or that is under way."""
        self.look_at_inherited()
        if not self.kept and self._keeping is None:
            self._keeping = self._loop.create_task(self._keep())

    async def _keep(self) -> None:
        passes = None
        try:
            while passes != self._passes:  # another one may have ended meanwhile
                passes = self._passes
                await completion(self._store.destage_clears)
                if self._initial:
                    await self._aside(self._session.update, initial_sync=InitialSync.NONE)
        except OSError:
            return  # the store has told it
        except BitmapdError as error:
            self._emit("record-error", message=error.message)
            return
        finally:
            self._keeping = None
        self.kept = True
        self._on_kept()

    async def end(self) -> None:
        """Return when nothing is under way; the copier has been stopped."""
        if self._keeping is not None:
            await self._keeping
