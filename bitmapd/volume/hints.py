"""What the policies of a volume have learnt: kept in the record between sessions, and handed from
one policy to the next.

1. It is written every ten minutes in which something was missed, and when the volume is let go of.
   A crash costs what was learnt since, and a write that it interrupts all of it; nothing else
   depends on it (`record/hints.py`).
2. It is read once, before hosts are served: reading and inflating would hold up their writes later.
3. What the present policy has no use for stays in memory for the one that comes after it: a bit for
   each extent of the volume and the trail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bitmapd.errors import BitmapdError
from bitmapd.gate.gate import Gate
from bitmapd.media.waiting import Aside
from bitmapd.predict.policy import Policy
from bitmapd.record.hints import Hints
from bitmapd.volume.session import RecordSession

SAVE_EVERY_S = 600.0

Emit = Callable[..., None]


class HintKeeper:
    def __init__(
        self,
        session: RecordSession,
        gate: Gate,
        loop: asyncio.AbstractEventLoop,
        aside: Aside,
        emit: Emit,
    ) -> None:
        self._session = session
        self._aside = aside
        self._gate = gate
        self._loop = loop
        self._emit = emit
        self._unused: Hints | None = None
        self._saved_misses = gate.misses
        self._due_s = loop.time() + SAVE_EVERY_S
        self._turn = asyncio.Lock()
        self._saving: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Have the gate's policy go on from the record's hints, before its first event."""
        self._offer(self._gate.policy, await self._aside(self._session.read_hints))

    def hand_over(self, policy: Policy) -> None:
        """Have the policy that is to take the place of the gate's go on from what is known; before
        its first event."""
        learnt = self._gate.policy.hints()
        self._offer(policy, self._unused if learnt is None else learnt)

    def _offer(self, policy: Policy, hints: Hints | None) -> None:
        self._unused = None if hints is None or policy.recall(hints) else hints

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
            try:
                await self._aside(self._session.write_hints, hints)
            except BitmapdError as error:
                self._emit("hints-not-saved", message=error.message)
            else:
                self._saved_misses = misses
