"""The image: in order of place, merged, and only what an entry has."""

from __future__ import annotations

import errno
import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.points.messages import Data, Encoding, Entry
from bitmapd.points.pieces import Packer, gather, whole_mask
from bitmapd.receiver.entries import Kept
from bitmapd.receiver.image import WINDOW_BYTES, InPlace, Redo, placed, writes
from bitmapd.receiver.steps import Steps, run
from bitmapd.record.geometry import Geometry
from tests.support.sim import SimDisk, SimLoop, drain

VOLUME = bytes(range(16))
GEOMETRY = Geometry((3 << 20) + 4096 + 512)  # the last block is a piece and a short one


def ended(steps: Steps[list[int]], *disks: SimDisk) -> list[int]:
    results: list[list[int]] = []

    def done(error: OSError | None, result: list[int] | None) -> None:
        assert error is None
        assert result is not None
        results.append(result)

    run(steps, done)
    drain(SimLoop(), *disks)
    return results[0]


def in_journal(entries: list[Entry]) -> tuple[SimDisk, list[Kept]]:
    raw = bytearray(8192 + 100)
    kept = []
    for entry in entries:
        kept.append(
            Kept(
                entry.block,
                entry.stamp,
                entry.mask,
                entry.sum64,
                len(raw),
                len(entry.payload),
                entry.encoding,
            )
        )
        raw += entry.payload
    raw += bytes(-len(raw) % 4096 + 4096)
    return SimDisk("journal", len(raw), bytes(raw)), kept


@given(st.data())
def test_a_point_in_the_image_is_what_was_packed(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 1 << 20)))
    blocks = sorted(data.draw(st.sets(st.integers(0, GEOMETRY.blocks - 1), min_size=1)))
    packer = Packer(GEOMETRY, VOLUME, compress=True)
    before = rng.randbytes(GEOMETRY.size_bytes)
    wanted = bytearray(before)
    entries = []
    for stamp, block in enumerate(blocks, 1):
        mask = rng.randrange(1, whole_mask(GEOMETRY, block) + 1)
        start, length = GEOMETRY.block_bytes_range(block, block + 1)
        kind = rng.random()
        whole = bytes(length) if kind < 0.3 else rng.randbytes(length)
        if kind > 0.7:
            whole = (b"abcd" * 16384)[:length]
        raw = gather(GEOMETRY, block, mask, memoryview(whole))
        entries.append(packer.pack(block, stamp, mask, raw))
        for offset, content in placed(GEOMETRY, block, mask, raw):
            wanted[offset : offset + len(content)] = whole[offset - start :][: len(content)]
    journal, kept = in_journal(entries)
    image = SimDisk("image", GEOMETRY.size_bytes, before)
    redo = Redo(GEOMETRY, VOLUME, journal, image)
    assert ended(redo.verify(kept), journal, image) == []
    for _ in range(2):
        assert ended(redo.apply(kept, ()), journal, image) == []
        assert image.visible == wanted
    offsets = [offset for kind, offset, _ in image.history if kind == "write"]
    half = len(offsets) // 2
    assert offsets[:half] == sorted(offsets[:half]) == offsets[half:]


def whole_blocks(count: int, fill: int = 1) -> list[Entry]:
    packer = Packer(GEOMETRY, VOLUME, compress=False)
    raw = memoryview(bytes([fill]) * 65536)
    return [packer.pack(block, block + 1, 0xFFFF, raw) for block in range(count)]


def test_contiguous_entries_are_one_write_of_a_mebibyte() -> None:
    journal, kept = in_journal(whole_blocks(40))
    image = SimDisk("image", GEOMETRY.size_bytes)
    ended(Redo(GEOMETRY, VOLUME, journal, image).apply(kept, ()), journal, image)
    lengths = [length for _, _, length in image.history]
    assert lengths == [WINDOW_BYTES, WINDOW_BYTES, 8 * 65536]


def test_zeros_and_data_are_operations_of_their_own() -> None:
    image = SimDisk("image", GEOMETRY.size_bytes)
    kinds: list[str] = []

    def zero(offset: int, length: int, done: object) -> None:
        kinds.append(f"zero {offset} {length}")

    def write(offset: int, buffer: memoryview, done: object) -> None:
        kinds.append(f"write {offset} {len(buffer)}")

    image.zero = zero  # type: ignore[assignment, method-assign]
    image.write = write  # type: ignore[assignment, method-assign]
    pieces = [(0, b"a" * 4096), (4096, bytes(4096)), (8192, bytes(4096)), (12288, b"b" * 512)]
    for step in writes(image, [*pieces, (16384, b"c" * 512)]):
        step(lambda error: None)
    assert kinds == ["write 0 4096", "zero 4096 8192", "write 12288 512", "write 16384 512"]


def test_what_is_left_out_is_not_written() -> None:
    journal, kept = in_journal(whole_blocks(3))
    image = SimDisk("image", GEOMETRY.size_bytes)
    redo = Redo(GEOMETRY, VOLUME, journal, image)
    assert ended(redo.apply(kept, {1}), journal, image) == []
    assert [offset for _, offset, _ in image.history] == [0, 131072]


@pytest.mark.parametrize("wrong", [{0}, {1}, {0, 1, 2}])
def test_what_is_wrong_is_said_and_not_written(wrong: set[int]) -> None:
    journal, kept = in_journal(whole_blocks(3))
    image = SimDisk("image", GEOMETRY.size_bytes)
    for block in wrong:
        journal.visible[kept[block].place_bytes + 70] ^= 1
    redo = Redo(GEOMETRY, VOLUME, journal, image)
    assert ended(redo.verify(kept), journal, image) == sorted(wrong)
    assert not image.history
    assert ended(redo.apply(kept, ()), journal, image) == sorted(wrong)
    for block in range(3):
        assert image.visible[block << 16] == (0 if block in wrong else 1)


def test_what_cannot_be_read_spoils_nothing_else() -> None:
    journal, kept = in_journal(whole_blocks(3))
    image = SimDisk("image", GEOMETRY.size_bytes)
    journal.unreadable = {kept[1].place_bytes + 8192}
    redo = Redo(GEOMETRY, VOLUME, journal, image)
    assert ended(redo.verify(kept), journal, image) == [1]


def test_an_error_in_place_counts_until_all_begins_anew() -> None:
    image = SimDisk("image", GEOMETRY.size_bytes)
    in_place = InPlace(GEOMETRY, VOLUME, image)
    errors: list[OSError | None] = []
    image.fail_next["write"] = [errno.EIO]
    one, other = whole_blocks(2)
    in_place.write(Data((one,)), errors.append)
    in_place.write(Data((other,)), errors.append)
    drain(SimLoop(), image)
    assert [error and error.errno for error in errors] == [errno.EIO, None]
    flushed = partial(run, in_place.flush(), lambda error, _: errors.append(error))
    flushed()
    assert errors[2] is errors[0]
    assert not image.pending
    settled: list[object] = []
    for _ in range(2):
        run(in_place.settle(), lambda error, lost: settled.append(lost))
    assert settled == [True, False]
    run(in_place.flush(), lambda error, _: errors.append(error))
    drain(SimLoop(), image)
    assert errors[3] is None


def test_a_flush_that_fails_loses_what_was_written_in_place() -> None:
    image = SimDisk("image", GEOMETRY.size_bytes)
    in_place = InPlace(GEOMETRY, VOLUME, image)
    image.fail_next["flush"] = [errno.EIO]
    errors: list[OSError | None] = []
    in_place.write(Data((whole_blocks(1)[0],)), lambda error: None)
    run(in_place.flush(), lambda error, _: errors.append(error))
    assert [op.kind for op in image.pending] == ["write"]
    drain(SimLoop(), image)
    assert [error and error.errno for error in errors] == [errno.EIO]
    lost: list[object] = []
    run(in_place.settle(), lambda error, found: lost.append(found))
    assert lost == [True]


def test_zeros_have_no_payload_to_read() -> None:
    packer = Packer(GEOMETRY, VOLUME, compress=False)
    zeros = packer.pack(0, 1, 0xFFFF, memoryview(bytes(65536)))
    assert zeros.encoding is Encoding.ZEROS
    journal, kept = in_journal([zeros])
    image = SimDisk("image", GEOMETRY.size_bytes)
    assert ended(Redo(GEOMETRY, VOLUME, journal, image).verify(kept), journal, image) == []
    assert not journal.history
