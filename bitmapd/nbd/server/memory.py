"""Buffers for the requests of all connections, in the order in which they ask.

1. Whoever finds the pool empty waits; it is resumed when it is its turn, and nobody overtakes it.
2. One that got something in its turn and needs more goes to the end of the queue; one that got
   nothing stays in front, so that the largest request has its turn, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from bitmapd.media.buffers import BufferPool


class Waiter(Protocol):
    def resume(self) -> None:
        """It is this one's turn: take what is needed, or wait again."""


class Memory:
    """`in_batch` runs a function as one batch of requests."""

    def __init__(self, pool: BufferPool, in_batch: Callable[[Callable[[], None]], None]) -> None:
        self.give = pool.give
        self._pool = pool
        self._in_batch = in_batch
        self._waiters: deque[Waiter] = deque()
        self._turn: Waiter | None = None
        self._turn_served = False
        self._armed = False

    def take(self, waiter: Waiter, length_bytes: int) -> memoryview | None:
        """A buffer, or None and a `resume` when it is this one's turn."""
        if self._waiters and waiter is not self._turn:
            if waiter not in self._waiters:
                self._waiters.append(waiter)
            return None
        buffer = self._pool.take(length_bytes)
        if buffer is not None:
            self._turn_served = True
            return buffer
        if waiter is self._turn and not self._turn_served:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        if not self._armed:
            self._armed = True
            self._pool.when_free(self.serve)
        return None

    def others_wait(self, waiter: Waiter) -> bool:
        return any(other is not waiter for other in self._waiters)

    def leave(self, waiter: Waiter) -> bool:
        """Ask no more.  True if it waited: then `serve` is due, since it may have been the one
        that the others queued behind."""
        if waiter not in self._waiters:
            return False
        self._waiters.remove(waiter)
        return True

    def serve(self) -> None:
        """Something has been given back: resume those who wait, as far as it goes."""
        self._armed = False
        self._in_batch(self._serve)

    def _serve(self) -> None:
        try:
            while self._waiters and not self._armed:
                self._turn, self._turn_served = self._waiters.popleft(), False
                self._turn.resume()
        finally:
            self._turn = None
