"""What the policy has learnt, kept in the record between sessions.

It is written every ten minutes in which something was missed, and when the volume is let go of.
A crash costs what was learnt since, and a write that it interrupts all of it; nothing else depends
on it (`record/hints.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bitmapd.errors import BitmapdError
from bitmapd.gate.gate import Gate
from bitmapd.record.hints import encode_hints
from bitmapd.session import RecordSession

SAVE_EVERY_S = 600.0

Emit = Callable[..., None]


class HintKeeper:
    def __init__(
        self, session: RecordSession, gate: Gate, loop: asyncio.AbstractEventLoop, emit: Emit
    ) -> None:
        self._session = session
        self._gate = gate
        self._loop = loop
        self._emit = emit
        self._saved_misses = gate.misses
        self._due_s = loop.time() + SAVE_EVERY_S
        self._turn = asyncio.Lock()
        self._saving: asyncio.Task[None] | None = None

    def tick(self) -> None:
        if self._loop.time() >= self._due_s:
            self._due_s = self._loop.time() + SAVE_EVERY_S
            self._saving = self._loop.create_task(self.save())

    async def save(self) -> None:
        """Returns when what was learnt up to now is on its way; a failure is told, no more."""
        async with self._turn:
            misses, hints = self._gate.misses, self._gate.policy.hints()
            if hints is None or misses == self._saved_misses:
                return

            def write() -> None:
                # Deflating a large volume's map takes longer than a host's write should wait.
                self._session.write_hints(encode_hints(hints))

            try:
                await self._loop.run_in_executor(None, write)
            except BitmapdError as error:
                self._emit("hints-not-saved", message=error.message)
            else:
                self._saved_misses = misses
