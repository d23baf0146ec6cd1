"""Sums of the image, for a sender that compares it with its volume (pure).

Invariants:
1. A question is answered when the image has every point that was committed when it came, with what
   the image has then.  What a later point writes meanwhile is the sender's to know.
2. Questions are answered in their order, one at a time, over the connection that they came on; what
   cannot be read is answered with no sums.
3. A question is at most `MOST_BYTES`, and at most `MOST_ASKED` wait: more is wrong.

A crash loses the questions, with their connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from bitmapd.media.base import Device
from bitmapd.media.buffers import aligned
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.points.messages import Sums
from bitmapd.points.sums import sums_of
from bitmapd.receiver.journal import Journal
from bitmapd.record.geometry import MIB, Geometry

MOST_BYTES: Final = 4 * MIB
MOST_ASKED: Final = 16


class Summing:
    """See the module docstring."""

    def __init__(
        self, geometry: Geometry, journal: Journal, image: Device, send: Callable[[Sums], None]
    ) -> None:
        self._geometry = geometry
        self._journal = journal
        self._image = image
        self._send = send
        self._asked: deque[tuple[int, int, int]] = deque()  # point, first, stop
        self._connection = 0
        self.is_at_work = False

    def forget(self) -> None:
        """The connection that asked is gone."""
        self._asked.clear()
        self._connection += 1

    def ask(self, runs: Runs) -> None:
        """PeerError if that is too much."""
        for first, stop in runs:
            length = self._geometry.block_bytes_range(first, stop)[1]
            if length > max(MOST_BYTES, self._geometry.block_bytes):
                raise PeerError(ErrorCode.SIZE, f"sums of {length} bytes were asked for at once")
            if len(self._asked) >= MOST_ASKED:
                raise PeerError(ErrorCode.BUSY, f"more than {MOST_ASKED} sums were asked for")
            self._asked.append((self._journal.page.committed, first, stop))
        self.go_on()

    def go_on(self) -> None:
        """A point may have been applied."""
        if self.is_at_work or not self._asked or self._asked[0][0] > self._journal.page.applied:
            return
        _, first, stop = self._asked.popleft()
        offset, length = self._geometry.block_bytes_range(first, stop)
        buffer = aligned(length)
        self.is_at_work = True
        self._image.read(offset, buffer, partial(self._read, self._connection, first, buffer))

    def _read(self, connection: int, first: int, buffer: memoryview, error: OSError | None) -> None:
        self.is_at_work = False
        if connection == self._connection:
            sums = () if error is not None else sums_of(self._geometry, first, buffer)
            self._send(Sums(first, sums))
        self.go_on()
