"""What is to be sent to one client, in order (pure).

Pieces are headers (`bytes`) and buffers of the pool (`memoryview`); a buffer is returned to the
caller exactly once, from the `sent` or `clear` that no longer needs it.
"""

from __future__ import annotations


class Outbox:
    __slots__ = ("_pieces", "_sent_bytes", "waiting_bytes")

    def __init__(self) -> None:
        self.waiting_bytes = 0
        self._pieces: list[bytes | memoryview] = []
        self._sent_bytes = 0  # of the first piece

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def add(self, piece: bytes | memoryview) -> None:
        """Pieces are never empty."""
        self._pieces.append(piece)
        self.waiting_bytes += len(piece)

    def pieces(self, limit: int) -> list[bytes | memoryview]:
        """What to send next, at most this many pieces; not to be changed."""
        pieces = self._pieces
        if self._sent_bytes:
            return [memoryview(pieces[0])[self._sent_bytes :], *pieces[1:limit]]
        return pieces if len(pieces) <= limit else pieces[:limit]

    def joined(self, limit_bytes: int) -> bytes | memoryview:
        """The next piece, and its neighbours if together they have no more than this many bytes:
        a TLS record of its own for each header would be wasteful."""
        first = memoryview(self._pieces[0])[self._sent_bytes :]
        if len(first) >= limit_bytes or len(self._pieces) == 1:
            return first
        chosen, room = [first], limit_bytes - len(first)
        for piece in self._pieces[1:]:
            chosen.append(memoryview(piece)[:room])
            room -= len(chosen[-1])
            if not room:
                break
        return b"".join(chosen)

    def sent(self, count_bytes: int) -> list[memoryview]:
        """So many more bytes are gone; returns the buffers that went completely."""
        self.waiting_bytes -= count_bytes
        if not self.waiting_bytes:
            return self.clear()
        pieces = self._pieces
        count_bytes += self._sent_bytes
        gone = 0
        while count_bytes >= len(pieces[gone]):
            count_bytes -= len(pieces[gone])
            gone += 1
        buffers = [piece for piece in pieces[:gone] if isinstance(piece, memoryview)]
        del pieces[:gone]
        self._sent_bytes = count_bytes
        return buffers

    def clear(self) -> list[memoryview]:
        """Forget everything; returns the buffers."""
        buffers = [piece for piece in self._pieces if isinstance(piece, memoryview)]
        self._pieces.clear()
        self.waiting_bytes = 0
        self._sent_bytes = 0
        return buffers
