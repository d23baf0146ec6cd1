"""Sums of the image, for a sender that compares it with its volume (pure).

Invariants:
1. A question is answered when the image has every point that was committed when it came, with what
   the image has then.  What a later point writes meanwhile is the sender's to know.
2. Questions are answered in their order, one at a time, over the connection that they came on; what
   cannot be read is answered with no sums.
3. A question is at most `MOST_BYTES`, and at most `MOST_ASKED` wait: more is wrong.
4. What a sender leaves out because the pieces are equal is nowhere but in the image, and before the
   first point no journal has it either.  So the image is flushed before these are summed: no power
   cut takes back what was said of them.

A crash loses the questions, with their connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from bitmapd.media.base import Device
from bitmapd.media.buffers import aligned
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.points.messages import Compare, Pieces, Sums
from bitmapd.points.sums import piece_sums, sums_of
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.steps import Steps, run, together
from bitmapd.record.geometry import MIB, Geometry

MOST_BYTES: Final = 4 * MIB
MOST_ASKED: Final = 16


@dataclass(frozen=True, slots=True)
class _Question:
    """Sums of whole blocks, or of pieces if there is a salt."""

    connection: int
    point: int  # committed when it came
    runs: Runs
    salt: int | None = None


class Summing:
    """See the module docstring."""

    def __init__(
        self, journal: Journal, image: Device, send: Callable[[Sums | Pieces], None]
    ) -> None:
        self._journal = journal
        self._image = image
        self._send = send
        self._asked: deque[_Question] = deque()
        self._connection = 0
        self._greeted = journal.line.geometry
        self.is_at_work = False

    def forget(self) -> None:
        """The connection that asked is gone."""
        self._asked.clear()
        self._connection += 1

    def greeted(self, geometry: Geometry) -> None:
        """The volume of whoever asks from now on."""
        self._greeted = geometry

    def ask(self, runs: Runs) -> None:
        """PeerError if that is too much."""
        committed = self._journal.page.committed
        for at in runs:
            self._take(_Question(self._connection, committed, (at,)))
        self.go_on()

    def compare(self, asked: Compare) -> None:
        """PeerError if that is too much, or nothing."""
        if not asked.runs:
            raise PeerError(ErrorCode.RUNS, "sums of nothing were asked for")
        committed = self._journal.page.committed
        self._take(_Question(self._connection, committed, asked.runs, asked.salt))
        self.go_on()

    def _take(self, question: _Question) -> None:
        length = sum(self._length(*at) for at in question.runs)
        if length > max(MOST_BYTES, self._journal.line.geometry.block_bytes):
            raise PeerError(ErrorCode.SIZE, f"sums of {length} bytes were asked for at once")
        if len(self._asked) >= MOST_ASKED:
            raise PeerError(ErrorCode.BUSY, f"more than {MOST_ASKED} sums were asked for")
        self._asked.append(question)

    def _length(self, first: int, stop: int) -> int:
        return self._geometry_of(stop).block_bytes_range(first, stop)[1]

    def _geometry_of(self, stop: int) -> Geometry:
        """Of the point that the image has, or of who asks if there is none: the last block may be
        short.  Of what the image has beyond, that of the largest size."""
        journal = self._journal
        here = journal.geometry_at(journal.page.size_bytes)
        if not journal.page.committed:
            here = self._greeted
        return here if stop <= here.blocks else journal.line.geometry

    def go_on(self) -> None:
        """A point may have been applied."""
        if self.is_at_work or not self._asked or self._asked[0].point > self._journal.page.applied:
            return
        question = self._asked.popleft()
        self.is_at_work = True
        run(self._read(question), partial(self._answer, question))

    def _read(self, question: _Question) -> Steps[list[memoryview]]:
        if question.salt is not None:
            yield self._image.flush
        buffers = [aligned(self._length(*at)) for at in question.runs]
        yield together(
            [
                partial(self._image.read, at[0] * self._journal.line.geometry.block_bytes, buffer)
                for at, buffer in zip(question.runs, buffers, strict=True)
            ]
        )
        return buffers

    def _answer(
        self, question: _Question, error: OSError | None, buffers: list[memoryview] | None
    ) -> None:
        self.is_at_work = False
        if question.connection == self._connection:
            read = [] if buffers is None else zip(question.runs, buffers, strict=True)
            first = question.runs[0][0]
            salt, sums = question.salt, list[int]()
            geometry = self._journal.line.geometry
            for at, raw in read:
                if salt is None:
                    sums += sums_of(geometry, at[0], raw)
                else:
                    sums += piece_sums(geometry, salt, at[0], raw)
            self._send(Sums(first, tuple(sums)) if salt is None else Pieces(first, tuple(sums)))
        self.go_on()
