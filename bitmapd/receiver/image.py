"""The image: points are written to it from the journal, any number of times with the same result.

Invariants:
1. Nothing of a point is written before every entry of it was read and verified (`verify`).
2. Entries are written in order of place, contiguous ones as one write of up to 1 MiB, and only the
   pieces that they have.
3. An entry that is wrong when it is read again is not written: `apply` says which ones were.
4. Before a window is written whoever looks at the image (`guard`) has what it needs of it.
5. `InPlace`, for a point that goes into the image at once, writes what has just been received.  Two
   writes to one block are never in flight together, so that the later one wins.

A crash leaves any part of a point in the image; applying it once more makes it whole, since its
entries say what each piece has to be, not how it changes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Final, Protocol

from bitmapd.media.base import Device, Done
from bitmapd.media.buffers import aligned
from bitmapd.peer.frames import PeerError
from bitmapd.points.messages import Data, Entry
from bitmapd.points.pieces import Content, Unpacker, is_zeros, raw_bytes, spans
from bitmapd.receiver.entries import Kept
from bitmapd.receiver.places import PAGE_BYTES, padded
from bitmapd.receiver.steps import Step, Steps, together
from bitmapd.record.geometry import MIB, Geometry

WINDOW_BYTES: Final = MIB

Piece = tuple[int, Content]  # offset in the image, what is to be there


class Guard(Protocol):
    """Who looks at the image as it is; `view.View`."""

    def preserve(self, blocks: Sequence[int], done: Done) -> None:
        """These, in order of place, are about to be overwritten.  Always ends well."""


class Redo:
    """Of one volume; see the module docstring."""

    guard: Guard | None = None

    def __init__(self, geometry: Geometry, volume: bytes, journal: Device, image: Device) -> None:
        self._geometry = geometry
        self._unpacker = Unpacker(geometry, volume)
        self._journal = journal
        self._image = image

    def resize(self, geometry: Geometry) -> None:
        """What comes next is of a point when the volume had this size."""
        self._geometry = self._unpacker.geometry = geometry

    def verify(self, entries: Iterable[Kept]) -> Steps[list[int]]:
        """The blocks whose entries are not what was received."""
        bad: list[int] = []
        for window in self._windows(entries):
            read = yield from self._read(window)
            bad += [kept.block for kept, raw in zip(window, read, strict=True) if raw is None]
        return bad

    def apply(self, entries: Iterable[Kept], leave_out: Collection[int]) -> Steps[list[int]]:
        """Write all but the blocks to be left out; not durable yet.  Returns those that were wrong
        besides."""
        bad: list[int] = []
        wanted = (kept for kept in entries if kept.block not in leave_out)
        for window in self._windows(wanted):
            read = yield from self._read(window)
            pieces: list[Piece] = []
            for kept, raw in zip(window, read, strict=True):
                if raw is None:
                    bad.append(kept.block)
                else:
                    pieces += placed(self._geometry, kept.block, kept.mask, raw)
            if pieces:
                if self.guard is not None:
                    yield partial(self.guard.preserve, [kept.block for kept in window])
                yield together(list(writes(self._image, pieces)))
        return bad

    def _windows(self, entries: Iterable[Kept]) -> Iterator[list[Kept]]:
        """Entries whose pieces have up to `WINDOW_BYTES` together."""
        window: list[Kept] = []
        size_bytes = 0
        for kept in entries:
            length = raw_bytes(self._geometry, kept.block, kept.mask)
            if window and size_bytes + length > WINDOW_BYTES:
                yield window
                window, size_bytes = [], 0
            window.append(kept)
            size_bytes += length
        if window:
            yield window

    def _read(self, window: list[Kept]) -> Steps[list[Content | None]]:
        """The pieces of each entry; None where they are not what was received."""
        places = [_Place(self._journal, kept) for kept in window]
        steps = [place.read for place in places if place.pages]
        if steps:
            try:
                yield together(steps)
            except OSError:
                for step in steps:
                    with contextlib.suppress(OSError):  # what is not there has another sum
                        yield step
        return [self._unpacked(place.kept, place.payload) for place in places]

    def _unpacked(self, kept: Kept, payload: memoryview) -> Content | None:
        entry = Entry(kept.block, kept.stamp, kept.mask, kept.encoding, kept.sum64, payload)
        try:
            return self._unpacker.unpack(entry)
        except PeerError:
            return None


class _Place:
    """A payload in the journal, and the pages that it is in; none, if it is empty."""

    def __init__(self, journal: Device, kept: Kept) -> None:
        self.kept = kept
        self._journal = journal
        skip = kept.place_bytes % PAGE_BYTES
        self._start = kept.place_bytes - skip
        pages_bytes = padded(skip + kept.length_bytes) if kept.length_bytes else 0
        self.pages = aligned(pages_bytes) if pages_bytes else memoryview(b"")
        self.payload = self.pages[skip : skip + kept.length_bytes]

    def read(self, done: Done) -> None:
        self._journal.read(self._start, self.pages, done)


class InPlace:
    """Writes received entries to the image at once.  After an error nothing that was written since
    the last `settle` counts."""

    def __init__(
        self,
        geometry: Geometry,
        volume: bytes,
        image: Device,
        guard: Callable[[], Guard | None] = lambda: None,
    ) -> None:
        """`guard`: who looks at the image now."""
        self._geometry = geometry
        self._unpacker = Unpacker(geometry, volume)
        self._image = image
        self._guard = guard
        self._failure: OSError | None = None
        self._waiting: deque[tuple[list[Piece], set[int], Done]] = deque()
        self._busy: set[int] = set()  # blocks in flight
        self._idle: list[Done] = []

    def resize(self, geometry: Geometry) -> None:
        """What is received from now on is of a volume of this size."""
        self._geometry = self._unpacker.geometry = geometry

    def write(self, data: Data, done: Done) -> None:
        """PeerError, and nothing is written, if a sum is wrong."""
        pieces: list[Piece] = []
        for entry in data.entries:
            raw = self._unpacker.unpack(entry)
            pieces += placed(self._geometry, entry.block, entry.mask, raw)
        blocks = {entry.block for entry in data.entries}
        self._waiting.append((pieces, blocks, done))
        self._begin()

    def flush(self) -> Steps[None]:
        """All that was received is durable when it goes on."""
        yield from self._landed()
        if self._failure is not None:
            raise self._failure
        try:
            yield self._image.flush
        except OSError as error:
            self._failure = error
            raise

    def settle(self) -> Steps[bool]:
        """Wait for what is in flight, and begin anew: whether something was lost."""
        yield from self._landed()
        failure, self._failure = self._failure, None
        return failure is not None

    def _landed(self) -> Steps[None]:
        if self._busy:
            yield self._idle.append

    def _begin(self) -> None:
        while self._waiting and not self._busy & self._waiting[0][1]:
            pieces, blocks, done = self._waiting.popleft()
            self._busy |= blocks
            ended = partial(self._ended, blocks, done)
            self._preserved(sorted(blocks), together(list(writes(self._image, pieces))), ended)

    def _preserved(self, blocks: Sequence[int], write: Step, ended: Done) -> None:
        guard = self._guard()
        if guard is None:
            write(ended)
        else:
            guard.preserve(blocks, lambda _: write(ended))

    def _ended(self, blocks: set[int], done: Done, error: OSError | None) -> None:
        self._busy -= blocks
        self._failure = self._failure or error
        done(error)
        self._begin()
        if not self._busy:
            idle, self._idle = self._idle, []
            for call in idle:
                call(None)


def placed(geometry: Geometry, block: int, mask: int, raw: Content) -> Iterator[Piece]:
    """Where the pieces of an entry go."""
    start, _ = geometry.block_bytes_range(block, block + 1)
    view = memoryview(raw)
    at = 0
    for offset, length in spans(geometry, block, mask):
        yield start + offset, view[at : at + length]
        at += length


def writes(image: Device, pieces: Iterable[Piece]) -> Iterator[Step]:
    """The fewest operations that put these, in order of place, into the image."""
    run: list[Piece] = []
    run_zeros = False
    for piece in chain(pieces, [(-1, b"")]):
        zeros = is_zeros(piece[1])
        if run and not (zeros is run_zeros and _joins(run, piece)):
            yield _operation(image, run, zeros=run_zeros)
            run = []
        run.append(piece)
        run_zeros = zeros


def _joins(run: list[Piece], piece: Piece) -> bool:
    """Whether a piece can be one operation with those before it."""
    last_at, last = run[-1]
    size_bytes = last_at + len(last) - run[0][0]
    return piece[0] == last_at + len(last) and size_bytes + len(piece[1]) <= WINDOW_BYTES


def _operation(image: Device, run: list[Piece], *, zeros: bool) -> Step:
    start = run[0][0]
    length = sum(len(raw) for _, raw in run)
    if zeros:
        return partial(image.zero, start, length)
    buffer = aligned(length)
    at = 0
    for _, raw in run:
        buffer[at : at + len(raw)] = raw
        at += len(raw)
    return partial(image.write, start, buffer)
