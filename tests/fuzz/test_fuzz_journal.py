"""Fuzz of a journal as it comes from a device: our own errors only, nothing outside the volume.

The images start from the golden ones; half of them get valid checksums again, as only a mistaken or
malicious writer could make them.  `FUZZ_EXAMPLES` says how long.
"""

from __future__ import annotations

from collections import deque
from functools import partial

from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import FormatTooNewError, NoSpaceError, NotFoundError, RecordDamagedError
from bitmapd.media.base import Done
from bitmapd.receiver.image import Redo
from bitmapd.receiver.places import COMMIT_OFFSETS, MIN_JOURNAL_BYTES, PAGE_BYTES
from bitmapd.receiver.scan import Scanned, scan
from bitmapd.receiver.steps import Steps, run
from bitmapd.record.copies import SUPERBLOCK_OFFSETS
from tests.data import make_journal_golden as golden
from tests.support.sim import SimDisk

IMAGES = golden.images()
SEGMENT = golden.PLACES.segment_offset(1)
PLACES = [*SUPERBLOCK_OFFSETS, *COMMIT_OFFSETS, SEGMENT, *golden.AT]

offsets = st.builds(
    lambda place, at: place + at,
    st.sampled_from(PLACES),
    st.integers(0, 300) | st.integers(168, 176) | st.integers(984, 1030) | st.integers(0, 8191),
)
mutations = st.lists(
    st.tuples(offsets, st.binary(min_size=1, max_size=16))
    | st.tuples(st.sampled_from(PLACES), st.sampled_from([bytes(4096), b"\xff" * 4096])),
    max_size=8,
)


class Medium(SimDisk):
    """Bytes, and zeros behind them."""

    def __init__(self, image: bytes) -> None:
        super().__init__("journal", 0)
        self.size_bytes = MIN_JOURNAL_BYTES
        self.image = image
        self.dones: deque[Done] = deque()

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        assert 0 <= offset_bytes <= offset_bytes + len(buffer) <= self.size_bytes
        piece = self.image[offset_bytes : offset_bytes + len(buffer)]
        buffer[:] = piece + bytes(len(buffer) - len(piece))
        self.dones.append(done)

    def flush(self, done: Done) -> None:
        self.dones.append(done)

    def result(self, steps: Steps[object]) -> object:
        ends: list[object] = []
        run(steps, lambda error, result: ends.append(error or result))
        while self.dones:
            self.dones.popleft()(None)
        return ends[0]


def sealed(image: bytearray) -> None:
    journal = bytes(image[131072 + 16 : 131072 + 32])
    for places, salt in (
        (SUPERBLOCK_OFFSETS, b"bitmapd journal"),
        (COMMIT_OFFSETS, b"bitmapd commit page" + journal),
        ((SEGMENT,), b"bitmapd segment" + journal),
        (golden.AT, b"bitmapd batch" + journal),
    ):
        for at in places:
            end = at + PAGE_BYTES - 4
            image[end : end + 4] = crc32c(image[at:end], crc32c(salt)).to_bytes(4, "little")


@given(st.sampled_from(sorted(IMAGES)), mutations, st.booleans())
def test_mutated_journals(name: str, steps: list[tuple[int, bytes]], seal: bool) -> None:
    image = bytearray(IMAGES[name])
    for at, raw in steps:
        image[at : at + len(raw)] = raw
    if seal:
        sealed(image)
    medium = Medium(bytes(image))
    try:
        found = medium.result(scan(medium))
    except (RecordDamagedError, FormatTooNewError, NotFoundError, NoSpaceError):
        return
    assert isinstance(found, Scanned)
    line = found.choice.superblock.line
    assert found.page.committed - found.page.applied == len(found.page.queue) <= 16
    if line is None:
        return
    redo = Redo(line.geometry, line.volume.bytes, medium, medium)
    for entries in (*found.points.values(), found.open):
        for kept in entries:
            assert kept.block < line.geometry.blocks
            assert kept.place_bytes + kept.length_bytes <= found.choice.superblock.journal_bytes
    wrong = partial(redo.verify, found.open)
    assert medium.result(wrong()) == []  # what a sender would be told to leave out
