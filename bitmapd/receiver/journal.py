"""The journal of a receiver on its device: what was received, kept until it is in the image.

A machine over a `Device`: entries of the *open* point are appended, a complete point is committed,
and the space of points that are in the image is used again.

Invariants:
1. `page` is what the newest commit page on the medium says.  A change of it counts when its page is
   durable; changes follow one another, each with a sequence and a slot of its own.
2. A point is committed in this order: all its batches have been written, a flush, the commit page.
3. A segment is used again only if every point with a batch in it is applied or dropped by a commit
   page that is durable, and no write to it is in flight.
4. What another incarnation has sent towards the open point is dropped by a commit page before
   anything of that point is appended.
5. `room_bytes` is what may be appended whatever its sizes are, and it counts no segment that is in
   use: a batch that does not fit is cut at the end of its segment, which `_LOSS_BYTES` allows for.
6. After an error of the device nothing is written any more: what a failed write or flush has left
   is found out by the next scan.
7. A larger size counts when the superblock with it is durable.  If segments move by that, none of
   them is in use before, and `scan_from` is behind all that they ever had.

A crash leaves the points that the commit page names, and any part of the open one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from bitmapd.errors import NoSpaceError, WrongStateError
from bitmapd.media.base import Device, Done, after_all
from bitmapd.media.buffers import aligned
from bitmapd.points.messages import Entry
from bitmapd.receiver.commit import CommitPage, PageFlag, Queued, encode_page, slot_offset
from bitmapd.receiver.directory import Directory, directory_offset, encode_directory
from bitmapd.receiver.entries import Entries
from bitmapd.receiver.places import DIRECTORY_BYTES, PAGE_BYTES, Places, padded
from bitmapd.receiver.scan import Scanned, Segment, kept_entries
from bitmapd.receiver.segments import Batch, encode_batch, encode_segment
from bitmapd.receiver.steps import Steps
from bitmapd.receiver.superblock import JournalSuperblock, Line, encode_superblock
from bitmapd.record.copies import SUPERBLOCK_OFFSETS
from bitmapd.record.geometry import Geometry

Change = Callable[[CommitPage], dict[str, Any]]

# What a segment cannot use, beside the length of an entry that does not fit at its end: its first
# page, the page of the batch that is cut there, and what pads both of its halves.
_LOSS_BYTES: Final = 4 * PAGE_BYTES


class Journal:
    """See the module docstring.  `on_failure` is called once, with the first error."""

    def __init__(
        self, device: Device, scanned: Scanned, on_failure: Callable[[OSError], None]
    ) -> None:
        self.superblock = scanned.choice.superblock
        self.page = scanned.page
        self.points = scanned.points
        self.open = scanned.open
        self.device = device
        self.failure: OSError | None = None
        self.directory = scanned.directory
        self._on_failure = on_failure
        self._stale_copy = scanned.choice.stale_copy
        self._segments = scanned.segments
        self._next_sequence = scanned.next_sequence
        line = self.superblock.line
        size_bytes = self.superblock.journal_bytes
        self._places = None if line is None else Places(line.geometry, size_bytes)
        self._current: Segment | None = None
        self._next_index = 0  # where a free segment is looked for
        self._at_bytes = 0  # in the current segment
        self._number = 0  # of its next batch
        self._in_flight = 0
        self._when_landed: list[Done] = []
        self._changes: deque[tuple[Change, Done]] = deque()
        self._changing = False
        self._recount()

    # -- whose it is ----------------------------------------------------------------------------
    @property
    def line(self) -> Line:
        """WrongStateError before the first sender."""
        if self.superblock.line is None:
            raise WrongStateError("the journal belongs to no volume yet")
        return self.superblock.line

    @property
    def places(self) -> Places:
        return Places(self.line.geometry, self.superblock.journal_bytes)

    def geometry_at(self, size_bytes: int) -> Geometry:
        """Of the volume when it had this size; 0: it has always had that of the line."""
        geometry = self.line.geometry
        return dataclasses.replace(geometry, size_bytes=size_bytes or geometry.size_bytes)

    # -- figures --------------------------------------------------------------------------------
    @property
    def open_point(self) -> int:
        return self.page.committed + 1

    @property
    def room_bytes(self) -> int:
        """Of what `codec.cost_bytes` counts."""
        places = self._places
        if places is None:
            return 0
        usable_bytes = places.segment_bytes - _LOSS_BYTES - places.geometry.block_bytes
        return max(0, self._free - 1) * usable_bytes

    @property
    def limit_bytes(self) -> int:
        """All segments together."""
        return 0 if self._places is None else len(self._segments) * self._places.segment_bytes

    @property
    def used_bytes(self) -> int:
        if self._places is None:
            return 0
        return (len(self._segments) - self._free) * self._places.segment_bytes

    @property
    def queued_bytes(self) -> int:
        """What is committed and not applied, as it is in the journal."""
        return sum(entries.payload_bytes for entries in self.points.values())

    def _is_free(self, segment: Segment) -> bool:
        return not segment.points and segment is not self._current

    def _recount(self) -> None:
        """A journal of 1 TiB has 262,144 segments: too many to look at for each frame."""
        self._free = sum(map(self._is_free, self._segments))

    # -- the first sender -----------------------------------------------------------------------
    def adopt(self, line: Line, now_s: int) -> Steps[None]:
        """Belong to this volume from now on.  NoSpaceError if the journal is too small for it."""
        places = Places(line.geometry, self.superblock.journal_bytes)
        yield from self._write_superblock(self.superblock.updated(now_s, line=line))
        self._places = places
        self._segments = [Segment(index) for index in range(places.segments)]
        self._recount()

    def follow(self, line: Line, now_s: int) -> Steps[None]:
        """Another generation of the same volume from now on."""
        yield from self._write_superblock(self.superblock.updated(now_s, line=line))

    def grow(self, line: Line, image_bytes: int, now_s: int) -> Steps[None]:
        """A larger size of the same volume.  If `moves` nothing may be queued; what is here of the
        open point is gone then."""
        here_bytes = self.line.geometry.size_bytes
        moves = self.moves(line)
        yield from self._landed()
        if moves and self.page.committed:
            self.open = Entries()
            for segment in self._segments:
                segment.points.clear()

        def sized(page: CommitPage) -> dict[str, Any]:
            queue = tuple(
                dataclasses.replace(queued, size_bytes=queued.size_bytes or here_bytes)
                for queued in page.queue
            )
            size_bytes = here_bytes if page.committed else 0
            return {"size_bytes": page.size_bytes or size_bytes, "queue": queue}

        yield from self._changed(sized)
        after = self.superblock.updated(now_s, line=line, image_bytes=image_bytes)
        yield from self._write_superblock(after)
        self._places = self.places
        if moves:
            self._current = None
            self._segments = [Segment(index) for index in range(self._places.segments)]
            self._next_index = 0
        self._recount()

    def moves(self, line: Line) -> bool:
        """Whether segments are elsewhere in the journal of that."""
        after = Places(line.geometry, self.superblock.journal_bytes)
        return after.segments_offset != self.places.segments_offset

    def _write_superblock(self, superblock: JournalSuperblock) -> Steps[None]:
        buffer = aligned(PAGE_BYTES)
        buffer[:] = encode_superblock(superblock)
        for copy in (self._stale_copy, 1 - self._stale_copy):
            self._stale_copy = copy  # in doubt until it is written
            yield partial(self._write, SUPERBLOCK_OFFSETS[copy], buffer, True)
        self.superblock = superblock

    # -- the open point -------------------------------------------------------------------------
    def append(self, entries: Sequence[Entry], done: Done) -> None:
        """Write them, 1 to 62, in as few batches as the end of a segment allows.  They must fit in
        `room_bytes`."""
        places = self._places
        if places is None:
            raise WrongStateError("the journal belongs to no volume yet")
        left = list(entries)
        batches: list[tuple[Batch, int, memoryview]] = []
        while left:
            batches.append(self._next_batch(places, left))
            del left[: len(batches[-1][0].entries)]
        ended = after_all(len(batches), done)

        def written(error: OSError | None) -> None:
            self._in_flight -= 1
            if not self._in_flight:
                landed, self._when_landed = self._when_landed, []
                for call in landed:
                    call(self.failure)
            ended(error)

        self._in_flight += len(batches)
        for batch, place, buffer in batches:
            for kept in kept_entries(batch, place):
                self.open.add(kept)
            header = len(buffer) - batch.total_bytes
            self._write(place - header, buffer, False, written)

    def _next_batch(self, places: Places, left: list[Entry]) -> tuple[Batch, int, memoryview]:
        """As many of these as fit: the batch, its place, and what is to be written, which begins
        with the segment's page if the batch is its first."""
        segment = self._current
        if segment is None or not self._fitting(places, left):
            segment = self._begin_segment()
        fitting = self._fitting(places, left)
        entries = tuple(left[:fitting])
        lengths = tuple(len(entry.payload) for entry in entries)
        batch = Batch(
            segment.sequence, self._number, self.page.incarnation, self.open_point, entries, lengths
        )
        header = 0 if self._number else PAGE_BYTES
        buffer = aligned(header + batch.total_bytes)
        journal = self.superblock.journal.bytes
        if header:
            encode_segment(buffer[:header], segment.sequence, journal)
        encode_batch(buffer[header:], batch, journal)
        place = places.segment_offset(segment.index) + self._at_bytes
        segment.points.add(self.open_point)
        self._number += 1
        self._at_bytes += batch.total_bytes
        return batch, place, buffer

    def _fitting(self, places: Places, left: Sequence[Entry]) -> int:
        """How many of these the current segment has room for."""
        room_bytes = places.segment_bytes - self._at_bytes - PAGE_BYTES
        total = 0
        for number, entry in enumerate(left):
            total += len(entry.payload)
            if padded(total) > room_bytes:
                return number
        return len(left) if room_bytes >= 0 else 0

    def _begin_segment(self) -> Segment:
        count = len(self._segments)
        for step in range(count):
            segment = self._segments[(self._next_index + step) % count]
            if self._is_free(segment):
                break
        else:
            raise NoSpaceError("the journal has no free segment")
        self._next_index = (segment.index + 1) % count
        segment.sequence = self._next_sequence
        self._next_sequence += 1
        self._current, self._at_bytes, self._number = segment, PAGE_BYTES, 0
        self._recount()
        return segment

    # -- what becomes of it ---------------------------------------------------------------------
    def drop(self, incarnation: bytes) -> Steps[None]:
        """Forget the open point; what this incarnation sends is taken from now on."""
        yield from self._landed()
        self.open = Entries()
        yield from self._changed(lambda page: {"incarnation": incarnation})
        dropped = self.open_point
        for segment in self._segments:
            segment.points.discard(dropped)
        self._recount()

    def commit(self, queued: Queued) -> Steps[None]:
        """The open point is complete: make it durable, and name it."""
        yield from self._landed()
        yield lambda done: self.device.flush(self._noting(done))

        def committed(page: CommitPage) -> dict[str, Any]:
            return {"committed": queued.point, "queue": (*page.queue, queued)} | self._said(queued)

        yield from self._changed(committed)
        self.points[queued.point] = self.open
        self.open = Entries()

    def commit_in_image(self, queued: Queued) -> Steps[None]:
        """The open point is in the image, durably: name it."""
        named = self._said(queued) | {"committed": queued.point, "applied": queued.point}
        named |= {"applied_group": queued.group, "applied_ns": queued.wall_ns}
        named |= {"inconsistent_until": 0, "size_bytes": queued.size_bytes}
        yield from self._changed(lambda page: named)
        self.open = Entries()

    def _said(self, queued: Queued) -> dict[str, Any]:
        generation, term = self.line.generations[0].bytes, self.line.term
        return {"committed_ns": queued.wall_ns, "generation": generation, "term": term}

    def applied(self, point: int) -> Steps[None]:
        """All queued points up to this one are in the image, durably: their space is free."""
        last = next(queued for queued in self.page.queue if queued.point == point)
        yield from self._changed(
            lambda page: {
                "applied": point,
                "applied_group": last.group,
                "applied_ns": last.wall_ns,
                "inconsistent_until": 0,
                "queue": tuple(queued for queued in page.queue if queued.point > point),
                "size_bytes": last.size_bytes,
            }
        )
        for number in [number for number in self.points if number <= point]:
            del self.points[number]

    def inconsistent(self, until: int) -> Steps[None]:
        """The image is between two points until this one is applied."""
        yield from self._changed(lambda page: {"inconsistent_until": until})

    def flagged(self, flags: PageFlag, line: Line) -> Steps[None]:
        """How far a promotion is; `line` is that of the data that the image has then."""
        named = {"flags": flags, "generation": line.generations[0].bytes, "term": line.term}
        yield from self._changed(lambda page: named)

    # -- kept points ----------------------------------------------------------------------------
    def name_kept(self, directory: Directory) -> Steps[None]:
        """Another directory of kept points; one at a time.  It counts when it is durable."""
        buffer = aligned(DIRECTORY_BYTES)
        buffer[:] = encode_directory(directory, self.superblock.journal.bytes)
        yield partial(self._write, directory_offset(directory.sequence), buffer, True)
        self.directory = directory

    def put(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        """A page of a change map, durably."""
        self._write(offset_bytes, buffer, True, done)

    # -- commit pages ---------------------------------------------------------------------------
    def _changed(self, change: Change) -> Steps[None]:
        """Durable when it goes on, and after all that was asked for before."""
        if self.failure is not None:
            raise self.failure

        def ask(done: Done) -> None:
            self._changes.append((change, done))
            if not self._changing:
                self._write_page()

        yield ask

    def _write_page(self) -> None:
        self._changing = True
        change, done = self._changes.popleft()
        page = dataclasses.replace(self.page, **change(self.page), sequence=self.page.sequence + 1)
        if self._current is not None and not _in_use(self._current, page.applied):
            self._current = None  # or what is appended later would have a sequence before scan_from
            self._recount()
        used = [segment for segment in self._segments if _in_use(segment, page.applied)]
        first = min(used, key=lambda segment: segment.sequence, default=None)
        page = dataclasses.replace(
            page,
            scan_from=self._next_sequence if first is None else first.sequence,
            first_segment=0 if first is None else first.index,
            kept_sequence=self.directory.sequence,
        )
        buffer = aligned(PAGE_BYTES)
        buffer[:] = encode_page(page)

        def written(error: OSError | None) -> None:
            self._changing = False
            if error is None:
                self.page = page
                for segment in self._segments:
                    segment.points = {point for point in segment.points if point > page.applied}
                self._recount()
            done(error)
            while self._changes and not self._changing:
                if error is None:
                    self._write_page()
                else:
                    self._changes.popleft()[1](error)

        self._write(slot_offset(page.sequence), buffer, True, written)

    # -- the device -----------------------------------------------------------------------------
    def _landed(self) -> Steps[None]:
        if self._in_flight:
            yield self._when_landed.append

    def _write(self, offset_bytes: int, buffer: memoryview, fua: bool, done: Done) -> None:
        self.device.write(offset_bytes, buffer, self._noting(done), fua)

    def _noting(self, done: Done) -> Done:
        def ended(error: OSError | None) -> None:
            if error is not None and self.failure is None:
                self.failure = error
                self._on_failure(error)
            done(error)

        return ended


def _in_use(segment: Segment, applied: int) -> bool:
    return any(point > applied for point in segment.points)
