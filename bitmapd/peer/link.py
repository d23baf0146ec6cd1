"""One connection to the other node, whose certificate or user has been checked (pure).

Bytes in, frames out; parts in, bytes out; and what the silence of the other means.  Time is an
argument: seconds of a monotonic clock.

1. Until `greeted` a frame has at most 4 KiB, and `receive` returns one at a time: what follows a
   greeting is looked at when its owner has judged it.
2. What is right before something wrong is returned first; the next `receive` raises.
3. Output waits in the order in which it was sent, and `take` gives as much as the socket has room
   for.  Above 2 MiB `has_room` is false: the owner then sends nothing but PONG and ERROR, gathers
   the rest in bitmaps, and goes on after `take` has brought it below.  A message is never cut off
   by that: one that was begun is taken whole, as large as its record may be.
4. The other is judged by `check`, at `due_s` or later: PING if nothing was sent for a quarter of
   the time-out, SILENT if nothing came for all of it, STUCK if output was too long for all of it
   and nothing left.  A slow link is not a lost one.
5. A loop that stood still judges nobody: the other may have spoken meanwhile.  Then `check` is to
   be called again after what has arrived was read, in the next turn of the loop: `due_s` is past.

A link that was lost is of no use: the next connection begins with a new one, at sequence 1.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from typing import Final

from bitmapd.peer.frames import MAX_PAYLOAD_BYTES, Frame, Part, PeerError, Reader, encode

MAX_OUTPUT_BYTES: Final = 2 << 20
TIMEOUT_S: Final = 2.0


class Verdict(enum.Enum):
    FINE = "fine"
    PING = "ping"  # something has to be sent
    SILENT = "silent"  # lost
    STUCK = "stuck"  # lost


class Link:
    """See the module docstring.  `timeout_s` is `partner_timeout`."""

    def __init__(self, now_s: float, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self.queued_bytes = 0
        self.frames_sent = 0  # the sequence of the last one
        self.frames_received = 0
        self.is_greeted = False
        self._reader = Reader()
        self._output: deque[bytes] = deque()
        self._heard_s = now_s
        self._sent_s = now_s
        self._checked_s = now_s
        self._full_since_s: float | None = None

    @property
    def has_room(self) -> bool:
        return self.queued_bytes <= MAX_OUTPUT_BYTES

    def greeted(self, timeout_s: float | None = None) -> None:
        """The other's HELLO fits; the larger time-out counts."""
        self.is_greeted = True
        self._reader.limit_bytes = MAX_PAYLOAD_BYTES
        self.timeout_s = max(self.timeout_s, timeout_s or 0.0)

    def send(self, parts: Iterable[Part]) -> int:
        """Appends to the output; returns the sequence of the last frame that was ever sent."""
        for part in parts:
            self.frames_sent += 1
            frame = encode(part, self.frames_sent)
            self._output.append(frame)
            self.queued_bytes += len(frame)
        return self.frames_sent

    def take(self, most_bytes: int, now_s: float) -> bytes:
        """The next bytes for the socket, at least a whole frame if there is any output."""
        if not self._output:
            return b""
        taken = [self._output.popleft()]
        size = len(taken[0])
        while self._output and size + len(self._output[0]) <= most_bytes:
            taken.append(self._output.popleft())
            size += len(taken[-1])
        self.queued_bytes -= size
        self._sent_s = now_s
        self._full_since_s = None
        return b"".join(taken)

    def receive(self, data: bytes, now_s: float) -> list[Frame]:
        """The frames that these bytes complete; call it with b"" until it returns none.
        Raises PeerError."""
        if data:
            self._heard_s = now_s
            self._reader.feed(data)
        frames: list[Frame] = []
        try:
            while (self.is_greeted or not frames) and (frame := self._reader.take()):
                frames.append(frame)
        except PeerError:
            if not frames:
                raise
        self.frames_received += len(frames)
        return frames

    def unread(self, now_s: float) -> None:
        """Nothing is read from the other, on purpose: so far its silence says nothing."""
        self._heard_s = now_s

    def check(self, now_s: float) -> Verdict:
        """What has to be done now; see 4 and 5 above."""
        stood_still = now_s > self._checked_s + self.timeout_s / 2
        self._checked_s = now_s
        if self._full_since_s is None and not self.has_room:
            self._full_since_s = now_s
        if not stood_still:
            if now_s >= self._heard_s + self.timeout_s:
                return Verdict.SILENT
            if self._full_since_s is not None and now_s >= self._full_since_s + self.timeout_s:
                return Verdict.STUCK
        if self.is_greeted and now_s >= self._sent_s + self.timeout_s / 4:
            self._sent_s = now_s
            return Verdict.PING
        return Verdict.FINE

    def due_s(self) -> float:
        """When `check` is to be called next."""
        due_s = min(self._heard_s + self.timeout_s, self._checked_s + self.timeout_s / 4)
        if self._full_since_s is not None:
            due_s = min(due_s, self._full_since_s + self.timeout_s)
        if self.is_greeted:
            due_s = min(due_s, self._sent_s + self.timeout_s / 4)
        return due_s
