"""The thread that does the costly part of TLS handshakes, one step of one client at a time (edge).

Signing with a key of RSA-4096 takes 3 ms and more, which the requests of all hosts would wait for
if the loop did it, and anybody who can connect can ask for it.  OpenSSL works without the lock of
the interpreter, so here it takes another processor.

1. A step never waits for a client: its socket does not block, and a step that needs more bytes
   ends.  Whatever a step raises is its result; the thread goes on.
2. The loop hands over one step after the other, in the order of `Turns`.  So a queue is nobody's
   but the loop's, a loop that is busy with requests slows handshakes and not the other way round,
   and all clients together take one processor at most.
3. An origin has one account for first steps, which cost much, and one for those that follow an
   answer of the client: whoever was served once does not compete with a flood again.
4. A step that was taken back has not begun and never does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from bitmapd.nbd.server.places import Turns


@dataclass(slots=True, eq=False)
class Step:
    """`work` is called on the thread, `done` with what it raised on the loop; then it may be handed
    in again."""

    origin: str
    work: Callable[[], None]
    done: Callable[[Exception | None], None]
    is_repeated: bool = False

    @property
    def account(self) -> tuple[str, bool]:
        return self.origin, self.is_repeated


class TlsWorker:
    """See the module docstring.  All methods but `_work` are called on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._turns: Turns[Step] = Turns()
        self._current: Step | None = None
        self.closed = False
        self._handed: SimpleQueue[Step | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tls", daemon=True)
        self._thread.start()

    def submit(self, step: Step) -> None:
        if not self.closed:
            self._turns.add(step.account, step)
            self._hand_over()

    def withdraw(self, step: Step) -> bool:
        """Take it back if it waits.  False if it is being carried out: `done` will be called."""
        self._turns.remove(step.account, step)
        return step is not self._current

    def close(self) -> None:
        """Returns when no step is being carried out; none begins any more."""
        self.closed = True
        self._turns = Turns()
        self._handed.put(None)
        self._thread.join()

    def _hand_over(self) -> None:
        if self._current is None and self._turns:
            self._current = self._turns.next()
            self._current.is_repeated = True
            self._handed.put(self._current)

    def _finished(self, step: Step, error: Exception | None) -> None:
        self._current = None
        self._hand_over()
        step.done(error)

    def _work(self) -> None:
        while (step := self._handed.get()) is not None:
            error: Exception | None = None
            try:
                step.work()
            except Exception as raised:  # noqa: BLE001  (it is the result, whatever it is)
                error = raised
            self._loop.call_soon_threadsafe(self._finished, step, error)
