"""Mistakes of a sender, its gate or its receiver that the simulation of points has to find.

Each is made by a class or a function in place of the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from bitmapd.copier.transfers import Transfers
from bitmapd.gate import clearing
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.changes import Changes
from bitmapd.gate.cycle import CutGate
from bitmapd.gate.eras import Eras
from bitmapd.gate.gate import Gate, Submit
from bitmapd.gate.unsettled import Era
from bitmapd.media.base import Done
from bitmapd.points.closing import Closing
from bitmapd.points.messages import Have
from bitmapd.points.reading import Reading
from bitmapd.points.sender import Sender
from bitmapd.points.uplink import Uplink
from bitmapd.receiver import commit, journal
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.commit import Queued
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.places import COMMIT_OFFSETS
from bitmapd.receiver.steps import Steps

Patch = pytest.MonkeyPatch


def write_before_the_copy(patch: Patch) -> None:
    """A pending block is read after the write that should have waited for that."""

    def waits(self: CutGate, first: int, stop: int, again: Callable[[], None]) -> bool:
        self.reader.read_first(list(self.taken.runs(first, stop)))
        return False

    patch.setattr(CutGate, "_waits", waits)


def read_before_landed(patch: Patch) -> None:
    """Pending blocks are read while writes of before the cut are in flight."""

    def when_landed(self: Eras, call: Callable[[], None]) -> None:
        self._scheduler.call_soon(call)

    patch.setattr(Eras, "when_landed", when_landed)


def era_at_completion(patch: Patch) -> None:
    """A write belongs to the era in which it ends."""

    def land(
        self: Gate, verb: str, offset: int, length: int, submit: Submit, done: Done, fua: bool
    ) -> None:
        self._flight.in_flight += 1
        flight = self._flight

        def landed(error: OSError | None) -> None:
            blocks = self._geometry.block_span(offset, length)
            self._current_era.mark(*blocks, self._scheduler.time())
            flight.in_flight -= 1
            if flight.when_empty is not None and not flight.in_flight:
                flight.when_empty()
            done(error)

        submit(offset, length, landed)

    def write(self: Gate, offset: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        era, self._current_era = self._current_era, Era()
        try:
            plain(self, offset, buffer, partial(ended, self, offset, len(buffer), done), fua)
        finally:
            self._current_era = era

    def ended(self: Gate, offset: int, length: int, done: Done, error: OSError | None) -> None:
        blocks = self._geometry.block_span(offset, length)
        self._current_era.mark(*blocks, self._scheduler.time())
        done(error)

    plain = Gate.write
    patch.setattr(Gate, "write", write)
    patch.setattr(Gate, "_land", land)


def overtaken(patch: Patch) -> None:
    """A block that was written while it was read ahead counts as sent."""

    def copied(self: Eras, first: int, stop: int) -> None:
        right(self, first, stop)
        self.current.discard(first, stop)

    right = Eras.copied
    patch.setattr(Eras, "copied", copied)


def cleared_at_end(patch: Patch) -> None:
    """What was sent leaves the record when the point is ended."""

    def end(self: Sender) -> None:
        right(self)
        self._gate.settle(self._gate.begin_settle())

    right = Sender._end
    patch.setattr(Sender, "_end", end)


def not_flushed(patch: Patch) -> None:
    """The primary is not flushed before what was sent leaves the record."""

    def begin(self: Closing, point: int, cut_ns: int) -> None:
        self._point, self._cut_ns = point, cut_ns
        self._failures_before = self._failures

    patch.setattr(Closing, "begin", begin)


def cleared_with_other_dirt(patch: Patch) -> None:
    """An extent leaves the record though others of its blocks are dirty."""

    def is_clean(self: clearing.Clearing, extent: int) -> bool:
        return self._store.covers(extent, extent + 1)

    patch.setattr(clearing.Clearing, "is_clean", is_clean)
    patch.setattr(clearing.Clearing, "_is_settled", is_clean)


def have_ignored(patch: Patch) -> None:
    """What the receiver lacks is not sent again."""

    def have(self: Uplink, message: Have) -> Iterator[None]:
        self._kept = BlockSet([(line[0], line[0] + 1) for line in self._sent.lines()])
        if message.last:
            yield from self._compared()

    patch.setattr(Uplink, "_have", have)


def lost_slice_by_slice(patch: Patch) -> None:
    """What the receiver lacks is forgotten while the rest is compared yet."""
    compared = Uplink._compared

    def forgets(self: Uplink) -> Iterator[None]:
        kept = self._kept
        gone = [line for line in self._sent.lines() if not kept.any(line[0], line[0] + 1)]
        for line in gone:
            self._sent.drop(line[0])
            yield
        for line in gone:
            self._sent.put(*line)
        yield from compared(self)

    patch.setattr(Uplink, "_compared", forgets)


def late_read_counts(patch: Patch) -> None:
    """A second read of a block that is pending no longer takes the place of the first."""

    def arrived(self: Reading, offset: int, content: memoryview) -> None:
        first = offset // self._geometry.block_bytes
        count = -(-len(content) // self._geometry.block_bytes)
        if self._gate.is_cutting:
            self._gate.taken.add(first, first + count)
        right(self, offset, content)

    def carries(self: Any, first: int, stop: int) -> bool:
        return False

    right = Reading._arrived
    patch.setattr(Reading, "_arrived", arrived)
    patch.setattr(Transfers, "carries", carries)


def pieces_since_the_cut(patch: Patch) -> None:
    """What a cut that was given up would have sent of a block is not sent with the next."""

    def cut(self: Changes) -> None:
        self.committed()
        right(self)

    right = Changes.cut
    patch.setattr(Changes, "cut", cut)


def pieces_of_what_is_unknown(patch: Patch) -> None:
    """A block that the record names after a crash is sent with what was written since."""

    def unknown(self: Changes, first: int, stop: int) -> None:
        pass

    patch.setattr(Changes, "unknown", unknown)


def committed_before_the_flush(patch: Patch) -> None:
    """The commit page is written before the journal's flush."""

    def unflushed(self: Journal, queued: Queued) -> Steps[None]:
        with _unflushed(self.device):
            yield from right(self, queued)

    right = Journal.commit
    patch.setattr(Journal, "commit", unflushed)


def one_commit_page(patch: Patch) -> None:
    """A commit page is written over the one before it."""
    patch.setattr(journal, "slot_offset", lambda sequence: COMMIT_OFFSETS[1])
    patch.setattr(commit, "slot_offset", lambda sequence: COMMIT_OFFSETS[1])


def applied_before_the_flush(patch: Patch) -> None:
    """A point is said to be applied before the image's flush."""

    def write(self: Applier, *arguments: Any) -> Steps[None]:
        with _unflushed(self._image):
            yield from right(self, *arguments)

    right = Applier._write
    patch.setattr(Applier, "_write", write)


def another_process_resumed(patch: Patch) -> None:
    """What another process has sent towards the open point counts for this one."""

    def drop(self: Journal, incarnation: bytes) -> Steps[None]:
        kept, points = self.open, [set(segment.points) for segment in self._segments]
        yield from right(self, incarnation)
        self.open = kept
        for segment, numbers in zip(self._segments, points, strict=True):
            segment.points |= numbers

    right = Journal.drop
    patch.setattr(Journal, "drop", drop)


@contextmanager
def _unflushed(device: Any) -> Iterator[None]:
    """Its flushes end at once, and do nothing."""
    flush, device.flush = device.flush, lambda done: done(None)
    try:
        yield
    finally:
        device.flush = flush


MISTAKES: dict[str, Callable[[Patch], None]] = {
    mistake.__name__: mistake
    for mistake in (
        write_before_the_copy,
        read_before_landed,
        era_at_completion,
        overtaken,
        cleared_at_end,
        not_flushed,
        cleared_with_other_dirt,
        have_ignored,
        lost_slice_by_slice,
        late_read_counts,
        pieces_since_the_cut,
        pieces_of_what_is_unknown,
        committed_before_the_flush,
        one_commit_page,
        applied_before_the_flush,
        another_process_resumed,
    )
}
