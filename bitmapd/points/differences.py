"""Of what nobody knows how it changed, only what differs from the receiver's image is sent (pure).

The record of an old primary names whole extents, and more of them than were written; so does the
record of a process that died.  All of them are dirty, and sending them all would be right.  So
before anything is sent to an old primary the receiver is asked for sums of their pieces: of the 4
KiB that a host wrote in a block of 64 only these are sent then, and of a block that is equal
nothing.  Sums of all pieces cost 1/512 of what is compared.  Sums of blocks first would cost 1/8192
and those of pieces where blocks differ: of what a record names that is most of it, and either side
would be read twice, over one more round trip.

Order:
1. The record names durably what may differ, and all of it is dirty (`Sender.differs`).
2. The era ends, and its writes land.  What is dirty is in `taken` then.
3. Blocks become *in question* (`gate.changes`), sums are asked for, and the primary is read.  Hosts
   write meanwhile; what they write is known by pieces, whatever the answer says.
4. With the answer the pieces that differ are known.  A block of which none does counts as copied:
   its extent leaves the record with the first point, after flushes of both sides, and not before.
   One that was written since 2 is in the era that runs, and sent all the same.

Invariants:
1. Nothing was sent of the open point, and nothing is until the comparison is over: so the image
   does not change between a sum and the first point.
2. A question whose connection is gone is answered by nobody: its blocks are unknown as before, and
   the next comparison asks anew.  Where either side cannot be read, blocks stay unknown, too, and
   are sent whole.
3. At most `DEPTH` questions of `MOST_BYTES` wait, with the sums of both sides; one read at a time
   belongs to each.

Two contents of one sum would stay different: one in 2**64 for each piece that differs.  A crash
loses what was found; all of it is in the record, and the next process compares anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from bitmapd.copier.throttle import Throttle
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.cycle import CutGate
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.points.messages import Compare, Message, Pieces
from bitmapd.points.sums import piece_sums
from bitmapd.record.geometry import MIB, PIECE_BYTES, Geometry

DEPTH: Final = 8
MOST_BYTES: Final = 4 * MIB  # of a question; 32 MiB a round trip
READ_BYTES: Final = MIB

Copied = Callable[[int, int], None]


@dataclass(slots=True, eq=False)
class _Question:
    runs: Runs
    left: deque[tuple[int, int]]  # to be read of the primary
    ours: list[int] = field(default_factory=list)
    theirs: tuple[int, ...] | None = None
    was_read: bool = False
    failed: bool = False  # the primary cannot be read there
    counts: bool = True  # its connection is there

    @property
    def is_over(self) -> bool:
        return self.was_read and self.theirs is not None


class Differences:
    """See the module docstring.  `copied` hears of blocks that need not be sent."""

    def __init__(
        self,
        geometry: Geometry,
        gate: CutGate,
        read_primary: Callable[[int, memoryview, Done], None],
        pool: BufferPool,
        throttle: Throttle,
        send: Callable[[Message], int],
        copied: Copied,
        changed: Callable[[], None],
        salt: int,
    ) -> None:
        """`changed` is called when `go_on` may do more."""
        self._geometry = geometry
        self._gate = gate
        self._read_primary = read_primary
        self._pool = pool
        self._throttle = throttle
        self._send = send
        self._copied = copied
        self._changed = changed
        self._salt = salt
        self._done: Callable[[], None] | None = None
        self._taking = False  # the era ends
        self._cursor = 0
        self._questions: deque[_Question] = deque()  # oldest first
        self._reads = 0  # in flight, also of questions that nobody answers any more
        self.compared_bytes = 0
        self.equal_bytes = 0
        self.sums_bytes = 0  # of questions and answers, without the headers of these

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight here."""
        return not (self._taking or self._reads)

    @property
    def is_under_way(self) -> bool:
        return self._done is not None

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on."""
        self._geometry = geometry

    # -- its course -------------------------------------------------------------------------
    def begin(self, done: Callable[[], None]) -> None:
        """Compare what is dirty and unknown; `done` is called, never from inside, unless the
        connection is lost before."""
        self.lost()
        self._done, self._cursor = done, 0
        if not self._taking:
            self._taking = True
            self._gate.take_era(self._taken)

    def _taken(self) -> None:
        self._taking = False
        self._changed()

    def lost(self) -> None:
        """The connection is gone."""
        for question in self._questions:
            question.counts = False
        self._questions.clear()
        self._gate.changes.unanswered()
        self._done = None

    def go_on(self, now_s: float) -> float | None:
        """Ask what may be asked now; the seconds after which more may be, if there are any."""
        if self._done is None or self._taking:
            return None
        while len(self._questions) < DEPTH:
            wait_s = self._throttle.delay_s(now_s, MOST_BYTES // PIECE_BYTES * 8)
            if wait_s > 0:
                return wait_s
            runs = self._next_runs()
            if not runs:
                break
            count = self._ask(runs)
            self.sums_bytes += count
            self._throttle.take(now_s, count)
        if not self._questions:
            done, self._done = self._done, None
            done()
        return None

    def _next_runs(self) -> Runs:
        """Of dirty blocks that are unknown, as many as a question has."""
        found, changes = BlockSet(), self._gate.changes
        most = room = max(1, MOST_BYTES // self._geometry.block_bytes)
        while room > 0 and (run := changes.next_unknown(self._cursor, room)) is not None:
            self._cursor = run[1]
            for part in self._gate.taken.runs(*run):
                found.add(*part)
            room = most - found.count()
        return tuple(found.runs())

    def _ask(self, runs: Runs) -> int:
        """The bytes that it costs on the wire, with those of the answer."""
        for run in runs:
            self._gate.changes.question(*run)
        at_once = max(1, READ_BYTES // self._geometry.block_bytes)
        parts = (
            (at, min(at + at_once, stop))
            for first, stop in runs
            for at in range(first, stop, at_once)
        )
        question = _Question(runs, deque(parts))
        self._questions.append(question)
        count = self._send(Compare(self._salt, runs))
        self._read(question)
        blocks = sum(stop - first for first, stop in runs)
        return count + blocks * (self._geometry.block_bytes // PIECE_BYTES) * 8

    # -- what we have ------------------------------------------------------------------------
    def _read(self, question: _Question) -> None:
        if not question.counts:
            return
        offset, length = self._geometry.block_bytes_range(*question.left[0])
        buffer = self._pool.take(length)
        if buffer is None:
            self._pool.when_free(partial(self._read, question))
            return
        self._reads += 1
        self._read_primary(offset, buffer, partial(self._was_read, question, buffer))

    def _was_read(self, question: _Question, buffer: memoryview, error: OSError | None) -> None:
        self._reads -= 1
        first, _ = question.left.popleft()
        if error is None:
            question.ours += piece_sums(self._geometry, self._salt, first, buffer)
        question.failed |= error is not None
        self._pool.give(buffer)
        if question.left and not question.failed:
            self._read(question)
        else:
            question.was_read = True
            self._judge()
        self._changed()

    # -- what the receiver has ---------------------------------------------------------------
    def take(self, pieces: Pieces) -> None:
        """PeerError if nobody asked for it."""
        question = next((asked for asked in self._questions if asked.theirs is None), None)
        if question is None or not self._fits(question, pieces):
            text = f"{len(pieces.sums)} sums of pieces from block {pieces.first} on"
            raise PeerError(ErrorCode.ANSWER, f"{text} were not asked for")
        question.theirs = pieces.sums
        self._judge()

    def _fits(self, question: _Question, pieces: Pieces) -> bool:
        count = sum(self._pieces_of(block) for block in _blocks(question.runs))
        return pieces.first == question.runs[0][0] and len(pieces.sums) in (0, count)

    def _pieces_of(self, block: int) -> int:
        return -(-self._geometry.block_bytes_range(block, block + 1)[1] // PIECE_BYTES)

    # -- what differs ------------------------------------------------------------------------
    def _judge(self) -> None:
        while self._questions and self._questions[0].is_over:
            question = self._questions.popleft()
            if question.failed or not question.theirs:
                for block in _blocks(question.runs):
                    self._gate.changes.answered(block, None)
            else:
                self._answered(question.runs, question.ours, question.theirs)

    def _answered(self, runs: Runs, ours: list[int], theirs: tuple[int, ...]) -> None:
        at, equal = 0, BlockSet()
        for block in _blocks(runs):
            mask, count = 0, self._pieces_of(block)
            for piece in range(count):
                if ours[at + piece] != theirs[at + piece]:
                    mask |= 1 << piece
            at += count
            length = self._geometry.block_bytes_range(block, block + 1)[1]
            self.compared_bytes += length
            if self._gate.changes.answered(block, mask):
                equal.add(block, block + 1)
                self.equal_bytes += length
        for run in equal.runs():
            self._gate.copied(*run)
            self._copied(*run)


def _blocks(runs: Runs) -> list[int]:
    return [block for run in runs for block in range(*run)]
