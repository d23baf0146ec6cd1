"""Comparing a volume with its receiver's image: sums come over the link, content does not (pure).

The receiver answers when every point is in its image that was committed when it was asked.  So for
a block that cannot differ when it is asked for, and has not been marked when the answer is here,
the sums are of the same content: `copier.verify` looks for just that.

Invariants:
1. Answers come in the order of the questions of a connection, one each; anything else ends it.
2. A question whose connection is gone, or that is given up, ends with an error.  The answer to one
   that was given up is still due, and nothing is asked before it is here.

A crash loses a comparison, and nothing else.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import xxhash

from bitmapd.copier.comparing import Compared, Side, when_both
from bitmapd.media.base import Done, Scheduler
from bitmapd.media.buffers import BufferPool
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.points.messages import Message, Sums, Verify
from bitmapd.record.geometry import PIECE_BYTES, Geometry

Answer = Callable[[OSError | None, tuple[int, ...]], None]

_PLACE: Final = struct.Struct("<QQ")
NO_LINK: Final = OSError(errno.ENOTCONN, "the receiver went away")


def sums_of(geometry: Geometry, first: int, raw: memoryview) -> tuple[int, ...]:
    """xxh3-64 of each whole block, from `first` on; the volume's last one may be short."""
    size = geometry.block_bytes
    return tuple(xxhash.xxh3_64_intdigest(raw[at : at + size]) for at in range(0, len(raw), size))


def piece_sums(geometry: Geometry, salt: int, first: int, raw: memoryview) -> tuple[int, ...]:
    """xxh3-64 of each piece of 4 KiB of whole blocks, from `first` on; the volume's last one may be
    short.  Seeded with block and salt: who writes two contents of one sum cannot know that they
    have one here."""
    size, sums = geometry.block_bytes, []
    for start in range(0, len(raw), size):
        seed = xxhash.xxh3_64_intdigest(_PLACE.pack(salt, first + start // size))
        end = min(start + size, len(raw))
        for at in range(start, end, PIECE_BYTES):
            sums.append(xxhash.xxh3_64_intdigest(raw[at : min(at + PIECE_BYTES, end)], seed))
    return tuple(sums)


class ImageSums:
    """Questions to the receiver, over whichever connection there is."""

    def __init__(self, send: Callable[[Message], object]) -> None:
        self._send = send
        self._asked: deque[tuple[int, int, Answer | None]] = deque()

    @property
    def is_due(self) -> bool:
        """Whether an answer is to come."""
        return bool(self._asked)

    def ask(self, first: int, stop: int, answer: Answer) -> None:
        self._asked.append((first, stop, answer))
        self._send(Verify(((first, stop),)))

    def take(self, sums: Sums) -> None:
        """PeerError if nobody asked for it."""
        first, stop, answer = self._asked.popleft() if self._asked else (0, 0, None)
        if sums.first != first or len(sums.sums) not in (0, stop - first):
            text = f"{len(sums.sums)} sums from block {sums.first} on were not asked for"
            raise PeerError(ErrorCode.ANSWER, text)
        if answer is not None:
            unread = OSError(errno.EIO, "the receiver cannot read its image")
            answer(None if sums.sums else unread, sums.sums)

    def lost(self) -> None:
        """The connection is gone."""
        asked, self._asked = self._asked, deque()
        for _, _, answer in asked:
            if answer is not None:
                answer(NO_LINK, ())

    def give_up(self, error: OSError) -> None:
        """Nobody waits for the answers any more."""
        asked, self._asked = self._asked, deque((a, b, None) for a, b, _ in self._asked)
        for _, _, answer in asked:
            if answer is not None:
                answer(error, ())


class Sending(Protocol):
    """The sender, as far as a comparison goes."""

    @property
    def sums(self) -> ImageSums: ...

    @property
    def is_linked(self) -> bool: ...

    def wake(self) -> None: ...


class BySums:
    """`copier.comparing.Comparison` with a receiver."""

    def __init__(
        self,
        geometry: Geometry,
        read_primary: Callable[[int, memoryview, Done], None],
        sender: Sending,
        scheduler: Scheduler,
        pool: BufferPool,
    ) -> None:
        self._geometry = geometry
        self._read_primary = read_primary
        self._sender = sender
        self._scheduler = scheduler
        self._pool = pool

    @property
    def connected(self) -> bool:
        return self._sender.is_linked

    def compare(self, first: int, stop: int, compared: Compared) -> bool:
        offset, length = self._geometry.block_bytes_range(first, stop)
        buffer = self._pool.take(length)
        if buffer is None:
            return False
        theirs: tuple[int, ...] = ()

        def both(failures: list[tuple[Side, OSError]]) -> None:
            mine = () if failures else sums_of(self._geometry, first, buffer)
            self._pool.give(buffer)
            differing = [
                first + at
                for at, (ours, other) in enumerate(zip(mine, theirs, strict=not failures))
                if ours != other
            ]
            self._scheduler.call_soon(compared, failures, differing)

        ended = when_both(both)

        def answered(error: OSError | None, sums: tuple[int, ...]) -> None:
            nonlocal theirs
            theirs = sums
            ended(Side.SECONDARY, error)

        if self._sender.is_linked:
            self._sender.sums.ask(first, stop, answered)
        else:
            answered(NO_LINK, ())
        self._read_primary(offset, buffer, lambda error: ended(Side.PRIMARY, error))
        return True

    def when_room(self, call: Callable[[], None]) -> None:
        self._pool.when_free(call)

    def hurry(self) -> None:
        """The next point brings what is on its way."""
        self._sender.wake()
