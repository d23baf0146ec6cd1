"""What a volume does first: copy what the record names, and say what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitmapd.copier.engine import Copier
from bitmapd.gate.gate import Gate
from bitmapd.record.layout import InitialSync
from bitmapd.record.store import RecordStore
from bitmapd.volume.session import RecordSession
from bitmapd.volume.status import recorded_bytes

Emit = Callable[..., None]


class Recovery:
    """The pass over everything that was recorded at the start.  A crash in it leaves the record as
    it was, less what has been settled since, so it can be begun again at any time."""

    def __init__(
        self,
        session: RecordSession,
        store: RecordStore,
        gate: Gate,
        copier: Copier,
        clock: Callable[[], float],
        emit: Emit,
    ) -> None:
        self._session = session
        self._store = store
        self._gate = gate
        self._copier = copier
        self._clock = clock
        self._emit = emit
        self._reason = ""
        self.result: dict[str, Any] | None = None  # `last_recovery` of the status
        copier.on_pass_done = self._pass_done

    def begin(self) -> None:
        """Mark everything recorded as to be copied."""
        initial = self._session.superblock.initial_sync
        self._extents = self._store.recorded_extents
        self._bytes_total = recorded_bytes(self._store, self._session.superblock.geometry)
        self._started_s = self._clock()
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

    def give_way(self) -> None:
        """The pass that comes now is a resync and not a recovery."""
        self._reason = ""

    def _pass_done(self) -> None:
        if self._reason == "":
            return
        self.result = {
            "reason": self._reason,
            "extents": self._extents,
            "bytes_total": self._bytes_total,
            "bytes_copied": self._copier.pass_copied_bytes,
            "seconds": round(self._clock() - self._started_s, 3),
        }
        self._reason = ""
        self._emit("recovery-finished", **self.result)
        if self._session.superblock.initial_sync is not InitialSync.NONE:
            self._session.update(initial_sync=InitialSync.NONE)
